"""Guidance and noise that all families share."""

import pytest
import torch
from tiny import FAMILIES, tiny_model

from infotok_lit.models.common.sampling import ImageNoise, guide, is_guided


@pytest.mark.parametrize("guidance", [1.5, 3.0])
def test_guidance_is_a_line_through_both_predictions(guidance) -> None:
    """At 1 it would be the conditional one, at 0 the unconditional one; it goes on beyond 1."""
    conditional, unconditional = torch.randn(2, 5), torch.randn(2, 5)
    found = guide(torch.cat([conditional, unconditional]), guidance)
    expected = conditional + (guidance - 1) * (conditional - unconditional)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0])
def test_up_to_one_there_is_no_guidance(guidance) -> None:
    predictions = torch.randn(4, 5)
    assert not is_guided(guidance)
    assert torch.equal(guide(predictions, guidance), predictions)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_a_scale_below_one_for_none(family) -> None:
    """No unconditional prompt is encoded, and the image is that of the prompt alone."""
    model = tiny_model(family)
    seen = []
    prompts = model.processor.generation_prompts
    model.processor.generation_prompts = lambda *given: seen.append(prompts(*given)) or seen[-1]
    plain, less = (
        model.generate(
            ["a red circle"], 3, type(model.config.sampling)(**{**vars(model.config.sampling), "guidance": g})
        )
        for g in (1.0, 0.3)
    )
    assert torch.equal(plain, less)
    assert [len(ids) for ids, _ in seen] == [1, 1]


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
