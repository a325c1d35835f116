"""`budget_evidence`: what reading an image with fewer tokens costs, and what choosing them by their rates is worth."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse.typing import NonNegativeInt, PositiveInt

from infotok_lit.commands.parsing import Seed
from infotok_lit.errors import SettingsError
from infotok_lit.files import check_target, replacing, write_json, write_whole
from infotok_lit.model_choice import ModelChoice, ModelOptions, choose
from infotok_lit.progress import progress_bar
from infotok_lit.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from infotok_lit.study.token_budgets import Evidence

Measured = "Mapping[str, Mapping[str, Answers]]"
CONFIDENCE = 0.95
TABLE, NUMBERS, ANSWERS, KEPT = "table.md", "numbers.json", "answers.png", "kept.png"


def budget_evidence(
    model: list[str],
    out: Path,
    questions: PositiveInt = 600,
    budgets: list[float] | None = None,
    scenes: Literal["scenes32", "scenes32_hard", "scenes64", "garments32"] = "scenes32",
    examples: NonNegativeInt = 8,
    batch_size: PositiveInt = 50,
    seed: Seed = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    force: bool = False,
) -> None:
    """Measure on Scenes what image tokens are worth when some are dropped: the highest rates, against other choices.

    All choices read as many tokens of each image, but those of the `same number`, which read the mean of all images.

    Args:
        model: A run with objective.token_budget, or its export --with_budget; or several that differ in their seeds.
        out: A folder for the table, the numbers and the pictures.
        questions: Questions about as many scenes that no training shows.
        budgets: Mean shares of tokens; default: 0.75, 0.5 and 0.25.
        scenes: The family of scenes, which should be the model's own.
        examples: Scenes on which kept places are drawn.
        batch_size: Questions at a time.
        seed: Of random choices.
        device: Where the model runs; auto: cuda if there is one.
        force: Replace the files of an earlier measurement.
    """
    from infotok_lit.modules.token_budget import checked_share
    from infotok_lit.study.token_budgets import Evidence, EvidenceOptions

    for name in (TABLE, NUMBERS, ANSWERS, *([KEPT] if examples else [])):
        check_target(out / name, force)
    shares = tuple(dict.fromkeys(checked_share(share) for share in budgets or (0.75, 0.5, 0.25)))
    options = EvidenceOptions(questions, shares, scenes, batch_size, seed)
    measured, follow = [], []
    for choice in _choices(model, device):
        base = choice.load()
        evidence = Evidence(base, choice.token_selector(base, 1.0), options)
        with progress_bar(questions) as bar:
            measured.append(evidence.measure(bar.show))
        follow.append(evidence.what_rates_follow())
    text = report(measured, follow, evidence.kinds)
    numbers = {"models": model, **asdict(options), "rates": follow, "answers": [_means(one) for one in measured]}
    write_json(out / NUMBERS, numbers)
    write_whole(out / TABLE, text.encode())
    _draw(out, measured, evidence, examples)
    sys.stdout.write(text)


def _choices(model: Sequence[str], device: Literal["auto", "cpu", "cuda"]) -> list[ModelChoice]:
    """All models, before the first is measured; SettingsError for several families."""
    choices = [choose(source, ModelOptions(device=device)) for source in model]
    families = sorted({choice.family for choice in choices})
    if len(families) > 1:
        raise SettingsError(f"models that differ in their seeds are averaged, not families: {', '.join(families)}")
    return choices


def report(measured: "Sequence[Measured]", follow: Sequence[Mapping[str, float]], kinds: Any) -> str:
    """The answers as Markdown: per way to choose and budget, with what it loses against the highest rates.

    Args:
        measured: of each model, all on the same questions.
        follow: of each model, what its rates follow.
        kinds: (questions,) the kind of each.
    """
    import numpy as np

    from infotok_lit.study.statistics import holm
    from infotok_lit.study.token_budgets import RATE

    names = sorted(set(kinds))
    head = ["tokens that are read", "budget", "tokens", "10-90 %", "answers", *names, "against the highest rates", "p"]
    lines, p_values = [], {}
    for policy, by_budget in measured[0].items():
        for budget in by_budget:
            correct = np.mean([one[policy][budget].correct for one in measured], axis=0)
            tokens = np.concatenate([one[policy][budget].tokens for one in measured])
            low, high = np.percentile(tokens, [10, 90])
            cells = [policy, budget or "-", f"{tokens.mean():.2f}", f"{low:.0f}-{high:.0f}", f"{correct.mean():.3f}"]
            cells += [f"{correct[kinds == name].mean():.3f}" for name in names]
            difference = ""
            if budget and policy != RATE:
                # Only what is compared counts as a test.
                p_values[len(lines)], difference = _against(
                    correct, np.mean([one[RATE][budget].correct for one in measured], axis=0)
                )
            lines.append([*cells, difference])
    corrected = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    told = ["" if (p := corrected.get(number)) is None else f"{p:.2g}" for number in range(len(lines))]
    rows = [[*line, p] for line, p in zip(lines, told, strict=True)]
    facts = [f"- {name}: " + ", ".join(f"{one[name]:.3g}" for one in follow) for name in follow[0]]
    notes = (
        "Differences are in points (hundredths of the answers), paired by question, with 95 % confidence intervals; "
        "p-values of paired t-tests, after Holm's correction."
    )
    return "\n".join([Table("", head, rows).markdown(), "", notes, "", "What rates are like:", "", *facts, ""])


def _against(correct: Any, reference: Any) -> tuple[float | None, str]:
    """The p-value of a paired difference, and the difference in points."""
    from infotok_lit.study.statistics import compare

    found = compare(dict(enumerate(correct.tolist())), dict(enumerate(reference.tolist())), CONFIDENCE)
    margin = found.difference.margin or 0.0
    return found.p_value, f"{100 * found.difference.mean:+.1f} ± {100 * margin:.1f}"


def _means(measured: "Measured") -> dict[str, dict[str, dict[str, float]]]:
    return {
        policy: {
            budget: {"answers": float(found.correct.mean()), "tokens": float(found.tokens.mean())}
            for budget, found in by_budget.items()
        }
        for policy, by_budget in measured.items()
    }


def _draw(out: Path, measured: "Sequence[Measured]", evidence: "Evidence", examples: int) -> None:
    from infotok_lit.pictures import captioned_grid

    pictures = {ANSWERS: partial(answers_figure([_means(one) for one in measured]).savefig, dpi=120)}
    if examples:
        images, words = zip(*evidence.examples(examples), strict=True)
        pictures[KEPT] = captioned_grid(images, words, columns=1 + len(evidence.options.budgets)).save
    for name, save in pictures.items():
        with replacing(out / name) as file:
            save(file, format="png")


def answers_figure(means: Sequence[Mapping[str, Mapping[str, Mapping[str, float]]]]) -> "Figure":
    """Answers against tokens, a line for each way to choose; the mean of the models, and each as a dot."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, policy in enumerate(means[0]):
        points = [[list(found.values()) for found in one[policy].values()] for one in means]
        answers, tokens = np.moveaxis(np.array(points), -1, 0)
        marker, colour = ("o" if policy in ("rate", "all tokens") else "."), f"C{number % 10}"
        line = "-" if number < 10 else "--"
        axes.plot(tokens.mean(0), answers.mean(0), marker=marker, linestyle=line, color=colour, label=policy)
        if len(means) > 1:
            axes.plot(tokens.T, answers.T, ".", markersize=3, color=colour)
    axes.set_xlabel("tokens that are read, mean of the images")
    axes.set_ylabel("answers that are right")
    figure.legend(loc="outside right upper", fontsize=8)
    return figure
