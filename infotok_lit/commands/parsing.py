"""Every command line is read in one way: a typed function's parameters are its options, and a mistake is one sentence.

A subcommand is the function of its name, whose annotations are light and whose body imports what is heavy, so that its
help is instant:

    def export(ckpt: Path, out: Path, dtype: Literal["float32", "bfloat16"] | None = None, force: bool = False) -> None:
        '''Strip a run to an inference folder.

        Args:
            ckpt: A run folder, or one of its checkpoints.
            ...
        '''
"""

import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import restricted_number_type

from infotok_lit.assets import find_config
from infotok_lit.commands.mistakes import check_config, config_files, one_sentence
from infotok_lit.errors import SettingsError

PROGRAM = "python -m infotok_lit"
NUMBER = re.compile(r"-(\d|\.\d|inf$|nan$)")
REST = "fit_arguments"
"""The parameter that takes the options that are not a function's own, as a list of arguments."""

Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**63)], docstring="What random numbers come from.")


def run(function: Callable[..., int | None], argv: Sequence[str], config: bool = False) -> int:
    """Call a function with the options of a command line.

    A parameter that is a dataclass is spelled by its fields, as if they were parameters. A list takes several values
    (`--image a.png b.png`), may be given several times, and takes the place of one in a file; `null` is none, where
    that may be left out. A flag is `--force` or `--force true`. Options that the function has not got are an error,
    unless it has `fit_arguments` for them.

    Args:
        function: What to call; its docstring is the help, and what it returns (None: 0) the exit status.
        argv: the subcommand, and the options.
        config: also read the options from YAML files, each named with `--config` (a path, or a name below configs/);
            later ones win.

    Raises:
        SettingsError: for options that are unknown, missing or wrong: where, and what about it.
    """
    parser = build_parser(function, argv[0], config)
    hints = {name: hint for name, hint in get_type_hints(function).items() if name != "return"}
    takes_rest = hints.pop(REST, None) is not None
    known = dict(_typed_options(hints))
    options, others = list(_options(argv[1:])), []
    if takes_rest:
        others = [option for option in options if _name(option[0]) not in {*known, "help", "h"}]
        options = [option for option in options if option not in others]
    options = _gathered(options, known)
    arguments = [argument for option in options for argument in _spelled(*option, hint=known.get(_name(option[0])))]
    arguments = [_with_path(argument) if config else argument for argument in arguments]
    for path in config_files(arguments):
        check_config(path)
    with one_sentence(parser, arguments):
        given = parser.instantiate(parser.parse_args(arguments))
    values = {name: _taken(given, name, hint) for name, hint in hints.items()}
    if takes_rest:
        values[REST] = [argument for option in others for argument in _spelled(*option)]
    return function(**values) or 0


def build_parser(function: Callable[..., int | None], command: str, config: bool = False) -> ArgumentParser:
    """The parser behind `run`."""
    description = (inspect.getdoc(function) or "").split("\nArgs:")[0].strip()
    parser = ArgumentParser(
        prog=f"{PROGRAM} {command}", description=description, exit_on_error=False, allow_abbrev=False
    )
    if config:
        parser.add_argument("--config", action="config", help="a YAML file of options; may be repeated, later ones win")
    flat = {name: hint for name, hint in get_type_hints(function).items() if is_dataclass(hint)}
    parser.add_function_arguments(function, as_group=False, as_positional=False, skip={*flat, REST}, fail_untyped=True)
    for hint in flat.values():
        parser.add_class_arguments(hint, as_positional=False)
    return parser


def normalised(argv: Iterable[str]) -> list[str]:
    """Options and values as `--key=value`, so that a value may begin with a minus: `--key -1e-4`."""
    return [argument for option in _options(argv) for argument in _spelled(*option)]


# Options


def _options(argv: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """`("--image", ["a.png", "b.png"])`: each option with the values after it."""
    option: tuple[str, list[str]] | None = None
    for argument in argv:
        begins = argument.startswith("-") and len(argument) > 1 and " " not in argument.partition("=")[0]
        if begins and not NUMBER.match(argument):
            if option is not None:
                yield option
            name, given, value = argument.partition("=")
            option = (name, [value] if given else [])
        elif option is None:
            raise SettingsError(f"{argument!r} is no option: options begin with --")
        else:
            option[1].append(argument)
    if option is not None:
        yield option


def _gathered(options: list[tuple[str, list[str]]], known: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Lists that are given several times become one option with all values, where the first of them stood."""
    gathered: dict[str, tuple[str, list[str]]] = {}
    for place, (name, values) in enumerate(options):
        is_list = _is_list(known.get(_name(name))) and not name.endswith("+")
        first = gathered.setdefault(name if is_list else f"{place}", (name, []))
        first[1].extend(_items(values) if is_list else values)
    return list(gathered.values())


def _items(values: list[str]) -> Iterator[Any]:
    """What the values of a list stand for: `a b` for two, and so does `["a", "b"]`."""
    for value in values:
        yield from json.loads(value) if _is_json_list(value) else [value]


def _spelled(name: str, values: list[str], hint: Any = None) -> list[str]:
    """An option as arguments that jsonargparse reads."""
    if "" in values and _names_paths(hint):
        raise SettingsError(f"{name} is empty: give it a path")
    if values == ["null"] and type(None) in get_args(hint):
        return [f"{name}=null"]
    if _is_list(hint) and not name.endswith("+"):
        return [f"{name}={json.dumps(values)}"]
    if hint is bool and not values:
        return [f"{name}=true"]
    if len(values) > 1:
        raise SettingsError(f"{name} takes one value, not {len(values)}: {' '.join(values)}; quote it if it is one")
    return [f"{name}={values[0]}"] if values else [name]


def _with_path(argument: str) -> str:
    name, _, value = argument.partition("=")
    return f"{name}={find_config(value)}" if name == "--config" and value else argument


def _name(option: str) -> str:
    return option.lstrip("-").removesuffix("+").split(".")[0]


def _typed_options(hints: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, hint in hints.items():
        if is_dataclass(hint):
            own = get_type_hints(hint)
            yield from ((field.name, own[field.name]) for field in fields(hint))
        else:
            yield name, hint


def _taken(given: Namespace, name: str, hint: Any) -> Any:
    if not is_dataclass(hint):
        return given[name]
    return hint(**{field.name: given[field.name] for field in fields(hint) if field.init})


def _is_list(hint: Any) -> bool:
    return any(get_origin(part) in (list, Sequence) for part in (hint, *get_args(hint)))


def _names_paths(hint: Any) -> bool:
    return hint is Path or any(map(_names_paths, get_args(hint)))


def _is_json_list(text: str) -> bool:
    try:
        return isinstance(json.loads(text), list)
    except ValueError:
        return False
