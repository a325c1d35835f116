"""Files that ship with the package: the quickstart's configuration, tokenizer and pretrained bases."""

from pathlib import Path

from infotok_lit.errors import MissingFileError

ASSETS = Path(__file__).parent
QUICKSTART_CONFIG = ASSETS / "quickstart.yaml"
SCENES_TOKENIZER = ASSETS / "scenes_tokenizer"
SCENES_FEATURES = ASSETS / "scenes_features" / "features.safetensors"
BENCHMARKS = ASSETS / "benchmarks"
"""What of the public benchmarks may be passed on."""


def embedded_base(family: str, size: str) -> Path:
    """The exported folder of a base that ships with the package; MissingFileError if none does."""
    folder = ASSETS / f"{family}_{size}"
    if not folder.is_dir():
        shipped = ", ".join(sorted(path.parent.name for path in ASSETS.glob("*/config.json")))
        raise MissingFileError(
            f"no base of family {family} and size {size} ships with the package, only {shipped}: set model.init_from "
            "to weights of your own, or to null for random ones"
        )
    return folder
