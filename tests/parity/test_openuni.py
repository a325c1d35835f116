"""Every case of an OpenUni golden, replayed with the recorded random draws."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from golden import DECODED_IMAGE, SAMPLING_CHAIN, Golden
from openuni_replay import ORDERS, build, sana_config, without
from PIL import Image
from torch import Tensor

from infotok_lit.batch import IMAGE_TOKEN_ID, GenerationBatch, PairedText
from infotok_lit.models.common.images import crop_to_square, to_pixels
from infotok_lit.models.common.language_model import compact_positions, read_after_text
from infotok_lit.models.common.sampling import guide
from infotok_lit.models.openuni.diffusion import (
    RandomNumbers,
    add_noise,
    around_connector,
    build_scheduler,
    build_transformer,
    sana_timestep,
    timesteps_of,
    walk,
)
from infotok_lit.models.openuni.family import SamplingConfig
from infotok_lit.models.openuni.model import OpenUni
from infotok_lit.models.openuni.vlm import IMAGENET_MEAN, IMAGENET_STD, normalise
from infotok_lit.pictures import to_uint8

DRAWINGS = ("generate_text", "generate_text_nocfg", "generate_image")


@pytest.fixture(scope="module")
def golden(openuni_golden: Golden) -> Golden:
    return openuni_golden


@pytest.fixture(scope="module")
def model(golden: Golden) -> OpenUni:
    return build(golden)


def ids_of(golden: Golden, case: str, prefix: str = "") -> Tensor:
    """Recorded ids with our marker at image slots."""
    ids = golden.input(case, f"{prefix}input_ids")
    return ids.masked_fill(ids == golden.info["tokenizer"]["specials"]["<IMG_CONTEXT>"], IMAGE_TOKEN_ID)


def embed(model: OpenUni, ids: Tensor) -> Tensor:
    return model.vlm.get_input_embeddings()(ids)


def shuffled(model: OpenUni, pixels: Tensor) -> Tensor:
    """What enters the projector of the vision tower, (B, N, 4 C)."""
    seen = []
    hook = model.vlm.model.multi_modal_projector.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.vlm.model.get_image_features(pixels, return_dict=True)
    hook.remove()
    return seen[0]


@torch.no_grad()
@pytest.mark.parametrize("case", ["vit_extract", "vit_extract_interp", "vit_tower_nonsquare"])
def test_vision_tower(golden: Golden, model: OpenUni, case: str) -> None:
    pixels = golden.input(case, "pixel_values")
    golden.check(case, "tower_last_hidden", model.vlm.model.vision_tower(pixels).last_hidden_state)
    if "features" in golden.outputs(case):
        recorded = golden.output(case, "pixel_shuffled")
        golden.check(case, "pixel_shuffled", shuffled(model, pixels).view(recorded.shape))
        found = model.vlm.model.get_image_features(pixels, return_dict=True).pooler_output
        golden.check(case, "features", found)


@torch.no_grad()
@pytest.mark.parametrize("case", ["semantic_features", "semantic_features_down"])
def test_semantic_features(golden: Golden, model: OpenUni, case: str) -> None:
    pixels = golden.input(case, "pixel_values")
    golden.check(case, "normalised_resized", normalise(pixels, model.config.vision.input_side))
    golden.check(case, "features", model.understood_tokens(pixels))


@torch.no_grad()
def test_images_are_understood_at_another_size_than_that_of_the_position_table(golden: Golden) -> None:
    """The recorded run of the vision tower at that size, entered by images instead of normalised pixels."""
    case, side = "vit_extract_interp", golden.info["config"]["vit_interp"]
    tokens = golden.output(case, "features").shape[1]
    info = golden.info | {"config": golden.info["config"] | {"vit_input_size": side, "image_length": tokens}}
    model = build(Golden(info, golden.tensors))
    assert model.config.vision.image_size != model.config.vision.input_side == side
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    images = (golden.input(case, "pixel_values") * std + mean) * 2 - 1
    golden.check(case, "features", model.understood_tokens(images))
    ids, _ = model.processor.understanding_prompts(["why ?"])
    assert int((ids == IMAGE_TOKEN_ID).sum()) == tokens


@torch.no_grad()
@pytest.mark.parametrize("suffix", list(ORDERS))
def test_connector(golden: Golden, suffix: str) -> None:
    model = build(golden, suffix)
    case = f"connector{suffix or '_enc_proj'}"
    order, x = model.config.connector.order, golden.input(case, "x")
    before, after = around_connector(model.projector, order)
    connected = model.connector(before(x))
    golden.check(case, "llm2dit", after(connected))
    if not suffix:
        golden.check(case, "connector", connected)
        golden.check(case, "connector_layer0", model.connector.layers[0](x, None))


@torch.no_grad()
def test_small_activations(golden: Golden, model: OpenUni) -> None:
    case = "small_activations"
    golden.check(case, "connector", model.connector(golden.input(case, "x_connector")))
    golden.check(case, "mlp1", model.vlm.model.multi_modal_projector(golden.input(case, "x_mlp1")))
    layer = model.vlm.model.vision_tower.encoder.layer[0](golden.input(case, "x_vit"))
    golden.check(case, "vit_layer0", layer[0] if isinstance(layer, tuple) else layer)
    x = golden.input(case, "x_llm")
    golden.check(case, "llm_last_hidden", model.vlm.model.language_model(inputs_embeds=x).last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("case", ["meta_query_text", "meta_query_text_leftpad"])
def test_meta_queries(golden: Golden, model: OpenUni, case: str) -> None:
    ids, mask = golden.input(case, "input_ids"), golden.input(case, "attention_mask")
    whole = torch.cat([mask, mask.new_ones(len(mask), model.config.num_queries)], dim=1)
    golden.check(case, "attention_mask", whole)
    golden.check(case, "position_ids", compact_positions(whole))
    embeds = embed(model, ids)
    queries = model.meta_queries.expand(len(ids), -1, -1)
    golden.check(case, "inputs_embeds", torch.cat([embeds, queries], dim=1))
    golden.check(case, "query_hidden", read_after_text(model.text_body, embeds, mask, queries))
    golden.check(case, "cond", model.condition_on(embeds, mask)[1])


@torch.no_grad()
@pytest.mark.parametrize("case", ["sana_forward", "sana_forward_extra"])
def test_diffusion_transformer(golden: Golden, model: OpenUni, case: str) -> None:
    network = model.transformer
    if case == "sana_forward_extra":
        given = golden.info["config"]["transformer_extra"]
        network = build_transformer(sana_config(given), given["in_channels"]).eval()
        network.load_state_dict(without("state_sana_extra/", golden.tensors))
    latents, condition = golden.input(case, "hidden_states"), golden.input(case, "encoder_hidden_states")
    found = network(latents, condition, golden.input(case, "timestep"), return_dict=False)[0]
    golden.check(case, "pred", found)
    golden.check(case, "pred_allones_mask", found)


@torch.no_grad()
def test_autoencoder(golden: Golden, model: OpenUni) -> None:
    latents = model.encode_images(golden.input("vae", "pixels"))
    golden.check("vae", "latents", latents)
    golden.check("vae", "rec_from_latents", model.decode_images(latents), DECODED_IMAGE)
    golden.check("vae", "rec_from_z", model.decode_images(golden.input("vae", "z")), DECODED_IMAGE)


def draws(golden: Golden, case: str) -> RandomNumbers:
    return RandomNumbers(golden.input(case, "noise"), golden.input(case, "u"))


@torch.no_grad()
def test_flow_loss(golden: Golden, model: OpenUni) -> None:
    case, latents = "diff_loss", golden.input("diff_loss", "image_latents")
    given = draws(golden, case)
    timesteps = timesteps_of(given.uniform)
    golden.check(case, "timesteps", timesteps)
    golden.check(case, "sigmas", (timesteps / 1000).view(-1, 1, 1, 1))
    noisy = add_noise(latents, given.noise, timesteps)
    golden.check(case, "noisy_model_input", noisy)
    condition = golden.input(case, "prompt_embeds")
    golden.check(case, "model_pred", model.velocity(noisy, condition, timesteps))
    golden.check(case, "loss", model.flow_loss(latents, condition, given)[0] / latents.numel())


def batch_of(golden: Golden, case: str) -> GenerationBatch:
    ids, mask = ids_of(golden, case), golden.input(case, "attention_mask")
    empty = PairedText(ids[:, :1], mask[:, :1], mask[:, :1], torch.arange(len(ids)))
    pixels = golden.tensors.get(f"in/{case}/pixel_values", torch.zeros(len(ids), 3, 32, 32))
    return GenerationBatch(pixels, ids, mask, empty, [], [], [])


def check_gradients(golden: Golden, case: str, model: OpenUni) -> None:
    named = {name: p for name, p in model.named_parameters() if p.grad is not None}
    recorded = [name for name in golden.outputs(case) if name.startswith("grad/")]
    assert recorded
    for name in recorded:
        golden.check(case, name, named[name.removeprefix("grad/")].grad)
    for norm, excluded in (
        ("grad_norm_all_trainable_finetune", ("vlm.",)),
        ("grad_norm_trainable_pretrain", ("vlm.", "transformer.")),
    ):
        gradients = [p.grad.norm() for name, p in named.items() if not name.startswith(excluded)]
        golden.check(case, norm, torch.stack(gradients).norm())


def test_text_to_image_from_latents(golden: Golden, model: OpenUni) -> None:
    case, latents = "text2image_loss_latents", golden.input("text2image_loss_latents", "image_latents")
    model.zero_grad()
    batch = batch_of(golden, case)
    _, condition = model.condition_on(embed(model, batch.input_ids), batch.attention_mask)
    golden.check(case, "cond", condition)
    golden.check(case, "latents", latents)
    loss = model.flow_loss(latents, condition, draws(golden, case))[0] / latents.numel()
    golden.check(case, "loss", loss)
    loss.backward()
    check_gradients(golden, case, model)


def test_text_to_image_from_pixels(golden: Golden, model: OpenUni) -> None:
    case = "text2image_loss_pixels"
    model.zero_grad()
    output = model.generation(batch_of(golden, case), random=draws(golden, case))
    golden.check(case, "latents", output.latents.transpose(1, 2).unflatten(2, output.latent_grid))
    loss = output.loss_sum / output.loss_count
    golden.check(case, "loss", loss)
    loss.backward()
    check_gradients(golden, case, model)


@pytest.mark.parametrize("case", ["image2image_loss", "image2image_loss_truncated"])
def test_image_to_image(golden: Golden, model: OpenUni, case: str) -> None:
    model.zero_grad()
    length = golden.info["cases"][case].get("max_length", golden.info["config"]["max_length"])
    batch, sources = batch_of(golden, case), golden.input(case, "pixel_values_src")
    loss = model.editing_loss(batch, sources, draws(golden, case), length)
    golden.check(case, "loss", loss)
    loss.backward()
    check_gradients(golden, case, model)
    with torch.no_grad():
        tokens = model.understood_tokens(sources)
        found = model.condition_on_images(batch.input_ids, batch.attention_mask, tokens, length)
    golden.check(case, "cond", found)


def test_image_to_image_reaches_what_reads_only_if_told_to(golden: Golden, model: OpenUni) -> None:
    """The loss and every other gradient stay the same."""
    case, reader = "image2image_loss", ("vlm.model.vision_tower.", "vlm.model.multi_modal_projector.")
    found = {}
    for trains_understanding in (False, True):
        model.zero_grad()
        sources, given = golden.input(case, "pixel_values_src"), draws(golden, case)
        loss = model.editing_loss(batch_of(golden, case), sources, given, trains_understanding=trains_understanding)
        golden.check(case, "loss", loss)
        loss.backward()
        found[trains_understanding] = {
            name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
        }
        check_gradients(golden, case, model)
    read = {name for name, _ in model.named_parameters() if name.startswith(reader)}
    assert not read & found[False].keys()
    # The class token's place is read by nobody behind the last layer, but everything has a gradient.
    assert found[True].keys() == found[False].keys() | read
    assert all(found[True][name].any() for name in read if name.startswith(reader[1]))


def condition_for(golden: Golden, model: OpenUni, case: str) -> Tensor:
    ids, embeds = ids_of(golden, case), None
    if case == "generate_image":
        tokens = model.understood_tokens(golden.input(case, "pixel_values_src"))
        embeds = model.embed_with_images(ids, tokens.repeat(len(ids) // len(tokens), 1, 1))
        torch.testing.assert_close(embeds, golden.input(case, "inputs_embeds"), rtol=1e-5, atol=1e-5)
    embeds = embed(model, ids) if embeds is None else embeds
    mask = golden.tensors[f"in/{case}/attention_mask"].bool()
    return model.condition_on(embeds, mask)[1]


@torch.no_grad()
@pytest.mark.parametrize("case", DRAWINGS)
def test_drawing(golden: Golden, model: OpenUni, case: str) -> None:
    given = golden.info["cases"][case]
    drawing = SamplingConfig(given["num_steps"], given["cfg_scale"])
    start = golden.input(case, "init_noise")
    condition = condition_for(golden, model, case)
    condition = condition if drawing.guidance > 1 else condition[: len(start)]
    path, steps = [], []

    def velocity(latents: Tensor, timestep: Tensor) -> Tensor:
        copies = len(condition) // len(latents)
        timesteps = sana_timestep(timestep, len(condition), latents.device)
        found = model.velocity(latents.repeat(copies, 1, 1, 1), condition, timesteps)
        path.append(latents)
        steps.append(guide(found, drawing.scale))
        return found

    path.append(walk(velocity, start, drawing))
    for i, step in enumerate(steps):
        golden.check(case, f"step{i}_guided_model_output", step, SAMPLING_CHAIN)
        golden.check(case, f"step{i}_next_latents", path[i + 1], SAMPLING_CHAIN)
    golden.check(case, "latents", path[-1], SAMPLING_CHAIN)
    torch.testing.assert_close(model.sample_latents(condition, start, drawing), path[-1], rtol=0, atol=0)
    golden.check(case, "image", model.decode_images(path[-1]), DECODED_IMAGE)
    scheduler = build_scheduler(drawing)
    golden.check(case, "scheduler_timesteps", scheduler.timesteps)
    golden.check(case, "scheduler_sigmas", scheduler.sigmas)


def test_schedules(golden: Golden) -> None:
    counts = [int(name.split("_")[-1]) for name in golden.outputs("schedule") if name.startswith("dpm_timesteps_")]
    assert counts
    for count in counts:
        scheduler = build_scheduler(SamplingConfig(count))
        golden.check("schedule", f"dpm_timesteps_{count}", scheduler.timesteps)
        golden.check("schedule", f"dpm_sigmas_{count}", scheduler.sigmas)
    # Training visits the thousand levels of this table; the index grows with the uniform draw.
    timesteps = timesteps_of(torch.arange(1000, dtype=torch.float64) / 1000 + 5e-4)
    golden.check("schedule", "train_timesteps", timesteps)
    golden.check("schedule", "train_sigmas", timesteps / 1000)


def test_training_times_are_shifted_as_by_diffusers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=6.0)
    timesteps = timesteps_of(torch.arange(1000, dtype=torch.float64) / 1000 + 5e-4, shift=6.0)
    torch.testing.assert_close(timesteps / 1000, scheduler.sigmas[:1000].float(), rtol=1e-6, atol=0)


@torch.no_grad()
def test_chat(golden: Golden, model: OpenUni) -> None:
    """One prompt with two tiles, and two prompts in a left-padded batch."""
    tiles = model.vlm.model.get_image_features(golden.input("chat", "pixel_values"), return_dict=True).pooler_output
    embeds = model.embed_with_images(ids_of(golden, "chat"), tiles)
    golden.check("chat", "logits", model.vlm(inputs_embeds=embeds).logits)
    for prefix, pixels in (("", "pixel_values"), ("batch_", "batch_pixel_values")):
        expected = golden.output("chat", f"{prefix}greedy_ids")
        tokens = model.vlm.model.get_image_features(golden.input("chat", pixels), return_dict=True).pooler_output
        embeds = model.embed_with_images(ids_of(golden, "chat", prefix), tokens)
        for use_cache in (True, False):
            found = model.answer(embeds, golden.input("chat", f"{prefix}attention_mask"), expected.shape[1], use_cache)
            golden.check("chat", f"{prefix}greedy_ids", found)


def decoded(images: Tensor) -> Tensor:
    """(B, 3, height, width) in about [-1, 1] -> what is written to files, in the same layout."""
    return torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2)


def test_images(golden: Golden) -> None:
    case = "image_preprocess"
    image = Image.fromarray(golden.input(case, "image_uint8_hwc").numpy())
    first, last = golden.argument(case, "offset_range")
    offset = (golden.argument(case, "crop_offset") + 0.5) / (last - first + 1)
    size = golden.argument(case, "image_size")
    golden.check(case, "pixel_values", to_pixels(crop_to_square(image, offset), size))
    golden.check("image_postprocess", "uint8", decoded(golden.input("image_postprocess", "x")))
    case = "image_preprocess_edit"
    image = Image.fromarray(golden.input(case, "image_uint8_hwc").numpy())
    golden.check(case, "pixel_values_src", to_pixels(image, golden.argument(case, "image_size")))
