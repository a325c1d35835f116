"""What replaying a Harmon golden needs: the recorded model, its stand-in tokenizer, and comparisons of gradients."""

import itertools

import torch
from golden import Golden, language_model_of
from torch import Tensor

from infotok_lit.batch import PairedText
from infotok_lit.models.common.model_config import KL16Config
from infotok_lit.models.harmon.family import HarmonConfig, MARConfig
from infotok_lit.models.harmon.model import KEYS, Harmon


class ByteTokenizer:
    """The stand-in tokenizer of the goldens: one id per UTF-8 byte, and the three chat markers."""

    markers = {"<|im_start|>": 256, "<|im_end|>": 257, "<|endoftext|>": 258}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        for marker, number in self.markers.items():
            if marker in text:
                before, after = text.split(marker, 1)
                return self.encode(before) + [number] + self.encode(after)
        return list(text.encode())

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        return bytes(number for number in token_ids if number < 256).decode()


def config_of(golden: Golden) -> HarmonConfig:
    given = golden.info["config"]
    vae, mar, llm = given["vae"], given["mar"], given["llm"]
    side = mar["img_size"] // mar["vae_stride"] // mar["patch_size"]
    return HarmonConfig(
        autoencoder=KL16Config(
            latent_channels=vae["embed_dim"],
            base_width=vae["ch"],
            width_multipliers=tuple(vae["ch_mult"]),
            blocks_per_level=vae["num_res_blocks"],
            num_groups=vae["num_groups"],
            attention_resolution=vae["attn_resolutions"][0],
        ),
        mar=MARConfig(
            encoder_width=mar["encoder_embed_dim"],
            encoder_depth=mar["encoder_depth"],
            encoder_heads=mar["encoder_num_heads"],
            decoder_width=mar["decoder_embed_dim"],
            decoder_depth=mar["decoder_depth"],
            decoder_heads=mar["decoder_num_heads"],
            diffusion_depth=mar["diffloss_d"],
            diffusion_width=mar["diffloss_w"],
            default_grid=(side, side),
            patch_size=mar["patch_size"],
            mlp_ratio=mar["mlp_ratio"],
            num_buffers=mar["buffer_size"],
            dropout=mar["attn_dropout"],
            mask_ratio_min=mar["mask_ratio_min"],
            noise_draws=mar["diffusion_batch_mul"],
            sampling_steps=mar["num_sampling_steps"],
            num_classes=mar["class_num"],
        ),
        llm=language_model_of(llm),
        latent_scale=given["vae_scale"],
        grad_scale=given["grad_scale"],
        image_size=mar["img_size"],
    )


def build(golden: Golden) -> Harmon:
    """The recorded model, in evaluation mode."""
    config = config_of(golden)
    model = Harmon(config, ByteTokenizer()).eval()
    official = golden.state
    vae = {key.removeprefix("vae."): value for key, value in official.items() if key.startswith("vae.")}
    rest = {key: value for key, value in official.items() if not key.startswith("vae.")}
    model.load_official_weights("harmon", rest, "golden")
    model.load_official_weights("kl16", vae, "golden")
    return model


def grid_of(golden: Golden, case: str, model: Harmon) -> tuple[int, int]:
    shape = golden.argument(case, "image_shape")
    return model.config.mar.default_grid if shape is None else tuple(shape)


def no_text(batch: int) -> PairedText:
    empty = torch.zeros(batch, 1, dtype=torch.int64)
    return PairedText(empty, empty.bool(), empty.bool(), torch.arange(batch))


def check_gradients(golden: Golden, case: str, model: Harmon, norms: str) -> None:
    """Compare the recorded gradients and gradient norms with those of the last backward pass."""
    named = {KEYS.official_name(name): parameter for name, parameter in model.named_parameters()}
    keys = golden.argument(case, "gradnorm_keys")
    golden.check(case, norms, torch.stack([named[key].grad.norm() for key in keys]))
    untouched = [name for name, parameter in named.items() if name not in keys and parameter.grad is not None]
    assert not [name for name in untouched if named[name].grad.any()]


def check_recorded_gradients(golden: Golden, case: str, model: Harmon) -> None:
    named = {KEYS.official_name(name): parameter for name, parameter in model.named_parameters()}
    recorded = [name for name in golden.outputs(case) if name.startswith("grad/")]
    assert recorded
    for name in recorded:
        golden.check(case, name, named[name.removeprefix("grad/")].grad)


def joint_norm(model: Harmon, *prefixes: str) -> Tensor:
    gradients = [
        parameter.grad.norm()
        for name, parameter in model.named_parameters()
        if name.startswith(prefixes) and parameter.grad is not None
    ]
    return torch.stack(gradients).norm()


class RecordedNoise:
    """Replays the draws of a recorded `sample*` case; the sampler asks for those of the conditional half."""

    def __init__(self, golden: Golden, case: str, guided: bool) -> None:
        self.stored = golden.input(case, "orders")
        self.halves = 2 if guided else 1
        self.queue: list[Tensor] = []
        for iteration in itertools.count():
            if f"in/{case}/step{iteration}_noise" not in golden.tensors:
                break
            self.queue.append(golden.input(case, f"step{iteration}_noise_init"))
            # Only the conditional half of the step noise reaches the picture.
            noise = golden.input(case, f"step{iteration}_noise")
            self.queue.extend(step[: len(step) // self.halves] for step in noise)

    def orders(self, places: int) -> Tensor:
        return self.stored[: len(self.stored) // self.halves]

    def normals(self, count: int, per_image: int, channels: int) -> Tensor:
        return torch.stack([self.queue.pop(0).unflatten(0, (-1, per_image)) for _ in range(count)])
