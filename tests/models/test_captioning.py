"""Captions read off generation's tokens, against a sequence that is put together by hand."""

import pytest
import torch
from tiny import tiny_model
from torch.nn import functional as F

from infotok_lit.batch import IGNORE_INDEX, IMAGE_TOKEN_ID
from infotok_lit.errors import SettingsError
from infotok_lit.models.showo2.sequence import build_mask, find_regions
from infotok_lit.objective.captioning import captioning
from infotok_lit.scenes import Scenes


def batch_of(model):
    source = Scenes(num_samples=3)
    return model.processor.generation([source.sample("generation", index) for index in range(3)])


def by_hand(model, tokens, caption: str, time=None):
    """Nats and length of one caption: every token embedded on its own, the whole vocabulary at every place."""
    encode, table = model.processor.encode, model.text_embedding.weight
    end = encode("<|im_end|>")
    answer = encode(caption) + end
    if model.family == "harmon":
        places = model.project_in(torch.cat([tokens[2:], tokens[:2]]))  # its two buffers come last
        before = encode("<|im_start|>user\n")
        after = encode("\ndescribe the image.") + encode("<|im_end|>\n<|im_start|>assistant\n")
        mask = None
    else:
        places = torch.cat([model.time_to_token(model.time_embed(time[None])), tokens])
        before = encode("<|im_start|>") + encode(f"system\n{model.processor.prompts.system}<|im_end|>")
        before += encode("\n<|im_start|>user\n") + encode("<|vision_start|>")
        after = encode("<|vision_end|>") + encode("\ndescribe the image.") + end + encode("\n<|im_start|>assistant\n")
        ids = before + [IMAGE_TOKEN_ID] * len(places) + after + answer
        mask = build_mask(find_regions(torch.tensor([ids])), len(ids))
    embeds = torch.cat([table[before], places, table[after], table[answer]])[None]
    logits = model.llm(inputs_embeds=embeds, attention_mask=mask).logits[0]
    return F.cross_entropy(logits[-len(answer) - 1 : -1], torch.tensor(answer), reduction="sum"), len(answer)


@pytest.mark.parametrize("family", ["harmon", "showo2"])
def test_every_caption_costs_what_the_language_model_gives_it(family) -> None:
    model = tiny_model(family)
    batch = batch_of(model)
    torch.manual_seed(1)
    output = model.generation(batch)
    nats, words = model.caption_nats(output.tokens, output, batch.captions)
    for row, caption in enumerate(batch.captions):
        time = None if output.noise_level is None else output.noise_level[row]
        expected, length = by_hand(model, output.tokens[row], caption, time)
        torch.testing.assert_close(nats[row], expected, rtol=1e-4, atol=1e-4)
        assert words[row] == length


@pytest.mark.parametrize("family", ["harmon", "showo2"])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_encoder_learns_from_it_and_the_reader_does_not(family, recompute) -> None:
    model = tiny_model(family).train()
    if recompute:
        model.recompute_activations()
    batch = batch_of(model)
    torch.manual_seed(1)
    output = model.generation(batch)
    wanted = sum(model.caption_nats(output.tokens, output, batch.captions)[0])
    parameters = dict(model.encoder.named_parameters())
    gradients = torch.autograd.grad(wanted, parameters.values(), retain_graph=True, allow_unused=True)
    term = captioning(output.tokens, lambda tokens: model.caption_nats(tokens, output, batch.captions))
    term.per_image.sum().backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached and all(name.startswith("encoder.") for name in reached)
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            torch.testing.assert_close(parameters[name].grad, gradient, rtol=1e-4, atol=1e-6)


def test_an_empty_caption_costs_nothing_and_a_long_one_loses_its_end() -> None:
    model = tiny_model()
    processor = model.processor
    processor.max_length = 60
    short, empty = "a red circle", " "
    ids, labels = processor.caption_answers([short, empty, "a red circle and " * 200], 10)
    assert ids.shape == labels.shape == (3, 60)
    counted = (labels != IGNORE_INDEX).sum(1).tolist()
    words = "<|im_start|>user\n", "\ndescribe the image.", "<|im_end|>\n<|im_start|>assistant\n"
    prompt = 10 + sum(len(processor.encode(part)) for part in words)
    assert counted == [len(processor.answer(short)), 0, 60 - prompt]
    assert (ids[0] == IMAGE_TOKEN_ID).sum() == 10


def test_openuni_refuses_in_words() -> None:
    model = tiny_model("openuni")
    batch = batch_of(model)
    output = model.generation(batch)
    with pytest.raises(SettingsError, match="tokens are made from the prompt alone and see no image"):
        model.caption_nats(output.tokens, output, batch.captions)
