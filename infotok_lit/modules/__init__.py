"""The LightningModule of each base model."""

from infotok_lit.modules.families import HarmonModule, OpenUniModule, Showo2Module

__all__ = ["HarmonModule", "OpenUniModule", "Showo2Module"]
