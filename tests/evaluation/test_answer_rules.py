"""Answers are read as the official scorers and the harnesses read them."""

import pytest

from infotok_lit.evaluation import gqa, seed_bench, yes_no
from infotok_lit.evaluation.mmmu import normalised, open_is_right, parse_choice, parse_open
from infotok_lit.evaluation.unibench import options_of, read_option

# What the official scripts and the two harnesses were seen to make of these replies:
# POPE by the official script, lmms-eval and VLMEvalKit; MME by the official script and lmms-eval.
MEASURED = [
    ("Yes.", "yes", "wrong", "yes", "yes", "yes"),
    ("No, there is no dog", "no", "wrong", "no", "no", "no"),
    ("NO", "yes", "no", "no", "no", "no"),
    ("\nNo", "yes", "no", "no", "no", "no"),
    ("There is not a dog", "no", "wrong", "unknown", "other", "other"),
    ("Yes, not sure", "no", "wrong", "yes", "yes", "yes"),
    ("", "yes", "wrong", "unknown", "other", "other"),
    ("The answer is no", "no", "wrong", "no", "other", "other"),
    ("N", "yes", "wrong", "unknown", "other", "no"),
]


@pytest.mark.parametrize(("reply", "pope", "pope_lmms", "vlmevalkit", "mme", "mme_lmms"), MEASURED)
def test_yes_and_no(reply, pope, pope_lmms, vlmevalkit, mme, mme_lmms):
    same = {"wrong": "other", "unknown": "other"}
    assert yes_no.pope_official(reply).value == pope
    assert yes_no.pope_lmms_eval(reply).value == same.get(pope_lmms, pope_lmms)
    assert yes_no.vlmevalkit(reply).value == same.get(vlmevalkit, vlmevalkit)
    assert yes_no.mme_official(reply).value == mme
    assert yes_no.mme_lmms_eval(reply).value == mme_lmms


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("Yes, it is", "yes"), ("Yes,it is", "yes"), ("no-one", "no"), ("(No)", "no"), ("Yes! There are 1,200", "yes"),
        ("**Yes**", "other"), ("No: none", "other"), ("yes.it is", "other"), ("yes/no", "other"), ("Yes.", "yes"),
        ("no -no", "no"), ("there are 1,200,no more", "other"),
    ],
)  # fmt: skip
def test_yes_and_no_in_the_words_of_vlmevalkit(reply, value):
    """Worked out by hand from what it does to marks."""
    assert yes_no.vlmevalkit(reply).value == value


@pytest.mark.parametrize("reply", ["", "Nothing", "N"])
def test_a_yes_that_nobody_said_is_unparsed(reply):
    reading = yes_no.pope_official(reply)
    assert reading.value == "yes" and reading.parsed is None


@pytest.mark.parametrize(
    ("answer", "official", "lmms_eval", "vlmevalkit"),
    [
        ("Blue.", True, True, False),
        ("blue", True, True, True),
        ("light-blue", False, False, False),
        ("blue!", False, True, False),
        ("dark blue", False, False, False),
    ],
)
def test_gqa(answer, official, lmms_eval, vlmevalkit):
    assert (gqa.official(answer, "blue"), gqa.lmms_eval(answer, "blue"), gqa.vlmevalkit(answer, "blue")) == (
        official,
        lmms_eval,
        vlmevalkit,
    )


@pytest.mark.parametrize(
    ("reply", "official", "lmms_eval", "vlmevalkit"),
    [
        ("B", "B", "B", "B"),
        ("B. Two", None, "B", "B"),
        ("Answer: B", None, "A", "B"),
        ("dog", None, "D", None),
        ("there are three", None, None, "C"),
        ("A or B", None, "A", None),
        ("A or B: two", None, "A", "B"),
        ("A man shows two fingers", None, "A", "B"),
        ("A man who stands there shows two of his fingers", None, "A", None),
        ("The answer is **b**, since the others cannot be true here", None, None, "B"),
        ("I see the letter D, and much else in this image", None, None, None),
        ("D-day", None, "D", None),
        ("", None, None, None),
    ],
)
def test_seed_letters(reply, official, lmms_eval, vlmevalkit):
    options = ("One", "Two", "Three", "Four")
    assert seed_bench.official(reply, options) == official
    assert seed_bench.lmms_eval(reply, options) == lmms_eval
    assert seed_bench.vlmevalkit(reply, options) == vlmevalkit


@pytest.mark.parametrize(
    ("reply", "official", "lmms_eval"),
    [
        ("B", "B", "B"),
        ("(B) because it is not (C)", "C", "C"),
        ("B. dog", None, "B"),
        ("The answer is B", "B", "B"),
        ("It is a picture of a dog and then a cat", "A", "A"),
        ("a cat", None, None),
        ("", None, None),
    ],
)
def test_mmmu_choices(reply, official, lmms_eval):
    options = {"A": "cat", "B": "dog", "C": "cow"}
    assert parse_choice(reply, options) == official
    assert parse_choice(reply, options, "lmms-eval") == lmms_eval


@pytest.mark.parametrize(
    ("reply", "truths", "right"),
    [
        ("3.50", ["3.5"], True),
        ("The final answer is 1,250 dollars.", ["1250"], True),
        ("x = 2e3", ["2000"], True),
        ("so it must be the Mona Lisa", ["mona lisa"], True),
        ("It is four", ["4"], False),
        ("Mona", ["mona lisa"], False),
        ("It is 4\nno, the result is 5", ["4"], True),
        ("b", ["b"], True),
        ("abc", ["b"], False),
    ],
)
def test_mmmu_short_answers(reply, truths, right):
    assert open_is_right(parse_open(reply), truths) is right
    assert not open_is_right(parse_open(reply), truths, "lmms-eval")


def test_mmmu_normal_forms():
    assert normalised(" 1,234.567 ") == [1234.57] and normalised("K") == [" k", "k "] and normalised("Ab") == ["ab"]


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"), ("Option B", "B"), ("(B)", "B"), ("B.", None), ("b", None), (" (b)", None),
        ("(B) not (C)", "C"), ("(A person stands there", "A"), ("It is light blue", "B"), ("blue it is", "B"),
        ("red, or rather green", "C"), ("", None),
    ],
)  # fmt: skip
def test_unibench_letters(reply, letter):
    question = "Question: Which?\nOptions: (A) red, (B) blue, dark, (C) green, (D) 4/7, (E) N/A or Unknown\nBased on"
    options = options_of(question)
    assert options == {"A": "red", "B": "blue, dark", "C": "green", "D": "4/7", "E": "N/A or Unknown"}
    assert read_option(reply, options) == letter


def test_an_option_of_unibench_may_hold_what_is_no_line_end():
    assert options_of("Which?\nOptions: (A) a red\u2028circle, (B) none\n") == {"A": "a red\u2028circle", "B": "none"}
