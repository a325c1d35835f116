"""InfoTok for unified multimodal language models. Importing this does no work.

`infotok_lit.load(...)` gives a model to use, and `infotok_lit.fit([...])` is `python -m infotok_lit fit ...`.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from infotok_lit.commands.fit import InfoTokCLI
    from infotok_lit.inference import InferenceModel, load

__version__ = "0.1.0"
__all__ = ["InferenceModel", "fit", "load"]


def fit(arguments: "list[str] | tuple[str, ...]" = ()) -> "InfoTokCLI":
    """Fine-tune a model, as `python -m infotok_lit fit ARGUMENTS` does; without arguments, the quickstart.

    Returns:
        What ran: its `trainer`, `model` and `datamodule`.
    """
    from infotok_lit.commands.fit import run

    return run(["fit", *arguments])


def __getattr__(name: str) -> object:
    """`load` and `InferenceModel`, imported when they are asked for."""
    if name not in ("load", "InferenceModel"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from infotok_lit import inference

    return getattr(inference, name)
