"""A judge behind an OpenAI-compatible endpoint: asked again when it fails, stalls or answers nonsense, and counted."""

import base64
import http.client
import json
import os
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

from infotok_lit.errors import ExplainedError, SettingsError
from infotok_lit.evaluation.benchmark import open_drawn
from infotok_lit.evaluation.records import Row

LARGEST_REPLY = 1 << 20
"""Bytes; a longer one is no verdict."""
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


@dataclass(frozen=True)
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

    Raises:
        SettingsError: the URL is none, or a limit stands without prices.
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

    def __post_init__(self) -> None:
        if not _is_url(self.url):
            raise SettingsError(f"--judge is {self.url!r}, no URL: such as https://api.openai.com/v1")
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
                problem = f"status {error.code} {error.reason}"
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

    def cost(self, tokens_in: int, tokens_out: int) -> float | None:
        """In the currency of the prices; None where they are not known."""
        if self.price_in is None or self.price_out is None:
            return None
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        if os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {os.environ[self.key_variable]}"
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

    def _mend(self, status: int) -> str:
        if status in (401, 403):
            return f"put a valid key into the environment variable {self.key_variable}"
        return "check --judge (it ends in /v1) and --judge_model"


class Judged(Protocol):
    """What a benchmark tells its judge, and how it reads the verdict."""

    instructions: str
    max_judge_tokens: int

    def judge_content(self, row: Row, folder: Path) -> list[dict[str, Any]]:
        """The user message about one row."""
        ...

    def read_verdict(self, text: str) -> Any:
        """The verdict; None if there is none in the text."""
        ...


class JudgeGrader:
    """Verdicts by an endpoint.

    Args:
        temperatures: of the first question and of each further one, asked while no verdict can be read in the answer.
    """

    def __init__(self, endpoint: Endpoint, benchmark: Judged, temperatures: Sequence[float]) -> None:
        self.endpoint, self.benchmark, self.temperatures = endpoint, benchmark, temperatures
        # Other instructions are another judge.
        instructions = sha256(benchmark.instructions.encode()).hexdigest()[:6]
        self.name = "".join(c if c.isalnum() or c in "-." else "-" for c in endpoint.model) + f"-{instructions}"
        self.batch_size = 4 * endpoint.workers
        self.spent = 0.0
        """What the verdicts of this process have cost."""

    def verdicts(self, rows: Sequence[Row], folder: Path) -> Iterator[Row]:
        """A verdict per row as they come, several calls at a time: `reading` (None where nothing could be read),
        `reply`, tokens. Where the judge fails at some rows only, they are left out, with a warning.

        Raises:
            JudgeError: none came, the judge is hopeless, or the limit of the cost is reached.
        """
        limit = self.endpoint.limit
        if limit is not None and self.spent >= limit:
            text = f"the judge has cost {self.spent:.2f}, and --judge_limit is {limit:g}"
            raise JudgeError(f"{text}. Verdicts so far are kept: run the same command again for more", hopeless=True)
        failures: list[JudgeError] = []
        stopped = Event()
        with ThreadPoolExecutor(self.endpoint.workers) as pool:
            calls = (pool.submit(self._verdict, row, folder, stopped) for row in rows)
            with closing(_ended(calls, stopped)) as ended:
                for call in ended:
                    try:
                        verdict = call.result()
                    except JudgeError as error:
                        failures.append(error)
                        if error.hopeless:
                            raise
                        continue
                    self.spent += self.endpoint.cost(verdict["tokens_in"], verdict["tokens_out"]) or 0.0
                    yield verdict
        if len(failures) == len(rows):
            raise failures[0]
        if failures:
            warnings.warn(f"{len(failures)} of {len(rows)} rows have no verdict: {failures[0]}", stacklevel=2)

    def facts(self, verdicts: Sequence[Row]) -> dict[str, Any]:
        """What some verdicts took."""
        tokens_in, tokens_out = (sum(one[key] for one in verdicts) for key in ("tokens_in", "tokens_out"))
        cost = self.endpoint.cost(tokens_in, tokens_out)
        unread = sum(one["reading"] is None for one in verdicts)
        return {"tokens_in": tokens_in, "tokens_out": tokens_out, "cost": cost, "unread": unread}

    def _verdict(self, row: Row, folder: Path, stopped: Event) -> Row:
        def pause(seconds: float) -> None:
            if stopped.wait(seconds):
                raise JudgeError("the run was stopped")

        content = self.benchmark.judge_content(row, folder)
        tokens_in = tokens_out = 0
        text, reading = "", None
        for temperature in self.temperatures:
            try:
                reply = self.endpoint.ask(content, temperature, self.benchmark.max_judge_tokens, pause)
            except Refusal as refusal:
                text = f"refused: {refusal}"
                break
            text, tokens_in, tokens_out = reply.text, tokens_in + reply.tokens_in, tokens_out + reply.tokens_out
            reading = self.benchmark.read_verdict(text)
            if reading is not None:
                break
        return {
            "id": row["id"],
            "reading": reading,
            "reply": text,
            "judge": self.endpoint.model,
            "tokens_in": tokens_in,
            "tokens_out": tokens_out,
        }


def _ended(started: "Iterable[Future[Row]]", stopped: Event) -> "Iterator[Future[Row]]":
    """Each call when it has ended. At an interrupt those under way, which are paid for, and then the interrupt."""
    calls: list[Future[Row]] = []
    told = set()
    try:
        calls.extend(started)
        for call in as_completed(calls):
            told.add(call)
            yield call
    except KeyboardInterrupt:
        _stop(calls, stopped)
        yield from as_completed([call for call in calls if call not in told and not call.cancelled()])
        raise
    finally:
        _stop(calls, stopped)


def _stop(calls: "Sequence[Future[Row]]", stopped: Event) -> None:
    """Ask no more: neither what waits for its turn, nor again what failed."""
    stopped.set()
    for call in calls:
        call.cancel()


def image_part(path: Path) -> dict[str, Any]:
    """A picture file as part of a message; DataError for one that is damaged: asking about it costs as much."""
    open_drawn(path)
    kind = "jpeg" if path.suffix.lower() in (".jpg", ".jpeg") else "png"
    data = base64.b64encode(path.read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{data}"}}


def text_part(text: str) -> dict[str, Any]:
    """Words as part of a message."""
    return {"type": "text", "text": text}


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
    return Reply(text, *(count if isinstance(count, int) and count >= 0 else 0 for count in tokens))
