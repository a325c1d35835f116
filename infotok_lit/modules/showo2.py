"""Show-o2 as a LightningModule."""

from infotok_lit.modules.infotok_module import InfoTokModule


class Showo2Module(InfoTokModule):
    """Fine-tunes Show-o2: `scenes32`, the small one that ships with the package, `1.5b`, `1.5b-hq` or `7b`.

    Official files: the folder of showlab/show-o2-1.5B and its kin for `init_from`, and Wan2.1_VAE.pth for
    `parts.autoencoder`.
    """

    family = "showo2"
