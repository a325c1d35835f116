"""Every case of a Show-o2 golden, replayed with the recorded random draws; layouts are in test_showo2_layouts.py."""

import pytest
import torch
from golden import DECODED_IMAGE, SAMPLING_CHAIN, Golden
from showo2_replay import build, build_vae, layouts
from torch import Tensor

from infotok_lit.batch import IMAGE_TOKEN_ID
from infotok_lit.models.common.autoencoders import WanVAE
from infotok_lit.models.common.language_model import text_loss
from infotok_lit.models.common.sampling import guide, sinusoid
from infotok_lit.models.showo2.diffusion import on_path, sampling_times, training_time
from infotok_lit.models.showo2.encoder import as_tokens
from infotok_lit.models.showo2.family import SamplingConfig
from infotok_lit.models.showo2.inference import cached_velocity, continue_greedily, full_velocity, walk
from infotok_lit.models.showo2.model import Showo2
from infotok_lit.models.showo2.network import Hidden
from infotok_lit.models.showo2.sequence import build_mask, dense_mask

READING = ("caption", "mmu_pretraining", "mmu_tuning", "mmu_tuning_noimage")
JOINT = ("t2i", "t2i_dropped", "caption", "mmu_pretraining")


@pytest.fixture(scope="module")
def golden(showo2_golden: Golden) -> Golden:
    return showo2_golden


@pytest.fixture(scope="module")
def model(golden: Golden) -> Showo2:
    return build(golden)


@pytest.fixture(scope="module")
def vae(golden: Golden) -> WanVAE:
    return build_vae(golden)


def draws(golden: Golden, case: str) -> tuple[Tensor, Tensor]:
    """The noise and the normal draws of a case's images, recorded image by image."""
    count = len(golden.input(case, "latents"))
    noise = torch.cat([golden.input(case, f"draw{2 * i}") for i in range(count)])
    return noise, torch.cat([golden.input(case, f"draw{2 * i + 1}") for i in range(count)])


def times(golden: Golden, case: str, minima: list[float]) -> Tensor:
    """Shifted times of a case's images, each with its own lower end."""
    _, normal = draws(golden, case)
    slots = golden.info["meta"]["layout_args"]["num_image_tokens"]
    return torch.cat([training_time(normal[i : i + 1], low, slots) for i, low in enumerate(minima)])


def mean(loss: tuple[Tensor, Tensor]) -> Tensor:
    return loss[0] / loss[1]


def read(golden: Golden, model: Showo2, case: str, names: tuple[str, ...]) -> tuple[Hidden, Tensor]:
    recorded = layouts(golden, *names)
    latents, time = golden.input(case, "latents"), golden.input(case, "t")
    return model.run_sequence(recorded["ids"], latents, time, regions=recorded["regions"]), recorded["labels"]


@torch.no_grad()
@pytest.mark.parametrize("case", ["a_vae", "a_vae_video"])
def test_autoencoder(golden: Golden, vae: WanVAE, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = vae.posterior(golden.input(case, "pixels"))
    golden.check(case, "mu_normalised", posterior.mean)
    golden.check(case, "logvar", posterior.log_variance)
    latents = posterior.sample(golden.input(case, "draw0"))
    golden.check(case, "sampled_latent", latents)
    decoded = vae.decode(golden.output(case, "sampled_latent"))
    golden.check(case, "decoded_clamped", decoded, DECODED_IMAGE)
    # diffusers clamps inside; what it clamps is compared too.
    monkeypatch.setattr(torch, "clamp", lambda x, min, max: x)
    golden.check(case, "decoded_raw", vae.decode(golden.output(case, "sampled_latent")), DECODED_IMAGE)


@torch.no_grad()
def test_an_image_is_a_video_of_one_frame(golden: Golden, vae: WanVAE) -> None:
    mean, _ = vae.posterior(golden.input("a_vae", "pixels").squeeze(2))
    golden.check("a_vae", "mu_normalised", mean.unsqueeze(2))


@torch.no_grad()
@pytest.mark.parametrize("grid", ["main", "alt0", "alt1"])
def test_shared_tokens(golden: Golden, model: Showo2, grid: str) -> None:
    case, encoder = f"b_embed/{grid}", model.encoder
    latents = golden.input(case, "latents")
    patches = encoder.understanding_embed(latents)
    golden.check(case, "und_patch", as_tokens(patches))
    golden.check(case, "gen_patch", as_tokens(encoder.generation_embed(latents)))
    golden.check(case, "pos", encoder.grid_positions(*patches.shape[2:]))
    golden.check(case, "semantic", encoder.semantic_tokens(latents))
    golden.check(case, "fused", encoder(latents).tokens)


@pytest.mark.parametrize("flex", [False, True])
def test_masks(golden: Golden, flex: bool) -> None:
    regions = golden.input("c_mask", "modality_positions")
    allowed = golden.output("c_mask", "allowed")
    length = allowed.shape[-1]
    if flex:
        logic = build_mask(regions, length, flex=True).mask_mod
        place = torch.arange(length)
        found = logic(torch.arange(len(regions)).view(-1, 1, 1, 1), place.new_zeros(1), place.view(-1, 1), place)
        golden.check("c_mask", "allowed_flex", found.long())
        return
    golden.check("c_mask", "allowed", build_mask(regions, length).long())
    blocked = torch.zeros(allowed.shape).masked_fill(~dense_mask(regions, length), float(-(2**63)))
    golden.check("c_mask", "additive_fp32", blocked)


@torch.no_grad()
@pytest.mark.parametrize(("case", "names"), [("d_mmu", READING[:2]), ("d_mmu_chat", READING[2:])])
def test_reading(golden: Golden, model: Showo2, case: str, names: tuple[str, ...]) -> None:
    hidden, labels = read(golden, model, case, names)
    golden.check(case, "logits", model.llm.lm_head(hidden.states))
    golden.check(case, "loss_ntp", mean(text_loss(model.llm.lm_head, hidden.states, labels)))
    if case == "d_mmu":
        golden.check(case, "hidden", hidden.states)


@torch.no_grad()
def test_drawing_loss(golden: Golden, model: Showo2) -> None:
    case, recorded = "e_t2i", layouts(golden, "t2i", "t2i_dropped")
    time = times(golden, case, [0.0, 0.0])
    golden.check(case, "t", time)
    noisy, velocity = on_path(golden.input(case, "latents"), draws(golden, case)[0], time)
    golden.check(case, "xt", noisy)
    golden.check(case, "ut", velocity)
    hidden = model.run_sequence(recorded["ids"], noisy, time)
    assert torch.equal(hidden.regions, recorded["regions"])
    golden.check(case, "fused", hidden.shared.tokens)
    golden.check(case, "hidden", hidden.states)
    golden.check(case, "logits", model.llm.lm_head(hidden.states))
    golden.check(case, "v_pred_all", model.velocities(hidden))
    golden.check(case, "loss_flow", mean(model.flow_loss(hidden, velocity)))


@pytest.mark.parametrize(("case", "minimum"), [("f_joint", 1.0), ("f_joint_noisy_und", 0.8)])
def test_joint_loss(golden: Golden, model: Showo2, case: str, minimum: float) -> None:
    recorded = layouts(golden, *JOINT)
    time = times(golden, case, [0.0, 0.0, minimum, minimum])
    golden.check(case, "t", time)
    noisy, velocity = on_path(golden.input(case, "latents"), draws(golden, case)[0], time)
    golden.check(case, "xt", noisy)
    golden.check(case, "ut", velocity)
    model.zero_grad()
    hidden = model.run_sequence(recorded["ids"], noisy, time, regions=recorded["regions"])
    golden.check(case, "logits", model.llm.lm_head(hidden.states))
    golden.check(case, "v_pred_all", model.velocities(hidden))
    # Images that are clean by design take no flow loss.
    counted = torch.tensor([True, True, minimum < 1, minimum < 1])
    text, flow = (
        mean(text_loss(model.llm.lm_head, hidden.states, recorded["labels"])),
        mean(model.flow_loss(hidden, velocity, counted)),
    )
    golden.check(case, "loss_ntp", text)
    golden.check(case, "loss_flow", flow)
    golden.check(case, "total_stage1", 0.2 * text + flow)
    golden.check(case, "total_stage2", text + flow)
    if case == "f_joint":
        (0.2 * text + flow).backward()
        check_gradients(golden, case, model)


def official_name(model: Showo2, name: str) -> str:
    return model.official_parts["showo2"].keys.official_name(name)


def check_gradients(golden: Golden, case: str, model: Showo2) -> None:
    own = {name: parameter for name, parameter in model.named_parameters() if not name.startswith("autoencoder.")}
    gradients = {official_name(model, name): p.grad for name, p in own.items() if p.grad is not None}
    recorded = [name for name in golden.outputs(case) if name.startswith("grad_stage1/")]
    assert recorded
    for name in recorded:
        golden.check(case, name, gradients[name.removeprefix("grad_stage1/")])
    golden.check(case, "grad_norm_stage1", torch.stack([g.norm() for g in gradients.values()]).norm())


@torch.no_grad()
def test_interleaved(golden: Golden, model: Showo2) -> None:
    case, recorded = "k_interleaved", layouts(golden, "interleaved", "interleaved_one")
    time = times(golden, case, [0.0] * 4)
    golden.check(case, "t", time)
    noisy, velocity = on_path(golden.input(case, "latents"), draws(golden, case)[0], time)
    hidden = model.run_sequence(recorded["ids"], noisy, time)
    assert torch.equal(hidden.regions, recorded["regions"]), "the second sequence has an idle slot"
    golden.check(case, "logits", model.llm.lm_head(hidden.states))
    golden.check(case, "loss_ntp", mean(text_loss(model.llm.lm_head, hidden.states, recorded["labels"])))
    golden.check(case, "v_pred_all", model.velocities(hidden))
    golden.check(case, "loss_flow", mean(model.flow_loss(hidden, velocity)))


def drawing_prompts(golden: Golden) -> Tensor:
    """Conditional prompts, then unconditional ones."""
    ids = [golden.output("j_layout/gen_prompt", name) for name in ("text_tokens", "text_tokens_null")]
    img_pad = golden.info["config"]["ids"]["img_pad_id"]
    return torch.cat(ids).masked_fill(torch.cat(ids) == img_pad, IMAGE_TOKEN_ID)


@torch.no_grad()
@pytest.mark.parametrize("make", [full_velocity, cached_velocity])
def test_guidance(golden: Golden, model: Showo2, make) -> None:
    prompts, z, time = drawing_prompts(golden), golden.input("g_cfg", "z"), golden.input("g_cfg", "t")
    velocities = make(model, prompts)(z, time)
    golden.check("g_cfg", "v_cond_then_uncond", velocities, SAMPLING_CHAIN)
    one = guide(velocities, golden.info["config"]["guidance"])
    golden.check("g_cfg", "v_guided", torch.cat([one, one]), SAMPLING_CHAIN)
    golden.check("g_cfg", "v_noguide", make(model, prompts[: len(z)])(z, time), SAMPLING_CHAIN)


@torch.no_grad()
@pytest.mark.parametrize("make", [full_velocity, cached_velocity])
def test_sampling(golden: Golden, model: Showo2, make) -> None:
    given = golden.info["config"]
    drawing = SamplingConfig(given["steps"], given["guidance"], given["factor"])
    velocity, path, seen, steps = make(model, drawing_prompts(golden)), [], [], []

    def record(latents: Tensor, time: Tensor) -> Tensor:
        found = velocity(latents, time)
        path.append(latents)
        seen.append(time.repeat(2))
        steps.append(guide(found, drawing.guidance).repeat(2, 1, 1, 1))
        return found

    path.append(walk(record, golden.input("h_sample", "z"), drawing))
    golden.check("h_sample", "trajectory", torch.stack(path).repeat(1, 2, 1, 1, 1), SAMPLING_CHAIN)
    golden.check("h_sample", "latents", path[-1], SAMPLING_CHAIN)
    golden.check("h_sample", "t_evaluated", torch.stack(seen))
    golden.check("h_sample", "v_steps", torch.stack(steps), SAMPLING_CHAIN)


def test_sampling_times(golden: Golden) -> None:
    grids = [name for name in golden.outputs("h_sample") if name.startswith("t_grid_")]
    assert grids
    for name in grids:
        found = sampling_times(int(name.removeprefix("t_grid_")), golden.info["config"]["factor"])
        golden.check("h_sample", name, found)


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("offset", ["official_offset", "training_consistent_offset"])
def test_answering(golden: Golden, model: Showo2, offset: str, use_cache: bool) -> None:
    before, after = golden.output("i_gen", "text_tokens_a"), golden.output("i_gen", "text_tokens_b")
    latents = golden.input("i_gen", "latents")
    slots = latents.shape[2] * latents.shape[3] // 4 + 1
    image = torch.full((1, slots), IMAGE_TOKEN_ID)
    ids = torch.cat([before, after[:, :1], image, after[:, 1:]], dim=1)
    embeds = model.embed_with_images(ids, model.project_for_llm(model.encoder(latents).tokens))
    golden.check("i_gen", "inputs_embeds", embeds)
    regions = golden.output(f"i_gen/{offset}", "modality_positions")
    expected = golden.output(f"i_gen/{offset}", "tokens")
    mask = torch.ones_like(ids, dtype=torch.bool)
    logits = []
    with model.llm.lm_head.register_forward_hook(lambda _, given, found: logits.append(found)):
        chosen = continue_greedily(model, embeds, mask, regions, len(expected), use_cache)
    golden.check(f"i_gen/{offset}", "tokens", chosen[0])
    golden.check(f"i_gen/{offset}", "step_logits", torch.cat(logits), SAMPLING_CHAIN)


@torch.no_grad()
def test_times_and_rotary_tables(golden: Golden, model: Showo2) -> None:
    case, normal = "m_time", golden.input("m_time", "u")
    for name in golden.outputs(case):
        if name.startswith("t_seq"):
            tokens, minimum = name.removeprefix("t_seq").split("_maxt0_")
            count = golden.info["meta"]["layout_args"]["num_image_tokens"] if tokens == "N" else int(tokens)
            golden.check(case, name, training_time(normal, 0.0 if minimum == "None" else float(minimum), count))
    golden.check(case, "t_noshift", training_time(normal))
    time = golden.input(case, "t_embed_in")
    golden.check(case, "sinusoid", sinusoid(time))
    golden.check(case, "time_embed", model.time_embed(time))
    golden.check(case, "time_embed_proj", model.time_to_token(model.time_embed(time)))
    golden.check(case, "diff_rope_inv_freq_tiny", model.diffusion_head.rotary.inv_freq)
    golden.check(case, "llm_rope_inv_freq_tiny", model.llm.model.rotary_emb.inv_freq)


@torch.no_grad()
def test_text_alone(golden: Golden, model: Showo2) -> None:
    golden.check("n_text", "logits", model.llm(input_ids=golden.input("n_text", "ids")).logits)
