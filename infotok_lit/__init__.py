"""InfoTok for unified multimodal language models. Importing this does no work."""

__version__ = "0.1.0"
