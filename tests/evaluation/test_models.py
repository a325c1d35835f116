"""What is evaluated: this package's models, and tiny random ones of transformers and diffusers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from evaluation import invented
from evaluation.fakes import noise
from PIL import Image
from safetensors.torch import save_file
from tiny import FAMILIES, TINY_CONFIGS
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.utils import is_torchvision_available

from infotok_lit.assets import SCENES_TOKENIZER
from infotok_lit.batch import UnderstandingSample
from infotok_lit.cli import main
from infotok_lit.errors import SettingsError
from infotok_lit.evaluation.models import DiffusersModel, OwnModel, TransformersModel, fingerprint, kind_of
from infotok_lit.inference import InferenceModel
from infotok_lit.models.family import family as family_called
from infotok_lit.models.unified import UnifiedModel

QUESTIONS = ("is there a red circle?", "how many objects are there in the image?", "what?")
IMAGES = [noise(number, 32) for number in range(3)]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request) -> UnifiedModel:
    torch.manual_seed(0)
    model = family_called(request.param).build(TINY_CONFIGS[request.param](0.0), str(SCENES_TOKENIZER))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.startswith(("llm.", "vlm.model.language_model.")):
            parameter.data += torch.randn_like(parameter)
    return model.eval()


def test_our_models_answer_a_batch_as_one_by_one(model):
    own = OwnModel(InferenceModel(model), "own", Path("nowhere"))
    together = own.answer(IMAGES, QUESTIONS, 6)
    alone = [own.answer([image], [question], 6)[0] for image, question in zip(IMAGES, QUESTIONS, strict=True)]
    assert together == alone and len(set(together)) > 1


def test_our_models_answer_many_questions_about_one_image_as_one_by_one(model):
    own = OwnModel(InferenceModel(model), "own", Path("nowhere"))
    images = [IMAGES[0], IMAGES[1], IMAGES[0]]
    together = own.answer(images, QUESTIONS, 6)
    assert together == [
        own.answer([image], [question], 6)[0] for image, question in zip(images, QUESTIONS, strict=True)
    ]


def test_our_models_draw_by_the_seed_of_each_prompt(model):
    own = OwnModel(InferenceModel(model), "own", Path("nowhere"))
    prompts = ["a red circle", "a blue square", "a red circle", "a red circle"]
    drawn = own.generate(prompts, [7, 8, 3, 7])
    alone = [own.generate([prompt], [seed])[0] for prompt, seed in zip(prompts, [7, 8, 3, 7], strict=True)]
    for one, other in zip(drawn, alone, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1
    assert np.array_equal(np.asarray(drawn[0]), np.asarray(drawn[3]))
    assert not np.array_equal(np.asarray(drawn[0]), np.asarray(drawn[2]))


def test_our_likelihood_is_the_loss_of_the_option_as_an_answer(model):
    own = OwnModel(InferenceModel(model), "own", Path("nowhere"))
    options = [["red", "blue"], ["one"], ["a large red circle"]]
    found = own.likelihoods(IMAGES, QUESTIONS, options)
    assert [len(values) for values in found] == [2, 1, 1]
    sample = UnderstandingSample(IMAGES[0], QUESTIONS[0], "blue", "")
    with torch.no_grad():
        output = model.understanding(model.processor.understanding([sample]))
    assert found[0][1] == pytest.approx(-float(output.loss_sum / output.loss_count), rel=1e-5)
    assert found[0][0] != found[0][1]


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(SCENES_TOKENIZER)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    template = (
        "{% for m in messages %}{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}"
        "{% endfor %}{% endfor %}{% if add_generation_prompt %} answer:{% endif %}"
    )
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    LlavaProcessor(
        pictures, tokenizer, patch_size=8, vision_feature_select_strategy="full", num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)  # fmt: skip
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**small, image_size=16, patch_size=8),
        text_config=LlamaConfig(**small, num_key_value_heads=2, vocab_size=len(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def test_a_transformers_model_answers_a_batch_as_one_by_one(llava):
    assert kind_of(llava) == "transformers"
    model = TransformersModel(llava, "llava", "cpu", "float32")
    together = model.answer(IMAGES, QUESTIONS, 5)
    alone = [model.answer([image], [question], 5)[0] for image, question in zip(IMAGES, QUESTIONS, strict=True)]
    assert together == alone and len(set(together)) > 1
    assert model.description()["family"] == "llava" and model.description()["dtype"] == "float32"
    with pytest.raises(SettingsError, match="draws no images"):
        model.generate(["x"], [0])


def test_a_transformers_answer_has_no_white_space_around_it(llava, monkeypatch):
    """Some say " B", which LLaVA's rule for letters would not take for B."""
    model = TransformersModel(llava, "llava", "cpu", "float32")
    monkeypatch.setattr(model.processor, "batch_decode", lambda tokens, **options: [" B\n"] * len(tokens))
    assert model.answer(IMAGES, QUESTIONS, 2) == ["B"] * 3


def test_a_transformers_likelihood_is_the_loss_of_the_option_as_an_answer(llava):
    model = TransformersModel(llava, "llava", "cpu", "float32")
    (values,) = model.likelihoods(IMAGES[:1], QUESTIONS[:1], [["red", "two blue circles"]])
    for value, option in zip(values, ("red", "two blue circles"), strict=True):
        text = f"<image>{QUESTIONS[0]} answer:"
        inputs = model.processor(text=text + option, images=IMAGES[0], return_tensors="pt")
        asked = model.processor(text=text, images=IMAGES[0], return_tensors="pt")["input_ids"].shape[1]
        labels = inputs["input_ids"].clone()
        labels[:, :asked] = -100
        with torch.no_grad():
            assert value == pytest.approx(-float(model.model(**inputs, labels=labels).loss), rel=1e-4)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(SCENES_TOKENIZER, model_max_length=16)
    text = CLIPTextConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=len(tokenizer),
        max_position_embeddings=16,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, cross_attention_dim=16, norm_num_groups=4,
        attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
                          down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2),
        text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_a_pipeline_draws_by_the_seed_of_each_prompt(pipeline):
    assert kind_of(pipeline) == "diffusers"
    model = DiffusersModel(pipeline, "sd", "cpu", "float32")
    model.pipeline.scheduler.set_timesteps(2)
    drawn = model.generate(["a red circle", "a blue square"], [5, 6])
    alone = model.generate(["a blue square"], [6])
    assert all(isinstance(image, Image.Image) and image.size == drawn[0].size for image in drawn)
    assert np.abs(np.asarray(drawn[1], int) - np.asarray(alone[0], int)).max() <= 1
    assert not np.array_equal(np.asarray(drawn[0]), np.asarray(drawn[1]))
    with pytest.raises(SettingsError, match="answers no questions"):
        model.answer(IMAGES[:1], ["what?"], 3)


@pytest.mark.parametrize(
    ("kind", "changed", "said"),
    [("pipeline", "scheduler/scheduler_config.json", "clip_sample"), ("llava", "generation_config.json", "use_cache")],
)
def test_settings_beside_the_weights_tell_models_apart(kind, changed, said, tmp_path, request):
    """Another sampler, or another way to generate, would go on with the images or answers of this one."""
    folder = tmp_path / "model"
    shutil.copytree(request.getfixturevalue(kind), folder)
    model = (DiffusersModel if kind == "pipeline" else TransformersModel)(folder, "m", "cpu", "float32")
    before, file = model.description(), folder / changed
    assert model.description() == before
    file.write_text(json.dumps(json.loads(file.read_text()) | {said: "other"}))
    after = model.description()
    assert before.pop("settings") != after.pop("settings") and before == after


def test_other_weights_have_another_fingerprint(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"1" * 200_000)
    before = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == before
    (tmp_path / "a.safetensors").write_bytes(b"1" * 199_999 + b"2")
    assert fingerprint(tmp_path) != before
    assert kind_of(tmp_path) is None


def test_a_tensor_in_the_middle_of_a_file_tells_weights_apart(tmp_path):
    frozen, found = torch.zeros(25_000), set()
    for value in (0.0, 1.0):
        tensors = {"a": frozen, "b": torch.full((25_000,), value), "c": frozen.clone()}
        save_file(tensors, tmp_path / "a.safetensors")
        found.add(fingerprint(tmp_path))
    assert len(found) == 2


def test_weights_that_are_written_again_have_the_same_fingerprint(tmp_path):
    """Though metadata are written in a random order."""
    contents, found = set(), set()
    for _ in range(10):
        save_file({"a": torch.ones(3)}, tmp_path / "a.safetensors", {key: "x" for key in "pqr"})
        contents.add((tmp_path / "a.safetensors").read_bytes())
        found.add(fingerprint(tmp_path))
    assert len(contents) > 1 and len(found) == 1


def test_all_files_of_a_model_tell_it_from_another(model, tmp_path):
    """Those of a sharded run, and those that an official checkpoint has beside it."""
    run, part = tmp_path / "last.ckpt", tmp_path / "vae.pth"
    run.mkdir()
    own = OwnModel(InferenceModel(model), "own", run, {"autoencoder": part})
    found = []
    for content in (b"11", b"12", b"22"):
        (run / "__0_0.distcp").write_bytes(content[:1])
        part.write_bytes(content[1:])
        found.append(own.description())
    assert found[0]["weights"] == found[1]["weights"] != found[2]["weights"]
    assert found[0]["autoencoder"] != found[1]["autoencoder"] == found[2]["autoencoder"]


def test_a_folder_that_is_no_model_is_refused(tmp_path, llava):
    with pytest.raises(SettingsError, match="no pipeline of diffusers"):
        DiffusersModel(llava, "x", "cpu", "float32")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(SettingsError, match="no image-text-to-text model"):
        TransformersModel(tmp_path, "x", "cpu", "float32")


@pytest.mark.parametrize("damage", [b"", b"version https://git-lfs.github.com/spec/v1", None])
@pytest.mark.parametrize("kind", ["llava", "pipeline"])
def test_damaged_weights_are_said_of_the_folder(kind, damage, tmp_path, request):
    """Empty, a pointer of git-lfs, or cut in half."""
    folder = tmp_path / "model"
    shutil.copytree(request.getfixturevalue(kind), folder)
    weights = next(folder.rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2] if damage is None else damage)
    with pytest.raises(SettingsError, match=f"{folder} is no .*, or a damaged one: "):
        (TransformersModel if kind == "llava" else DiffusersModel)(folder, "x", "cpu", "float32")


def test_a_model_that_cannot_be_asked_is_refused(llava, tmp_path):
    shutil.copytree(llava, tmp_path / "base", ignore=lambda _, names: [name for name in names if "template" in name])
    with pytest.raises(SettingsError, match="has no chat template"):
        TransformersModel(tmp_path / "base", "x", "cpu", "float32")
    sizes = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    DDPMPipeline(UNet2DModel(sample_size=8, **sizes, **blocks), DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    with pytest.raises(SettingsError, match="is a DDPMPipeline, which takes no prompts"):
        DiffusersModel(tmp_path / "ddpm", "x", "cpu", "float32")
    (tmp_path / "config.json").write_bytes(b'\xff\xfe"model_type"')
    assert kind_of(tmp_path) == "transformers"


def test_a_model_that_reads_videos_asks_for_torchvision(tmp_path):
    """Only torchvision runs its processor; with it, such a model loads like any other."""
    if is_torchvision_available():
        pytest.skip("torchvision is installed")
    PreTrainedTokenizerFast.from_pretrained(SCENES_TOKENIZER).save_pretrained(tmp_path)
    pictures = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pictures))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}')
    with pytest.raises(SettingsError, match="torchvision"):
        TransformersModel(tmp_path, "x", "cpu", "float32")


def test_the_command_takes_either_kind(llava, pipeline, tmp_path):
    invented.pope(tmp_path / "data" / "pope")
    common = ["--limit", "1", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    assert main(["evaluate", "--model", str(llava), "--benchmark", "pope", *common]) == 0
    drawn = ["--benchmark", "geneval", "--images_per_prompt", "1"]
    assert main(["evaluate", "--model", str(pipeline), *drawn, *common]) == 0
    read, painted = tmp_path / "out" / llava.name / "pope", tmp_path / "out" / pipeline.name / "geneval"
    assert json.loads((read / "result.json").read_text())["model"]["family"] == "llava"
    assert json.loads((read / "result.json").read_text())["rows"] >= 3
    assert (painted / "images" / "00000" / "samples" / "00000.png").is_file()
