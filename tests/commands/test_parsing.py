"""A typed function's parameters are a command's options; whatever is wrong with them is one sentence."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from infotok_lit.commands.mistakes import closest_key
from infotok_lit.commands.parsing import Seed, normalised, run
from infotok_lit.errors import SettingsError


@dataclass(frozen=True)
class Choice:
    """Which model.

    Args:
        model: A folder.
        dtype: Of the weights.
    """

    model: Path
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.model.name == "nowhere":
            raise SettingsError("model is nowhere; name a folder that exists")


def ask(
    choice: Choice,
    image: list[str],
    prompt: list[str] | None = None,
    scale: float = 1.0,
    force: bool = False,
    sizes: list[float] | None = None,
    seed: Seed = 0,
) -> int:
    """Ask a model.

    Args:
        choice: Which.
        image: Files.
        prompt: Questions.
        scale: A factor.
        force: Replace.
        sizes: Several numbers.
        seed: Of random numbers.
    """
    called.append((choice, image, prompt, scale, force))
    return 3


called: list[tuple] = []


def arguments_of(*argv: str) -> tuple:
    called.clear()
    assert run(ask, ["ask", *argv]) == 3
    return called[0]


def test_a_function_gets_what_its_types_say() -> None:
    given = arguments_of(
        "--model", "m", "--image", "a", "b", "--image=c", "--scale", "-1e-4", "--force", "--prompt=[x]"
    )
    assert given == (Choice(Path("m")), ["a", "b", "c"], ["[x]"], -1e-4, True)
    given = arguments_of("--image", '["a", "b"]', "--model=m", "--dtype", "bfloat16", "--force", "false")
    assert given == (Choice(Path("m"), "bfloat16"), ["a", "b"], None, 1.0, False)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("--modl m --image a", "there is no setting modl; did you mean model?"),
        (
            "--model m --image a --dtype bfloat61",
            "dtype: 'bfloat61' is not one of float32, bfloat16; did you mean bfloat16?",
        ),
        ("--model m --image a --scale fast", "scale: 'fast' is not a number"),
        ("--model m --image a --scale", "--scale needs a value"),
        ("--model m --image a --scale 1 2", "--scale takes one value, not 2: 1 2; quote it if it is one"),
        ("--model nowhere --image a", "model is nowhere; name a folder that exists"),
        ("--model m", "missing: --image; --help says more"),
        ("m", "'m' is no option: options begin with --"),
        ("--model= --image a", "--model is empty: give it a path"),
        ("--model m --image a --sizes 1 wide", "sizes: 'wide' is not a number"),
        ("--model m --image a --seed -1", "seed: -1 is not 0 or more and below 9223372036854775808"),
        (f"--model m --image a --seed {2**63}", f"seed: {2**63} is not 0 or more and below {2**63}"),
        ("--model m --image a --forc", "there is no setting forc; did you mean force?"),
    ],
)
def test_a_mistake_is_one_sentence(argv, sentence) -> None:
    with pytest.raises(SettingsError) as refused:
        run(ask, ["ask", *argv.split()])
    assert str(refused.value) == sentence


def test_options_that_are_not_the_functions_are_handed_on() -> None:
    def bench(fit_arguments: list[str], steps: int = 1) -> int:
        assert (steps, fit_arguments) == (4, ["--config=a.yaml", "--model.init_args.optimiser.lr=-1e-4"])
        return 0

    argv = ["bench", "--config", "a.yaml", "--steps", "4", "--model.init_args.optimiser.lr", "-1e-4"]
    assert run(bench, argv) == 0


def test_a_list_on_the_command_line_takes_the_place_of_a_files(tmp_path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("image: [a, b]\nmodel: m\n")
    for argv, images in (
        ([], ["a", "b"]),
        (["--image", "c"], ["c"]),
        (["--image", '["c"]', "--scale", "2", "--image", "d", "e"], ["c", "d", "e"]),
        (["--image+", "c"], ["a", "b", "c"]),
    ):
        called.clear()
        run(ask, ["ask", "--config", str(file), *argv], config=True)
        assert called[0][1] == images


def test_null_on_the_command_line_takes_the_place_of_a_files_list(tmp_path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text("model: m\nimage: [a]\nprompt: [x]\n")
    for argv, prompt in (([], ["x"]), (["--prompt", "null"], None), (["--prompt", "null", "y"], ["null", "y"])):
        called.clear()
        run(ask, ["ask", "--config", str(file), *argv], config=True)
        assert called[0][2] == prompt


def test_settings_from_a_file_are_refused_with_its_name(tmp_path) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("image: [a]\nmodel: m\n")
    assert run(ask, ["ask", "--config", str(good)], config=True) == 3
    for content, sentence in (
        ("scale: fast\n", f"scale: 'fast' is not a number (in {bad})"),
        ("scle: 1\n", f"there is no setting scle (in {bad}); did you mean scale?"),
        ("image: [a\n", f"{bad} is not YAML: expected ',' or ']', but got '<stream end>' (line 2, column 1)"),
        ("[a, b]\n", f"{bad} holds a list, not settings as `key: value`"),
        ("config: []\n", f"{bad}: a configuration cannot name others under `config`; give each with --config"),
    ):
        bad.write_text(content)
        with pytest.raises(SettingsError) as refused:
            run(ask, ["ask", "--config", str(good), "--config", str(bad)], config=True)
        assert str(refused.value) == sentence
    bad.write_bytes(bytes(range(256)))
    with pytest.raises(SettingsError, match="not a text file of settings in YAML"):
        run(ask, ["ask", "--config", str(bad)], config=True)


def test_numbers_and_options_are_told_apart() -> None:
    assert normalised(["--a", "-1e-4", "--b=-.5", "-c", "x", "--d", "-inf"]) == [
        "--a=-1e-4",
        "--b=-.5",
        "-c=x",
        "--d=-inf",
    ]


def test_the_key_that_was_meant() -> None:
    known = ["model", "trainer.max_steps", "objective.temperature"]
    assert closest_key("objective.temprature", known) == "objective.temperature"
    assert closest_key("modle.init_args.size", known) == "model"
    assert closest_key("max_steps", known) == "trainer.max_steps"
    assert closest_key("colour", known) is None
