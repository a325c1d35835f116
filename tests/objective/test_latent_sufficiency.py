"""The latent decoder: its density, what it sees, what it refuses; and the sine-cosine places of both decoders."""

import pytest
import torch
from branch_outputs import changed
from torch.distributions import Normal

from infotok_lit.objective.sufficiency import DecoderConfig, LatentDecoder, grid_positions


@pytest.fixture
def decoder() -> LatentDecoder:
    torch.manual_seed(0)
    decoder = LatentDecoder(DecoderConfig(width=16, depth=2, heads=2), latent_width=16, latent_channels=5, num_extra=2)
    torch.nn.init.normal_(decoder.log_variance)
    return decoder


def test_nats_are_those_of_a_normal_density(decoder, make_inputs):
    inputs = make_inputs()
    mean, log_variance = decoder.predict(inputs.tokens, inputs, inputs.latent_grid)
    expected = -Normal(mean, (log_variance / 2).exp()).log_prob(inputs.latents).sum((1, 2))
    term = decoder(inputs.tokens, inputs)
    torch.testing.assert_close(term.per_image, expected)
    assert term.elements.tolist() == 3 * [12 * 5]


def test_all_latents_are_predicted_from_any_subset_of_tokens_and_any_grid(decoder, make_inputs):
    inputs = make_inputs(tokens=3)
    assert decoder.predict(inputs.tokens, inputs, inputs.latent_grid)[0].shape == (3, 12, 5)
    wide = changed(inputs, latents=torch.randn(3, 14, 5), latent_grid=(2, 7))
    assert decoder.predict(inputs.tokens, wide, wide.latent_grid)[0].shape == (3, 14, 5)


def test_order_of_the_tokens_does_not_matter_but_their_place_does(decoder, make_inputs):
    inputs = make_inputs()
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = changed(inputs, token_index=inputs.token_index[:, order])
    expected = decoder(inputs.tokens, inputs).per_image
    torch.testing.assert_close(decoder(inputs.tokens[:, order], shuffled).per_image, expected)
    assert not torch.isclose(decoder(inputs.tokens, shuffled).per_image, expected).any()


def test_every_latent_sees_the_tokens_and_its_own_place(decoder, make_inputs):
    inputs = make_inputs()
    mean, _ = decoder.predict(inputs.tokens, inputs, inputs.latent_grid)
    (gradient,) = torch.autograd.grad(mean[0, 7].sum(), inputs.tokens)
    assert gradient[0].abs().sum(-1).min() > 0 and gradient[1:].abs().max() == 0
    assert torch.cdist(mean[0], mean[0]).fill_diagonal_(1).min() > 1e-3


def test_latents_receive_no_gradient(decoder, make_inputs):
    inputs = make_inputs()
    inputs.latents.requires_grad_()
    decoder(inputs.tokens, inputs).per_image.sum().backward()
    assert inputs.latents.grad is None and inputs.tokens.grad is not None


def test_missing_or_mis_shaped_latents_are_refused(decoder, make_inputs):
    inputs = make_inputs()
    with pytest.raises(ValueError, match="give latents and latent_grid"):
        decoder(inputs.tokens, changed(inputs, latents=None))
    with pytest.raises(ValueError, match=r"latents must have shape \(3, 10, 5\), not \(3, 12, 5\)"):
        decoder(inputs.tokens, changed(inputs, latent_grid=(2, 5)))


def test_grids_of_different_fineness_agree_on_what_lies_where():
    coarse, fine = (grid_positions(grid, 32, torch.device("cpu")) for grid in ((1, 2), (3, 6)))
    torch.testing.assert_close(coarse[0], fine.view(3, 6, 32)[1, 1], rtol=0, atol=1e-4)
    torch.testing.assert_close(coarse[1], fine.view(3, 6, 32)[1, 4], rtol=0, atol=1e-4)


def test_places_of_a_large_grid_are_told_apart():
    places = grid_positions((32, 32), 32, torch.device("cpu"))
    distance = torch.cdist(places, places).fill_diagonal_(torch.inf)
    assert places.shape == (1024, 32) and distance.min() > 0.5
