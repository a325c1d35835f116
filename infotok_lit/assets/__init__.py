"""Files that ship with the package: configurations, the tokenizer of Scenes, pretrained bases, photographs of garments.

Only the standard library is imported before a configuration is read: the command line answers typing errors with it.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from infotok_lit.errors import MissingFileError, SettingsError, did_you_mean

EMBEDDED = "embedded"
"""How a configuration names the base that ships for its family and size."""
ASSETS = Path(__file__).parent
QUICKSTART_CONFIG = ASSETS / "quickstart.yaml"
DEFAULTS_CONFIG = ASSETS / "defaults.yaml"
"""What lies under every configuration of `fit`."""
CONFIGS = next(
    (folder for folder in (ASSETS.parent / "configs", ASSETS.parents[1] / "configs") if folder.is_dir()), ASSETS
)
"""Where installing the package puts configs/, or configs/ of the repository."""
OVER = "over"
"""The key by which a configuration names what it is to be laid over: a path from its own folder, or a list of them."""
SCENES_TOKENIZER = ASSETS / "scenes_tokenizer"
BENCHMARKS = ASSETS / "benchmarks"
"""What of the public benchmarks may be passed on."""
SCENES_FEATURES = ASSETS / "scenes_features" / "features.safetensors"
GARMENT_PHOTOGRAPHS = ASSETS / "garments" / "photographs.npz"
GARMENT_JUDGE = ASSETS / "garments" / "judge.safetensors"


def embedded_base(family: str, size: str) -> Path:
    """The exported folder of a base that ships with the package; MissingFileError if none does."""
    folder = shipped_bases().get(f"{family}_{size}")
    if folder is None:
        raise MissingFileError(
            f"no base of family {family} and size {size} ships with the package, only {', '.join(shipped_bases())}: "
            "set model.init_from to weights of your own, or to null for random ones"
        )
    return folder


def shipped_bases() -> dict[str, Path]:
    """The exported folders of the bases that ship with the package by their names, such as `harmon_scenes32`."""
    return {path.parent.name: path.parent for path in sorted(ASSETS.glob("*_scenes32/config.json"))}


def find_config(name: str | Path) -> Path:
    """The configuration file at a path, or of a name below configs/, such as `harmon/scenes32`.

    Raises:
        MissingFileError: if there is none; the message names what is close.
    """
    path = Path(name)
    if path.is_file():
        return path
    # From anywhere, what stands in the docs is found too: configs/harmon/scenes32.yaml.
    inside = Path(*path.parts[1:]) if path.parts[:1] == ("configs",) else path
    if not path.is_absolute() and ".." not in inside.parts:
        for candidate in (CONFIGS / inside, CONFIGS / f"{inside}.yaml"):
            if candidate.is_file():
                return candidate
    names = [str(file.relative_to(CONFIGS).with_suffix("")) for file in CONFIGS.rglob("*.yaml")]
    beside = [file.name for file in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    raise MissingFileError(
        f"no configuration file at {name}{did_you_mean(path.name, beside) or did_you_mean(str(inside), names)}"
    )


def config_chain(names: Iterable[str | Path]) -> list[Path]:
    """The files of configurations, each after what it says it is laid over, unless that is there already.

    Raises:
        MissingFileError: if one is not there.
        SettingsError: if one is laid over itself, by way of others too.
    """
    chain: list[Path] = []
    for name in names:
        path = find_config(name)
        _add_below(path, (path,), chain)
        chain.append(path)
    return chain


def _add_below(path: Path, above: Sequence[Path], chain: list[Path]) -> None:
    """Add to the chain what a configuration lies over and is not there yet, lowest first."""
    for base in _laid_over(path):
        if any(base.samefile(file) for file in above):
            raise SettingsError(f"{base} is laid over itself, by its key `{OVER}`")
        if not any(base.samefile(file) for file in chain):
            _add_below(base, (*above, base), chain)
            chain.append(base)


def _laid_over(path: Path) -> list[Path]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        # Whoever reads the settings says what is wrong with the file.
        return []
    bases = (content.get(OVER) if isinstance(content, dict) else None) or []
    return [find_config(path.parent / str(base)) for base in (bases if isinstance(bases, list) else [bases])]
