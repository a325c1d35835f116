"""The LightningModule of each base model: which family, and which official files it takes."""

from infotok_lit.modules.infotok_module import InfoTokModule

__all__ = ["HarmonModule", "OpenUniModule", "Showo2Module"]


class HarmonModule(InfoTokModule):
    """Fine-tunes Harmon: `scenes32`, the small one that ships with the package, `0.5b` or `1.5b`.

    Official files: harmon_0.5b.pth or harmon_1.5b.pth for `init_from`, and kl16.ckpt for `parts.autoencoder`.
    """

    family = "harmon"


class Showo2Module(InfoTokModule):
    """Fine-tunes Show-o2: `scenes32`, the small one that ships with the package, `1.5b`, `1.5b-hq` or `7b`.

    Official files: the folder of showlab/show-o2-1.5B and its kin for `init_from`, and Wan2.1_VAE.pth for
    `parts.autoencoder`.
    """

    family = "showo2"


class OpenUniModule(InfoTokModule):
    """Fine-tunes OpenUni: `scenes32`, the small one that ships with the package, `b-512`, `l-512` or `l-1024`.

    Official files: openuni_*.pth for `init_from`, and in `parts` the folders of InternVL3 (`vlm`), of SANA
    (`transformer`, for checkpoints without it) and of the DC-AE (`autoencoder`).
    """

    family = "openuni"
