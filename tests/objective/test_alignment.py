"""InfoNCE against a double loop, and against mutual information that is known."""

import math
from dataclasses import replace

import pytest
import torch
from branch_outputs import changed

from infotok_lit.batch import NegativeTexts
from infotok_lit.errors import SettingsError
from infotok_lit.objective.alignment import Alignment, NegativesConfig, info_nce
from infotok_lit.objective.config import ObjectiveConfig


def loop_info_nce(similarity, keys, present):
    """Eq. 9 written out: (A, log K) per row; rows and columns are the same batch."""
    results = []
    for i in range(len(keys)):
        others = [j for j in range(len(keys)) if j != i and present[j] and keys[j] != keys[i]]
        if not present[i]:
            results.append((0.0, 0.0))
            continue
        total = math.exp(similarity[i][i]) + sum(math.exp(similarity[i][j]) for j in others)
        results.append((-math.log(math.exp(similarity[i][i]) / total), math.log(1 + len(others))))
    return torch.tensor(results)


def align(inputs, keys, latent_width=8, temperature=0.2, present=None):
    """The head's contrast, and the same from a loop over plain cosine similarities."""
    torch.manual_seed(1)
    head = Alignment(inputs.text_embedding.weight.shape[1], latent_width, temperature)
    mean = torch.randn(len(keys), 4, latent_width)
    present = [True] * len(keys) if present is None else present
    inputs.text.key.copy_(torch.tensor(keys))
    first = [keys.index(key) for key in keys]
    inputs.text.ids.copy_(inputs.text.ids[first])
    inputs.text.mask.copy_(inputs.text.mask[first])
    inputs.text.mask[[i for i, there in enumerate(present) if not there]] = False
    images = [row.mean(0) for row in mean]
    texts = []
    for ids, mask in zip(inputs.text.ids, inputs.text.mask, strict=True):
        words = [inputs.text_embedding.weight[word] for word, there in zip(ids, mask, strict=True) if there]
        texts.append(head.text_map(sum(words, torch.zeros(12)) / max(len(words), 1)))
    cosine = [[torch.cosine_similarity(a, b, dim=0).item() / temperature for b in texts] for a in images]
    return head(mean, inputs), loop_info_nce(cosine, keys, present)


@pytest.mark.parametrize("keys", [[0, 1, 2, 3, 4, 5], [0, 1, 0, 2, 1, 0], [7, 7, 7, 7, 7, 7]])
def test_equals_a_double_loop(make_inputs, keys):
    contrast, expected = align(make_inputs(batch=6), keys)
    torch.testing.assert_close(torch.stack([contrast.nats, contrast.log_k], 1), expected, rtol=1e-4, atol=1e-5)
    assert (contrast.nats >= 0).all()
    assert (contrast.bound <= contrast.log_k + 1e-6).all()


def test_images_without_text_are_neither_anchors_nor_candidates(make_inputs):
    present = [True, False, True, True, False, True]
    contrast, expected = align(make_inputs(batch=6), [0, 9, 1, 0, 9, 2], present=present)
    torch.testing.assert_close(torch.stack([contrast.nats, contrast.log_k], 1), expected, rtol=1e-4, atol=1e-5)
    assert contrast.paired.tolist() == present
    assert contrast.term().elements.tolist() == [1, 0, 1, 1, 0, 1]


def test_without_negatives_there_is_nothing_to_learn(make_inputs):
    inputs = make_inputs(batch=3)
    head = Alignment(12, 8, 0.1)
    inputs.text.key.fill_(5)
    mean = torch.randn(3, 4, 8, requires_grad=True)
    contrast = head(mean, inputs)
    contrast.nats.sum().backward()
    assert torch.equal(contrast.nats, torch.zeros(3)) and torch.equal(contrast.log_k, torch.zeros(3))
    assert torch.equal(mean.grad, torch.zeros_like(mean))


def test_bound_equals_log_k_minus_a_when_no_text_occurs_twice(make_inputs):
    contrast, _ = align(make_inputs(batch=6), list(range(6)))
    torch.testing.assert_close(contrast.bound, contrast.log_k - contrast.nats)


def test_the_embedding_table_receives_no_gradient(make_inputs):
    inputs = make_inputs()
    inputs.text_embedding.weight.requires_grad_()
    head = Alignment(12, 8, 0.1)
    head(torch.randn(3, 4, 8), inputs).nats.sum().backward()
    assert inputs.text_embedding.weight.grad is None and head.text_map.weight.grad is not None


def ideal_bound(num_texts: int, batch: int):
    """The contrast of a critic that knows p(T | Z) exactly, where Z tells which of `num_texts` equally likely texts."""
    text = torch.randint(num_texts, (batch,))
    same = text[:, None] == text
    similarity = torch.where(same, 0.0, -100.0)
    return info_nce(similarity, torch.arange(batch), ~same, torch.ones(batch, dtype=torch.bool))


@pytest.mark.parametrize(("num_texts", "batch"), [(2, 32), (4, 64), (50, 64)])
def test_bound_never_exceeds_the_known_mutual_information(num_texts, batch):
    torch.manual_seed(0)
    bounds = torch.stack([ideal_bound(num_texts, batch).bound.mean() for _ in range(200)])
    error = bounds.std() / len(bounds) ** 0.5
    assert bounds.mean() <= math.log(num_texts) + 3 * error
    assert bounds.mean() > 0.8 * math.log(min(num_texts, batch))


def test_log_k_minus_a_would_exceed_it_when_texts_repeat():
    torch.manual_seed(0)
    contrast = ideal_bound(num_texts=4, batch=64)
    assert (contrast.log_k - contrast.nats).mean() > math.log(4) + 1


def gaussian_bound(batch: int, dimensions: int, correlation: float) -> torch.Tensor:
    """The contrast of the critic log p(t | z) / p(t) on pairs of Gaussians whose I = -dimensions / 2 log(1 - rho^2)."""
    noise = (1 - correlation**2) ** 0.5
    z = torch.randn(batch, dimensions)
    t = correlation * z + noise * torch.randn(batch, dimensions)
    similarity = t.square().sum(1) / 2 - torch.cdist(correlation * z, t).square() / (2 * noise**2)
    everyone = torch.ones(batch, dtype=torch.bool)
    return info_nce(similarity, torch.arange(batch), ~torch.eye(batch, dtype=torch.bool), everyone).bound.mean()


@pytest.mark.parametrize(
    ("information", "batch", "share"),
    [(0.5, 64, (0.95, 1.0)), (1.5, 256, (0.95, 1.0)), (3.0, 4, (0.0, 1.0)), (20.0, 64, (0.0, 1.0))],
)
def test_bound_finds_the_information_of_gaussians_below_its_ceiling_of_log_k(information, batch, share):
    torch.manual_seed(0)
    dimensions = 4
    correlation = (1 - math.exp(-2 * information / dimensions)) ** 0.5
    bounds = torch.stack([gaussian_bound(batch, dimensions, correlation) for _ in range(200)])
    error = 3 * (bounds.std() / len(bounds) ** 0.5).item()
    low, high = share
    assert low * information - error < bounds.mean().item() < high * information + error
    assert bounds.max().item() <= math.log(batch) + 1e-5
    if information > 3 * math.log(batch):
        assert bounds.mean().item() > 0.85 * math.log(batch)


NUM_TEXTS, SEEN = 8, 0.8


def channel_inputs(make_inputs, batch: int):
    """One of eight equally likely words; the tokens show it with probability 0.8 and otherwise another one."""
    word = torch.randint(NUM_TEXTS, (batch,))
    mistake = torch.where(torch.rand(batch) < SEEN, 0, torch.randint(1, NUM_TEXTS, (batch,)))
    shown = torch.nn.functional.one_hot((word + mistake) % NUM_TEXTS, 16).float()[:, None]
    mask = torch.ones(batch, 1, dtype=torch.bool)
    return changed(
        make_inputs(batch=batch),
        tokens=shown,
        token_index=torch.zeros(batch, 1, dtype=torch.int64),
        text_ids=word[:, None],
        text_mask=mask,
        target_mask=mask,
        text_key=word,
        text_embedding=torch.eye(NUM_TEXTS, 12),
    )


def trained_bounds(make_infotok, make_inputs, **settings) -> torch.Tensor:
    """Alignment's bounds, nats, on 60 batches of that channel after 200 steps."""
    infotok = make_infotok(ObjectiveConfig(terms=("alignment",), temperature=0.3, **settings))
    optimizer = torch.optim.Adam(infotok.parameters(), lr=1e-2)
    torch.manual_seed(0)
    for step in range(200):
        optimizer.zero_grad()
        infotok("generation", channel_inputs(make_inputs, 64), step).loss.backward()
        optimizer.step()
    with torch.no_grad():
        reports = [infotok("generation", channel_inputs(make_inputs, 256), 0).report for _ in range(60)]
    return torch.stack([report["alignment_bound_nats"] for report in reports])


def test_the_trained_head_finds_the_information_of_a_channel_and_no_more(make_infotok, make_inputs):
    known = math.log(NUM_TEXTS) + SEEN * math.log(SEEN) + (1 - SEEN) * math.log((1 - SEEN) / (NUM_TEXTS - 1))
    bounds = trained_bounds(make_infotok, make_inputs)
    error = bounds.std() / len(bounds) ** 0.5
    assert 0.9 * known < bounds.mean() < known + 3 * error


def test_with_the_texts_of_other_images_it_finds_none(make_infotok, make_inputs):
    bounds = trained_bounds(make_infotok, make_inputs, shuffled_texts=True)
    assert bounds.mean() < 3 * bounds.std() / len(bounds) ** 0.5


def test_shuffled_texts_are_those_of_the_row_below_with_their_negatives(make_inputs):
    torch.manual_seed(1)
    inputs, mean = make_inputs(batch=4), torch.randn(4, 5, 8)
    head, control = (Alignment(12, 8, 0.2, NegativesConfig(from_data=1), shuffled_texts=on) for on in (False, True))
    control.load_state_dict(head.state_dict())
    false = NegativeTexts(torch.randint(20, (4, 2, 3)), torch.rand(4, 2, 3) < 0.7)
    inputs = replace(inputs, text=inputs.text._replace(negatives=false))
    below = [1, 2, 3, 0]
    moved = inputs.text._replace(
        **{name: getattr(inputs.text, name)[below] for name in ("ids", "mask", "target_mask", "key")},
        negatives=NegativeTexts(false.ids[below], false.mask[below]),
    )
    expected, found = head(mean, replace(inputs, text=moved)), control(mean, inputs)
    torch.testing.assert_close(found.nats, expected.nats)
    assert not torch.allclose(found.nats, head(mean, inputs).nats)


def test_shuffled_texts_are_refused_where_they_are_no_control(make_inputs):
    with pytest.raises(SettingsError, match="2 or more images"):
        Alignment(12, 8, 0.2, shuffled_texts=True)(torch.randn(1, 5, 8), make_inputs(batch=1))
    with pytest.raises(SettingsError, match="shuffled_texts is a control"):
        ObjectiveConfig(terms=("compactness",), shuffled_texts=True)
