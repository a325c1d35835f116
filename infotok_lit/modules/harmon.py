"""Harmon as a LightningModule."""

from infotok_lit.modules.infotok_module import InfoTokModule


class HarmonModule(InfoTokModule):
    """Fine-tunes Harmon: `scenes32`, the small one that ships with the package, `0.5b` or `1.5b`.

    Official files: harmon_0.5b.pth or harmon_1.5b.pth for `init_from`, and kl16.ckpt for `parts.autoencoder`.
    """

    family = "harmon"
