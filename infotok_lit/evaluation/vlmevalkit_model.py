"""Our models in VLMEvalKit, whose `run.py` finds models in a dict of constructors: this puts one there, and runs it.

python -m infotok_lit.evaluation.vlmevalkit_model EXPORTED VLMEvalKit/run.py --model infotok --data MME POPE
"""

import runpy
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from vlmeval.config import supported_VLM
from vlmeval.vlm.base import BaseModel

from infotok_lit.data.image_file import read_image
from infotok_lit.errors import SettingsError
from infotok_lit.evaluation.models import OwnModel
from infotok_lit.evaluation.running import side_by_side
from infotok_lit.inference import InferenceModel
from infotok_lit.models.family import load_folder

NAME = "infotok"
NEW_TOKENS = 512
"""The longest answer: VLMEvalKit sets no limit."""


class InfoTok(BaseModel):
    """An exported folder of any family, on the first GPU that its process sees.

    Args:
        path: the folder.
    """

    INTERLEAVE = True

    def __init__(self, path: str) -> None:
        super().__init__()
        model = load_folder(Path(path)).to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.own = OwnModel(InferenceModel(model), Path(path).name, Path(path))

    def generate_inner(self, message: Sequence[Mapping[str, str]], dataset: str | None = None) -> str:
        """The greedy answer to a message of texts and image files; several images are laid side by side."""
        pictures = [Path(part["value"]) for part in message if part["type"] == "image"]
        if not pictures:
            raise SettingsError(f"infotok reads images, and {dataset} has a question without one")
        image = side_by_side([read_image(file, min_side=1, max_aspect=float("inf")) for file in pictures])
        question = "\n".join(part["value"] for part in message if part["type"] == "text")
        return self.own.answer([image], [question], NEW_TOKENS)[0]


def main(argv: Sequence[str]) -> None:
    """Run VLMEvalKit's script with a model called `infotok`."""
    if len(argv) < 2:
        raise SystemExit(f"usage: python -m {InfoTok.__module__} EXPORTED VLMEvalKit/run.py --model {NAME} --data ...")
    path, script, *options = argv
    supported_VLM[NAME] = partial(InfoTok, path=path)
    sys.argv = [script, *options]
    sys.path.insert(0, str(Path(script).resolve().parent))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
