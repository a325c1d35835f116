from pathlib import Path

import pytest
from transformers import AutoTokenizer

import infotok_lit
from infotok_lit.models.family import family
from infotok_lit.scenes import Scenes
from infotok_lit.scenes.build_tokenizer import extend_tokenizer, save_tokenizer

FOLDER = Path(infotok_lit.__file__).parent / "assets" / "scenes_tokenizer"
PROMPT = "<|im_start|>user\nGenerate an image: a red circle left of a blue square<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


def test_rebuilding_gives_the_shipped_files(tmp_path):
    save_tokenizer(tmp_path)
    assert {path.name for path in FOLDER.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    for path in FOLDER.iterdir():
        assert (tmp_path / path.name).read_text() == path.read_text()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "naïve 😀👩‍🚀 日本\n\n\ttabs  and   spaces ",
        "a user\nsays 12,5% no!",
        "Generate an image.",
        PROMPT,
        "\x00\x7f",
    ],
)
def test_any_text_survives_the_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens(tokenizer):
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        assert len(tokenizer.encode(token)) == 1
    assert tokenizer.decode(tokenizer.encode(PROMPT), skip_special_tokens=True).startswith("user\nGenerate an image:")
    assert len(tokenizer) < 512


def test_a_prompt_is_short(tokenizer):
    assert len(tokenizer.encode(PROMPT)) <= 16


def test_every_word_of_the_grammar_is_one_token(tokenizer):
    for spec in ("scenes32", "scenes64"):
        source = Scenes(spec, "held_out")
        for index in range(300):
            _, caption, _ = source.draw("generation", index)
            assert len(tokenizer.encode(f" {caption}")) == len(caption.split())
            _, question, answer = source.draw("understanding", index)
            assert len(tokenizer.encode(f"\n{question}")) == len(question.split()) + 1  # the closing sign
            assert len(tokenizer.encode(answer)) == len(answer.split())


@pytest.mark.parametrize("name", ["harmon", "showo2", "openuni"])
def test_words_of_garments_become_tokens_and_old_ids_keep_their_meaning(name, tmp_path):
    before = family(name).load_tokenizer(str(FOLDER))
    before.save_pretrained(tmp_path)
    old, rows = before.get_vocab(), len(before)
    texts = [PROMPT, "naïve 😀👩‍🚀 日本\n\n\ttabs  and   spaces "]
    for index in range(50):
        source = Scenes("scenes64", "held_out")
        texts += [source.draw("generation", index)[1], " ".join(source.draw("understanding", index)[1:])]
    encoded = [before.encode(text) for text in texts]
    assert extend_tokenizer(tmp_path) == extend_tokenizer(tmp_path) == rows + 19
    shipped = family(name).load_tokenizer(str(FOLDER.parent / f"{name}_scenes32"))
    assert len(shipped) == rows + 19 <= family(name).config_of_size("scenes32").llm.vocab_size
    for after in (AutoTokenizer.from_pretrained(tmp_path), shipped):
        assert old.items() <= after.get_vocab().items()
        assert [after.encode(text) for text in texts] == encoded
        check_garments(after)


def check_garments(tokenizer) -> None:
    garments = Scenes("garments32", "held_out")
    for index in range(300):
        _, caption, _ = garments.draw("generation", index)
        assert len(tokenizer.encode(f" {caption}")) == len(caption.split())
        _, question, answer = garments.draw("understanding", index)
        assert len(tokenizer.encode(f"\n{question}")) == len(question.split()) + 1
        assert len(tokenizer.encode(answer)) == len(answer.split())
        for text in (caption, question, answer, "addresses and rebooted shirting"):
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_run_from_before_the_words_of_garments_finds_the_tokenizer_that_it_was_trained_with():
    harmon = family("harmon")
    old = harmon.config_of_size("scenes32").with_settings({"llm": {"vocab_size": 440}})
    tokens = harmon.build(old, "scenes32").processor.tokenizer
    assert tokens.get_vocab() == AutoTokenizer.from_pretrained(FOLDER).get_vocab()
