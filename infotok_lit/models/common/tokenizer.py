"""The tokenizers of the language models."""

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from infotok_lit.batch import Tokenizer
from infotok_lit.errors import SettingsError


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder or the hub; SettingsError says how to get one where there is none."""
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"no tokenizer at {source!r}: give a folder with tokenizer.json, or go online so that it can be fetched "
            f"({str(error).splitlines()[0]})"
        ) from error


def single_id(tokenizer: Tokenizer, marker: str, needs: str) -> int:
    """The id of a marker.

    Args:
        needs: who needs which tokenizer, for the message.

    Raises:
        SettingsError: if the tokenizer does not know the marker as one token, which means that it is the wrong one.
    """
    ids = tokenizer.encode(marker, add_special_tokens=False)
    if len(ids) != 1:
        raise SettingsError(f"the tokenizer splits {marker!r} into {len(ids)} tokens: {needs}")
    return ids[0]
