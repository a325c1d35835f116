"""GenEval++: 280 prompts in seven tasks, one image each, judged by a vision model (Ye et al., 2025, arXiv 2508.09987).

The official judge is gpt-4.1 at temperature 0. Its instructions are restated here in our own words, so a verdict may
differ from the official script's, which runs unchanged on the images (`image/1.jpg` and on).
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infotok_lit.assets import BENCHMARKS
from infotok_lit.errors import DataError
from infotok_lit.evaluation.benchmark import Benchmark, Drawing, Score, average, scores_by
from infotok_lit.evaluation.endpoint import Endpoint
from infotok_lit.evaluation.judge import JudgeGrader, image_part, text_part
from infotok_lit.evaluation.records import Row, checked, read_json, read_json_lines

TAGS = (
    "color_attr", "spatial_count_attr", "color_spatial_attr", "color_count_attr", "multi_object_count_attr",
    "size_spatial_attr", "counting",
)  # fmt: skip
FILE = BENCHMARKS / "geneval_plus_plus" / "Geneval++.jsonl"

KEY = "overall_results"
"""Where the official Output.json has its entries."""
INSTRUCTIONS = """You check whether an image shows what a text asked for.

Text: "{prompt}"

The image is correct only if every point holds:
{checklist}
- It looks like one photograph: no cartoon, drawing or rendering, and no collage of several pictures.
Objects must be recognisable at once. Be strict: if a point is in doubt, it does not hold.

Answer with JSON alone: {{"correct": 1 or 0, "reason": "one short sentence"}}"""


class GenEvalPlusPlus(Benchmark):
    """One JPEG per prompt.

    Args:
        endpoint: the judge; without one the images are only drawn.
    """

    name = "geneval++"
    title = "GenEval++"
    rewritten = False
    paper = {tag: f"GenEval++/{tag}" for tag in (*TAGS, "overall")}
    instructions = INSTRUCTIONS
    max_judge_tokens = 200

    def __init__(self, seed: int = 0, endpoint: Endpoint | None = None) -> None:
        self.sources, self.seed = (FILE,), seed
        self.metadata = read_json_lines(FILE)
        self.grader = None if endpoint is None else JudgeGrader(endpoint, self, (0.0, 0.0, 0.0))

    def drawings(self) -> Sequence[Drawing]:
        return [
            Drawing(str(number), metadata["prompt"], self.seed + number - 1, f"image/{number}.jpg", str(number))
            for number, metadata in enumerate(self.metadata, 1)
        ]

    def judge_content(self, row: Row, folder: Path) -> list[dict[str, Any]]:
        metadata = self.metadata[int(row["id"]) - 1]
        text = self.instructions.format(prompt=metadata["prompt"], checklist=checklist(metadata))
        return [text_part(text), image_part(folder / row["image"])]

    def read_verdict(self, text: str) -> int | None:
        found = re.search(r"\{.*\}", text, re.DOTALL)
        try:
            correct = json.loads(found[0])["correct"] if found else None
        except (ValueError, RecursionError, KeyError, TypeError):
            return None
        return int(correct) if correct in (0, 1) else None

    def grade(self, rows: Sequence[Row]) -> list[Row]:
        """A verdict that could not be read counts as wrong, as in the official script."""
        graded = []
        for row in rows:
            score, verdict = None, row.get("verdict")
            if verdict is not None:
                score = float(verdict["reading"] == 1)
            graded.append(row | {"tag": self.metadata[int(row["id"]) - 1]["tag"], "score": score})
        return graded

    def _scores(self, rows: Sequence[Row]) -> dict[str, Score]:
        """Per tag, and `overall`, their plain mean."""
        tags = scores_by(rows, "tag")
        overall = Score(average(tag.value for tag in tags.values()).value, len(rows))
        return {"overall": overall} | {tag: tags[tag] for tag in TAGS if tag in tags}

    def aggregate(self, files: Sequence[Path]) -> list[Row]:
        """From the official Output.json: under `overall_results` one entry per image with `id`, the number of its
        prompt from 1, and a `result` whose `correct` is 1, 0, or -1 for unread.
        """
        rows = []
        for file in files:
            content = read_json(file)
            entries = content.get(KEY) if isinstance(content, dict) else None
            for entry in checked(entries, f"{KEY} of {file}", {"id": int, "result": dict}):
                if not 1 <= entry["id"] <= len(self.metadata):
                    raise DataError(
                        f"{KEY} of {file}: there is no prompt {entry['id']}, only 1 to {len(self.metadata)}"
                    )
                # The official sum takes a reply without `correct` as wrong.
                own = {
                    "tag": self.metadata[entry["id"] - 1]["tag"],
                    "score": float(entry["result"].get("correct") == 1),
                }
                rows.append({"id": str(entry["id"]), "group": str(entry["id"])} | own)
        return rows


def checklist(metadata: Row) -> str:
    """What a prompt's metadata asks for, one line each."""
    lines = []
    for wanted in metadata["include"]:
        what = " ".join(str(wanted[key]) for key in ("color", "class") if key in wanted)
        line = f"- It shows exactly {wanted['count']} of: {what}"
        if "size" in wanted:
            line += f", clearly {wanted['size']} than the other object"
        if "region" in wanted:
            line += f", {wanted['region'] if wanted['region'] in ('above', 'below') else 'on the ' + wanted['region']}"
            line += " in the picture"
        lines.append(line + ".")
    lines += [f"- It shows fewer than {one['count']} of: {one['class']}." for one in metadata.get("exclude", ())]
    return "\n".join(lines)
