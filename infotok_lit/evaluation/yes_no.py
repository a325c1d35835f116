"""How answers to yes/no questions are read: the official rules of POPE and MME, and the harnesses' own.

A rule turns a reply into "yes", "no" or "other", and says whether the reply itself held that, or the rule fell back.
"""

import re
from collections.abc import Callable
from typing import Literal, NamedTuple

MARKS = ';/[]"{}()=+\\_-><@`,?!'
"""What VLMEvalKit takes out of a reply, beside full stops."""
YesNo = Literal["yes", "no", "other"]


class Reading(NamedTuple):
    """What a rule makes of a reply."""

    value: YesNo
    clear: bool
    """False where nothing in the reply decided it."""

    @property
    def parsed(self) -> str | None:
        """The value, or None where the reply was not understood."""
        return self.value if self.clear else None


Rule = Callable[[str], Reading]


def _reading(value: YesNo) -> Reading:
    return Reading(value, value != "other")


def pope_official(reply: str) -> Reading:
    """No if one of the words before the first full stop is "No", "no" or "not"; yes in every other case."""
    words = reply.split(".")[0].replace(",", "").split(" ")
    if {"No", "no", "not"}.intersection(words):
        return Reading("no", True)
    return Reading("yes", "yes" in reply.lower())


def pope_lmms_eval(reply: str) -> Reading:
    """The whole reply, but for white space and case, must be yes or no."""
    text = reply.strip().lower()
    return _reading(text if text in ("yes", "no") else "other")


def mme_official(reply: str) -> Reading:
    """Yes or no alone, or within the first four characters, where yes goes first."""
    text = reply.lower()
    if text in ("yes", "no"):
        return _reading(text)
    start = text[:4]
    return _reading("yes" if "yes" in start else "no" if "no" in start else "other")


def mme_lmms_eval(reply: str) -> Reading:
    """As the official rule, without white space at the ends and full stops; y and n alone count."""
    text = reply.lower().strip().replace(".", "")
    if text in ("y", "n"):
        return _reading("yes" if text == "y" else "no")
    return mme_official(text)


def vlmevalkit(reply: str) -> Reading:
    """One of the words yes and no, without the other. Full stops are left out. So are some marks that stand beside a
    space somewhere in the reply; otherwise they part words. Others, such as * and :, belong to their word."""
    text = words = reply.lower()
    numbers = re.search(r"\d,\d", text) is not None
    for mark in MARKS:
        words = words.replace(mark, "" if numbers or f"{mark} " in text or f" {mark}" in text else " ")
    words = re.sub(r"\.(?!\d)", "", words).split()
    if ("yes" in words) == ("no" in words):
        return _reading("other")
    return _reading("yes" if "yes" in words else "no")
