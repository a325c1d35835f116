"""Guidance and noise that all families share."""

import functools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from infotok_lit.assets import embedded_base
from infotok_lit.models.common.sampling import ImageNoise, guide, is_guided
from infotok_lit.models.family import load_folder
from infotok_lit.models.unified import UnifiedModel


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.5, 3.0])
def test_guidance_is_a_line_through_both_predictions(guidance) -> None:
    """At 1 it would be the conditional one, at 0 the unconditional one; it goes on beyond 1."""
    conditional, unconditional = torch.randn(2, 5), torch.randn(2, 5)
    found = guide(torch.cat([conditional, unconditional]), guidance)
    expected = conditional + (guidance - 1) * (conditional - unconditional)
    torch.testing.assert_close(found, expected)


def test_at_one_there_is_no_guidance() -> None:
    predictions = torch.randn(4, 5)
    assert not is_guided(1.0)
    assert torch.equal(guide(predictions, 1.0), predictions)


@functools.cache
def base(family: str) -> UnifiedModel:
    """One that has learned to draw, so that its prompt shows."""
    return load_folder(embedded_base(family, "scenes32"))


def drawn(model, guidance: float, monkeypatch, unconditional: bool = False) -> tuple[Tensor, int]:
    """An image, and how many prompts it was drawn from."""
    prompts, count = model.processor.generation_prompts, []

    def given(texts, negative, *more):
        ids, mask = prompts(texts, "" if unconditional else negative, *more)
        count.append(len(ids) - unconditional)
        return (ids[1:], mask[1:]) if unconditional else (ids, mask)

    # Harmon's own chain takes its variance from the prompt, whatever the scale; the solver reads none.
    own = {"solver_steps": 8} if model.family == "harmon" else {}
    sampling = replace(model.config.sampling, guidance=guidance, iterations=6, **own)
    with monkeypatch.context() as patch:
        patch.setattr(model.processor, "generation_prompts", given)
        image = model.generate(["a red circle"], 3, sampling)
    return image, count[0]


@pytest.mark.parametrize(
    ("family", "guidance", "copies", "like"),
    [
        ("harmon", 0.0, 2, "unconditional"),
        ("showo2", 0.0, 1, "plain"),
        ("showo2", 1e-6, 2, "unconditional"),
        ("openuni", 0.3, 1, "plain"),
    ],
)
def test_below_one_each_family_does_as_its_official_code(family, guidance, copies, like, monkeypatch) -> None:
    """Harmon and Show-o2 follow the line to the unconditional prediction, but 0 is none with Show-o2, nor is any with
    OpenUni."""
    model = base(family)
    expected = {"plain": drawn(model, 1.0, monkeypatch)[0], "unconditional": drawn(model, 1.0, monkeypatch, True)[0]}
    assert (expected["plain"] - expected["unconditional"]).abs().max() > 0.3
    found, count = drawn(model, guidance, monkeypatch)
    assert count == copies
    torch.testing.assert_close(found, expected[like], rtol=0, atol=1e-3)


@pytest.mark.parametrize(("shape", "calls"), [((4, 16), 2), ((2, 48), 2), ((5, 3), 14), ((17,), 14), ((32, 2, 3), 2)])
def test_the_noise_of_many_steps_is_that_of_each_and_mostly_one_call_an_image(shape, calls, monkeypatch) -> None:
    device, counted, randn = torch.device("cpu"), [], torch.randn
    one_by_one = ImageNoise([3, 4], device)
    expected = torch.stack([one_by_one.normal(*shape) for _ in range(7)])
    noise = ImageNoise([3, 4], device)
    monkeypatch.setattr(torch, "randn", lambda *sizes, **options: counted.append(sizes) or randn(*sizes, **options))
    assert torch.equal(noise.normals(7, *shape), expected)
    assert len(counted) == calls
    # What comes after is the same, too.
    assert torch.equal(noise.orders(9), one_by_one.orders(9))


def test_noise_depends_on_an_images_own_seed_alone() -> None:
    device = torch.device("cpu")
    together, alone = ImageNoise([3, 4], device), ImageNoise([4], device)
    assert torch.equal(together.normal(2, 3)[1], alone.normal(2, 3)[0])
    assert torch.equal(together.orders(7)[1], alone.orders(7)[0])
    assert sorted(together.orders(7)[0].tolist()) == list(range(7))
