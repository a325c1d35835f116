"""Files that ship with the package: the quickstart's configuration, tokenizer and pretrained base."""

from pathlib import Path

ASSETS = Path(__file__).parent
QUICKSTART_CONFIG = ASSETS / "quickstart.yaml"
SCENES_TOKENIZER = ASSETS / "scenes_tokenizer"
HARMON_SCENES32 = ASSETS / "harmon_scenes32"
