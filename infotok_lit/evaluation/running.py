"""Runs benchmarks on a model: draws, asks and grades what is left to do, in batches, in one process or several.

Everything made is kept at once in logs of the result folder, so that a run that was killed goes on where it stopped.
"""

import glob
import io
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from PIL import Image

from infotok_lit.errors import SettingsError
from infotok_lit.evaluation.benchmark import Benchmark, Drawing, Item, Question, spread
from infotok_lit.evaluation.endpoint import JudgeError
from infotok_lit.evaluation.models import EvaluatedModel
from infotok_lit.evaluation.records import Log, Row, checked, read_json, read_log, to_lines
from infotok_lit.files import write_json, write_whole

SETTINGS = "settings.json"
DRAWN, ASKED = "drawn", "asked"
"""The stages, and the names of their logs."""


@dataclass
class World:
    """The processes that share the work, as torchrun starts them."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls) -> "World":
        """The world that the environment names: RANK, WORLD_SIZE and, where there are several, MASTER_ADDR."""
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if size > 1:
            import torch.distributed as dist

            if not dist.is_initialized():
                # Processes only wait for one another here, and one may be a day behind.
                dist.init_process_group("gloo", timeout=timedelta(days=30))
        return cls(rank, size)

    def wait(self) -> None:
        """Return once every process has come here."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier()

    def any(self, happened: bool) -> bool:
        """Whether it has happened in some process, once every one has come here."""
        if self.size > 1:
            import torch
            import torch.distributed as dist

            found = torch.tensor(int(happened))
            dist.all_reduce(found, dist.ReduceOp.MAX)
            happened = bool(found)
        return happened

    def leave(self) -> None:
        """Leave the world, if there are others in it."""
        if self.size > 1:
            import torch.distributed as dist

            dist.destroy_process_group()


@dataclass
class Progress:
    """What is told while work goes on."""

    show: Callable[[float, str], None] = lambda done, what: None
    """(items done since `start`, what is being done)."""
    done: int = 0
    """Items, over all processes, since `start`."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Stage -> time spent in this process."""
    made: dict[str, int] = field(default_factory=dict)
    """Stage -> items made in this process and now."""

    def start(self, show: Callable[[float, str], None]) -> None:
        """Tell from here on."""
        self.show, self.done = show, 0

    def add(self, stage: str, count: int, seconds: float, processes: int, what: str) -> None:
        """Count what this process has made, and take it that the others are as fast."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        self.made[stage] = self.made.get(stage, 0) + count
        self.done += count * processes
        self.show(self.done, what)


@dataclass
class Evaluation:
    """One benchmark on one model, in one result folder.

    Args:
        limit: at most so many prompts or images, spread evenly over the benchmark.
    """

    model: EvaluatedModel
    benchmark: Benchmark
    folder: Path
    batch_size: int = 8
    limit: int | None = None
    world: World = field(default_factory=World)
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self.drawings = spread(self.benchmark.drawings(), self.limit)
        self.questions = spread(self.benchmark.questions(), self.limit)

    def open(self) -> None:
        """Make the result folder, or make sure that what it holds was made with the same settings.

        Raises:
            SettingsError: naming what differs.
        """
        self.world.wait()
        path = self.folder / SETTINGS
        settings = json.loads(json.dumps({"model": self.model.description(), "benchmark": self.benchmark.facts}))
        if path.exists():
            earlier = checked(read_json(path), path, {}, dict)
            differing = [
                f"{part}.{key}" for part in settings for key in settings[part] | earlier.get(part, {})
                if key != "rules" and settings[part].get(key) != earlier.get(part, {}).get(key)
            ]  # fmt: skip
            if differing:
                raise SettingsError(
                    f"{self.folder} holds results of other settings ({', '.join(differing)}): choose another --out, "
                    "or delete that folder"
                )
        elif self.world.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, settings)
        self.world.wait()

    def outputs(self, most: int | None = None) -> list[Row]:
        """The rows of all that was drawn and asked, after at most `most` further batches of each."""
        drawn = self._stage(DRAWN, self.drawings, self._draw, self.batch_size, most)
        questions = by_group(self.questions)
        if self.benchmark.about_own_images:
            there = {row["image"] for row in drawn}
            questions = [question for question in questions if there.issuperset(question.images)]
        asked = self._stage(ASKED, questions, self._ask, self.batch_size, most)
        order = {question.id: number for number, question in enumerate(self.questions)}
        return drawn + sorted(asked, key=lambda row: order[row["id"]])

    def left(self) -> dict[str, int]:
        """Stage -> how many items are still to be made."""
        stages: dict[str, Sequence[Drawing | Question]] = {DRAWN: self.drawings, ASKED: self.questions}
        if self._judged:
            stages[self._judged] = self._subjects
        done = {stage: self._done(self.folder / f"{stage}.jsonl") for stage in stages}
        return {stage: sum(item.id not in done[stage] for item in items) for stage, items in stages.items()}

    def expected_seconds(self) -> float:
        """How long the rest will take, judged by the batches so far."""
        rates = {stage: self.progress.seconds[stage] / made for stage, made in self.progress.made.items() if made}
        return sum(rates.get(stage, 0.0) * count / self.world.size for stage, count in self.left().items())

    def expected_cost(self) -> float | None:
        """What the judge will still cost, judged by its verdicts so far; None without prices."""
        if not self._judged:
            return None
        verdicts = list(self._done(self.folder / f"{self._judged}.jsonl").values())
        cost = self.benchmark.grader.facts(verdicts).get("cost")
        return None if cost is None or not verdicts else cost / len(verdicts) * self.left()[self._judged]

    def graded(self, most: int | None = None) -> list[Row]:
        """The rows of everything, with their verdicts and scores."""
        rows = self.outputs(most)
        grader = self.benchmark.grader
        if grader is not None:
            by_id = {row["id"]: row for row in rows}

            def judge(batch: Sequence[Drawing | Question]) -> Iterable[Row]:
                return grader.verdicts([by_id[item.id] for item in batch], self.folder)

            subjects = [item for item in self._subjects if item.id in by_id]
            verdicts = self._stage(self._judged, subjects, judge, grader.batch_size, most)
            found = {verdict["id"]: verdict for verdict in verdicts}
            rows = [row | {"verdict": found[row["id"]]} if row["id"] in found else row for row in rows]
        return self.benchmark.grade(rows)

    @property
    def _judged(self) -> str:
        """The stage of the grader; empty without one."""
        return "" if self.benchmark.grader is None else f"verdicts.{self.benchmark.grader.name}"

    @property
    def _subjects(self) -> Sequence[Drawing | Question]:
        """What the grader looks at."""
        return self.drawings if self.benchmark.graded == "drawings" else self.questions

    def _draw(self, batch: Sequence[Drawing]) -> list[Row]:
        images = self.model.generate([item.prompt for item in batch], [item.seed for item in batch])
        rows = []
        for item, image in zip(batch, images, strict=True):
            path = self.folder / item.file
            path.parent.mkdir(parents=True, exist_ok=True)
            content = encoded(image, path.suffix)
            write_whole(path, content)
            kept = {"image": item.file, "bytes": len(content)}
            rows.append({"id": item.id, "group": item.group, "prompt": item.prompt, "seed": item.seed} | kept)
        return rows

    def _ask(self, batch: Sequence[Question]) -> list[Row]:
        opened: dict[tuple[str, ...], Image.Image] = {}
        for item in batch:
            if item.images not in opened:
                opened[item.images] = side_by_side(
                    [self.benchmark.open_image(name, self.folder) for name in item.images]
                )
        images, texts = [opened[item.images] for item in batch], [item.text for item in batch]
        if batch[0].options:
            replies = self.model.likelihoods(images, texts, [item.options for item in batch])
        else:
            replies = self.model.answer(images, texts, self.benchmark.max_new_tokens)
        key = "likelihoods" if batch[0].options else "answer"
        return [
            {"id": item.id, "group": item.group, "image": " ".join(item.images), "question": item.text, key: reply}
            for item, reply in zip(batch, replies, strict=True)
        ]

    def _stage(
        self,
        name: str,
        items: Sequence[Item],
        work: Callable[[Sequence[Item]], Iterable[Row]],
        batch_size: int,
        most: int | None,
    ) -> list[Row]:
        """Make what is missing of a log, and return its rows in the order of the items."""
        if not items:
            return []
        path = self.folder / f"{name}.jsonl"
        done = self._done(path)
        # Every process has read the same before any adds to it.
        self.world.wait()
        pending = [item for item in items if item.id not in done]
        batches = [pending[start : start + batch_size] for start in range(0, len(pending), batch_size)]
        mine = batches[self.world.rank :: self.world.size][:most]
        log = Log(path.with_name(f"{name}.{self.world.rank}.part"))
        failure = None
        try:
            for batch in mine:
                started = time.perf_counter()
                for row in work(batch):
                    log.append(row)
                what = f"{self.benchmark.name}: {name.split('.')[0]}"
                self.progress.add(name, len(batch), time.perf_counter() - started, self.world.size, what)
        except JudgeError as error:
            # The other processes keep what they pay for, and all of them end.
            failure = error
        failed = self.world.any(failure is not None)
        if self.world.rank == 0:
            self._merge(path, items)
        self.world.wait()
        if failed:
            text = "the judge has failed in another process. Verdicts so far are kept: run the same command again"
            raise failure or JudgeError(text)
        rows = read_log(path)
        return [rows[item.id] for item in items if item.id in rows]

    def _done(self, path: Path) -> dict[str, Row]:
        """The rows of a log and of the parts that processes added to it, of this world or of an earlier one; those of
        images that were deleted or are not as long as they were are left out, and made again."""
        rows = read_log(path)
        for part in _parts(path):
            rows |= read_log(part)
        return {name: row for name, row in rows.items() if path.stem != DRAWN or self._is_whole(row)}

    def _is_whole(self, row: Row) -> bool:
        path = self.folder / row["image"]
        # Rows of older versions do not say how long their images are.
        return path.is_file() and path.stat().st_size == row.get("bytes", path.stat().st_size)

    def _merge(self, path: Path, items: Sequence[Item]) -> None:
        rows, parts = self._done(path), _parts(path)
        if not parts:
            return
        order = {item.id: number for number, item in enumerate(items)}
        # Rows of a larger --limit stay, behind.
        ordered = sorted(rows.values(), key=lambda row: order.get(row["id"], len(order)))
        write_whole(path, to_lines(ordered).encode())
        for part in parts:
            part.unlink()


def counts(benchmark: Benchmark, limit: int | None) -> tuple[int, int]:
    """How many images a run draws, and how many questions it asks."""
    return len(spread(benchmark.drawings(), limit)), len(spread(benchmark.questions(), limit))


def by_group(items: Sequence[Item]) -> list[Item]:
    """The items in the order of their groups' first ones, so that a batch asks much about few images."""
    first: dict[str, int] = {}
    for number, item in enumerate(items):
        first.setdefault(item.group, number)
    return sorted(items, key=lambda item: first[item.group])


def _parts(log: Path) -> list[Path]:
    """What processes add to a log before it is merged."""
    return sorted(log.parent.glob(f"{glob.escape(log.stem)}.*.part"))


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Several images on one white canvas, from left to right at one height: models here read one image."""
    if len(images) == 1:
        return images[0]
    height = max(image.height for image in images)
    scaled = [image.resize((max(1, round(image.width * height / image.height)), height)) for image in images]
    canvas, left = Image.new("RGB", (sum(image.width for image in scaled), height), "white"), 0
    for image in scaled:
        canvas.paste(image, (left, 0))
        left += image.width
    return canvas


def encoded(image: Image.Image, suffix: str) -> bytes:
    """PNG, or JPEG of the highest quality where the official layout wants that."""
    content = io.BytesIO()
    options: dict[str, Any] = {"quality": 100, "subsampling": 0} if suffix in (".jpg", ".jpeg") else {}
    image.save(content, "JPEG" if options else "PNG", **options)
    return content.getvalue()
