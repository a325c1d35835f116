"""`check`: the data of a configuration before it is trained on: sizes, lengths, what would be cut, what is broken."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING

from jsonargparse.typing import PositiveInt

from infotok_lit.batch import (
    BRANCHES,
    Branch,
    BrokenSampleError,
    Processor,
    Sample,
    Source,
    UnderstandingSample,
)
from infotok_lit.progress import ProgressBar, progress_bar
from infotok_lit.tables import Table

if TYPE_CHECKING:
    from infotok_lit.modules.base_model import InitialModel

NAMED = 20
"""So many of a kind are named; of the others the number is said."""


def check(fit_arguments: list[str], limit: PositiveInt = 10_000) -> int:
    """Look at the data of a configuration before training: every image is opened with one of its texts.

    Of a row with several texts one is drawn, as in training. Says which samples are broken, by name, and which texts
    the model would cut. No weights are read, and no GPU is needed. Ends with status 1 if so many samples are broken
    that training would stop. Every option that is not listed here is one of fit's, such as --config FILE.

    Args:
        fit_arguments: What `fit` is given.
        limit: At most so many samples of each source and branch are looked at: the first ones.
    """
    from rich.console import Console

    from infotok_lit.commands.fit import ModelAndData

    cli = ModelAndData(fit_arguments, "check")
    processor, data = processor_of(cli.model.initial_model), cli.datamodule
    sources = [("train", data.training_sources), ("validation", data.validation_sources)]
    findings: list[Findings] = []
    with progress_bar(len(sources) * len(BRANCHES)) as bar:
        for part, of_branch in sources:
            for branch in BRANCHES:
                name, before = f"{part}, {branch}", len(findings)
                findings.append(look_at(name, of_branch[branch], branch, processor, limit, bar, before))
    console = Console()
    overview(findings).show()
    for line in remarks(findings, cli.model.answer_tokens):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    share = drawn_broken_share(findings[: len(BRANCHES)], [data.batch_sizes[branch] for branch in BRANCHES])
    stops = share > data.max_broken_share
    if stops:
        console.print(
            f"train: {share:.1%} of the samples are broken, so training would stop; mend or remove them, or raise "
            f"max_broken_share above {data.max_broken_share:.1%}.",
            soft_wrap=True,
        )
    return 1 if stops else 0


def drawn_broken_share(training: Sequence["Findings"], batch_sizes: Sequence[int]) -> float:
    """The share of broken samples among all that training draws, of both branches together, as it is judged there.

    A broken sample is replaced by another until one is whole, so a branch draws more of them than its batch holds.
    """
    if any(found.broken_share == 1 for found in training):
        return 1.0
    drawn = [size / (1 - found.broken_share) for found, size in zip(training, batch_sizes, strict=True)]
    return 1 - sum(batch_sizes) / sum(drawn)


def processor_of(model: "InitialModel") -> Processor:
    """The processor of the configured base model, without its weights."""
    import torch

    with torch.device("meta"):
        return replace(model, init_from=None, tokenizer=model.reference()["tokenizer"]).build().processor


@dataclass
class Findings:
    """What was found in one source for one branch."""

    name: str
    samples: int
    looked_at: int = 0
    sides: list[tuple[int, int]] = field(default_factory=list)
    """(width, height) of each image in pixels."""
    side: int = 0
    """Of the square that the model sees, in pixels."""
    crops: bool = False
    """Whether the square is cut out of the image; it is padded otherwise."""
    tokens: list[int] = field(default_factory=list)
    """Of the whole text of each sample, without template."""
    answer_tokens: list[int] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    """Names of samples whose text does not go into the model whole."""
    broken: list[str] = field(default_factory=list)
    """A sentence for each sample that cannot be used."""

    @property
    def broken_share(self) -> float:
        """Of what was looked at."""
        return len(self.broken) / max(self.looked_at, 1)


def look_at(
    name: str, source: Source, branch: Branch, processor: Processor, limit: int, bar: ProgressBar, before: int
) -> Findings:
    """Draw each sample once, and make a batch of it; the bar counts `before` sources as done already."""
    import numpy as np

    found = Findings(name, samples=source.branch_length(branch), crops=branch == "generation")
    found.looked_at = min(limit, found.samples)
    for index in range(found.looked_at):
        bar.show(before + index / found.looked_at, name)
        try:
            sample = source.sample(branch, index, np.random.default_rng(index))
            _measure(found, sample, processor)
        except (BrokenSampleError, OSError) as error:
            found.broken.append(str(error))
    return found


def _measure(found: Findings, sample: Sample, processor: Processor) -> None:
    texts = [sample.question, sample.answer] if isinstance(sample, UnderstandingSample) else [sample.caption]
    lengths = [len(processor.tokenizer.encode(text.strip(), add_special_tokens=False)) for text in texts]
    if isinstance(sample, UnderstandingSample):
        batch = processor.understanding([sample])
        found.answer_tokens.append(lengths[1])
    else:
        batch = processor.generation([sample])
    if batch.cut:
        found.cut.append(sample.name)
    found.sides.append(sample.image.size)
    found.tokens.append(sum(lengths))
    found.side = batch.pixel_values.shape[-1]


def overview(findings: Sequence[Findings]) -> Table:
    """A row for each source and branch."""
    lines = []
    for found in findings:
        sides = [side for pair in found.sides for side in pair]
        # Two lines, as a terminal of 80 columns would break one long name anywhere.
        name = found.name.replace(", ", "\n")
        lengths = (_spread(values) for values in (sides, found.tokens, found.answer_tokens))
        lines.append([name, f"{found.samples:,}", *lengths, len(found.cut), len(found.broken)])
    header = ["", "samples", "image\nsides (px)", "text\ntokens", "answer\ntokens", "cut", "broken"]
    most = max(found.looked_at for found in findings)
    caption = "smallest, median, largest"
    if any(found.looked_at < found.samples for found in findings):
        caption += f"; at most {most:,} samples of each were looked at"
    return Table("The data, as the model would see it", header, lines, caption, wraps=True)


def remarks(findings: Sequence[Findings], answer_tokens: int) -> list[str]:
    """What a user may want to mend, a line each; names are said once, wherever a sample is used."""
    lines = []
    for kind, title in (("broken", "broken"), ("cut", "longer than the model takes, and cut")):
        names = list(dict.fromkeys(name for found in findings for name in getattr(found, kind)))
        lines += [f"{title}: {name}" for name in names[:NAMED]]
        lines += [f"{title}: {len(names) - NAMED} more"] if len(names) > NAMED else []
    for found in findings:
        small = sum(min(sides) < found.side for sides in found.sides)
        # In whole numbers: an image of 3 : 2, as cameras take them, loses a third and not more.
        narrow = sum(3 * min(sides) < 2 * max(sides) for sides in found.sides) if found.crops else 0
        training = found.name.startswith("train")
        long = 0 if training else sum(length > answer_tokens for length in found.answer_tokens)
        counted = (
            (small, f"images have a side under the model's {found.side} px and are enlarged."),
            (narrow, "images lose over a third of their area: they are cropped to a square."),
            (long, f"true answers are longer than model.answer_tokens ({answer_tokens}), at which generated ones end."),
        )
        lines += [f"{found.name}: {count} {remark}" for count, remark in counted if count]
    return lines


def _spread(values: Sequence[int]) -> str:
    return f"{min(values)}, {median(values):.0f}, {max(values)}" if values else ""
