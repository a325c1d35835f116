"""OpenUni as a LightningModule."""

from infotok_lit.modules.infotok_module import InfoTokModule


class OpenUniModule(InfoTokModule):
    """Fine-tunes OpenUni: `scenes32`, a small one without shipped weights, `b-512`, `l-512` or `l-1024`.

    Official files: openuni_*.pth for `init_from`, and in `parts` the folders of InternVL3 (`vlm`), of SANA
    (`transformer`, for checkpoints without it) and of the DC-AE (`autoencoder`).
    """

    family = "openuni"
