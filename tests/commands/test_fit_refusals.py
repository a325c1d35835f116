"""Settings that only the built model or the opened data can refuse: `fit` answers with one message, not a traceback."""

import pytest

from infotok_lit.cli import main


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.init_args.freeze=[nope.]"], "freeze: no parameter starts with 'nope.'"),
        (["--model.init_args.lora.targets=[nope]"], "lora.targets: no linear layer is called 'nope'"),
        (["--model.init_args.optimiser.group_lr.nope=0.1"], "group_lr: no trainable parameter starts with 'nope'"),
        (["--model.init_args.image_size=30"], "image size 30 x 30 is not a multiple of 8 pixels"),
        (["--model.init_args.tokenizer=/nowhere"], "no tokenizer at '/nowhere'"),
        (["--trainer.max_steps=-1"], "say when to stop with trainer.max_steps"),
        (["--trainer.precision=bf16-true"], "set it to bf16-mixed"),
    ],
)
def test_a_setting_that_cannot_be_met_is_one_message(tmp_path, monkeypatch, capsys, arguments, words) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--model.init_args.init_from=null", "--trainer.accelerator=cpu", *arguments]) != 0
    assert words in capsys.readouterr().err
