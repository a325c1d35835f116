"""Show-o2's sequences and masks, and its logits with and without a cache."""

import pytest
import torch
from loud import NEW_TOKENS, PROMPTS, loud_model

from infotok_lit.batch import IMAGE_TOKEN_ID
from infotok_lit.models.showo2.diffusion import from_runs, to_runs
from infotok_lit.models.showo2.inference import continue_greedily
from infotok_lit.models.showo2.model import Showo2
from infotok_lit.models.showo2.sequence import attend, build_mask, dense_mask, find_regions, insert_images

X = IMAGE_TOKEN_ID


@pytest.fixture(scope="module")
def model() -> Showo2:
    return loud_model("showo2")


@torch.no_grad()
def test_the_cache_leaves_every_logit_as_it_is(model, images) -> None:
    ids, mask = model.processor.understanding_prompts(PROMPTS)
    embeds = model.embed_with_images(ids, model.project_for_llm(model.understood_tokens(images)))
    regions = find_regions(ids)
    logits = []
    with model.llm.lm_head.register_forward_hook(lambda _, given, found: logits.append(found)):
        cached, whole = (continue_greedily(model, embeds, mask, regions, NEW_TOKENS, cache) for cache in (True, False))
    assert torch.equal(cached, whole)
    torch.testing.assert_close(*torch.stack(logits).chunk(2), rtol=1e-4, atol=1e-4)


# Sequences and masks


def test_regions_are_runs_of_image_slots() -> None:
    ids = torch.tensor([[1, X, X, 2, X, X, X], [X, X, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 6, 7]])
    assert find_regions(ids).tolist() == [[[1, 2], [4, 3]], [[0, 2], [0, 0]], [[0, 0], [0, 0]]]
    assert find_regions(ids[2:]).tolist() == [[[0, 0]]]
    # Without reading the ids: who knows how many images there are, says so.
    assert torch.equal(find_regions(ids, 2), find_regions(ids))
    assert find_regions(ids, 1).tolist() == [[[1, -1]], [[0, 2]], [[0, 0]]]


def test_more_images_than_announced_are_refused() -> None:
    ids = torch.tensor([[1, X, X, 2, X, X]])
    with pytest.raises(ValueError, match="2 positions with its time"):
        insert_images(torch.zeros(1, 6, 1), find_regions(ids, 1), torch.zeros(1, 1), torch.zeros(1, 1, 1))


def test_images_stand_where_their_slots_are() -> None:
    ids = torch.tensor([[1, X, X, X, 2, X, X, X], [1, 2, X, X, X, 3, 4, 5]])
    times = torch.tensor([10.0, 20.0, 30.0, 40.0]).unsqueeze(1)
    tokens = torch.arange(100.0, 108.0).view(4, 2, 1)
    found = insert_images(torch.zeros(2, 8, 1), find_regions(ids), times, tokens).squeeze(-1)
    assert found.tolist() == [[0, 10, 100, 101, 0, 20, 102, 103], [40, 0, 30, 104, 105, 0, 0, 0]]


def test_an_image_that_does_not_fit_its_slots_is_refused() -> None:
    ids = torch.tensor([[1, X, X, X]])
    with pytest.raises(ValueError, match="5 positions with its time, but the text leaves 3"):
        insert_images(torch.zeros(1, 4, 1), find_regions(ids), torch.zeros(1, 1), torch.zeros(1, 4, 1))


def test_a_mask_is_causal_but_for_images() -> None:
    regions = torch.tensor([[[1, 3], [5, 2]]])
    mask = dense_mask(regions, 8)[0, 0]
    for query in range(8):
        for key in range(8):
            together = any(start <= query < start + n and start <= key < start + n for start, n in ((1, 3), (5, 2)))
            assert mask[query, key] == (key <= query or together)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_both_kinds_of_attention_agree(kv_heads) -> None:
    torch.manual_seed(0)
    regions = torch.tensor([[[1, 3], [5, 9]], [[2, 20], [0, 0]]])
    query, key, value = (torch.randn(2, heads, 32, 16) for heads in (4, kv_heads, kv_heads))
    dense = attend(query, key, value, build_mask(regions, 32, flex=False), 0.25)
    blocks = attend(query, key, value, build_mask(regions, 32, flex=True), 0.25)
    torch.testing.assert_close(blocks, dense, rtol=1e-5, atol=1e-5)


def test_attention_takes_what_autocast_makes_of_norms() -> None:
    """Queries and keys in float32 beside values in bfloat16: kernels refuse two types."""
    torch.manual_seed(0)
    mask = build_mask(torch.tensor([[[1, 9]]]), 16, flex=True)
    query, key, value = torch.randn(3, 1, 2, 16, 16).unbind()
    expected = attend(query, key, value, dense_mask(torch.tensor([[[1, 9]]]), 16), 0.25)
    found = attend(query, key, value.bfloat16(), mask, 0.25)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.05)


def test_a_token_predicts_a_run_of_four_latent_pixels() -> None:
    latents = torch.arange(2 * 3 * 2 * 6.0).view(2, 3, 2, 6)
    runs = to_runs(latents)
    assert runs.shape == (2, 3, 12)
    for token in range(3):
        for pixel in range(4):
            row, column = divmod(4 * token + pixel, 6)
            assert torch.equal(runs[:, token, 3 * pixel : 3 * pixel + 3], latents[:, :, row, column])
    assert torch.equal(from_runs(runs, 3, 2, 6), latents)
