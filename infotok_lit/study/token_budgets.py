"""What choosing image tokens by their rates is worth: answers about Scenes, against other choices of as many tokens.

Shapes: B images, N tokens, L of them with a place in the grid.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd, isqrt

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from infotok_lit.batch import IMAGE_TOKEN_ID, Processor
from infotok_lit.budgets import keep_spread, nearest_count
from infotok_lit.models.common.language_model import compact_positions
from infotok_lit.models.unified import UnifiedModel
from infotok_lit.modules.token_budget import TokenSelector, device_of
from infotok_lit.scenes import Scenes, question_kind
from infotok_lit.scenes.render import render
from infotok_lit.scenes.spec import SpecName

ALL, NO_PLACES, RATE = "all tokens", "no place", "rate"
ATTENTION_LAYER = 2
"""FastV (arXiv 2403.06764) ranks image tokens by the attention that they receive in this layer, counted from 1."""
MAX_NEW_TOKENS = 48


@dataclass(frozen=True)
class EvidenceOptions:
    """What is measured.

    Args:
        questions: How many questions, each about a scene of its own that no training shows.
        budgets: Mean shares of tokens.
        scenes: The family of scenes.
        batch_size: Questions at a time.
        seed: Of random choices.
    """

    questions: int = 600
    budgets: tuple[float, ...] = (0.75, 0.5, 0.25)
    scenes: SpecName = "scenes32"
    batch_size: int = 50
    seed: int = 0


@dataclass(frozen=True)
class Shown:
    """Images with questions about them, as a way to choose tokens sees them."""

    base: UnifiedModel
    pixels: Tensor
    """(B, 3, height, width) in [-1, 1]."""
    tokens: Tensor
    """(B, N, D)."""
    rates: Tensor
    """(B, N) nats."""
    questions: Sequence[str]
    generator: torch.Generator

    @property
    def side(self) -> int:
        """Places per side of the grid."""
        return isqrt(self.tokens.shape[1] - self.base.num_extras["understanding"])

    def of_places(self, per_place: Tensor) -> Tensor:
        """(B, L) -> (B, N), with 0 for tokens without a place."""
        return F.pad(per_place, (self.base.num_extras["understanding"], 0))


# Ways to rank tokens: what they show -> scores (B, N), the highest of which are kept


def pixel_error(shown: Shown) -> Tensor:
    """Squared error of the autoencoder's reconstruction at each place."""
    decoded = shown.base.decode_images(shown.base.encode_images(shown.pixels))
    error = (decoded - shown.pixels).square().mean(1, keepdim=True)
    return shown.of_places(F.adaptive_avg_pool2d(error, shown.side).flatten(1))


def attention_received(shown: Shown) -> Tensor:
    """Attention from the end of the question, the mean over the heads of an early layer; it knows the question."""
    base, body = shown.base, shown.base.text_body
    visual = base.project_for_llm(shown.tokens)
    ids, mask = base.processor.understanding_prompts(shown.questions, num_image_tokens=visual.shape[1])
    ids, mask = ids.to(visual.device), mask.to(visual.device)
    seen = base.prefix_mask(ids)
    seen = mask.new_ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril() if seen is None else seen
    # A padded row sees itself, so that no softmax is over nothing.
    seen = seen & mask.bool()[:, None, None] | torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device)
    usual = body.config._attn_implementation
    body.set_attn_implementation("eager")
    try:
        attentions = body(
            inputs_embeds=base.embed_with_images(ids, visual),
            attention_mask=torch.zeros_like(seen, dtype=visual.dtype).masked_fill(~seen, torch.finfo(visual.dtype).min),
            position_ids=compact_positions(mask),
            output_attentions=True,
            use_cache=False,
        ).attentions
    finally:
        body.set_attn_implementation(usual)
    received = attentions[min(ATTENTION_LAYER, len(attentions)) - 1].mean(1)[:, -1]
    slots = received[ids == IMAGE_TOKEN_ID].view(len(ids), -1)[:, base.slots_before_tokens :]
    order = base.reading_order(torch.arange(slots.shape[1], device=slots.device).expand_as(slots))
    return torch.empty_like(slots).scatter_(1, order, slots)


RANKINGS: Mapping[str, Callable[[Shown], Tensor]] = {
    RATE: lambda shown: shown.rates,
    "lowest rate": lambda shown: -shown.rates,
    "random": lambda shown: torch.rand(shown.rates.shape, generator=shown.generator).to(shown.rates),
    "attention": attention_received,
    "token norm": lambda shown: shown.tokens.float().norm(dim=-1),
    "pixel error": pixel_error,
}
STRIDE, RATE_SAME, RANDOM_SAME = "stride", "rate, same number", "random, same number"
"""Places in equal steps; and the number of tokens that is the same for all images, not what each one deserves."""
POLICIES = (*RANKINGS, STRIDE, RATE_SAME, RANDOM_SAME)


@dataclass(frozen=True)
class Answers:
    """One way to choose tokens, at one budget: an entry for each question."""

    correct: np.ndarray
    """(questions,) 0 or 1."""
    tokens: np.ndarray
    """(questions,) how many tokens were read."""


class Evidence:
    """Answers about the same scenes, read in different ways.

    Args:
        base: in evaluation mode.
        selector: gives the rates and the budgets.
        options: what is measured.
    """

    def __init__(self, base: UnifiedModel, selector: TokenSelector, options: EvidenceOptions) -> None:
        self.base, self.selector, self.options = base, selector, options
        self.scenes = Scenes(options.scenes, split="val", num_samples=options.questions)
        drawn = [self.scenes.draw("understanding", number) for number in range(options.questions)]
        self.drawn, self.questions, self.truths = zip(*drawn, strict=True)
        self.kinds = np.array([question_kind(question) for question in self.questions])

    @torch.inference_mode()
    def measure(self, progress: Callable[[float, str], None]) -> dict[str, dict[str, Answers]]:
        """Policy -> budget (as text; "" for those that have none) -> answers."""
        rates = torch.cat([shown.rates for _, shown in self._batches()])
        steady = {budget: self._same_number(rates, budget) for budget in self.options.budgets}
        found: dict[str, dict[str, list[tuple[bool, int]]]] = {}
        for start, shown in self._batches():
            stop = start + len(shown.questions)
            progress(start, "answering")
            for name, budget, kept in self._choices(shown, {b: counts[start:stop] for b, counts in steady.items()}):
                answers = self.base.describe_tokens(shown.tokens, shown.questions, MAX_NEW_TOKENS, kept=kept)
                right = [
                    answer.strip().casefold() == truth.strip().casefold()
                    for answer, truth in zip(answers, self.truths[start:stop], strict=True)
                ]
                read = [shown.tokens.shape[1]] * len(right) if kept is None else kept.sum(1).tolist()
                found.setdefault(name, {}).setdefault(budget, []).extend(zip(right, read, strict=True))
        return {
            name: {budget: Answers(*np.array(pairs).T) for budget, pairs in by_budget.items()}
            for name, by_budget in found.items()
        }

    @torch.inference_mode()
    def what_rates_follow(self) -> dict[str, float]:
        """How rates vary, and their rank correlation with what the scenes are known to hold at each place."""
        extras = self.base.num_extras["understanding"]
        rates = torch.cat([shown.rates[:, extras:] for _, shown in self._batches()]).double().cpu().numpy()
        truth = [self._truth_of_places(number, isqrt(rates.shape[1])) for number in range(len(rates))]
        objects, texture = (np.stack(part) for part in zip(*truth, strict=True))
        empty = objects == 0
        totals = rates.sum(1)
        return {
            "mean rate of a token, bits": float(rates.mean() / np.log(2)),
            "variation within an image": float((rates.std(1) / rates.mean(1)).mean()),
            "variation between images": float(totals.std() / totals.mean()),
            "rank correlation with the object's share of the place": _rank_correlation(rates, objects),
            "rank correlation with the texture of empty places": _rank_correlation(rates[empty], texture[empty]),
            "rank correlation of an image's sum with its number of objects": _rank_correlation(
                totals, np.array([len(scene.objects) for scene in self.drawn])
            ),
        }

    def examples(self, count: int) -> Iterator[tuple[np.ndarray, str]]:
        """Pictures (height, width, 3) uint8 of scenes and of what is kept of them, with words below; by scene."""
        shown = next(self._batches())[1]
        side, extras = shown.side, self.base.num_extras["understanding"]
        for number in range(min(count, len(shown.questions))):
            image = render(self.drawn[number], self.scenes.spec)
            yield image, self.questions[number]
            for budget in self.options.budgets:
                kept = self.selector.budget.kept(shown.rates, budget)[number, extras:].view(side, side).cpu().numpy()
                place = np.arange(len(image)) * side // len(image)
                lit = kept[place][:, place]
                dark = (0.15 * image).astype(np.uint8)
                words = f"budget {budget:g}: {kept.sum()} of {kept.size} places"
                yield np.where(lit[..., None], image, dark), words

    def _batches(self) -> Iterator[tuple[int, Shown]]:
        generator = torch.Generator().manual_seed(self.options.seed)
        processor: Processor = self.base.processor
        for start in range(0, self.options.questions, self.options.batch_size):
            stop = min(start + self.options.batch_size, self.options.questions)
            images = [self.scenes.sample("understanding", number).image for number in range(start, stop)]
            pixels = processor.pixels(images).to(device_of(self.base))
            tokens = self.base.tokens_to_describe(pixels)
            rates = self.selector.rates(tokens)
            yield start, Shown(self.base, pixels, tokens, rates, self.questions[start:stop], generator)

    def _choices(self, shown: Shown, steady: Mapping[float, Tensor]) -> Iterator[tuple[str, str, Tensor | None]]:
        """Policy, budget, and what is kept (B, N)."""
        budget, extras = self.selector.budget, self.base.num_extras["understanding"]
        places = shown.tokens.shape[1] - extras
        yield ALL, "", None
        if extras:
            numbers = torch.arange(places + extras, device=shown.rates.device)
            yield NO_PLACES, "", numbers.expand_as(shown.rates) < extras
        scores = {name: ranking(shown) for name, ranking in RANKINGS.items()}
        for keep in self.options.budgets:
            share = budget.share(shown.rates, keep)
            for name, ranked in scores.items():
                yield name, f"{keep:g}", budget.highest(ranked, share)
            spread = keep_spread(nearest_count(share, places), places)
            yield STRIDE, f"{keep:g}", budget.highest(shown.of_places(spread.float()), share)
            for name, ranking in ((RATE_SAME, RATE), (RANDOM_SAME, "random")):
                yield name, f"{keep:g}", budget.highest(scores[ranking], steady[keep].to(share) / places)

    def _same_number(self, rates: Tensor, keep: float) -> Tensor:
        """(questions,): whole numbers of places that differ by at most one, with the mean that the budget has."""
        places = rates.shape[1] - self.base.num_extras["understanding"]
        mean = nearest_count(self.selector.budget.share(rates, keep), places).double().mean()
        steps = torch.floor(torch.arange(len(rates) + 1, dtype=torch.float64) * mean.cpu())
        return steps.diff()

    def _truth_of_places(self, number: int, side: int) -> tuple[np.ndarray, np.ndarray]:
        """(L,) each: which share of a place objects cover, and how strong its texture is."""
        scene = self.drawn[number]
        image, bare = (render(one, self.scenes.spec).astype(float) for one in (scene, replace(scene, objects=())))
        covered = (image != bare).any(-1)
        # Where a place is no whole number of pixels, each pixel is divided until it is.
        parts = side // gcd(side, len(image))
        tiles = (side, parts * len(image) // side) * 2
        covered, grey = (part.repeat(parts, 0).repeat(parts, 1).reshape(tiles) for part in (covered, bare.mean(-1)))
        return covered.mean((1, 3)).flatten(), grey.std((1, 3)).flatten()


def _rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    return float(stats.spearmanr(one.flatten(), other.flatten()).statistic)
