"""A judge behind an endpoint: its verdicts as they come, several calls at a time, and what they took."""

import base64
import io
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from threading import Event, Lock
from typing import Any, Protocol

from PIL import Image

from infotok_lit.evaluation.benchmark import open_drawn
from infotok_lit.evaluation.endpoint import Endpoint, JudgeError, Refusal
from infotok_lit.evaluation.records import Row


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
        self._answers, self._probing = False, Lock()

    def verdicts(self, rows: Sequence[Row], folder: Path) -> Iterator[Row]:
        """A verdict per row as they come, several calls at a time: `reading` (None where nothing could be read),
        `reply`, tokens. Where the judge fails at some rows only, they are left out, with a warning.

        Raises:
            JudgeError: none came and the judge answers nothing else either, it is hopeless, or the limit of the cost is
                reached.
        """
        self.endpoint.check_limit()
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
                    self.endpoint.pay(verdict["tokens_in"], verdict["tokens_out"])
                    yield verdict
        if len(failures) == len(rows) and not self._answers_probe(rows[0], folder):
            raise failures[0]
        if failures:
            warnings.warn(f"{len(failures)} of {len(rows)} rows have no verdict: {failures[0]}", stacklevel=2)

    def facts(self, verdicts: Sequence[Row]) -> dict[str, Any]:
        """What some verdicts took, and what the judge called itself: not every endpoint serves what it is asked for."""
        tokens_in, tokens_out = (sum(one[key] for one in verdicts) for key in ("tokens_in", "tokens_out"))
        cost = self.endpoint.cost(tokens_in, tokens_out)
        unread = sum(one["reading"] is None for one in verdicts)
        return {"tokens_in": tokens_in, "tokens_out": tokens_out, "cost": cost, "unread": unread} | {
            "answered_as": sorted({one["judge"] for one in verdicts})
        }

    def _verdict(self, row: Row, folder: Path, stopped: Event) -> Row:
        def pause(seconds: float) -> None:
            if stopped.wait(seconds):
                raise JudgeError("the run was stopped")

        content = self.benchmark.judge_content(row, folder)
        tokens_in = tokens_out = 0
        text, reading, model = "", None, None
        for temperature in self.temperatures:
            try:
                reply = self.endpoint.ask(content, temperature, self.benchmark.max_judge_tokens, pause)
            except Refusal as refusal:
                self._check_refusal(refusal, content, pause)
                text = f"refused: {refusal}"
                break
            self._answers, model = True, reply.model
            self.endpoint.check_usage(reply)
            text, tokens_in, tokens_out = reply.text, tokens_in + reply.tokens_in, tokens_out + reply.tokens_out
            reading = self.benchmark.read_verdict(text)
            if reading is not None:
                break
        return {
            "id": row["id"],
            "reading": reading,
            "reply": text,
            "judge": model or self.endpoint.model,
            "tokens_in": tokens_in,
            "tokens_out": tokens_out,
        }

    def _check_refusal(
        self, refusal: Refusal, content: Sequence[Mapping[str, Any]], pause: Callable[[float], object]
    ) -> None:
        """JudgeError where the judge refuses a question that nobody can mind, too: it is all questions, not this one.

        A setting that the judge does not know, or a judge that sees no images, would otherwise be kept as a verdict on
        every image.
        """
        with self._probing:
            if self._answers:
                return
            try:
                self._probe(content, pause)
            except Refusal:
                text = f"the judge {self.endpoint.model} at {self.endpoint.url} refuses every question: {refusal}"
                raise JudgeError(f"{text}. Nothing of that is kept: choose another --judge_model", True) from refusal
            self._answers = True

    def _answers_probe(self, row: Row, folder: Path) -> bool:
        """Whether the judge still answers at all, where it failed at every row."""
        try:
            self._probe(self.benchmark.judge_content(row, folder), time.sleep)
        except (JudgeError, Refusal):
            return False
        return True

    def _probe(self, content: Sequence[Mapping[str, Any]], pause: Callable[[float], object]) -> None:
        """Ask a question like this one that nobody can mind; errors as for `Endpoint.ask`."""
        probe = [text_part("Say yes.")]
        if any(part["type"] == "image_url" for part in content):
            white = io.BytesIO()
            Image.new("RGB", (64, 64), "white").save(white, "PNG")
            probe.append(_image_url(white.getvalue(), "png"))
        self.endpoint.ask(probe, self.temperatures[0], self.benchmark.max_judge_tokens, pause)


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
    return _image_url(path.read_bytes(), kind)


def _image_url(content: bytes, kind: str) -> dict[str, Any]:
    data = base64.b64encode(content).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{data}"}}


def text_part(text: str) -> dict[str, Any]:
    """Words as part of a message."""
    return {"type": "text", "text": text}
