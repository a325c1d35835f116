"""Builds the tokenizer of Scenes: `python -m infotok_lit.scenes.build_tokenizer OUT_DIR`.

A byte-level BPE: every byte is in the alphabet, so any text is encoded without loss, and every word of the grammar of
shapes is one token. Building is deterministic: the corpus is fixed and small enough for every merge to be learnt.

Words of garments are pieces of this vocabulary. `--extend` makes each of them one token of a tokenizer that is there,
behind all others, so that every id keeps its meaning; the model's embedding table must have a row for each.
"""

import argparse
import json
import sys
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from infotok_lit.scenes.grammar import NUMBERS, RELATIONS
from infotok_lit.scenes.questions import DESCRIBE
from infotok_lit.scenes.spec import COLOURS, GARMENTS, SHAPES, SIZES, place_name

PAD_TOKEN, START_TOKEN, EOS_TOKEN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MAX_VOCABULARY = 640
"""An upper bound; training stops earlier, when every piece of the corpus is one token."""

# Pieces that BPE may not merge across: the chat template's fixed parts, words with their leading space, numbers, other
# signs, white space.
_PIECES = r"(?:user|assistant)\n|Generate an image[:.]|\s?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"


def corpus() -> list[str]:
    """Sentences that hold every word of the grammar, inside a sentence and at the start of one."""
    places = [place_name((row, column), cells) for cells in (2, 3) for row in range(cells) for column in range(cells)]
    answers = ["yes", "no", *NUMBERS, *SHAPES.kinds, *SHAPES.plurals, *COLOURS, *SIZES, *places]
    template = ["user\n", "assistant\n", "Generate an image:", "Generate an image.", "\n"]
    questions = [
        "is there a circle?",
        "how many circles are there?",
        "what colour is the circle?",
        "what shape is the red object?",
        "is the red circle large or small?",
        "where is the red circle?",
        DESCRIBE,
    ]
    spaced = [f"a {word}" for word in (*answers, *places, *RELATIONS, "and")]
    return [*template, *answers, *questions, *[f"\n{question}" for question in questions], *spaced]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, trained from scratch in well under a second."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY,
        min_frequency=1,
        show_progress=False,
        special_tokens=[PAD_TOKEN, START_TOKEN, EOS_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        clean_up_tokenization_spaces=False,
    )


def garment_words() -> list[str]:
    """Every word of the grammar of garments that the grammar of shapes has not, as it stands in its texts.

    Inside a text with the space before it; a kind also at the start of one, as an answer.
    """
    words = GARMENTS
    return [*words.kinds, *(f" {word}" for word in (*words.kinds, *words.plurals, words.noun))]


def extend_tokenizer(folder: Path) -> int:
    """Give each word of garments a token of its own in the tokenizer of a folder; those that have one keep it.

    Returns:
        How many rows the embedding table of a model with this tokenizer must have.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in garment_words() if word not in known])
    _save(tokenizer, folder)
    return max(tokenizer.get_vocab().values()) + 1


def save_tokenizer(folder: Path) -> None:
    """Builds the tokenizer and writes tokenizer.json and tokenizer_config.json to a folder."""
    _save(build_tokenizer(), folder)


def _save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    # The class name that every version of transformers knows; the newest writes one that older ones do not.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    """Command line: the folder to write to is its one argument."""
    parser = argparse.ArgumentParser(
        prog="python -m infotok_lit.scenes.build_tokenizer", description="Build the Scenes tokenizer."
    )
    parser.add_argument("folder", type=Path, help="folder of tokenizer.json and tokenizer_config.json")
    parser.add_argument(
        "--extend", action="store_true", help="add the words of garments to the tokenizer that is there"
    )
    arguments = parser.parse_args()
    if arguments.extend:
        sys.stdout.write(f"{arguments.folder}: an embedding table needs {extend_tokenizer(arguments.folder)} rows\n")
    else:
        save_tokenizer(arguments.folder)


if __name__ == "__main__":
    main()
