"""Our models in lmms-eval (0.7), which finds them through the entry point `lmms_eval.models`.

lmms-eval --model infotok --model_args path=EXPORTED --tasks TASK --batch_size 8
"""

import os
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from PIL import Image

from infotok_lit.errors import SettingsError
from infotok_lit.evaluation.models import OwnModel
from infotok_lit.evaluation.running import side_by_side
from infotok_lit.inference import InferenceModel
from infotok_lit.models.family import load_folder

DEFAULT_NEW_TOKENS = 128
"""Of tasks that set no limit, as SEED-Bench."""


class InfoTok(lmms):
    """An exported folder of any family.

    Args:
        path: the folder.
        batch_size: questions at a time.
        device: default: cuda, each process its own, if there is one.
        dtype: of the weights.
        max_batch_size: lmms-eval's; not used, for memory is known beforehand.
    """

    is_simple = True

    def __init__(
        self,
        path: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "float32",
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if not torch.cuda.is_available():
            device = "cpu"
        self.device = torch.device(device or f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
        self.batch_size = int(batch_size)
        model = load_folder(Path(path))
        for parameter in model.parameters():
            parameter.data = parameter.data.to(getattr(torch, dtype))
        # Inside another object, so that lmms-eval does not delete it after its first task.
        self.own = OwnModel(InferenceModel(model.to(self.device).eval()), Path(path).name, Path(path))

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Greedy answers, in the order of the requests."""
        answers: dict[int, str] = {}
        order = sorted(range(len(requests)), key=lambda number: _new_tokens(requests[number]))
        for most, numbers in groupby(order, key=lambda number: _new_tokens(requests[number])):
            same = list(numbers)
            for batch in (same[start : start + self.batch_size] for start in range(0, len(same), self.batch_size)):
                images = [self._image(requests[number]) for number in batch]
                questions = [requests[number].args[0] for number in batch]
                found = self.own.answer(images, questions, most)
                answers |= {n: _until(text, requests[n]) for n, text in zip(batch, found, strict=True)}
        return [answers[number] for number in range(len(requests))]

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """(loss in nats per token, False): lmms-eval takes the lowest, whatever the name says, and no task of
        pictures asks whether the option is the greedy one. As the text of a result, since 0.7.3 makes strings of
        bare pairs, which its scoring cannot read."""
        losses = []
        for request in requests:
            context, target = request.args[:2]
            option = target if isinstance(target, str) else target(self._document(request))
            # The delimiter is for texts that follow one another; here an answer follows a template.
            ((likelihood,),) = self.own.likelihoods([self._image(request)], [context], [[option.lstrip()]])
            losses.append(GenerationResult((-likelihood, False)))
        return losses

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Our models answer one question at a time."""
        raise SettingsError("infotok answers single questions: choose tasks of one round")

    def _document(self, request: Instance) -> Any:
        *_, name, split = request.args
        return self.task_dict[name][split][request.args[-3]]

    def _image(self, request: Instance) -> Image.Image:
        images = request.args[-4](self._document(request))
        if not images:
            raise SettingsError(f"infotok reads images, and task {request.args[-2]} has a question without one")
        return side_by_side([image.convert("RGB") for image in images])


def _new_tokens(request: Instance) -> int:
    return int(request.args[1].get("max_new_tokens", DEFAULT_NEW_TOKENS))


def _until(text: str, request: Instance) -> str:
    """The text up to the first of the task's stop strings."""
    stops = request.args[1].get("until") or ()
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.split(stop)[0] if stop else text
    return text
