"""Texts as token ids: tokenizers, padding, and the texts that are paired with images."""

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import torch
from huggingface_hub import constants, get_session
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from infotok_lit.batch import NegativeTexts, PairedText
from infotok_lit.errors import SettingsError

HUB_SECONDS = 5.0
"""How long the hub may take to answer before this machine counts as offline."""

Text = tuple[list[int], list[int]]
"""Ids that are only context (a question, a caption) and ids that are a target (an answer)."""


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder or the hub, without running any code that it may bring.

    What is on this machine is taken first; the hub is asked only if it answers within some seconds.

    Raises:
        SettingsError: if there is none; the message says how to get one.
    """
    # Said explicitly, also in what is saved, because transformers otherwise takes any large vocabulary that lies beside
    # a config.json of another library for a Mistral model's, and warns of it.
    options = {"trust_remote_code": False, "fix_mistral_regex": False}
    try:
        try:
            return AutoTokenizer.from_pretrained(source, local_files_only=True, **options)
        except OSError:
            if Path(source).exists() or not _hub_answers():
                raise
        return AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"no tokenizer at {source!r}: set model.tokenizer to a folder with tokenizer.json, or go online so that "
            f"it can be fetched ({str(error).splitlines()[0]})"
        ) from error


def _hub_answers() -> bool:
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception:  # Whatever the hub's client, which has changed its library, raises without a network.
        return False
    return True


def pad(rows: Sequence[list[int]], value: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """Rows of different lengths -> (B, T) int64 and a (B, T) bool mask of what is real."""
    side, tensors = "left" if left else "right", [torch.tensor(row, dtype=torch.int64) for row in rows]
    ids = pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)
    real = [torch.ones(len(row), dtype=torch.bool) for row in rows]
    return ids, pad_sequence(real, batch_first=True, padding_side=side)


def label_places(labels: Tensor) -> Tensor:
    """(n,) int64: where labels (B, T), flattened, are tokens; nothing predicts the first of a row."""
    return F.pad(labels[:, 1:] >= 0, (1, 0)).flatten().nonzero()[:, 0]


def paired_text(
    texts: Sequence[Text],
    raw: Sequence[str],
    pad_id: int,
    max_length: int,
    negatives: Sequence[Sequence[Text]] = (),
) -> PairedText:
    """The text paired with each image, without template tokens.

    Args:
        texts: one per sample.
        raw: the same texts as strings, which decide what counts as identical.
        max_length: longer texts are cut from the right.
        negatives: per sample, any number of texts that are false of it.
    """
    ids, mask = pad([(context + target)[:max_length] for context, target in texts], pad_id)
    is_target, _ = pad([([0] * len(context) + [1] * len(target))[:max_length] for context, target in texts], 0)
    keys = torch.tensor([text_key(text) for text in raw])
    places = is_target.flatten().nonzero()[:, 0]
    return PairedText(ids, mask, is_target.bool(), keys, _negative_texts(negatives, pad_id, max_length), places)


def _negative_texts(negatives: Sequence[Sequence[Text]], pad_id: int, max_length: int) -> NegativeTexts | None:
    most = max((len(texts) for texts in negatives), default=0)
    if most == 0:
        return None
    rows = [(context + target)[:max_length] for texts in negatives for context, target in texts]
    ids, mask = pad(rows, pad_id)
    is_text = torch.arange(most) < torch.tensor([[len(texts)] for texts in negatives])
    shape = (*is_text.shape, ids.shape[1])
    all_ids, all_masks = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.bool)
    all_ids[is_text], all_masks[is_text] = ids, mask
    return NegativeTexts(all_ids, all_masks)


def text_key(text: str) -> int:
    """A 63-bit digest, equal on every machine and in every process."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
