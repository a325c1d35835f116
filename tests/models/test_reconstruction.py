"""Reconstruction alignment: what the loss sees, what it asks, where its gradient goes, for every family."""

from dataclasses import replace

import pytest
import torch
from tiny import FAMILIES, tiny_model, tiny_showo2_config
from torch import Tensor, nn

from infotok_lit.assets import SCENES_TOKENIZER
from infotok_lit.batch import IMAGE_TOKEN_ID, GenerationBatch
from infotok_lit.models.common.reconstruction import (
    DESCRIBE_TEMPLATES,
    RandomTemplates,
    ReconstructionConfig,
)
from infotok_lit.models.harmon.sampling import RandomNumbers as HarmonNumbers
from infotok_lit.models.harmon.sampling import random_numbers as draw_harmon
from infotok_lit.models.openuni.diffusion import random_numbers as draw_openuni
from infotok_lit.models.showo2.diffusion import on_path, training_time
from infotok_lit.models.showo2.diffusion import random_numbers as draw_showo2
from infotok_lit.models.showo2.family import FAMILY as SHOWO2
from infotok_lit.models.unified import UnifiedModel
from infotok_lit.scenes import Scenes

AS_USUAL = ReconstructionConfig()
SHORT = ReconstructionConfig(templates=("Describe this.", "What is here, and what colours does it have?"))
"""Requests of different length, so that rows are padded."""


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


def lively(family: str) -> UnifiedModel:
    """A tiny model in which what is read reaches what is drawn: fresh weights let hardly anything through."""
    model = tiny_model(family)
    torch.manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


@pytest.fixture
def model(family) -> UnifiedModel:
    return lively(family)


def batch_of(model: UnifiedModel, count: int = 3) -> GenerationBatch:
    source = Scenes(num_samples=count)
    return model.processor.generation([source.sample("generation", i) for i in range(count)])


def draws_of(model: UnifiedModel, batch: GenerationBatch, seed: int = 5):
    torch.manual_seed(seed)
    if model.family == "harmon":
        latents, _ = model.latent_tokens(batch.pixel_values)
        mar = replace(model.config.mar, mask_ratio_std=10.0)  # hides any share above 0.3 equally often
        return draw_harmon(*latents.shape, mar, latents.device)
    shape = model.encode_images(batch.pixel_values).shape
    return (draw_showo2 if model.family == "showo2" else draw_openuni)(shape, torch.device("cpu"))


def row_of(draws, row: int, rows: int):
    """The draws of one image."""
    if not isinstance(draws, HarmonNumbers):
        return type(draws)(*(value[row : row + 1] for value in vars(draws).values()))

    def own(numbers: Tensor) -> Tensor:
        return numbers.unflatten(0, (2, rows, -1))[:, row].flatten(0, 1)  # two noise draws per token

    return HarmonNumbers(draws.hidden[row : row + 1], own(draws.timesteps), own(draws.noise))


def templates(*places: float, swap: float = 0.99) -> RandomTemplates:
    return RandomTemplates(torch.tensor(places), torch.full((len(places),), swap))


def loss_of(model: UnifiedModel, batch: GenerationBatch, config: ReconstructionConfig = SHORT, **others) -> Tensor:
    given = {"templates": templates(*[0.0, 0.9, 0.0][: len(batch.names)]), "random": draws_of(model, batch)}
    output = model.reconstruction(batch, config, **{**given, **others})
    return output.loss_sum / output.loss_count


# The gradient through what is understood


class Probe:
    """A transform that changes nothing and shows the gradient that reaches the tokens."""

    def __init__(self) -> None:
        self.offset: Tensor | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        self.offset = torch.zeros_like(tokens, requires_grad=True)
        return tokens + self.offset


@pytest.mark.parametrize("condition", ["same_res", "low_res", "blur8"])
def test_the_gradient_is_scaled_and_the_loss_is_not(model, condition) -> None:
    batch, found = batch_of(model), {}
    for scale in (1.0, 0.1):
        probe = Probe()
        loss = loss_of(
            model, batch, replace(SHORT, condition=condition, gradient_scale=scale), understood_transform=probe
        )
        found[scale] = (loss, *torch.autograd.grad(loss, probe.offset))
    assert found[1.0][0] == found[0.1][0]
    largest = found[1.0][1].abs().max().item()
    assert largest > 1e-6
    torch.testing.assert_close(found[0.1][1], 0.1 * found[1.0][1], rtol=1e-5, atol=1e-6 * largest)


ENCODERS = {"harmon": "encoder.", "showo2": "encoder.", "openuni": "vlm.model.vision_tower."}


def encoder_gradient(model: UnifiedModel, config: ReconstructionConfig) -> Tensor:
    model.zero_grad()
    loss_of(model, batch_of(model), config).backward()
    grads = [p.grad for name, p in model.named_parameters() if name.startswith(ENCODERS[model.family])]
    return torch.cat([g.flatten() for g in grads if g is not None] or [torch.zeros(1)])


def test_the_encoder_learns_from_a_tenth_of_what_it_is_understood_to_say(model) -> None:
    """Its gradient is linear in the scale; OpenUni's vision tower is no part of what draws, so at 0 nothing is left."""
    none, tenth, whole = (encoder_gradient(model, replace(SHORT, gradient_scale=scale)) for scale in (0.0, 0.1, 1.0))
    torch.testing.assert_close(tenth, none + 0.1 * (whole - none), rtol=1e-4, atol=1e-7)
    assert (whole - none).abs().max() > 1e-5
    assert none.any() == (model.family != "openuni")


def test_by_default_what_is_shared_gets_a_tenth_and_a_frozen_reader_nothing(model) -> None:
    scale = 0.0 if model.family == "openuni" else 0.1
    default, explicit = (encoder_gradient(model, replace(SHORT, gradient_scale=s)) for s in (None, scale))
    assert torch.equal(default, explicit)
    assert all(p.grad is None for p in model.autoencoder.parameters())
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    drawers = {
        "harmon": {"decoder.", "token_diffusion.", "project_in.", "project_out.", "llm."},
        "showo2": {"diffusion_head.", "time_embed.", "llm.", "encoder.generation_embed.", "encoder.semantic."},
        "openuni": {"meta_queries", "connector.", "projector.", "transformer."},
    }
    for prefix in drawers[model.family]:
        assert any(name.startswith(prefix) for name in reached), prefix


# What is asked


def as_text(model: UnifiedModel, ids: Tensor, mask: Tensor) -> list[str]:
    """Texts with runs of image slots as `{number}`."""
    texts = []
    for row, real in zip(ids.tolist(), mask.tolist(), strict=True):
        text, slots = "", 0
        for number in [number for number, there in zip(row, real, strict=True) if there] + [None]:
            if slots and number != IMAGE_TOKEN_ID:
                text, slots = f"{text}{{{slots}}}", 0
            if number == IMAGE_TOKEN_ID:
                slots += 1
            elif number is not None:
                text += model.processor.tokenizer.decode([number])
        texts.append(text)
    return texts


OPENING = "<|im_start|>user\n"
CLOSING = "<|im_end|>\n<|im_start|>assistant\n"


def test_harmon_puts_the_image_before_the_request_and_keeps_it_when_the_request_is_swapped() -> None:
    model = lively("harmon")
    found = as_text(model, *model.processor.reconstruction_prompts(["Describe this.", ""], 18))
    assert found == [f"{OPENING}{{18}}\nDescribe this.{CLOSING}", f"{OPENING}{{18}}Generate an image.{CLOSING}"]


def test_showo2_answers_the_request_with_the_image() -> None:
    prompts = replace(tiny_showo2_config().prompts, system="You are a helpful assistant.")
    model = SHOWO2.build(replace(tiny_showo2_config(), prompts=prompts), str(SCENES_TOKENIZER))
    found = as_text(model, *model.processor.reconstruction_prompts(["Describe this.", ""], 5, 17))
    before = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|>{5}<|vision_end|>"
    )
    after = "<|im_end|>\n<|im_start|>assistant\n<|vision_start|>{17}<|vision_end|><|im_end|>"
    assert found == [f"{before}Describe this.{after}", f"{before}{after}"]


def test_openuni_asks_after_the_image_and_opens_the_one_to_draw() -> None:
    model = lively("openuni")
    found = as_text(model, *model.processor.reconstruction_prompts(["Describe this.", ""]))
    before, after = "<|im_start|>user\n<img>{16}</img>\n", f"{CLOSING}<img>"
    assert found == [f"{before}Describe this.{after}", f"{before}Generate an image.{after}"]


def test_every_template_reaches_the_model_as_it_is_written(model) -> None:
    """Also through the tokenizer of Scenes, which knows few words: it falls back on bytes."""
    counts = {"harmon": [18], "showo2": [5, 17], "openuni": []}[model.family]
    found = as_text(model, *model.processor.reconstruction_prompts(DESCRIBE_TEMPLATES, *counts))
    assert all(template in text for template, text in zip(DESCRIBE_TEMPLATES, found, strict=True))


def test_the_text_is_read_and_the_captions_are_not(model) -> None:
    batch = batch_of(model)
    loss = loss_of(model, batch)
    assert loss_of(model, batch._replace(input_ids=batch.input_ids * 0, captions=["nothing"] * 3)) == loss
    assert loss_of(model, batch, templates=templates(0.9, 0.0, 0.9)) != loss
    assert loss_of(model, batch, replace(SHORT, template_swap=1.0)) != loss


def test_the_image_is_understood(model) -> None:
    """Another copy of the same image tells less or more."""
    losses = {c: loss_of(model, batch_of(model), replace(SHORT, condition=c)).item() for c in ("same_res", "blur8")}
    assert losses["same_res"] != losses["blur8"]


def test_a_row_does_not_depend_on_its_neighbours_and_their_padding(model) -> None:
    """Nor on how long their requests are."""
    batch, chosen = batch_of(model), templates(0.0, 0.9, 0.0)
    draws = draws_of(model, batch)
    together = model.reconstruction(batch, SHORT, templates=chosen, random=draws)
    apart = []
    for row in range(3):
        alone = GenerationBatch(
            batch.pixel_values[row : row + 1], *batch[1:4], *(part[row : row + 1] for part in batch[4:8])
        )
        own = RandomTemplates(chosen.template[row : row + 1], chosen.swap[row : row + 1])
        apart.append(model.reconstruction(alone, SHORT, templates=own, random=row_of(draws, row, 3)))
    torch.testing.assert_close(together.loss_sum, sum(part.loss_sum for part in apart), rtol=1e-4, atol=1e-4)
    assert together.loss_count == sum(part.loss_count for part in apart)


# What is predicted


def shifted(module: nn.Module, places: Tensor) -> torch.utils.hooks.RemovableHandle:
    """Adds noise to a module's output (B, positions, width) at some positions (B, positions)."""
    return module.register_forward_hook(lambda _, given, out: out + places.unsqueeze(-1) * torch.randn_like(out))


def test_harmons_loss_ignores_what_is_visible() -> None:
    model = lively("harmon")
    batch = batch_of(model)
    hidden = draws_of(model, batch).hidden
    assert hidden.any() and not hidden.all()
    expected = loss_of(model, batch)
    for places, same in ((~hidden, True), (hidden, False)):
        handle = shifted(model.decoder, places)
        assert (loss_of(model, batch) == expected) == same
        handle.remove()


@pytest.mark.parametrize("condition", ["low_res", "same_res", "blur8"])
def test_showo2s_loss_ignores_the_condition_the_text_and_the_time(condition) -> None:
    model = lively("showo2")
    batch, config = batch_of(model), replace(SHORT, condition=condition)
    expected = loss_of(model, batch, config)
    seen = {}
    original = model.processor.reconstruction_prompts
    model.processor.reconstruction_prompts = lambda *given: seen.setdefault("ids", original(*given))
    loss_of(model, batch, config)
    drawn = torch.zeros(seen["ids"][0].shape, dtype=torch.bool)
    for row, ids in enumerate(seen["ids"][0].tolist()):
        last = max(i for i, number in enumerate(ids) if number == IMAGE_TOKEN_ID)
        drawn[row, last - 15 : last + 1] = True  # 4 x 4 tokens; before them, the time
    for places, same in ((~drawn, True), (drawn, False)):
        handle = shifted(model.diffusion_head, places)
        assert (loss_of(model, batch, config) == expected) == same
        handle.remove()


def test_the_mean_is_over_what_is_predicted(model) -> None:
    batch = batch_of(model)
    output = model.reconstruction(batch, SHORT, random=draws_of(model, batch))
    hidden = int(draws_of(model, batch).hidden.sum()) if model.family == "harmon" else 0
    expected = {"harmon": 2 * hidden, "showo2": 3 * 16 * 48, "openuni": 3 * 16 * 48}
    assert output.loss_count == expected[model.family]


# Against what is known from elsewhere


def test_harmon_reads_understood_tokens_as_it_would_read_words() -> None:
    """With the projected tokens as further rows of the vocabulary, reconstruction is text-to-image."""
    model = lively("harmon")
    batch, draws = batch_of(model), draws_of(model, batch_of(model))
    expected = loss_of(model, batch)
    ids, mask = model.processor.reconstruction_prompts([SHORT.templates[i] for i in (0, 1, 0)], 18)
    with torch.no_grad():
        visual = model.project_for_llm(model.encoder(*model.latent_tokens(batch.pixel_values))).flatten(0, 1)
        table = model.llm.get_input_embeddings().weight
        ids[ids == IMAGE_TOKEN_ID] = len(table) + torch.arange(len(visual))
        model.llm.set_input_embeddings(nn.Embedding.from_pretrained(torch.cat([table, visual])))
    output = model.generation(batch._replace(input_ids=ids, attention_mask=mask), random=draws)
    torch.testing.assert_close(output.loss_sum / output.loss_count, expected)


def test_showo2_at_one_size_is_its_own_sequence_of_two_images() -> None:
    model = lively("showo2")
    batch, draws = batch_of(model), draws_of(model, batch_of(model))
    expected = loss_of(model, batch, replace(SHORT, condition="same_res"))
    clean = model.encode_images(batch.pixel_values)
    time = training_time(draws.normal, 0.0, 17)
    noisy, velocity = on_path(clean, draws.noise, time)
    ids, _ = model.processor.reconstruction_prompts([SHORT.templates[i] for i in (0, 1, 0)], 17, 17)
    both = torch.stack([clean, noisy], dim=1).flatten(0, 1)
    times = torch.stack([torch.ones_like(time), time], dim=1).flatten()
    loss_sum, loss_count = model.flow_loss(
        model.run_sequence(ids, both, times),
        torch.stack([velocity, velocity], dim=1).flatten(0, 1),
        torch.tensor([False, True] * 3),
    )
    torch.testing.assert_close(loss_sum / loss_count, expected)


def test_openuni_is_the_official_loss_of_drawing_from_an_image() -> None:
    model = lively("openuni")
    batch, draws = batch_of(model), draws_of(model, batch_of(model))
    ids, mask = model.processor.editing_prompts([SHORT.templates[i] for i in (0, 1, 0)])
    official = model.editing_loss(batch._replace(input_ids=ids, attention_mask=mask), batch.pixel_values, draws)
    torch.testing.assert_close(loss_of(model, batch), official)


def test_every_number_is_drawn_from_the_generator(model) -> None:
    batch, losses = batch_of(model), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        losses.append(model.reconstruction(batch, AS_USUAL).loss_sum.item())
    assert losses[0] == losses[1] != losses[2]


def test_inference_does_not_notice(model) -> None:
    batch = batch_of(model, 2)
    names = model.state_dict().keys()

    def infer() -> tuple[list[str], Tensor]:
        return model.describe(batch.pixel_values, ["what is it?"] * 2, 3), model.generate(batch.captions)

    answers, images = infer()
    loss_of(model, batch).backward()
    again, same = infer()
    assert answers == again and torch.equal(images, same)
    assert model.state_dict().keys() == names


def test_a_copy_that_is_no_whole_number_of_tokens_is_refused() -> None:
    model = lively("showo2")
    with pytest.raises(ValueError, match="image size 20 x 20 is not a multiple of 8"):
        loss_of(model, batch_of(model), ReconstructionConfig(condition="low_res", condition_size=20))
