"""What a benchmark is: what to draw and what to ask, how replies are graded, and what is reported of them.

A benchmark draws nothing and asks nothing: `running.py` does, so that every benchmark can be killed and resumed, is
batched, and runs in several processes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar

from PIL import Image

from infotok_lit.batch import BrokenSampleError
from infotok_lit.data.image_file import check_header, read_image
from infotok_lit.errors import DataError, MissingFileError, SettingsError
from infotok_lit.evaluation.records import Row, digest
from infotok_lit.evaluation.tables import TableImage

NAMED = 5
"""Images that cannot be asked about, before the rest is only counted."""

Rules = Literal["official", "lmms-eval", "vlmevalkit"]
"""Whose way of reading answers: that of a benchmark's authors, or a harness's."""


@dataclass(frozen=True)
class Drawing:
    """An image to draw."""

    id: str
    prompt: str
    seed: int
    file: str
    """Where it is kept, below the result folder: the official layout."""
    group: str
    """Shared by the images of one prompt."""


@dataclass(frozen=True)
class Question:
    """A question to answer about an image."""

    id: str
    text: str
    images: tuple[str, ...]
    """Names that the benchmark's `open_image` knows; several are laid side by side."""
    group: str
    """Shared by the questions about one image."""
    options: tuple[str, ...] = ()
    """Where there are any, the likelihood of each is asked for instead of an answer."""


Item = TypeVar("Item", Drawing, Question)


class Score(NamedTuple):
    """A score and the number of rows that it rests on."""

    value: float
    n: int


class Grader(Protocol):
    """A second model that looks at what the first one made: a detector, or a judge behind an endpoint."""

    name: str
    """What tells its verdicts from another's."""
    batch_size: int

    def verdicts(self, rows: Sequence[Row], folder: Path) -> Iterable[Row]:
        """One verdict per output row, with its `id`, in any order."""
        ...

    def facts(self, verdicts: Sequence[Row]) -> dict[str, Any]:
        """What a reader of its verdicts must know: what they cost, how often it is right."""
        ...


class Benchmark(ABC):
    """One benchmark on the user's data.

    A row of output holds `id`, `group`, `image` and either `prompt` and `seed`, or `question` and `answer` (or
    `likelihoods`, nats per token, one per option). Grading adds `score` in [0, 1] (None without a verdict; no such key
    where nothing is graded) and, for answers, `parsed`: what the rule read in the answer, None where it read nothing.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    headline: ClassVar[str] = "overall"
    """The score that is reported first."""
    headlines: ClassVar[Sequence[str]] = ()
    """The scores whose fall means that a task has become worse; default: the headline."""
    paper: ClassVar[Mapping[str, str]] = {}
    """Score -> the column of the paper's tables."""
    about_own_images: ClassVar[bool] = False
    """Whether the questions are about the images of `drawings`."""
    max_new_tokens: ClassVar[int] = 16
    """Of an answer."""
    size: ClassVar[int | None] = None
    """How many prompts, or without any, questions the official files hold; None for files that ship."""
    fetch: ClassVar[str] = ""
    """What to get, and where to put it below the folder of `--data`."""

    def __init_subclass__(cls) -> None:
        cls.headlines = cls.headlines or (cls.headline,)

    sources: Sequence[Path] = ()
    """The files that the prompts or questions come from."""
    seed: int | None = None
    """What the seeds of images start from; None for a benchmark that draws none."""
    images_per_prompt: int | None = None
    """None where the benchmark leaves no choice."""
    rewritten: ClassVar[bool | None] = None
    """Whether a language model has made the prompts longer."""
    grader: Grader | None = None
    graded: ClassVar[Literal["drawings", "questions"]] = "drawings"
    """What the grader looks at."""
    rules: Rules = "official"
    RULES: ClassVar[Mapping[str, Callable[..., Any]]] = {}
    """Ways to read an answer, by name; `official` is the default."""

    @property
    def facts(self) -> dict[str, object]:
        """What a reader of the scores must know: variant, rules, the hash of the prompt files."""
        drawn = {"rewritten": self.rewritten, "seed": self.seed, "images_per_prompt": self.images_per_prompt}
        return {
            "rules": self.rules,
            "prompts_sha256": self._prompts_sha256,
            **{name: value for name, value in drawn.items() if value is not None},
        }

    @cached_property
    def _prompts_sha256(self) -> str | None:
        """Of the sources, read once: tables hold their images, and `TradeOff` asks at every measurement."""
        return digest(self.sources) if self.sources else None

    def drawings(self) -> Sequence[Drawing]:
        """All images to draw, in the official order."""
        return ()

    def questions(self) -> Sequence[Question]:
        """All questions, in the official order."""
        return ()

    def shortfall(self) -> str | None:
        """What the user's files have too little or too much of, in words; None where they are the whole benchmark."""
        prompts = {drawing.group for drawing in self.drawings()}
        found, what = (len(prompts), "prompts") if prompts else (len(self.questions()), "questions")
        if self.size in (None, found):
            return None
        return f"the files hold {found} {what}, the benchmark has {self.size}"

    def image_source(self, name: str) -> Path | TableImage | None:
        """What an image of a question is read from, there or not; None where the model draws it."""
        return None

    def open_image(self, name: str, folder: Path) -> Image.Image:
        """An image of a question, RGB, of any shape. MissingFileError if it is not there, DataError if it is damaged.

        Args:
            folder: the result folder.
        """
        source = self.image_source(name)
        if source is None:
            return open_drawn(folder / name)
        if isinstance(source, TableImage):
            return source.open()
        return _opened(require(source, type(self)), f"put a whole one there. {self.fetch}")

    def check_images(self, questions: Sequence[Question]) -> None:
        """See that all images of these questions that are files of their own are there, by their headers alone.

        Raises:
            MissingFileError: one message about all that are not, or are no images.
        """
        sources = map(self.image_source, dict.fromkeys(name for question in questions for name in question.images))
        files = dict.fromkeys(source.file if isinstance(source, TableImage) else source for source in sources)
        files.pop(None, None)
        faults = [f"{file}: {fault}" for file in files if (fault := _fault(file, _check_header)) is not None]
        if faults:
            more = [f"and {len(faults) - NAMED} more"] if len(faults) > NAMED else []
            raise MissingFileError(
                f"{self.title}: {len(faults)} of {len(files)} images are missing or cannot be read "
                f"({'; '.join(faults[:NAMED] + more)}): put whole ones there. {self.fetch}"
            )

    def grade(self, rows: Sequence[Row]) -> list[Row]:
        """Rows of output, with the grader's verdict as `verdict` where there is one -> the same, graded; here without
        any score, which the official script alone gives."""
        return [row | {"score": None} for row in rows]

    def scores(self, rows: Sequence[Row]) -> dict[str, Score]:
        """Name -> score of graded rows; a score without rows is left out."""
        scored = [row for row in rows if row.get("score") is not None]
        return self._scores(scored) if scored else {}

    @abstractmethod
    def _scores(self, rows: Sequence[Row]) -> dict[str, Score]:
        """The same of rows that all have a score, at least one."""

    def write_official(self, folder: Path, rows: Sequence[Row]) -> None:  # noqa: B027
        """Write what the official scorer reads beside the images, by default nothing."""

    def check_complete(self, folder: Path) -> list[str]:
        """What of the official layout is missing or no image, in words."""
        faults = ((drawing.file, _fault(folder / drawing.file, open_drawn)) for drawing in self.drawings())
        return [f"{file}: {fault}" for file, fault in faults if fault is not None]

    def aggregate(self, files: Sequence[Path]) -> list[Row]:
        """Graded rows from the result files of an official run. SettingsError where there are no such files."""
        raise SettingsError(f"{self.title} keeps no verdicts that could be read: leave out --verdicts")


def average(values: Iterable[float]) -> Score:
    """The plain mean; nan of nothing."""
    values = list(values)
    return Score(sum(values) / len(values) if values else float("nan"), len(values))


def scores_by(rows: Sequence[Row], key: str) -> dict[str, Score]:
    """The mean score of the rows of each value of a key, in the order of their first row."""
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row[key], []).append(row["score"])
    return {name: average(scores) for name, scores in values.items()}


def spread(items: Sequence[Item], limit: int | None) -> list[Item]:
    """The items of at most `limit` groups, evenly spread, in their order."""
    groups = list(dict.fromkeys(item.group for item in items))
    if limit is None or limit >= len(groups):
        return list(items)
    kept = {groups[number * len(groups) // limit] for number in range(limit)}
    return [item for item in items if item.group in kept]


def rule_named(benchmark: Benchmark | type[Benchmark], name: str) -> Callable[..., Any]:
    """One of the benchmark's rules; SettingsError naming them for any other."""
    if name not in benchmark.RULES:
        raise SettingsError(f"{benchmark.title} has no rules called {name!r}: choose from {', '.join(benchmark.RULES)}")
    return benchmark.RULES[name]


def require(path: Path, benchmark: type[Benchmark]) -> Path:
    """The path; MissingFileError saying what to fetch if it is not there."""
    if not path.exists():
        raise MissingFileError(f"{benchmark.title} needs {path}, which is not there. {benchmark.fetch}")
    return path


def open_drawn(path: Path) -> Image.Image:
    """An image of the result folder as RGB; DataError for one that is damaged."""
    return _opened(path, "delete that file and run again, and it is drawn anew")


def _opened(path: Path, mend: str) -> Image.Image:
    try:
        return read_image(path, min_side=1, max_aspect=float("inf"))
    except BrokenSampleError as error:
        raise DataError(f"{error}: {mend}") from error


def _check_header(path: Path) -> None:
    check_header(path, min_side=1, max_aspect=float("inf"))


def _fault(path: Path, look: Callable[[Path], object]) -> str | None:
    """What is wrong with an image file, in words; `look` raises for one that is no image."""
    if not path.is_file():
        return "missing"
    try:
        look(path)
    except (BrokenSampleError, DataError) as error:
        return str(error).removeprefix(f"{path}: ")
    return None
