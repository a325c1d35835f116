"""How MMMU's answers are read: the official parser, and lmms-eval's, which differs in two steps.

The official parser takes a random option where it finds none; here that answer is wrong, so that scores can be
repeated, and the share of such answers is reported.
"""

import re
from collections.abc import Sequence
from typing import Literal

Style = Literal["official", "lmms-eval"]
CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
"""What stands before the point of a sentence."""
NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)
"""With thousands' commas, in scientific notation, and plain."""


def parse_choice(reply: str, options: dict[str, str], style: Style = "official") -> str | None:
    """The letter of the option that a reply names last; None if it names none.

    Args:
        options: letter -> text.
    """
    for mark in ",.!?;:'":
        reply = reply.strip(mark)
    reply = f" {reply} "
    # lmms-eval does not ask for a space before the letter, but still looks for the last one with it.
    forms = ["({})", " {} "] if style == "official" else ["({})", "{} ", "{}."]
    for form in forms:
        named = [letter for letter in options if form.format(letter) in reply]
        if named:
            place = form if form == "({})" else " {} "
            return max(named, key=lambda letter: reply.rfind(place.format(letter)))
    if len(reply.split()) > 5:
        places = {letter: reply.lower().rfind(text.lower()) for letter, text in options.items()}
        if max(places.values()) >= 0:
            return max(places, key=places.__getitem__)
    return None


def parse_open(reply: str) -> list[str | float]:
    """What a reply to an open question may mean: the ends of its sentences, and every number in them, normalised."""
    # The official pattern would also split before capital letters, of which there are none once letters are small.
    lines = reply.strip().strip(".").lower().split("\n")
    ends = []
    for number, line in enumerate(lines):
        shortest = ""
        for cue in (*CUES, "=") if number == len(lines) - 1 else CUES:
            tail = line.split(cue)[-1].strip()
            if cue in line and (not shortest or len(tail) < len(shortest)):
                shortest = tail
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            ends.append(shortest)
    ends = ends or [reply.strip().strip(".").lower()]
    found = ends + [match for end in ends for pattern in NUMBERS for match in re.findall(pattern, end)]
    return list(dict.fromkeys(form for text in found for form in normalised(text)))


def open_is_right(parsed: Sequence[str | float], truths: Sequence[str], style: Style = "official") -> bool:
    """Whether a true text occurs in one that was parsed, or a true number equals one.

    lmms-eval hands its checker a text where a list belongs, and so compares single characters, of which none can
    hold a true text: no open answer is right there.
    """
    if style == "lmms-eval":
        return False
    forms = [form for truth in truths for form in normalised(truth)]
    return any(
        any(isinstance(form, str) and form in one for form in forms) if isinstance(one, str) else one in forms
        for one in parsed
    )


def normalised(text: str) -> list[str | float]:
    """A number to two decimals, or the text in small letters; a single character is set off by a space."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
