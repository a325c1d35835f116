"""`video_evidence`: what a trained video tokenizer gains by choosing its tokens."""

import sys
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import PositiveInt

from infotok_lit.commands.compress import open_tokenizer
from infotok_lit.commands.parsing import Seed
from infotok_lit.files import check_target, write_json
from infotok_lit.progress import progress_bar
from infotok_lit.tables import Table

PAPER = {"R2L": 27.43, "Jump": 28.07, "adaptive": 29.30}
"""TokenBench PSNR in dB at rate 0.5 (arXiv 2512.16975): natural videos and 123 million parameters, another scale."""


def video_evidence(
    model: str,
    clips: PositiveInt = 64,
    frames: PositiveInt = 9,
    side: PositiveInt = 32,
    rates: list[float] | None = None,
    seed: Seed = 0,
    out: Path | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    force: bool = False,
) -> None:
    """Measure on Moving Scenes what adaptive budgets and the map mask are worth, at equal mean bits.

    Args:
        model: An exported tokenizer's folder, or `embedded`.
        clips: Clips that are measured.
        frames: Frames per clip.
        side: Their height and width in pixels.
        rates: Mean shares of tokens that are kept; default: 0.5 and 0.25.
        seed: Of uniform rates and random masks.
        out: A JSON file for the numbers.
        device: Where the tokenizer runs; auto: cuda if there is one.
        force: Replace a file that is there.
    """
    from infotok_lit.video.evidence import EvidenceOptions, measure

    check_target(out, force)
    options = EvidenceOptions(clips, frames, side, tuple(rates or (0.5, 0.25)), seed)
    tokenizer = open_tokenizer(model, device)
    with progress_bar(1.0) as bar:
        found = measure(tokenizer, options, bar.show)
    write_json(out, {"model": model, "clips": clips, **found})
    sys.stdout.write(report(found))


def report(found: dict[str, Any]) -> str:
    """The numbers as Markdown, with the paper's beside them."""
    rates = list(found["policies"])
    names = list(found["policies"][rates[0]])
    header = ["tokens", *(f"PSNR at rate {rate}" for rate in rates), "paper, rate 0.5 (another scale)"]
    psnr = {name: [f"{found['policies'][rate][name]:.2f}" for rate in rates] for name in names}
    table = Table("", header, [[name, *values, PAPER.get(name, "")] for name, values in psnr.items()])
    gains = ", ".join(f"{found['search'][rate]:.3f} dB at rate {rate}" for rate in rates)
    lost = ", ".join(f"{found['latent_router']['lost_db'][rate]:.3f} dB at rate {rate}" for rate in rates)
    correlations = ", ".join(f"{name} {value:.2f}" for name, value in found["complexity"].items())
    seconds = found["seconds"]
    extra = seconds["router"] / (seconds["encode"] + seconds["decode"])
    lines = [
        table.markdown(),
        "",
        f"- The clip's error ranks clips like their {correlations} (Spearman).",
        f"- An exhaustive search over rates gains {gains} (paper: 0.09 dB).",
        f"- A router that reads only the latent: rank correlation {found['latent_router']['rank_correlation']:.2f}, "
        f"loses {lost}.",
        f"- The router takes {seconds['router']:.3f} s a clip, {extra:.0%} of encoding and decoding.",
        "",
    ]
    return "\n".join(lines)
