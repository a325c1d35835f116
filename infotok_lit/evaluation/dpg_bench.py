"""DPG-Bench: 1,065 dense prompts (Hu et al., 2024, arXiv 2403.05135), in the layout of its official scorer.

The scorer (`compute_dpg_bench.py`, with mPLUG) reads one picture per prompt, ITEM_ID.png: four images in a square.
"""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from infotok_lit.errors import DataError
from infotok_lit.evaluation.benchmark import Benchmark, Drawing, Score, average, open_drawn, require
from infotok_lit.evaluation.records import Row, checked, read_text
from infotok_lit.files import replacing

FILE = "dpg_bench.csv"
GRIDS = "grids"
SCALE = 100


class DpgBench(Benchmark):
    """Four images per prompt, and their square in `grids`; scores come from the official result file.

    Args:
        folder: holds dpg_bench.csv (several rows per prompt; `item_id` and `text` are used).
    """

    name = "dpg_bench"
    title = "DPG-Bench"
    rewritten = False
    size = 1065
    fetch = "Put dpg_bench/dpg_bench.csv of https://github.com/TencentQQGYLab/ELLA to DATA/dpg_bench."

    def __init__(self, folder: Path, seed: int = 0, images_per_prompt: int = 4) -> None:
        self.sources = [require(folder / FILE, type(self))]
        self.seed, self.images_per_prompt = seed, images_per_prompt
        try:
            rows = list(csv.DictReader(io.StringIO(read_text(folder / FILE))))
        except csv.Error as error:
            raise DataError(f"{folder / FILE} is no CSV: {error}") from error
        checked(rows, folder / FILE, {"item_id": str, "text": str})
        for row in rows:
            if Path(row["item_id"]).name != row["item_id"] or row["item_id"] in ("", ".."):
                raise DataError(f"{folder / FILE}: the item_id {row['item_id']!r} is to name files, and cannot")
        self.prompts = {row["item_id"]: row["text"] for row in reversed(rows)}
        self.prompts = dict(reversed(self.prompts.items()))

    def drawings(self) -> Sequence[Drawing]:
        return [
            Drawing(
                id=f"{item}/{sample}",
                prompt=prompt,
                seed=self.seed + number * self.images_per_prompt + sample,
                file=f"images/{item}/{sample}.png",
                group=item,
            )
            for number, (item, prompt) in enumerate(self.prompts.items())
            for sample in range(self.images_per_prompt)
        ]

    def _scores(self, rows: Sequence[Row]) -> dict[str, Score]:
        """`overall`: the mean over prompts; the official script prints a hundred times this."""
        return {"overall": average(row["score"] for row in rows)}

    def write_official(self, folder: Path, rows: Sequence[Row]) -> None:
        """The squares, row by row; their side is what `--resolution` asks for, `--pic-num` the images per prompt."""
        items: dict[str, list[Row]] = {}
        for row in rows:
            if "image" in row:
                items.setdefault(row["group"], []).append(row)
        (folder / GRIDS).mkdir(exist_ok=True)
        for item, own in items.items():
            with replacing(folder / GRIDS / f"{item}.png") as file:
                square([folder / row["image"] for row in own]).save(file, "PNG")

    def check_complete(self, folder: Path) -> list[str]:
        missing = [item for item in self.prompts if not (folder / GRIDS / f"{item}.png").is_file()]
        return super().check_complete(folder) + [f"{GRIDS}/{item}.png: missing" for item in missing]

    def aggregate(self, files: Sequence[Path]) -> list[Row]:
        """From the official result file, whose lines read `PATH/ITEM.png, score, ..., mean`."""
        scores: dict[str, float] = {}
        for file in files:
            for number, line in enumerate(read_text(file).split("\n"), 1):
                name, *values = line.split(", ")
                if name.endswith(".png") and len(values) > 1:
                    try:
                        scores[Path(name).stem] = float(values[-1])
                    except ValueError as error:
                        raise DataError(f"line {number} of {file} ends in no score: {line!r:.80}") from error
        if not scores:
            raise DataError(f"no line of {', '.join(map(str, files))} reads `PATH/ITEM.png, score, ..., mean`")
        return [{"id": item, "group": item, "score": score} for item, score in scores.items()]


def square(files: Sequence[Path]) -> Image.Image:
    """Images of one size, two to a row for four of them."""
    images = [open_drawn(file) for file in files]
    columns = math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    canvas = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height))
    for number, image in enumerate(images):
        canvas.paste(image, (number % columns * width, number // columns * height))
    return canvas
