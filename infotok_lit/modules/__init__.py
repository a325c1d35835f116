"""The LightningModule of each base model."""

from infotok_lit.modules.harmon import HarmonModule

__all__ = ["HarmonModule"]
