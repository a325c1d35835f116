"""An OpenAI-compatible endpoint: asked again when it fails, stalls or answers nonsense, and what it cost."""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from infotok_lit.errors import ExplainedError, SettingsError

LARGEST_REPLY = 1 << 20
"""Bytes; a longer one is no verdict."""
LONGEST_WORDS = 4096
"""Bytes of what comes with a failure."""
LONGEST_WAIT = 600.0
"""Seconds; a judge that asks for more is left for another day."""
HOPELESS = (301, 302, 303, 307, 308, 401, 403, 404, 405)
"""Statuses that asking again will not change, for any question. A redirection would take the key elsewhere."""
REFUSED = (400, 413, 422)
"""Statuses that mean this question only: a content policy, or too large an image."""


class JudgeError(ExplainedError):
    """The judge cannot be reached, or does not answer.

    Args:
        hopeless: whether it would be so for every other question, too.
    """

    def __init__(self, message: str, hopeless: bool = False) -> None:
        super().__init__(message)
        self.hopeless = hopeless


class Refusal(Exception):
    """The judge will not answer this question."""


class Reply(NamedTuple):
    """One answer of the judge."""

    text: str
    tokens_in: int
    tokens_out: int
    model: str | None = None
    """What the judge calls itself."""


@dataclass
class Endpoint:
    """Where the judge is.

    Args:
        url: up to and including `/v1`.
        model: its name there.
        key_variable: the environment variable that holds the key; without one no key is sent.
        timeout: seconds for one whole answer.
        tries: how often a call is made before giving up.
        wait: seconds before the second try, unless the judge says how long; doubled for every further one.
        workers: calls at a time.
        price_in: per million tokens that are sent; price_out: per million that come back.
        limit: at that cost no more is asked.
        processes: how many share the limit, each an equal part.

    Raises:
        SettingsError: the URL or the key is none, or a limit stands without prices.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 120.0
    tries: int = 6
    wait: float = 1.0
    workers: int = 8
    price_in: float | None = None
    price_out: float | None = None
    limit: float | None = None
    processes: int = 1
    spent: float = field(default=0.0, init=False)
    """What the verdicts of this process have cost, on whatever benchmark."""

    def __post_init__(self) -> None:
        if not _is_url(self.url):
            raise SettingsError(f"--judge is {self.url!r}, no URL: such as https://api.openai.com/v1")
        self._key()
        if self.limit is not None and self.cost(0, 0) is None:
            raise SettingsError("--judge_limit needs the prices: --judge_price_in and --judge_price_out")

    def ask(
        self,
        content: Sequence[Mapping[str, Any]],
        temperature: float,
        max_tokens: int,
        pause: Callable[[float], object] = time.sleep,
    ) -> Reply:
        """Send one user message.

        Args:
            pause: waits for some seconds.

        Raises:
            Refusal: the judge will not answer this one.
            JudgeError: it fails every time, or says that it always will.
        """
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": list(content)}],
            "temperature": temperature,
            "max_tokens": max_tokens,
        }
        problem = ""
        for attempt in range(self.tries):
            asked_for = None
            try:
                return _reply(self._post(json.dumps(body).encode()))
            except urllib.error.HTTPError as error:
                problem = f"status {error.code} {error.reason}{_words(error)}"
                if error.code in HOPELESS:
                    text = f"the judge at {self.url} answers with {problem}: {self._mend(error.code)}"
                    raise JudgeError(text, hopeless=True) from error
                if error.code in REFUSED:
                    raise Refusal(problem) from error
                asked_for = _retry_after(error.headers)
            except (OSError, ValueError, http.client.HTTPException) as error:
                problem = str(error) or type(error).__name__
            if asked_for is not None and asked_for > LONGEST_WAIT:
                text = f"the judge at {self.url} wants to be left alone for {asked_for:.0f} seconds ({problem})"
                raise JudgeError(f"{text}. Verdicts so far are kept: run the same command again then", hopeless=True)
            if attempt + 1 < self.tries:
                pause(min(60.0, self.wait * 2**attempt) if asked_for is None else asked_for)
        raise JudgeError(
            f"the judge {self.model} at {self.url} did not answer in {self.tries} tries; last: {problem}. "
            "Verdicts so far are kept: run the same command again"
        )

    def pay(self, tokens_in: int, tokens_out: int) -> None:
        """Count what a verdict took."""
        self.spent += self.cost(tokens_in, tokens_out) or 0.0

    def check_limit(self) -> None:
        """JudgeError once the limit is reached."""
        if self.limit is not None and self.spent >= self.limit / self.processes:
            share = f", of which each of {self.processes} processes has a part" if self.processes > 1 else ""
            raise JudgeError(
                f"the judge has cost {self.spent:.2f}, and --judge_limit is {self.limit:g}{share}. "
                "Verdicts so far are kept: run the same command again for more",
                hopeless=True,
            )

    def check_usage(self, reply: Reply) -> None:
        """JudgeError where a limit stands and the judge does not say what it took."""
        if self.limit is not None and reply.tokens_in == 0:
            text = f"the judge {self.model} does not say how many tokens it takes, so that --judge_limit cannot hold"
            raise JudgeError(f"{text}: leave it out", hopeless=True)

    def cost(self, tokens_in: int, tokens_out: int) -> float | None:
        """In the currency of the prices; None where they are not known."""
        if self.price_in is None or self.price_out is None:
            return None
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        key = self._key()
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", body, headers)
        deadline, parts = time.monotonic() + self.timeout, []
        with urllib.request.build_opener(_NoRedirection).open(request, timeout=self.timeout) as response:
            # A judge that sends a byte now and then never runs into the socket's own timeout.
            while part := response.read1(1 << 16):
                parts.append(part)
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no whole answer within {self.timeout:g} seconds")
                if sum(map(len, parts)) > LARGEST_REPLY:
                    raise ValueError("the answer is too long to be one")
        return b"".join(parts)

    def _key(self) -> str:
        """Empty without one. What cannot be one is refused here: what http.client says of it would print it."""
        key = os.environ.get(self.key_variable, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise SettingsError(f"the environment variable {self.key_variable} holds no key: one is a single word")
        return key

    def _mend(self, status: int) -> str:
        if status in (401, 403):
            return f"put a valid key into the environment variable {self.key_variable}"
        return "check --judge (it ends in /v1) and --judge_model"


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any) -> None:
        return None


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and text.isprintable() and " " not in text


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds that a judge asks for; None where it gives a date, or nothing."""
    value = (headers.get("Retry-After") or "").strip()
    return float(value) if value.isascii() and value.isdigit() else None


def _reply(body: bytes) -> Reply:
    """ValueError unless the body is a chat completion with a text in it."""
    try:
        content = json.loads(body)
        text = content["choices"][0]["message"]["content"]
        usage = content.get("usage") or {}
        tokens = [usage.get(key, 0) for key in ("prompt_tokens", "completion_tokens")]
    except (ValueError, RecursionError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"the answer is no chat completion: {body[:80]!r}") from error
    if not isinstance(text, str):
        raise ValueError(f"the answer holds no text but {text!r}")
    tokens = [count if isinstance(count, int) and count >= 0 else 0 for count in tokens]
    model = content.get("model")
    return Reply(text, *tokens, model=model if isinstance(model, str) else None)


def _words(error: urllib.error.HTTPError) -> str:
    """What a failing judge says about it: `: words`, or nothing."""
    try:
        body = error.read1(LONGEST_WORDS).decode(errors="replace")
    except (OSError, ValueError, http.client.HTTPException):
        return ""
    with suppress(ValueError, RecursionError, KeyError, TypeError):
        body = str(json.loads(body)["error"]["message"])
    words = " ".join(body.split())
    return f": {words:.200}" if words.isprintable() and words else ""
