"""Your own images with text: rows of JSON beside image files. `rows.py` lists the layouts of a row."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from infotok_lit.batch import BRANCHES, Branch, BrokenSampleError, GenerationSample, Sample, Source, UnderstandingSample
from infotok_lit.data.image_file import MAX_PIXELS, MOST_PIXELS, read_image
from infotok_lit.data.rows import PackedRows, RowText, UnreadableRow, read_object, read_row_text, read_rows
from infotok_lit.errors import DataError, SettingsError

log = logging.getLogger(__name__)

DESCRIBE_QUESTIONS = (
    "Describe the image in detail.",
    "What does this picture show?",
    "Tell me everything you can see here.",
    "Put what is in this image into words.",
    "Write a caption for this picture.",
)
"""What is asked when the answer is a caption. The wording is only augmentation; the first is the usual prompt."""


@dataclass(kw_only=True, eq=False)
class SampleOptions:
    """How rows become samples, the same for folders and shards.

    Args:
        caption_key: The key that holds a caption.
        first_turn_only: Use only the first exchange of a LLaVA conversation; default: any of them, at random.
        describe_questions: What is asked where the answer is a caption; default: a few paraphrases.
        min_side: Images with a smaller side, in pixels, are broken samples.
        max_aspect: Images whose long side is this many short sides or more are broken samples.
        max_pixels: Images with more pixels are broken samples; they are not decoded. At most 178,956,970.
        random_crop: A square to generate is cut at another place in each epoch, if the base model leaves it open;
            false takes the middle.
        jpeg_draft: JPEGs are decoded to a half, a quarter or an eighth of their sides if these keep so many pixels:
            faster for large photographs, and the pixels differ slightly. Null decodes them whole.
    """

    caption_key: str = "caption"
    first_turn_only: bool = False
    describe_questions: list[str] | None = None
    min_side: int = 9
    max_aspect: float = 10.0
    max_pixels: int = MAX_PIXELS
    random_crop: bool = True
    jpeg_draft: int | None = None

    def __post_init__(self) -> None:
        if self.describe_questions is not None and not self.describe_questions:
            raise SettingsError("describe_questions is empty: give at least one question, or leave it out")
        if self.min_side < 1 or self.max_pixels < 1 or self.max_aspect <= 1:
            raise SettingsError("min_side and max_pixels must be at least 1, and max_aspect above 1")
        if self.max_pixels > MOST_PIXELS:
            raise SettingsError(f"max_pixels is {self.max_pixels}, and Pillow decodes no more than {MOST_PIXELS}")
        if self.jpeg_draft is not None and self.jpeg_draft < 1:
            raise SettingsError("jpeg_draft must be at least 1, or null to decode every image whole")

    def sample_options(self) -> SampleOptions:
        """These alone, checked: of a source, which has them among its arguments."""
        return SampleOptions(**{field.name: getattr(self, field.name) for field in fields(SampleOptions)})

    def read_text(self, row: Mapping[str, Any]) -> RowText:
        """The text of a row; ValueError where a known key has another shape."""
        return read_row_text(row, self.caption_key, self.first_turn_only)

    def branches(self, row: Mapping[str, Any]) -> tuple[Branch, ...]:
        """The branches that a row serves. A malformed row serves all: it is reported when it is drawn."""
        try:
            text = self.read_text(row)
        except ValueError:
            return BRANCHES
        return tuple(branch for branch in BRANCHES if text.serves(branch))


class ImageTextSource(Source):
    """Images with captions or question/answer pairs; each branch draws from the rows that have what it needs.

    Understanding answers a question about the image: one of the row's own, or a request to describe it, answered by a
    caption; all are equally likely. Generation draws the image from one of its captions.
    """

    _needed_image = "an image"
    """What rows without one are told to have."""

    def __init__(self, label: str, rows: PackedRows, serves: Sequence[Collection[Branch]], options: SampleOptions):
        self._label = label
        self._rows = rows
        self._options = options
        self._rows_of = {
            branch: np.array([i for i, branches in enumerate(serves) if branch in branches], dtype=np.int64)
            for branch in BRANCHES
        }
        self._unused = sum(not branches for branches in serves)

    def report(self) -> None:
        """Say in the log what there is; a warning if some rows are left out."""
        counts = ", ".join(f"{len(index)} serve {branch}" for branch, index in self._rows_of.items())
        level = logging.WARNING if self._unused else logging.INFO
        said = "%s: %d rows: %s; %d left out (no image or no text)"
        log.log(level, said, self._label, len(self), counts, self._unused)

    def count(self, branch: Branch) -> int:
        """How many rows serve a branch."""
        return len(self._rows_of[branch])

    def __len__(self) -> int:
        return len(self._rows)

    def branch_length(self, branch: Branch) -> int:
        """How many rows serve a branch; DataError if none does."""
        count = self.count(branch)
        if not count:
            fields = f'"{self._options.caption_key}" or "captions"'
            if branch == "understanding":
                fields += ', "qa", "question" with "answer", or "conversations"'
            raise DataError(
                f"{self._label}: none of its {len(self)} rows can train {branch}, which needs {self._needed_image} "
                f"and {fields}. Add them, or give {branch} another source."
            )
        return count

    def sample(self, branch: Branch, index: int, rng: np.random.Generator) -> Sample:
        """The index-th row among those that serve the branch; `rng` chooses the text and the crop."""
        name, image_source, text = self._open(int(self._rows_of[branch][index]))
        if not text.serves(branch):
            raise BrokenSampleError(f"{name}: it has no text for {branch}")
        limits = self._options
        image = read_image(image_source, name, limits.min_side, limits.max_aspect, limits.max_pixels, limits.jpeg_draft)
        if branch == "understanding":
            question, answer = self._exchange(text, rng)
            return UnderstandingSample(image, question, answer, name)
        caption = text.captions[int(rng.integers(len(text.captions)))]
        offset = float(rng.random())
        return GenerationSample(image, caption, name, crop_offset=offset if limits.random_crop else 0.5)

    def _exchange(self, text: RowText, rng: np.random.Generator) -> tuple[str, str]:
        choice = int(rng.integers(len(text.questions) + len(text.captions)))
        if choice < len(text.questions):
            return text.questions[choice]
        asked = DESCRIBE_QUESTIONS if self._options.describe_questions is None else self._options.describe_questions
        return asked[int(rng.integers(len(asked)))], text.captions[choice - len(text.questions)]

    def split(self, share: float) -> tuple[ImageTextSource, ImageTextSource]:
        """All rows but those of a share of the images, and those rows: an image is never in both.

        Which images they are depends on their names alone, so that a few new ones move few of the old.
        """
        names = self._one_name_each([self._image_name(row) for row in range(len(self))])
        order = sorted(set(names), key=lambda name: hashlib.sha256(name.encode(errors="replace")).digest())
        if len(order) < 2:
            raise SettingsError(f"{self._label}: {len(order)} image cannot be split; two are needed at least")
        kept = set(order[: min(max(1, round(share * len(order))), len(order) - 1)])
        inside = np.array([name in kept for name in names])
        return self._part(~inside), self._part(inside)

    def _part(self, chosen: np.ndarray) -> ImageTextSource:
        part = copy.copy(self)
        part._rows_of = {branch: index[chosen[index]] for branch, index in self._rows_of.items()}
        return part

    @abstractmethod
    def _open(self, row: int) -> tuple[str, Path | bytes, RowText]:
        """The name, the image and the text of a row; BrokenSampleError if it cannot be read."""

    @abstractmethod
    def _image_name(self, row: int) -> str:
        """What names the image of a row: several rows may have the same."""

    def _one_name_each(self, names: list[str]) -> list[str]:
        """The names, with one alone for each image."""
        return names


@dataclass(eq=False)
class ImageTextFolder(SampleOptions, ImageTextSource):
    """Image files with annotations in JSON.

    Besides the layouts of `rows.py`, a row may be {"image": path, "annotation": path}: its text is then in a
    JSON file of its own (Harmon's data_info.json).

    Args:
        annotations: A JSON list, a JSONL file, or a folder of such files. Each row names its "image", or "file_name" as
            Hugging Face's ImageFolder has it.
        images: The folder that image paths are relative to; default: the folder of the annotations.
        captions: The folder that "annotation" paths are relative to; default: the folder of the annotations.
    """

    annotations: str
    images: str | None = None
    captions: str | None = None
    _needed_image = '"image" (the path of its file)'

    def __post_init__(self) -> None:
        path, options = Path(self.annotations), self.sample_options()
        folder = path if path.is_dir() else path.parent
        self._images = folder if self.images is None else Path(self.images)
        self._captions = folder if self.captions is None else Path(self.captions)
        kept_keys = ("image", "annotation", self.caption_key, "captions", "qa", "question", "answer", "conversations")
        rows = [
            {"broken": row.reason}
            if isinstance(row, UnreadableRow)
            else {key: row[key] for key in kept_keys if key in row} | _image_of(row)
            for row in read_rows(path)
        ]
        serves = [_branches(row, options) for row in rows]
        ImageTextSource.__init__(self, self.annotations, PackedRows(rows), serves, options)
        self.report()

    def _open(self, row: int) -> tuple[str, Path | bytes, RowText]:
        entry = self._rows[row]
        if "broken" in entry:
            raise BrokenSampleError(entry["broken"])
        name = f"{entry['image']} (row {row})"
        try:
            has_file = isinstance(entry.get("annotation"), str)
            annotation = read_object(self._captions / entry["annotation"]) if has_file else {}
            return name, self._images / entry["image"], self._options.read_text({**entry, **annotation})
        except ValueError as error:
            raise BrokenSampleError(f"{name}: {error}") from error

    def _image_name(self, row: int) -> str:
        return str(self._rows[row].get("image", f"row {row}"))

    def _one_name_each(self, names: list[str]) -> list[str]:
        """The names, with the first of those that lead to one file, as links do."""
        files: dict[tuple[int, int], str] = {}
        first = {}
        for name in sorted(set(names)):
            # What cannot be read is said where it is read.
            with contextlib.suppress(OSError, ValueError):
                found = (self._images / name).stat()
                first[name] = files.setdefault((found.st_dev, found.st_ino), name)
        return [first.get(name, name) for name in names]


def _image_of(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"image": row["file_name"]} if "image" not in row and "file_name" in row else {}


def _branches(row: Mapping[str, Any], options: SampleOptions) -> tuple[Branch, ...]:
    if "broken" in row:
        return BRANCHES
    if not isinstance(row.get("image"), str) or not row["image"]:
        return ()
    return BRANCHES if isinstance(row.get("annotation"), str) else options.branches(row)
