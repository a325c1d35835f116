"""What is wrong with options or a configuration, in one sentence: where, what, the file if known, and the mend."""

import difflib
import inspect
import re
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from infotok_lit.errors import ExplainedError, SettingsError, did_you_mean

KINDS = {
    **{"int": "a whole number", "float": "a number", "bool": "true or false"},
    **{"str": "text", "list": "a list", "NoneType": "null"},
}
"""What a user calls Python's types."""
BOUNDS = {">=": "{} or more", ">": "above {}", "<=": "{} or less", "<": "below {}"}
"""What a user calls Python's comparisons."""
MOVED = {
    "objective.weight": "it is objective.understanding.lambda_ and objective.generation.lambda_ now, one per branch",
    "objective.multiplier": "objective.warmup_steps alone says it: 0 for constant, more for a warm-up",
}
"""What the end of an older configuration's key is called now."""

TRIED_AS_A_PATH = re.compile(r"File does not exist: '[^{]*\{\"")
"""What jsonargparse meets before it reads a piece of configuration as such."""


@contextmanager
def one_sentence(parser: ArgumentParser, arguments: Sequence[str]) -> Iterator[None]:
    """Whatever is refused while options are parsed or instantiated comes out as a SettingsError that says where.

    Args:
        parser: made with `exit_on_error=False`.
        arguments: what is parsed, as `normalised` leaves it: to find the file that a key stands in.
    """
    try:
        yield
    except Exception as error:
        sentence = explain(error, parser, arguments)
        if sentence is None:
            raise
        raise SettingsError(sentence) from error


def explain(error: Exception, parser: ArgumentParser, arguments: Sequence[str] = ()) -> str | None:
    """One sentence for what jsonargparse or a configured class raised; None if it is no mistake of the user's."""
    chain = list(_chain(error))
    key = _key(chain)
    explained = next((one for one in chain if isinstance(one, ExplainedError)), None)
    if explained is not None:
        return _located(str(explained), key, arguments)
    root, text = chain[-1], _message(chain[-1])
    unknown = re.search(r"(?:unrecognized arguments: --|ption ')([^'=\s]+)", text)
    if unknown is not None:
        inside = _as_typed(unknown[1], key, arguments)
        name = ".".join([*key, inside])
        moved = next((now for old, now in MOVED.items() if name.endswith(old)), None)
        if moved is not None:
            return f"there is no setting {name} any more{_place(name, arguments)}; {moved}"
        close = closest_key(inside, _known_keys(chain, parser))
        hint = f"; did you mean {'.'.join([*key, close])}?" if close else ""
        return f"there is no setting {name}{_place(name, arguments)}{hint}"
    if not isinstance(root, (ValueError, TypeError, KeyError, ImportError, OSError, AttributeError, ArgumentError)):
        return None
    if isinstance(root, AttributeError) and not inspect.ismodule(getattr(root, "obj", None)):
        return None
    return _located(_plain(root, text, chain), key, arguments)


def closest_key(key: str, known: Iterable[str]) -> str | None:
    """The dotted key that was meant: the first part that is not known, mended; or the same name elsewhere.

    Where only the name itself is not known there, the same name elsewhere is nearer than one that is spelt alike.
    """
    paths = [name.split(".") for name in known]
    parts = key.removesuffix("+").split(".")
    elsewhere = next((".".join(path) for path in paths if len(path) > 1 and path[-1] == parts[-1]), None)
    candidates = paths
    for depth, part in enumerate(parts):
        names = {path[depth] for path in candidates if len(path) > depth}
        if part not in names:
            if elsewhere and depth == len(parts) - 1:
                return elsewhere
            close = difflib.get_close_matches(part, names, n=1)
            if close:
                return ".".join([*parts[:depth], *close])
            break
        candidates = [path for path in candidates if len(path) > depth and path[depth] == part]
    return elsewhere


def config_files(arguments: Sequence[str]) -> list[Path]:
    """The files that `--config` names, in order."""
    pairs = [argument.partition("=") for argument in arguments]
    return [Path(value) for name, _, value in pairs if name in ("-c", "--config") and value]


def check_config(path: Path) -> dict[str, Any]:
    """The settings in a file; SettingsError, naming it, unless it is a YAML mapping of settings."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise SettingsError(f"{path} is not YAML: {error.problem or error.context}{where}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise SettingsError(f"{path} is not a text file of settings in YAML") from error
    except OSError as error:
        raise SettingsError(f"the configuration {path} cannot be read: {error.strerror}") from error
    if not isinstance(content, dict | None):
        raise SettingsError(f"{path} holds a {type(content).__name__}, not settings as `key: value`")
    if content and "config" in content:
        raise SettingsError(f"{path}: a configuration cannot name others under `config`; give each with --config")
    return content or {}


# Inside


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from, the outermost first; one that only repeats its cause is left out."""
    while error is not None:
        cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        cause = None if cause is not None and TRIED_AS_A_PATH.match(_message(cause)) else cause
        if cause is None or _message(cause) != _message(error):
            yield error
        error = cause


def _message(error: BaseException) -> str:
    # KeyError quotes its message.
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)


def _key(chain: Sequence[BaseException]) -> list[str]:
    """Where in the configuration the error arose, in parts."""
    parts: list[str] = []
    for error in chain:
        text = _message(error)
        if match := re.match(r'Parser key "([^"]+)"', text):
            parts.append(match[1])
        elif text.startswith("Problem with given class_path"):
            parts.append("init_args")
        for frame, _ in traceback.walk_tb(error.__traceback__):
            # jsonargparse does not say which component refused its values, but it is at work on it.
            component = frame.f_locals.get("component")
            if frame.f_code.co_name == "instantiate" and hasattr(component, "dest"):
                parts += ["init_args", component.dest] if parts else [component.dest]
    return parts


def _as_typed(unknown: str, key: Sequence[str], arguments: Sequence[str]) -> str:
    """An unknown key below `key`, whole: where it was set to null, jsonargparse names its end alone."""
    above = "--" + "".join(f"{part}." for part in key)
    nulls = [argument.removesuffix("=null") for argument in arguments if argument.endswith("=null")]
    whole = (name.removeprefix(above) for name in nulls if name.startswith(above) and name.endswith(f".{unknown}"))
    return next(whole, unknown)


def _known_keys(chain: Sequence[BaseException], parser: ArgumentParser) -> list[str]:
    """The keys of the class, or of the command, that an unknown key was given to."""
    classes = [re.match(r"Problem with given class_path '([^']+)'", _message(error)) for error in chain]
    named = [match[1] for match in classes if match]
    if named:
        from jsonargparse._util import import_object

        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(import_object(named[-1]), fail_untyped=False)
    return [action.dest for action in parser._actions if action.dest != "help"]


def _plain(error: BaseException, text: str, chain: Sequence[BaseException]) -> str:
    """jsonargparse's sentence about a value, in a user's words."""
    if isinstance(error, AttributeError):
        return f"{error.obj.__name__} has no {error.name}{did_you_mean(error.name, dir(error.obj))}"
    got = re.search(r"\. Got value: (.*)", text, re.DOTALL)
    value = got[1] if got else ""
    union = _union(chain)
    if union is not None:
        choices = _choices(union)
        kinds = [KINDS.get(kind, kind) for kind in re.findall(r"<class '(?:\w+\.)*(\w+)'>", union)]
        listed = [f"one of {', '.join(choices)}"] if choices else []
        if kinds or choices:
            return f"{value!r} is not {' or '.join(listed + kinds)}{did_you_mean(value, choices)}"
    if text.startswith("Expected a typing.Literal["):
        choices = _choices(text.partition(". Got value:")[0])
        return f"{value!r} is not one of {', '.join(choices)}{did_you_mean(value, choices)}"
    if match := re.match(r"Expected a dot import path string: (.*)", text):
        return f"{match[1]!r} is not the path of a class, such as infotok_lit.scenes.Scenes"
    if match := re.match(r"Expected a <class '(?:\w+\.)*(\w+)'>", text):
        return f"{value!r} is not {KINDS.get(match[1], match[1])}"
    if match := re.match(r"(\S+) does not conform to restriction (.*)", text):
        bounds = [BOUNDS[sign].format(bound) for sign, bound in re.findall(r"v([<>]=?)(\S+)", match[2])]
        return f"{match[1]} is not {' and '.join(bounds)}"
    if match := re.match(r"invalid literal for int\(\) with base 10: (.*)", text):
        return f"{match[1]} is not a whole number"
    if match := re.match(r"the following arguments are required: (.*)", text):
        return f"missing: {', '.join(f'--{name}' for name in match[1].split(', '))}; --help says more"
    if match := re.match(r"argument (\S+?)[,:].*expected one argument", text, re.DOTALL):
        return f"{match[1]} needs a value"
    return " ".join(text.split())


def _choices(text: str) -> list[str]:
    """What the Literals that a text spells allow."""
    choices = [choice for part in re.findall(r"Literal\[(.*?)\]", text) for choice in part.split(",")]
    return list(dict.fromkeys(choice.strip().strip("'\"") for choice in choices))


def _union(chain: Sequence[BaseException]) -> str | None:
    """The types of which none fits the value, if the innermost error is about one of several simple ones.

    For a value inside a list, that one error says it all: the other types are none that it could have.
    """
    expected = re.match(r"Expected a (<class '.*?'>|typing)", _message(chain[-1]))
    if not chain[1:] or expected is None:
        return None
    match = re.match(r"Does not validate against any .*\nSubtypes: [\[(](.*)[\])]\n", _message(chain[-2]))
    return match[1] if match and (expected[1] in match[1] or "Literal" in match[1]) else None


def _located(sentence: str, key: Sequence[str], arguments: Sequence[str]) -> str:
    key = key[:-1] if key[-1:] == ["init_args"] else key
    name = ".".join(key)
    says_where = not key or sentence.startswith((f"{key[0]}.", f"{key[-1]}:", name))
    place = _place(name, arguments)
    return f"{sentence}{place}" if says_where else f"{name}: {sentence}{place}"


def _place(key: str, arguments: Sequence[str]) -> str:
    """ " (in FILE)" for a key that a configuration file sets, and no later option."""
    place = ""
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name in ("-c", "--config"):
            place = f" (in {value})" if _holds(Path(value), key.split(".")) else place
        elif key and f"{name[2:].removesuffix('+')}.".startswith(f"{key}."):
            place = ""
    return place


def _holds(path: Path, key: Sequence[str]) -> bool:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    for part in key:
        if not isinstance(content, dict) or not {part, f"{part}+"} & content.keys():
            return False
        content = content.get(part, content.get(f"{part}+"))
    return bool(key)
