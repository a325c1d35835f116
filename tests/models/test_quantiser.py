"""Quantised tokens: nearest codes, gradients that pass through, and a model that can be saved with them."""

from dataclasses import replace

import pytest
import torch
from tiny import tiny_model, tiny_showo2_config

from infotok_lit.assets import SCENES_TOKENIZER
from infotok_lit.batch import TokenCodes
from infotok_lit.models.export import export_model
from infotok_lit.models.family import load_folder
from infotok_lit.models.showo2.encoder import TokenQuantiser
from infotok_lit.models.showo2.family import FAMILY, QuantiserConfig
from infotok_lit.models.showo2.model import Showo2
from infotok_lit.scenes import Scenes

KINDS = ("fsq", "lfq", "vq")
WIDTH = 12


def config(kind: str) -> QuantiserConfig:
    return QuantiserConfig(kind=kind, levels=(5, 4, 3), codebook_size=64, codebook_width=4)


@pytest.fixture(params=KINDS)
def quantiser(request) -> TokenQuantiser:
    torch.manual_seed(0)
    made = TokenQuantiser(config(request.param), WIDTH)
    # Vector quantisation takes its first codes from the first batch.
    made(torch.randn(32, 16, WIDTH))
    return made.eval()


def test_tokens_with_one_code_are_one_embedding(quantiser) -> None:
    tokens, (codes, *_) = quantiser(torch.randn(8, 16, WIDTH))
    assert codes.shape == (8, 16) and codes.min() >= 0 and codes.max() < quantiser.num_codes
    flat, ids = tokens.flatten(0, 1), codes.flatten()
    assert len(ids.unique()) > 5
    for code in ids.unique():
        same = flat[ids == code]
        torch.testing.assert_close(same, same[:1].expand_as(same), rtol=1e-4, atol=1e-5)
    assert len(flat.mul(1e4).round().unique(dim=0)) == len(ids.unique())


def test_quantising_twice_in_evaluation_is_quantising_once(quantiser) -> None:
    tokens = torch.randn(4, 16, WIDTH)
    first, second = quantiser(tokens), quantiser(tokens)
    assert torch.equal(first.tokens, second.tokens) and torch.equal(first.codes.codes, second.codes.codes)


def test_vector_quantisation_takes_the_nearest_code() -> None:
    torch.manual_seed(0)
    quantiser = TokenQuantiser(config("vq"), WIDTH)
    quantiser(torch.randn(32, 16, WIDTH))
    quantiser.eval()
    tokens = torch.randn(4, 16, WIDTH)
    projected = quantiser.codebook.project_in(tokens)
    distances = torch.cdist(projected.flatten(0, 1), quantiser.codebook.codebook)
    assert torch.equal(quantiser(tokens).codes.codes.flatten(), distances.argmin(dim=1))


def test_finite_scalar_quantisation_rounds_every_channel_to_its_levels() -> None:
    torch.manual_seed(0)
    quantiser = TokenQuantiser(config("fsq"), WIDTH).eval()
    seen = []
    quantiser.codebook.project_out.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    quantiser(3 * torch.randn(64, 16, WIDTH))
    for channel, levels in enumerate((5, 4, 3)):
        assert len(seen[0][..., channel].mul(1e4).round().unique()) <= levels


def test_gradients_reach_what_comes_before(quantiser) -> None:
    tokens = torch.randn(2, 16, WIDTH, requires_grad=True)
    quantiser.train()
    quantiser(tokens).tokens.square().sum().backward()
    assert tokens.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_picks_the_codes_of_float32(kind) -> None:
    torch.manual_seed(0)
    quantiser = TokenQuantiser(config(kind), WIDTH)
    quantiser(torch.randn(32, 16, WIDTH))
    quantiser.eval()
    tokens = torch.randn(4, 16, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantiser(tokens).codes.codes, quantiser(tokens.clone()).codes.codes)
        codes = quantiser(tokens).codes.codes
    assert torch.equal(codes, quantiser(tokens).codes.codes)


def tiny_discrete(kind: str) -> Showo2:
    torch.manual_seed(0)
    model = FAMILY.build(replace(tiny_showo2_config(), quantiser=config(kind)), str(SCENES_TOKENIZER))
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [None, "float16"])
def test_a_model_with_a_quantiser_is_exported_whole(tmp_path, kind, dtype) -> None:
    model, source = tiny_discrete(kind), Scenes(num_samples=10)
    batch = model.processor.generation([source.sample("generation", i, None) for i in range(8)])
    output = model.generation(batch)
    assert output.codes.num_codes == (60 if kind == "fsq" else 64)
    assert (output.codes.loss is None) == (kind == "fsq")
    for _ in range(2):
        export_model(model.eval(), tmp_path / "out", {}, dtype=dtype, force=True)
    loaded = load_folder(tmp_path / "out")
    if dtype is None:
        prompts = ["a red circle"]
        assert torch.equal(loaded.generate(prompts), model.generate(prompts))
    expected = model.encoder.quantiser.state_dict()
    found = loaded.encoder.quantiser.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-3)


def test_a_quantiser_may_be_added_but_not_swapped() -> None:
    plain = FAMILY.config_of_size("scenes32")
    with_fsq, with_vq = (replace(plain, quantiser=config(kind)) for kind in ("fsq", "vq"))
    assert FAMILY.differing_parts(plain, with_fsq) == []
    assert FAMILY.differing_parts(with_fsq, with_vq) == ["quantiser"]


def test_continuous_tokens_have_no_codes() -> None:
    model = tiny_model("showo2")
    batch = model.processor.generation([Scenes(num_samples=1).sample("generation", 0, None)])
    assert model.generation(batch).codes is None


def test_usage_of_codes() -> None:
    codes = torch.tensor([[0, 0, 1, 1], [2, 2, 3, 3]])
    found = TokenCodes(codes, 8, None)
    assert (found.entropy_bits(), found.usage_fraction()) == (2.0, 0.5)
    assert TokenCodes(torch.zeros(3, 3, dtype=torch.int64), 8, None).entropy_bits() == 0.0
