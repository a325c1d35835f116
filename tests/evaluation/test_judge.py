"""A judge behind an endpoint that fails, stalls and lies."""

import base64
import io
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler

import pytest
from evaluation.fakes import FakeModel
from evaluation.judge_server import Server, fails, says, send
from PIL import Image

from infotok_lit.errors import SettingsError
from infotok_lit.evaluation.endpoint import Endpoint, JudgeError, Refusal
from infotok_lit.evaluation.geneval_plus_plus import GenEvalPlusPlus
from infotok_lit.evaluation.judge import JudgeGrader
from infotok_lit.evaluation.running import Evaluation
from infotok_lit.files import write_json


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.server.shutdown()
    running.server.server_close()


def stalls(handler: BaseHTTPRequestHandler, body: dict) -> None:
    time.sleep(3.0)


def drips(handler: BaseHTTPRequestHandler, body: dict) -> None:
    """A byte now and then, each well within the timeout."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(15):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.2)


def hangs_up(handler: BaseHTTPRequestHandler, body: dict) -> None:
    handler.connection.close()


GOOD = says('{"correct": 1, "reason": "as asked"}', {"prompt_tokens": 1000, "completion_tokens": 10})
HTML = lambda handler, body: send(handler, 200, b"<html>welcome</html>")  # noqa: E731
EMPTY = lambda handler, body: send(handler, 200, b'{"choices": []}')  # noqa: E731
DEEP = lambda handler, body: send(handler, 200, b"[" * 200_000)  # noqa: E731
CUT = lambda handler, body: send(handler, 200, b'{"choices": [{"mess')  # noqa: E731
GARBAGE = lambda handler, body: handler.wfile.write(b"garbage\r\n\r\n")  # noqa: E731
HUGE = lambda handler, body: send(handler, 200, b"x" * (3 << 20))  # noqa: E731


@pytest.mark.parametrize(
    "bad",
    [fails(500), fails(429), fails(503), stalls, drips, hangs_up, HTML, EMPTY, DEEP, CUT, GARBAGE, HUGE, says(None),
     says(["a"])],
)  # fmt: skip
def test_a_call_that_fails_is_made_again(server, bad):
    server.behaviours = [bad, GOOD]
    endpoint = replace(server.endpoint, timeout=1.5) if bad in (stalls, drips) else server.endpoint
    reply = endpoint.ask([], 0.0, 5)
    assert reply == ('{"correct": 1, "reason": "as asked"}', 1000, 10, None)
    assert len(server.calls) == 2 and server.calls[0] == server.calls[1]
    assert server.calls[0]["model"] == "judge-1" and server.calls[0]["max_tokens"] == 5


def test_a_call_that_always_fails_ends_with_what_to_do(server):
    server.behaviours = [fails(500)]
    with pytest.raises(JudgeError, match="did not answer in 4 tries.*status 500.*run the same command again"):
        server.endpoint.ask([], 0.0, 5)
    assert len(server.calls) == 4


@pytest.mark.parametrize(("status", "mend"), [(401, "NO_KEY_HERE"), (404, "--judge_model")])
def test_a_hopeless_call_is_made_once(server, status, mend):
    server.behaviours = [fails(status)]
    with pytest.raises(JudgeError, match=mend):
        server.endpoint.ask([], 0.0, 5)
    assert len(server.calls) == 1


def answers(status: int, **headers: str):
    def behaviour(handler: BaseHTTPRequestHandler, body: dict) -> None:
        handler.send_response(status)
        for name, value in (headers | {"Content-Length": "0"}).items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()

    return behaviour


def test_a_judge_that_says_how_long_to_wait_is_left_alone_so_long(server):
    server.behaviours = [answers(429, Retry_After="7"), answers(429, Retry_After="Fri, 31 Dec 2027 23:59:59 GMT"), GOOD]
    waited = []
    assert server.endpoint.ask([], 0.0, 5, waited.append).tokens_in == 1000
    # A date is not read: there the wait is the endpoint's own, 0.01 seconds, doubled.
    assert waited == [7.0, 0.02]
    server.behaviours, server.calls[:] = [answers(429, Retry_After="86400")], []
    with pytest.raises(JudgeError, match="left alone for 86400 seconds.*run the same command again then"):
        server.endpoint.ask([], 0.0, 5, waited.append)
    assert len(server.calls) == 1 and len(waited) == 2


def test_the_key_is_not_taken_elsewhere(server, monkeypatch):
    """A redirection is refused, where following it would send the key along."""
    monkeypatch.setenv("NO_KEY_HERE", "secret")
    server.behaviours = [answers(302, Location=server.endpoint.url + "/elsewhere"), GOOD]
    with pytest.raises(JudgeError, match="302.*check --judge"):
        server.endpoint.ask([], 0.0, 5)
    assert len(server.calls) == 1


@pytest.mark.parametrize(
    "url", ["nonsense", "ftp://x/v1", "file:///etc/passwd", "http://", "http://a b/v1", "http://[/v1"]
)
def test_what_is_no_url_is_refused_before_anything_is_drawn(url):
    with pytest.raises(SettingsError, match="no URL"):
        Endpoint(url, "m")


def test_a_refusal_concerns_one_question(server):
    server.behaviours = [fails(400)]
    with pytest.raises(Refusal):
        server.endpoint.ask([], 0.0, 5)


def unless_white(handler: BaseHTTPRequestHandler, body: dict) -> None:
    """Refuses every picture but a white one, as a content policy might."""
    parts = body["messages"][0]["content"]
    content = base64.b64decode(parts[1]["image_url"]["url"].partition(",")[2])
    white = Image.open(io.BytesIO(content)).convert("RGB").getextrema() == ((255, 255),) * 3
    (GOOD if white else fails(400))(handler, body)


def test_a_judge_that_refuses_everything_is_no_verdict(server, tmp_path):
    """A setting that it does not know, or a model without eyes: said in its own words, and nothing is kept."""
    body = b'{"error": {"message": "Unsupported parameter:\\n\'max_tokens\'"}}'
    server.behaviours = [lambda handler, _: send(handler, 400, body)]
    with pytest.raises(JudgeError, match="refuses every question: status 400 .*: Unsupported parameter: 'max_tokens'"):
        judged(tmp_path, server.endpoint, FakeModel())
    assert not list(tmp_path.glob("verdicts*.jsonl"))
    # One that refuses some pictures only is asked once whether it answers at all, and what it refuses is wrong.
    server.behaviours, server.calls[:] = [unless_white], []
    _, rows = judged(tmp_path, replace(server.endpoint, workers=1), FakeModel(most=0))
    assert len(server.calls) == 5 and [row["score"] for row in rows] == [0.0] * 4
    assert all(row["verdict"]["reply"] == "refused: status 400 Bad Request: sorry" for row in rows)


def test_the_result_says_what_the_judge_calls_itself(server, tmp_path):
    completion = {"choices": [{"message": {"content": '{"correct": 1}'}}], "model": "another-7b"}
    server.behaviours = [lambda handler, _: send(handler, 200, json.dumps(completion).encode())]
    benchmark, rows = judged(tmp_path, server.endpoint, FakeModel())
    assert benchmark.grader.facts([row["verdict"] for row in rows])["answered_as"] == ["another-7b"]


def test_a_key_is_sent_only_if_there_is_one(server, monkeypatch):
    server.behaviours = [GOOD]
    server.endpoint.ask([], 0.0, 5)
    monkeypatch.setenv("NO_KEY_HERE", "secret")
    server.endpoint.ask([], 0.0, 5)
    # A file's last line break comes along when a key is read from one.
    monkeypatch.setenv("NO_KEY_HERE", "secret\n")
    server.endpoint.ask([], 0.0, 5)
    assert server.keys == [None, "Bearer secret", "Bearer secret"]


def test_a_key_that_is_none_is_not_printed(server, monkeypatch):
    for key in ("sec\nret", "secrét"):
        monkeypatch.setenv("NO_KEY_HERE", key)
        with pytest.raises(SettingsError, match="NO_KEY_HERE holds no key") as caught:
            replace(server.endpoint)
        assert "sec" not in str(caught.value)


def test_cost_is_tokens_times_price():
    endpoint = Endpoint("http://u/v1", "m")
    assert endpoint.cost(10**6, 10**6) is None
    assert replace(endpoint, price_in=2.0, price_out=8.0).cost(500_000, 250_000) == 3.0


class Judged:
    instructions, max_judge_tokens = "Be just.", 3

    def judge_content(self, row, folder):
        return [{"type": "text", "text": row["id"]}]

    def read_verdict(self, text):
        return int(text) if text in ("0", "1") else None


def test_nonsense_is_asked_again_warmer_and_then_kept_as_unread(server, tmp_path):
    server.behaviours = [says("well..."), says("7"), says("1"), says("never")]
    grader = JudgeGrader(server.endpoint, Judged(), (0.0, 0.5, 1.0))
    (first,) = list(grader.verdicts([{"id": "a"}], tmp_path))
    assert first["reading"] == 1 and [call["temperature"] for call in server.calls] == [0.0, 0.5, 1.0]
    (second,) = list(grader.verdicts([{"id": "b"}], tmp_path))
    assert second["reading"] is None and second["reply"] == "never" and len(server.calls) == 6


def judged(folder, endpoint, model, limit=4) -> tuple[GenEvalPlusPlus, list[dict]]:
    benchmark = GenEvalPlusPlus(endpoint=endpoint)
    evaluation = Evaluation(model, benchmark, folder, batch_size=4, limit=limit)
    evaluation.open()
    return benchmark, evaluation.graded()


def test_verdicts_survive_a_judge_that_breaks_down(server, tmp_path):
    """What was judged before is not asked again; an unread verdict counts as wrong and stays in the count."""
    endpoint = replace(server.endpoint, workers=1, tries=2)
    by_number = {0: GOOD, 1: says('Sure! {"correct": 0, "reason": "a cartoon"}'), 2: says("no JSON"), 5: GOOD}
    server.behaviours = [by_number.get(number, says("no JSON")) for number in range(6)]
    benchmark, rows = judged(tmp_path, endpoint, FakeModel())
    assert [row["score"] for row in rows] == [1, 0, 0, 1]
    assert [row["verdict"]["reading"] for row in rows] == [1, 0, None, 1]
    assert benchmark.scores(rows)["overall"].n == 4
    calls = len(server.calls)
    server.behaviours = [fails(500)]
    _, again = judged(tmp_path, endpoint, FakeModel(most=0))
    assert again == rows and len(server.calls) == calls
    # Of four more, the second call finds that the key is no longer valid: no more are begun, and the first is kept.
    server.calls.clear()
    server.behaviours = [GOOD, fails(401)]
    with pytest.raises(JudgeError, match="valid key"):
        judged(tmp_path, endpoint, FakeModel(), limit=8)
    assert len(server.calls) in (2, 3)
    # Then it fails at one row alone, which is left for another time, and warned about.
    server.calls.clear()
    server.behaviours = [GOOD, fails(500), fails(500), GOOD]
    with pytest.warns(UserWarning, match="1 of 3 rows have no verdict.*status 500"):
        _, more = judged(tmp_path, endpoint, FakeModel(most=0), limit=8)
    assert sorted("verdict" in row for row in more) == [False] + [True] * 7 and len(server.calls) == 4
    server.calls.clear()
    benchmark, more = judged(tmp_path, endpoint, FakeModel(most=0), limit=8)
    assert all("verdict" in row for row in more) and len(server.calls) == 1
    assert benchmark.grader.facts([row["verdict"] for row in more])["tokens_in"] == 6000


def test_a_row_that_the_judge_never_answers_ends_no_run(server, tmp_path):
    """As a safety filter does, which gives no text. It is judged once it is answered; a judge that answers nothing at
    all ends the run."""
    endpoint = replace(server.endpoint, workers=1, tries=1)
    server.behaviours = [says(None), GOOD]
    with pytest.warns(UserWarning, match="1 of 4 rows have no verdict.*holds no text"):
        judged(tmp_path, endpoint, FakeModel())
    server.calls.clear()
    with pytest.warns(UserWarning, match="1 of 1 rows have no verdict.*holds no text"):
        _, rows = judged(tmp_path, endpoint, FakeModel(most=0))
    assert sorted("verdict" in row for row in rows) == [False] + [True] * 3 and len(server.calls) == 2
    for behaviour in (says(None), fails(400), fails(500)):
        server.calls.clear()
        server.behaviours = [says(None), behaviour]
        with pytest.raises(JudgeError, match="did not answer in 1 tries.*holds no text"):
            judged(tmp_path, endpoint, FakeModel(most=0))
    server.calls.clear()
    server.behaviours = [GOOD]
    _, rows = judged(tmp_path, endpoint, FakeModel(most=0))
    assert all("verdict" in row for row in rows) and len(server.calls) == 1


def test_an_interrupt_keeps_what_is_under_way_and_asks_no_more(server, tmp_path):
    """Two calls at a time: the first two are answered after the interrupt, and the other six are never made."""

    def slow(handler: BaseHTTPRequestHandler, body: dict) -> None:
        time.sleep(1.0)
        GOOD(handler, body)

    def interrupts(handler: BaseHTTPRequestHandler, body: dict) -> None:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        slow(handler, body)

    server.behaviours = [slow, interrupts, GOOD]
    # What a shell starts in the background ignores interrupts, and so would the tests there.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            judged(tmp_path, server.endpoint, FakeModel(), limit=8)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(server.calls) == 2
    _, rows = judged(tmp_path, server.endpoint, FakeModel(most=0), limit=8)
    assert len(server.calls) == 8 and all(row["score"] == 1 for row in rows)


def test_the_limit_of_the_cost_stops_the_asking(server, tmp_path):
    """A verdict costs 1,000 x 2 + 10 x 8 millionths: a batch of eight reaches 0.015, and a second is not begun."""
    server.behaviours = [GOOD]
    endpoint = replace(server.endpoint, price_in=2.0, price_out=8.0, limit=0.015)
    with pytest.raises(JudgeError, match=r"has cost 0.02, and --judge_limit is 0.015.*run the same command again"):
        judged(tmp_path, endpoint, FakeModel(), limit=20)
    assert len(server.calls) == 8
    judged(tmp_path, replace(endpoint, limit=1.0), FakeModel(most=0), limit=20)
    assert len(server.calls) == 20
    # What one benchmark has cost counts for the next, and of two processes each has half.
    spender = replace(endpoint, limit=0.03, processes=2)
    for benchmark, folder in ((GenEvalPlusPlus(endpoint=spender), "a"), (GenEvalPlusPlus(1, spender), "b")):
        evaluation = Evaluation(FakeModel(), benchmark, tmp_path / folder, limit=8)
        evaluation.open()
        server.calls.clear()
        if folder == "a":
            evaluation.graded()
            assert len(server.calls) == 8
        else:
            with pytest.raises(JudgeError, match="limit is 0.03, of which each of 2 processes has a part"):
                evaluation.graded()
            assert not server.calls
    server.behaviours = [says('{"correct": 1}')]
    with pytest.raises(JudgeError, match="does not say how many tokens it takes, so that --judge_limit cannot hold"):
        judged(tmp_path / "c", replace(endpoint), FakeModel(), limit=2)
    with pytest.raises(SettingsError, match="needs the prices"):
        replace(endpoint, price_in=None)


def test_half_a_character_from_the_judge_is_kept_as_it_came(server, tmp_path):
    server.behaviours = [lambda handler, body: send(handler, 200, b'{"choices":[{"message":{"content":"\\ud83d"}}]}')]
    for model in (FakeModel(), FakeModel(most=0)):
        _, rows = judged(tmp_path, server.endpoint, model, limit=1)
        assert rows[0]["verdict"]["reply"] == "\ud83d" and rows[0]["score"] == 0


def test_half_a_character_is_json_in_an_official_file_too(tmp_path):
    write_json(tmp_path / "answers.json", {"a": "\ud83d", "b": "é"})
    assert json.loads((tmp_path / "answers.json").read_bytes().decode()) == {"a": "\ud83d", "b": "é"}


def test_the_judge_sees_the_image_the_prompt_and_the_checklist(server, tmp_path):
    server.behaviours = [GOOD]
    benchmark, rows = judged(tmp_path, server.endpoint, FakeModel(), limit=2)
    text, image = server.calls[0]["messages"][0]["content"]
    prompts = {metadata["prompt"] for metadata in benchmark.metadata}
    assert any(f'"{prompt}"' in text["text"] for prompt in prompts) and "- It shows exactly" in text["text"]
    assert image["image_url"]["url"].startswith("data:image/jpeg;base64,/9j/")
