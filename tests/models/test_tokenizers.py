"""Tokenizers are found at once or not at all, run no code, and load again without a warning."""

import json
import logging
import socket
from contextlib import suppress
from pathlib import Path
from threading import Thread

import pytest
import tokenizers
from PIL import Image
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from infotok_lit.assets import SCENES_TOKENIZER, embedded_base
from infotok_lit.checkpoints import write_config
from infotok_lit.errors import SettingsError
from infotok_lit.models.common import text
from infotok_lit.models.common.text import load_tokenizer
from infotok_lit.models.family import family, load_folder


@pytest.fixture
def empty_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


def test_a_hub_that_does_not_answer_is_asked_once(empty_cache, monkeypatch) -> None:
    """A connection is made, and then nothing comes; its library would ask for each file, and for each again."""
    calls: list[tuple[socket.socket, bytes]] = []
    monkeypatch.setattr(text, "HUB_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(text.constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        Thread(target=_take_calls, args=(server, calls), daemon=True).start()
        with pytest.raises(SettingsError, match=r"no tokenizer at 'some/name': set model\.tokenizer to"):
            load_tokenizer("some/name")
        assert [request for _, request in calls].count(b"HEAD") == 1, "(it also asks, once, who its user is)"


def _take_calls(server: socket.socket, calls: list[tuple[socket.socket, bytes]]) -> None:
    with suppress(OSError):  # The server is closed at the end.
        while True:
            call, _ = server.accept()
            calls.append((call, call.recv(4)))


def test_without_a_network_the_setting_is_named(empty_cache, monkeypatch) -> None:
    """Nobody listens at the address."""
    monkeypatch.setattr(text.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SettingsError, match=r"no tokenizer at 'Qwen/Qwen2\.5-0\.5B-Instruct': set model\.tokenizer to"):
        family("harmon").fresh("0.5b")


def test_a_folder_without_a_tokenizer_is_named(tmp_path) -> None:
    with pytest.raises(SettingsError, match=rf"no tokenizer at '{tmp_path}'"):
        load_tokenizer(str(tmp_path))


def test_only_a_base_that_ships_falls_back_on_the_tokenizer_of_scenes(tmp_path) -> None:
    """Runs of it may be older than some of its words; one that is too large for another model is refused."""
    harmon, outside = family("harmon"), tmp_path / "own"
    config = harmon.config_of_size("scenes32").with_settings({"llm": {"vocab_size": 440}})
    load_tokenizer(harmon.tokenizers["scenes32"]).save_pretrained(outside)
    assert len(harmon.build(config, "scenes32").processor.tokenizer) <= 440
    other = type("Other", (type(harmon),), {"name": "harmon", "tokenizers": {"0.5b": str(outside)}})()
    with pytest.raises(SettingsError, match="has 454 tokens, the language model only 440: set model.tokenizer to its"):
        other.build(config, "0.5b")


def test_code_that_a_tokenizer_brings_is_not_run(tmp_path) -> None:
    ran = tmp_path / "ran"
    for file in SCENES_TOKENIZER.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    try:
        load_tokenizer(str(tmp_path))
    except SettingsError as error:
        assert "no tokenizer at" in str(error)
    assert not ran.exists()


def large_tokenizer(folder: Path) -> None:
    """More than 100,000 tokens, as Qwen's: only such ones are taken for Mistral's."""
    vocabulary = {f"token{i}": i for i in range(100_001)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="token0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)


def test_an_exported_tokenizer_loads_without_a_warning(tmp_path, caplog, monkeypatch) -> None:
    """By us, and by others, who do not know what to ask for."""
    (tmp_path / "source").mkdir()
    (tmp_path / "export").mkdir()
    large_tokenizer(tmp_path / "source")
    write_config(tmp_path / "source", "harmon", {})
    write_config(tmp_path / "export", "harmon", {})
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    AutoTokenizer.from_pretrained(str(tmp_path / "source"))
    assert "incorrect regex" in caplog.text, "what is to be silenced"
    caplog.clear()
    load_tokenizer(str(tmp_path / "source")).save_pretrained(tmp_path / "export")
    load_tokenizer(str(tmp_path / "export"))
    AutoTokenizer.from_pretrained(str(tmp_path / "export"))
    assert "incorrect regex" not in caplog.text


def test_a_question_is_encoded_once(monkeypatch) -> None:
    model = load_folder(embedded_base("harmon", "scenes32"))
    encode, texts = model.processor.encode, []
    monkeypatch.setattr(model.processor, "encode", lambda text: texts.append(text) or encode(text))
    model.describe(model.processor.pixels([Image.new("RGB", (40, 20))]), ["how many circles are there?"], 2)
    assert texts == ["\nhow many circles are there?"]
