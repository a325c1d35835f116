"""Texts of any length: padding changes no loss, and where one is too long, the user's words alone lose their end."""

import warnings
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny import FAMILIES, TINY_CONFIGS, tiny_model

from infotok_lit.assets import SCENES_TOKENIZER
from infotok_lit.batch import IMAGE_TOKEN_ID, BrokenSampleError, GenerationSample, UnderstandingSample
from infotok_lit.errors import SettingsError
from infotok_lit.models.common.processor import ChatProcessor
from infotok_lit.models.family import family as family_called
from infotok_lit.scenes import Scenes

IMAGE = Image.new("RGB", (32, 32))
LONG = "what shape is the red object? " * 100
LIMIT = 80


@pytest.fixture(params=FAMILIES)
def name(request) -> str:
    return request.param


def make(name: str, **settings: object) -> ChatProcessor:
    config = replace(TINY_CONFIGS[name](0.0), **settings)
    return family_called(name).build(config, str(SCENES_TOKENIZER)).processor


@pytest.fixture
def processor(name) -> ChatProcessor:
    return make(name, max_length=LIMIT)


def sample(question: str = "why?", answer: str = "yes") -> UnderstandingSample:
    return UnderstandingSample(IMAGE, question, answer, "photo 7")


def row(batch) -> list[int]:
    return batch.input_ids[0][batch.attention_mask[0]].tolist()


def test_losses_do_not_depend_on_padding(name) -> None:
    """The sum over a padded batch is the sum of its rows, each alone and without padding."""
    model = tiny_model(name, seed=3)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    source = Scenes(num_samples=100)
    samples = [source.sample("understanding", i, None) for i in range(4)]
    samples[1] = replace(samples[1], question=samples[1].question + " tell me more about it", answer="red circle")
    whole = model.processor.understanding(samples)
    assert not whole.attention_mask.all()
    with torch.no_grad():
        together = model.understanding(whole)
        alone = [model.understanding(model.processor.understanding([sample])) for sample in samples]
    torch.testing.assert_close(together.loss_sum, sum(output.loss_sum for output in alone), rtol=1e-5, atol=1e-4)
    assert together.loss_count == sum(output.loss_count for output in alone) > 4


def test_a_long_question_loses_its_end_and_keeps_template_image_and_answer(processor) -> None:
    with pytest.warns(UserWarning, match=r"photo 7: the text is \d+ tokens too long .*max_length 80"):
        batch = processor.understanding([sample(LONG)])
    short = processor.understanding([sample("")])
    ids, slots = row(batch), row(short).count(IMAGE_TOKEN_ID)
    assert len(ids) == LIMIT and ids.count(IMAGE_TOKEN_ID) == slots > 0
    answer = [*processor.encode("yes"), processor.end_id]
    assert batch.labels[0][batch.labels[0] >= 0].tolist() == answer
    # From the marker of the assistant on, it is as without any question.
    closing = row(short)[row(short).index(IMAGE_TOKEN_ID) + slots :]
    kept = (
        len(answer) + len(processor.encode(processor.after_answer)) + len(processor.encode("<|im_start|>assistant\n"))
    )
    assert ids[-kept:] == closing[-kept:]
    assert len(batch.cut) == 1 and batch.cut[0].startswith("photo 7: the text is ")


def test_what_fits_is_neither_cut_nor_warned_of(processor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = processor.understanding([sample()])
        drawn = processor.generation([GenerationSample(IMAGE, "a red circle", "x")])
    assert len(batch.cut) == len(drawn.cut) == 0


def test_each_cut_is_told_to_the_batch_and_one_is_warned_of(processor) -> None:
    with pytest.warns(UserWarning) as caught:
        batch = processor.understanding([sample(LONG), sample(), sample(LONG)])
        again = processor.understanding([sample(LONG)])
    assert len(batch.cut) == 2 and len(again.cut) == 1
    assert len([warning for warning in caught if "too long" in str(warning.message)]) == 1


def test_a_sample_whose_answer_leaves_no_room_is_broken(processor) -> None:
    for check in (processor.check, lambda broken: processor.understanding([broken])):
        with pytest.raises(BrokenSampleError, match=r"photo 7: .* tokens longer than max_length \(80\)"):
            check(sample(LONG, answer=LONG))
    processor.check(sample(LONG, answer="yes"))


@pytest.mark.filterwarnings("ignore:.*too long")
def test_prompts_at_inference_follow_the_same_rule(processor) -> None:
    whole, _ = processor.understanding_prompts(["why?"])
    ids, _ = processor.understanding_prompts([LONG])
    assert ids.shape[1] == LIMIT > whole.shape[1]
    assert ids[0, -4:].tolist() == whole[0, -4:].tolist()
    ids, mask = processor.generation_prompts([LONG])
    short, _ = processor.generation_prompts(["a"])
    assert int(mask.sum()) <= LIMIT and ids[0, -3:].tolist() == short[0, -3:].tolist()


@pytest.mark.filterwarnings("ignore:.*too long")
def test_an_image_of_another_size_leaves_its_prompt_as_much_room() -> None:
    """Also one that has more positions than `max_length`."""
    processor = make("showo2", max_length=LIMIT)
    own, _ = processor.generation_prompts([LONG])
    for slots in (2, 2 * LIMIT):
        ids, _ = processor.generation_prompts([LONG], num_image_tokens=slots)
        assert int((ids == IMAGE_TOKEN_ID).sum()) == slots
        assert ids[ids != IMAGE_TOKEN_ID].tolist() == own[own != IMAGE_TOKEN_ID].tolist()


@pytest.mark.filterwarnings("ignore:.*too long")
def test_captions_have_a_limit_of_their_own_where_the_official_code_has_one(name) -> None:
    processor = make(name)
    processor.max_caption = 10
    batch = processor.generation([GenerationSample(IMAGE, LONG, "x")])
    short = processor.generation([GenerationSample(IMAGE, "a", "x")])
    assert 0 < len(row(batch)) - len(row(short)) <= 10
    assert row(batch)[-3:] == row(short)[-3:] and len(batch.cut) == 1


def test_prompts_of_openuni_are_not_cut_as_its_captions_are() -> None:
    """As in the official scripts, which cut captions in training alone."""
    processor = make("openuni", max_caption=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids, _ = processor.generation_prompts([LONG])
    assert ids.shape[1] > len(processor.encode(LONG.strip())) > 100


@pytest.mark.filterwarnings("ignore:.*too long")
def test_prompts_of_showo2_are_cut_as_its_captions_are() -> None:
    config = TINY_CONFIGS["showo2"](0.0)
    processor = make("showo2", prompts=replace(config.prompts, max_caption=10))
    ids, _ = processor.generation_prompts([LONG])
    assert ids[0].tolist() == row(processor.generation([GenerationSample(IMAGE, LONG, "x")]))


def test_the_limit_is_a_setting_of_every_family(name) -> None:
    config = family_called(name).config_of_size("scenes32").with_settings({"max_length": 77})
    assert family_called(name).build(config, "scenes32").processor.max_length == 77


def test_a_setting_that_is_gone_says_what_took_its_place() -> None:
    with pytest.raises(SettingsError, match=r"no `prompts\.max_text` any more: `max_length` limits"):
        family_called("showo2").config_of_size("scenes32").with_settings({"prompts": {"max_text": 3}})
