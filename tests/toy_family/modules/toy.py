"""Toy as a LightningModule."""

from infotok_lit.modules.infotok_module import InfoTokModule


class ToyModule(InfoTokModule):
    """Fine-tunes Toy: `scenes32`, its only size."""

    family = "toy"
