"""Pictures reach every logger that can show them, by that logger's own method."""

from types import SimpleNamespace

import numpy as np
from PIL import Image

from infotok_lit.callbacks.figures import show_in

PICTURE = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))


class Recorder:
    """Remembers how its methods were called."""

    def __init__(self, *methods: str) -> None:
        self.calls: list[tuple[tuple, dict]] = []
        for method in methods:
            setattr(self, method, lambda *given, **named: self.calls.append((given, named)))


def test_tensorboard_gets_height_width_channels() -> None:
    experiment = Recorder("add_image")
    show_in(SimpleNamespace(experiment=experiment), "val/pictures", PICTURE, 7)
    ((name, array, step), named) = experiment.calls[0]
    assert (name, step, named) == ("val/pictures", 7, {"dataformats": "HWC"})
    assert np.array_equal(array, np.array(PICTURE))


def test_weights_and_biases_gets_a_list() -> None:
    logger = Recorder("log_image")
    logger.experiment = object()
    show_in(logger, "val/pictures", PICTURE, 7)
    assert logger.calls == [((), {"key": "val/pictures", "images": [PICTURE], "step": 7})]


def test_mlflow_gets_its_run_and_a_key_without_a_slash() -> None:
    experiment = Recorder("log_image")
    show_in(SimpleNamespace(experiment=experiment, run_id="r"), "val/pictures", PICTURE, 7)
    assert experiment.calls == [(("r", PICTURE), {"key": "val_pictures", "step": 7})]


def test_comet_gets_a_name() -> None:
    experiment = Recorder("log_image")
    show_in(SimpleNamespace(experiment=experiment), "val/pictures", PICTURE, 7)
    assert experiment.calls == [((PICTURE,), {"name": "val/pictures", "step": 7})]


def test_a_logger_without_pictures_is_left_alone() -> None:
    experiment = Recorder("log_metrics")
    show_in(SimpleNamespace(experiment=experiment), "val/pictures", PICTURE, 7)
    assert not experiment.calls
