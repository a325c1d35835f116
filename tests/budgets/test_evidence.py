"""The evidence compares like with like, and its controls are what they are called."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from tiny import tiny_model

from infotok_lit.batch import IMAGE_TOKEN_ID
from infotok_lit.commands.bench_reading import at_budget, before_language_model, image_tokens, shapes_of
from infotok_lit.commands.budget_evidence import budget_evidence, report
from infotok_lit.errors import ExplainedError, MissingFileError, SettingsError
from infotok_lit.modules.token_budget import TokenSelector
from infotok_lit.objective.compactness import Projection, ProjectionConfig
from infotok_lit.objective.token_budget import TokenBudget
from infotok_lit.scenes.render import render
from infotok_lit.study.token_budgets import (
    ALL,
    NO_PLACES,
    POLICIES,
    RANDOM_SAME,
    RATE,
    RATE_SAME,
    Answers,
    Evidence,
    EvidenceOptions,
    Shown,
    attention_received,
    pixel_error,
)

OPTIONS = EvidenceOptions(questions=7, budgets=(0.5,), batch_size=4)


@pytest.fixture(scope="module", params=["harmon", "showo2"])
def evidence(request) -> Evidence:
    base = tiny_model(request.param)
    torch.manual_seed(1)
    width = base.token_widths["understanding"]
    projection = Projection(ProjectionConfig(hidden_width=16, latent_width=4), width, with_variance=True)
    for layer in (projection.features[1], projection.mean):
        torch.nn.init.normal_(layer.weight)  # so that images differ in what they carry
    selector = TokenSelector(projection, TokenBudget(base.num_extras["understanding"]))
    found = Evidence(base, selector, OPTIONS)
    selector.budget.observe(torch.cat([shown.rates for _, shown in found._batches()]))
    return found


def test_every_choice_reads_as_many_tokens(evidence) -> None:
    measured = evidence.measure(lambda done, what: None)
    extras = evidence.base.num_extras["understanding"]
    assert extras == {"harmon": 2, "showo2": 0}[evidence.base.family]
    assert set(measured) == {ALL, *POLICIES} | ({NO_PLACES} if extras else set())
    tokens = measured[RATE]["0.5"].tokens
    assert len(set(tokens.tolist())) > 1, "images differ in what they deserve"
    for name in set(POLICIES) - {RATE_SAME, RANDOM_SAME}:
        assert measured[name]["0.5"].tokens.tolist() == tokens.tolist(), name
    for name in (RATE_SAME, RANDOM_SAME):
        same = measured[name]["0.5"].tokens
        assert max(same) - min(same) <= 1
        assert same.sum() == tokens.sum()
    assert set(measured[ALL][""].tokens) == {16 + extras}
    assert not extras or set(measured[NO_PLACES][""].tokens) == {extras}


@torch.no_grad()
def test_attention_is_what_the_last_word_pays_to_each_token(evidence) -> None:
    shown = next(evidence._batches())[1]
    scores = attention_received(shown)
    base = shown.base
    extras = base.num_extras["understanding"]
    body = type(base.text_body)._from_config(base.text_body.config, attn_implementation="eager")
    body.load_state_dict(base.text_body.state_dict())
    for row, question in enumerate(shown.questions):
        visual = base.project_for_llm(shown.tokens[row : row + 1])
        ids, _ = base.processor.understanding_prompts([question], num_image_tokens=visual.shape[1])
        allowed = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        if base.family == "showo2":  # its image, from one position further right, sees all of itself
            inside = (ids[0] == IMAGE_TOKEN_ID).roll(base.seen_after_image)
            allowed |= inside & inside[:, None]
        embeds = base.embed_with_images(ids, visual)
        hidden = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)[None, None]
        layers = body(inputs_embeds=embeds, attention_mask=hidden, output_attentions=True).attentions
        read = layers[min(2, len(layers)) - 1][0].mean(0)[-1][ids[0] == IMAGE_TOKEN_ID]
        # The grid, then Harmon's buffers; before the grid, the time of an image of Show-o2.
        read = read[1:] if base.family == "showo2" else torch.cat([read[-extras:], read[:-extras]])
        torch.testing.assert_close(scores[row], read, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_pixel_error_is_that_of_each_place(evidence) -> None:
    shown = next(evidence._batches())[1]
    decoded = shown.base.decode_images(shown.base.encode_images(shown.pixels))
    error = (decoded - shown.pixels).square()
    scores = pixel_error(shown)[:, shown.base.num_extras["understanding"] :]
    for place in (0, 5, 15):
        top, left = 8 * (place // 4), 8 * (place % 4)
        expected = error[:, :, top : top + 8, left : left + 8].mean((1, 2, 3))
        torch.testing.assert_close(scores[:, place], expected)


def test_places_of_objects_are_known(evidence) -> None:
    for number in range(OPTIONS.questions):
        covered, texture = evidence._truth_of_places(number, 4)
        centres = {(int(y) // 8, int(x) // 8) for y, x in (item.centre for item in evidence.drawn[number].objects)}
        assert all(covered.reshape(4, 4)[centre] > 0 for centre in centres)
        assert (texture > 0).all()
        assert 0 < (covered > 0).sum() <= 9 * len(evidence.drawn[number].objects)


def test_places_need_no_whole_number_of_pixels(evidence) -> None:
    """As with Show-o2's 27 on a side: a pixel belongs to two of them by its parts."""
    edges = np.arange(4) * 32 / 3
    pixel = np.arange(32)
    parts = np.clip(np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel), 0, None) * 3 / 32
    scene, spec = evidence.drawn[0], evidence.scenes.spec
    bare = render(replace(scene, objects=()), spec).astype(float)
    grey, touched = bare.mean(-1), (render(scene, spec) != bare).any(-1)
    covered, texture = evidence._truth_of_places(0, 3)
    assert covered == pytest.approx((parts @ touched @ parts.T).flatten())
    strength = np.sqrt(parts @ grey**2 @ parts.T - (parts @ grey @ parts.T) ** 2)
    assert texture == pytest.approx(strength.flatten())


def test_kept_places_are_lit_where_they_lie(evidence, monkeypatch) -> None:
    monkeypatch.setattr(Shown, "side", 3)
    three = torch.zeros(7, 9 + evidence.base.num_extras["understanding"], dtype=torch.bool)
    three[:, -5] = True  # the middle of nine
    monkeypatch.setattr(evidence.selector.budget, "kept", lambda rates, keep: three)
    (whole, _), (dark, words) = evidence.examples(1)
    lit = (dark == whole).all(-1)
    assert lit[11:21, 11:21].all() and not lit[:10].any() and not lit[:, 22:].any()
    assert words == "budget 0.5: 1 of 9 places"


def test_differences_are_paired_and_by_kind() -> None:
    rng = np.random.default_rng(0)
    kinds = np.array(["counting", "place"] * 50)
    right = rng.integers(0, 2, 100)
    worse = right * (np.arange(100) % 10 > 0)
    tokens = np.full(100, 12)
    measured = {
        ALL: {"": Answers(right, tokens)},
        RATE: {"0.5": Answers(right, tokens)},
        "random": {"0.5": Answers(worse, tokens)},
    }
    lines = report([measured], [{"a fact": 0.5}], kinds).splitlines()
    cells = [cell.strip() for cell in next(line for line in lines if line.startswith("| random")).split("|")[1:-1]]
    lost = worse - right
    margin = 1.984 * lost.std(ddof=1) / 10
    assert cells[4:7] == [f"{worse.mean():.3f}", f"{worse[::2].mean():.3f}", f"{worse[1::2].mean():.3f}"]
    assert cells[7] == f"{100 * lost.mean():+.1f} ± {100 * margin:.1f}"
    assert cells[8] == f"{stats.ttest_rel(worse, right).pvalue:.2g}", "a single test needs no correction"
    assert "- a fact: 0.5" in lines


def test_tokens_are_those_of_all_models() -> None:
    kinds, right = np.array(["place"] * 4), np.ones(4)
    models = [{RATE: {"0.5": Answers(right, np.full(4, tokens))}} for tokens in (8, 12)]
    row = next(line for line in report(models, [{}, {}], kinds).splitlines() if line.startswith("| rate "))
    assert [cell.strip() for cell in row.split("|")[3:5]] == ["10.00", "8-12"]


def test_operations_of_prefill_follow_from_the_shapes() -> None:
    """Harmon 0.5B: two operations a weight and token, and for each pair of positions and layer, twice two a width."""
    model = shapes_of("harmon", "0.5b")
    weights = sum(p.numel() for name, p in model.text_body.named_parameters() if p.ndim == 2 and "embed" not in name)
    llm = model.config.llm
    for share, tokens in ((1.0, 1088), (0.5, 576)):
        found = at_budget(model, share, question_tokens=32)
        length = tokens + 32
        head = 2 * llm.vocab_size * llm.hidden_size
        pairs = 4 * length**2 * llm.hidden_size * llm.num_hidden_layers
        assert found["image_tokens"] == tokens
        # Rotary positions are worked out by a small product of matrices.
        assert found["prefill"] == pytest.approx((2 * weights * length + pairs + head) / 1e9, rel=1e-4)
    before = before_language_model(model)
    assert before["MAREncoder"] == pytest.approx(228, abs=1)
    assert before["Encoder"] == pytest.approx(556, abs=1)


def test_the_time_of_an_image_is_always_read() -> None:
    model = shapes_of("showo2", "1.5b")
    assert [image_tokens(model, share) for share in (1.0, 0.5)] == [1 + 27 * 27, 1 + 364]


@pytest.mark.parametrize("name", ["table.md", "numbers.json", "answers.png", "kept.png"])
def test_no_file_that_is_there_is_replaced(tmp_path, name) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(SettingsError, match=f"{name} exists; choose another name"):
        budget_evidence(["no model"], tmp_path)
    with pytest.raises(MissingFileError, match="there is no model at no model"):
        budget_evidence(["no model"], tmp_path, force=True)


@pytest.mark.parametrize(
    ("model", "said"),
    [("no model", "there is no model at no model"), ("showo2_scenes32", "not families: harmon, showo2")],
)
def test_all_models_are_looked_at_before_the_first_is_measured(tmp_path, monkeypatch, model, said) -> None:
    monkeypatch.setattr("infotok_lit.model_choice.ModelChoice.load", lambda self: pytest.fail("it is measured"))
    with pytest.raises(ExplainedError, match=said):
        budget_evidence(["harmon_scenes32", model], tmp_path / "out")


def test_a_budget_that_is_given_twice_is_measured_once(evidence, tmp_path, monkeypatch) -> None:
    class Choice:
        family = evidence.base.family
        load = staticmethod(lambda: evidence.base)
        token_selector = staticmethod(lambda base, keep: evidence.selector)

    monkeypatch.setattr("infotok_lit.commands.budget_evidence.choose", lambda source, options: Choice)
    budget_evidence(["a"], tmp_path / "out", questions=3, budgets=[0.5, 0.25, 0.5], examples=1)
    numbers = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert numbers["budgets"] == list(map(float, numbers["answers"][0][RATE])) == [0.5, 0.25]


def test_the_numbers_are_written(evidence, tmp_path) -> None:
    from infotok_lit.commands.budget_evidence import _draw, _means

    measured = [{ALL: {"": Answers(np.ones(7), np.full(7, 18))}, RATE: {"0.5": Answers(np.zeros(7), np.full(7, 9))}}]
    _draw(tmp_path, measured, evidence, examples=2)
    assert {path.name for path in tmp_path.iterdir()} == {"answers.png", "kept.png"}
    assert json.loads(json.dumps(_means(measured[0])))[RATE]["0.5"] == {"answers": 0.0, "tokens": 9.0}
