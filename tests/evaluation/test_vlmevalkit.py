"""Our models in a stand-in of VLMEvalKit with the contract of its BaseModel and of the script that runs it."""

import json
import sys
from pathlib import Path

import pytest
import torch
from evaluation.fakes import noise
from PIL import Image
from tiny import TINY_CONFIGS

from infotok_lit.assets import SCENES_TOKENIZER
from infotok_lit.evaluation.models import OwnModel
from infotok_lit.evaluation.running import side_by_side
from infotok_lit.inference import InferenceModel
from infotok_lit.models.export import export_model
from infotok_lit.models.family import family, load_folder

BASE = """
class BaseModel:
    INTERLEAVE = False
    allowed_types = ["text", "image"]

    def __init__(self):
        self.dump_image_func = None

    def set_dump_image(self, function):
        self.dump_image_func = function

    def use_custom_prompt(self, dataset):
        return False

    def generate(self, message, dataset=None):
        assert all(part["type"] in self.allowed_types for part in message)
        return self.generate_inner(message, dataset)
"""
RUN = """
import argparse, json
from vlmeval.config import supported_VLM
parser = argparse.ArgumentParser()
parser.add_argument("--model", nargs="+")
parser.add_argument("--data", nargs="+")
given = parser.parse_args()
for constructor in supported_VLM.values():
    if "retry" in constructor.keywords:
        constructor.keywords["retry"] = 3
model = supported_VLM[given.model[0]]()
model.set_dump_image(print)
found = [model.generate(message=message, dataset="MME") for message in json.load(open(given.data[0]))]
json.dump(found, open(given.data[0] + ".answers", "w"))
"""


@pytest.fixture
def script(tmp_path, monkeypatch) -> Path:
    for name, text in {"__init__": "", "config": "supported_VLM = {}\n", "vlm/__init__": "", "vlm/base": BASE}.items():
        file = tmp_path / "kit" / "vlmeval" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tmp_path / "kit" / "run.py").write_text(RUN)
    monkeypatch.syspath_prepend(tmp_path / "kit")
    monkeypatch.setattr(sys, "argv", sys.argv)
    yield tmp_path / "kit" / "run.py"
    for name in [name for name in sys.modules if name.split(".")[0] == "vlmeval" or name.endswith("vlmevalkit_model")]:
        del sys.modules[name]


def test_the_script_of_vlmevalkit_finds_our_model(script, tmp_path):
    """Its answers are those of the model asked directly; two images of one question are laid side by side."""
    from infotok_lit.evaluation.vlmevalkit_model import NEW_TOKENS, main

    exported = tmp_path / "tiny"
    torch.manual_seed(0)
    model = family("harmon").build(TINY_CONFIGS["harmon"](0.0), str(SCENES_TOKENIZER))
    for name, parameter in model.named_parameters():
        if name.startswith("llm."):
            parameter.data += torch.randn_like(parameter)
    export_model(model, exported, {})
    pictures = [tmp_path / "0.png", tmp_path / "1.jpg"]
    for number, file in enumerate(pictures):
        noise(number, 32).save(file)
    image, text = [{"type": "image", "value": str(file)} for file in pictures], {"type": "text", "value": "how many?"}
    messages = [[image[0], text], [image[0], text, image[1], {"type": "text", "value": "and now?"}]]
    data = tmp_path / "messages.json"
    data.write_text(json.dumps(messages))
    main([str(exported), str(script), "--model", "infotok", "--data", str(data)])

    own = OwnModel(InferenceModel(load_folder(exported)), "own", None)
    opened = [Image.open(file).convert("RGB") for file in pictures]
    expected = [
        own.answer([opened[0]], ["how many?"], NEW_TOKENS)[0],
        own.answer([side_by_side(opened)], ["how many?\nand now?"], NEW_TOKENS)[0],
    ]
    assert expected[0] != expected[1]
    assert json.loads(Path(f"{data}.answers").read_text()) == expected


def test_a_message_without_an_image_is_refused(script):
    from infotok_lit.errors import SettingsError
    from infotok_lit.evaluation.vlmevalkit_model import InfoTok

    model = InfoTok.__new__(InfoTok)
    with pytest.raises(SettingsError, match="MMLU has a question without one"):
        model.generate([{"type": "text", "value": "why?"}], "MMLU")
