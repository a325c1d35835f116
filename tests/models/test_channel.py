"""Shared tokens of a known capacity: the channel against what correlations say it carries, in every family."""

import math
from dataclasses import replace

import pytest
import torch
from tiny import FAMILIES, TINY_CONFIGS, tiny_model

from infotok_lit.assets import SCENES_TOKENIZER
from infotok_lit.errors import SettingsError
from infotok_lit.models.common.channel import Channel
from infotok_lit.models.family import family as family_called
from infotok_lit.modules import HarmonModule
from infotok_lit.scenes import Scenes


@pytest.mark.parametrize("bits", [20.0, 270.0])
def test_the_best_code_carries_the_bits_and_none_is_louder(bits) -> None:
    """Gaussian numbers are the best code: what they carry follows from the correlation of sent and received."""
    torch.manual_seed(0)
    tokens, width = 20, 64
    channel = Channel(bits, tokens, width).train()
    sent = torch.randn(500, tokens, width)
    received = channel(7.0 * sent)
    sent = sent * (width / sent.square().sum(-1, keepdim=True)).sqrt()
    noise = received - sent
    # Each number has a mean square of 1, whatever was given.
    torch.testing.assert_close(channel.eval()(7.0 * sent), sent, atol=1e-5, rtol=1e-5)
    squared = torch.corrcoef(torch.stack([sent.flatten(), received.flatten()]))[0, 1].square()
    assert (-0.5 * (1 - squared).log2() * tokens * width).item() == pytest.approx(bits, rel=0.03)
    assert abs(torch.corrcoef(torch.stack([sent.flatten(), noise.flatten()]))[0, 1]) < 0.01


def test_without_a_limit_tokens_pass_as_they_are() -> None:
    tokens = torch.randn(2, 3, 4)
    assert Channel(None, 3, 4).train()(tokens) is tokens
    with pytest.raises(SettingsError, match="capacity_bits is 0; set it above 0"):
        Channel(0, 3, 4)
    with pytest.raises(SettingsError, match="capacity_bits is 100000.0, which is no limit; set it lower, or to null"):
        Channel(1e5, 3, 4)


def limited(family: str, bits: float | None):
    config = replace(TINY_CONFIGS[family](0.0), capacity_bits=bits)
    model = family_called(family).build(config, str(SCENES_TOKENIZER))
    model.load_state_dict(tiny_model(family).state_dict())  # it has no weights of its own
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_both_branches_of_every_family_go_through_it(family) -> None:
    model, source = limited(family, 100.0), Scenes(num_samples=2)
    assert family_called(family).config_class.from_dict(model.config.to_dict()).capacity_bits == 100.0
    batches = [
        getattr(model.processor, branch)([source.sample(branch, index) for index in range(2)])
        for branch in ("understanding", "generation")
    ]
    for branch, batch in zip(("understanding", "generation"), batches, strict=True):
        outputs = []
        for training in (True, False, False):
            torch.manual_seed(0)
            outputs.append(getattr(model.train(training), branch)(batch).tokens)
        power = outputs[1].square().mean(-1)
        assert power.max() < 1 + 1e-5 and power.min() > 0.99
        if branch == "understanding":
            assert torch.equal(outputs[1], outputs[2]), "without noise it is the same every time"
            spread = (outputs[0] - outputs[1]).square().mean().item()
            numbers = outputs[1][0].numel()
            assert spread == pytest.approx(1 / (2 ** (2 * 100.0 / numbers) - 1), rel=0.15)
    prompts, pixels = ["a red circle"], batches[0].pixel_values
    assert model.describe(pixels, ["what?", "what?"], 3) == model.describe(pixels, ["what?", "what?"], 3)
    plain = limited(family, None)
    assert torch.equal(model.generate(prompts), model.generate(prompts))
    assert not torch.equal(model.generate(prompts), plain.eval().generate(prompts)), "inference normalises as well"


def test_it_is_a_setting_of_every_run() -> None:
    module = HarmonModule(capacity_bits=270.0)
    assert module.build_base().config.capacity_bits == 270.0
    assert math.isclose(module.build_base().encoder.channel.noise_std, (2 ** (2 * 270 / (20 * 128)) - 1) ** -0.5)
