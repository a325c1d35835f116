"""The LightningModule of each base model."""

from infotok_lit.modules.harmon import HarmonModule
from infotok_lit.modules.openuni import OpenUniModule
from infotok_lit.modules.showo2 import Showo2Module

__all__ = ["HarmonModule", "OpenUniModule", "Showo2Module"]
