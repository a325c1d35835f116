"""The evidence: its search is exhaustive, its comparisons spend the same, and its report can be read."""

import json
from itertools import product

import numpy as np
import pytest
import torch
from tiny_video import tiny_tokenizer

from infotok_lit.cli import main as command_line
from infotok_lit.errors import SettingsError
from infotok_lit.video import evidence
from infotok_lit.video.evidence import EvidenceOptions, best_allocation, measure
from infotok_lit.video.official import export_tokenizer
from infotok_lit.video.tokenizer import keep_clipwide

SMALL = EvidenceOptions(clips=4, frames=5, side=32, rates=(0.5,))


def test_the_search_is_exhaustive() -> None:
    quality = np.random.default_rng(0).random((4, 3))
    for budget in range(4, 13):
        every = product(range(1, 4), repeat=4)
        best = max(
            np.mean([row[units - 1] for row, units in zip(quality, choice, strict=True)])
            for choice in every
            if sum(choice) <= budget
        )
        assert best_allocation(quality, budget) == pytest.approx(best)


@pytest.mark.parametrize("settings", [{"clips": 1}, {"rates": (2.0,)}, {"rates": (0.5, 0.01)}])
def test_what_cannot_be_measured_is_refused(settings: dict) -> None:
    with pytest.raises(SettingsError, match=next(iter(settings))):
        EvidenceOptions(**settings)


def test_every_policy_spends_the_same(monkeypatch) -> None:
    kept: list[float] = []

    def counted(token_map: torch.Tensor, rate: torch.Tensor, kind: str = "map") -> torch.Tensor:
        mask = keep_clipwide(token_map, rate, kind)
        kept.append(mask.float().mean().item())
        return mask

    monkeypatch.setattr(evidence, "keep_clipwide", counted)
    monkeypatch.setattr(evidence, "_quality_by_rate", lambda *arguments: np.zeros((SMALL.clips, 16)))
    found = measure(tiny_tokenizer(), SMALL)
    policies = found["policies"]["0.5"]
    assert set(policies) >= {"adaptive", "static", "uniform", "R2L", "Jump", "random mask"}
    # The floor of each clip's count takes up to one token of 32.
    assert max(kept) - min(kept) <= 1 / 32 and 0.5 - 2 / 32 <= min(kept) <= 0.5


def test_the_command_reports_and_leaves_the_numbers(tmp_path, capsys) -> None:
    export_tokenizer(tiny_tokenizer(), tmp_path / "model", {})
    out = tmp_path / "evidence.json"
    options = ["--clips", "3", "--frames", "5", "--side", "32", "--rates", "0.5", "--device", "cpu"]
    arguments = ["video_evidence", "--model", str(tmp_path / "model"), *options, "--out", str(out)]
    assert command_line(arguments) == 0
    text, found = capsys.readouterr().out, json.loads(out.read_text())
    assert f"| adaptive | {found['policies']['0.5']['adaptive']:.2f} | 29.3 |" in text
    assert found["search"]["0.5"] >= -1e-9
    assert -1 <= found["complexity"]["objects"] <= 1
    assert set(found["seconds"]) == {"encode", "router", "decode"}
    for more, said in (
        ([], "exists"),
        (["--force", "--rates", "2"], "rates must be between 1/16 and 1, got [0.5, 2.0]"),
        (["--frames", "0"], "frames: 0 is not above 0"),
    ):
        assert command_line([*arguments, *more]) == 2
        assert said in capsys.readouterr().err
