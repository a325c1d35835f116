"""Numbers per band of a flow model's time, against a loop over the images."""

import pytest
import torch
from branch_outputs import changed, parts

from infotok_lit.objective.config import ObjectiveConfig
from infotok_lit.objective.report import noise_band_report
from infotok_lit.objective.term import PAPER_TERMS

TIMES = [0.0, 0.2499, 0.25, 0.3, 0.99, 1.0]
BANDS = ["t_0.00_0.25", "t_0.00_0.25", "t_0.25_0.50", "t_0.25_0.50", "t_0.75_1.00", "t_0.75_1.00"]


@pytest.mark.parametrize("branch", ["understanding", "generation"])
def test_a_band_reports_what_its_images_alone_would(branch, make_inputs, make_infotok):
    infotok = make_infotok(ObjectiveConfig(terms=("compactness", "sufficiency")))
    inputs, noise = make_inputs(batch=6), torch.randn(6, 5, 64)
    report = infotok(branch, changed(inputs, noise_level=torch.tensor(TIMES)), step=0, noise=noise).report
    names = ("tokens", "token_index", "text_ids", "text_mask", "target_mask", "text_key", "latents")
    for band in sorted(set(BANDS)):
        chosen = [i for i, own in enumerate(BANDS) if own == band]
        alone = changed(inputs, **{name: parts(inputs)[name][chosen] for name in names})
        expected = infotok(branch, alone, step=0, noise=noise[chosen]).report
        for name in ("rate_bits_per_token", "sufficiency_nats_per_element"):
            torch.testing.assert_close(report[f"{name}/{band}"], expected[name])
    empty = [value for name, value in report.items() if "t_0.50_0.75" in name]
    assert len(empty) == 2 and all(value.isnan() for value in empty)


def test_alignment_of_a_band_is_the_mean_over_its_images_with_a_text(make_inputs, make_infotok):
    infotok = make_infotok(ObjectiveConfig(terms=("alignment",)))
    inputs = make_inputs(batch=6)
    inputs.text.mask[[1, 4, 5]] = False
    report = infotok("generation", changed(inputs, noise_level=torch.tensor(TIMES)), step=0).report
    head = infotok.heads["generation"]
    nats = head.alignment(head.projection(inputs.tokens).mean, inputs).nats
    banded = {name.split("/")[1]: value for name, value in report.items() if "/" in name and not value.isnan()}
    torch.testing.assert_close(banded, {"t_0.00_0.25": nats[0].detach(), "t_0.25_0.50": nats[2:4].detach().mean()})


def test_the_bands_change_nothing_else(make_inputs, make_infotok):
    infotok, inputs, noise = make_infotok(ObjectiveConfig(terms=PAPER_TERMS)), make_inputs(), torch.randn(3, 5, 64)
    without = infotok("generation", inputs, step=0, noise=noise)
    times = changed(inputs, noise_level=torch.tensor([0.1, 0.5, 1.0]))
    banded = infotok("generation", times, step=0, noise=noise)
    assert torch.equal(banded.loss, without.loss)
    assert {name: value for name, value in banded.report.items() if "/" not in name} == without.report


def test_nothing_measured_nothing_reported():
    assert noise_band_report(torch.tensor([0.5]), None, {}) == {}


def test_one_time_per_image(make_inputs, make_infotok):
    with pytest.raises(ValueError, match=r"noise_level must have shape \(3,\), not \(2,\)"):
        make_infotok(ObjectiveConfig(terms=PAPER_TERMS))(
            "generation", changed(make_inputs(), noise_level=torch.zeros(2)), step=0
        )
