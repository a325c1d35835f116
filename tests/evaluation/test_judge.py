"""A judge behind an endpoint that fails, stalls and lies."""

import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler

import pytest
from evaluation.fakes import FakeModel
from evaluation.judge_server import Server, fails, says, send

from infotok_lit.evaluation.geneval_plus_plus import GenEvalPlusPlus
from infotok_lit.evaluation.judge import Endpoint, JudgeError, JudgeGrader, Refusal
from infotok_lit.evaluation.running import Evaluation


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.server.shutdown()
    running.server.server_close()


def stalls(handler: BaseHTTPRequestHandler, body: dict) -> None:
    time.sleep(0.8)


def drips(handler: BaseHTTPRequestHandler, body: dict) -> None:
    """A byte now and then, each well within the timeout."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(8):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)


def hangs_up(handler: BaseHTTPRequestHandler, body: dict) -> None:
    handler.connection.close()


GOOD = says('{"correct": 1, "reason": "as asked"}', {"prompt_tokens": 1000, "completion_tokens": 10})
HTML = lambda handler, body: send(handler, 200, b"<html>welcome</html>")  # noqa: E731
EMPTY = lambda handler, body: send(handler, 200, b'{"choices": []}')  # noqa: E731
HUGE = lambda handler, body: send(handler, 200, b"x" * (3 << 20))  # noqa: E731


@pytest.mark.parametrize(
    "bad", [fails(500), fails(429), fails(503), stalls, drips, hangs_up, HTML, EMPTY, HUGE, says(None), says(["a"])]
)
def test_a_call_that_fails_is_made_again(server, bad):
    server.behaviours = [bad, GOOD]
    reply = server.endpoint.ask([], 0.0, 5)
    assert reply == ('{"correct": 1, "reason": "as asked"}', 1000, 10)
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


def test_a_refusal_concerns_one_question(server):
    server.behaviours = [fails(400)]
    with pytest.raises(Refusal):
        server.endpoint.ask([], 0.0, 5)


def test_a_key_is_sent_only_if_there_is_one(server, monkeypatch):
    server.behaviours = [GOOD]
    server.endpoint.ask([], 0.0, 5)
    monkeypatch.setenv("NO_KEY_HERE", "secret")
    server.endpoint.ask([], 0.0, 5)
    assert server.keys == [None, "Bearer secret"]


def test_cost_is_tokens_times_price():
    endpoint = Endpoint("u", "m")
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
    (first,) = grader.verdicts([{"id": "a"}], tmp_path)
    assert first["reading"] == 1 and [call["temperature"] for call in server.calls] == [0.0, 0.5, 1.0]
    (second,) = grader.verdicts([{"id": "b"}], tmp_path)
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
    # Of four more, the second call breaks down, and the others bring a verdict that is kept.
    server.calls.clear()
    server.behaviours = [GOOD, fails(401), GOOD]
    with pytest.raises(JudgeError):
        judged(tmp_path, endpoint, FakeModel(), limit=8)
    server.calls.clear()
    benchmark, more = judged(tmp_path, endpoint, FakeModel(most=0), limit=8)
    assert len(more) == 8 and len(server.calls) == 1
    assert benchmark.grader.facts([row["verdict"] for row in more])["tokens_in"] == 6000


def test_the_judge_sees_the_image_the_prompt_and_the_checklist(server, tmp_path):
    server.behaviours = [GOOD]
    benchmark, rows = judged(tmp_path, server.endpoint, FakeModel(), limit=2)
    text, image = server.calls[0]["messages"][0]["content"]
    prompts = {metadata["prompt"] for metadata in benchmark.metadata}
    assert any(f'"{prompt}"' in text["text"] for prompt in prompts) and "- It shows exactly" in text["text"]
    assert image["image_url"]["url"].startswith("data:image/jpeg;base64,/9j/")
