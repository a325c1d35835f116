"""Evaluations that are killed, resumed, limited and shared among processes give what one run gives."""

import hashlib
import json
import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from evaluation.fakes import FakeModel
from forked import run_forked

from infotok_lit.errors import DataError, SettingsError
from infotok_lit.evaluation.benchmark import spread
from infotok_lit.evaluation.endpoint import JudgeError
from infotok_lit.evaluation.records import Log, read_log, to_lines
from infotok_lit.evaluation.running import Evaluation, World
from infotok_lit.evaluation.scenes import ScenesBenchmark


def scenes() -> ScenesBenchmark:
    return ScenesBenchmark(count=10)


def run(folder: Path, model: FakeModel, **options) -> list[dict]:
    evaluation = Evaluation(model, scenes(), folder, batch_size=4, **options)
    evaluation.open()
    return evaluation.graded()


def test_a_killed_run_goes_on_and_makes_nothing_twice(tmp_path):
    whole = run(tmp_path / "whole", FakeModel())
    assert len(whole) == 20
    seen = []
    for most in (2, 1, 1, 10):
        model = FakeModel(most=most)
        try:
            rows = run(tmp_path / "killed", model)
        except KeyboardInterrupt:
            rows = None
        seen.append(model)
    assert rows == whole
    assert sum(len(model.drawn) for model in seen) == 10 and sum(len(model.asked) for model in seen) == 10
    files = sorted(path.name for path in (tmp_path / "killed").iterdir())
    assert files == ["asked.jsonl", "drawn.jsonl", "images", "settings.json", "verdicts.parser.jsonl"]


def test_an_image_that_was_deleted_is_drawn_again(tmp_path):
    whole = run(tmp_path, FakeModel())
    image = tmp_path / "images" / "00003.png"
    content = image.read_bytes()
    image.unlink()
    model = FakeModel()
    assert run(tmp_path, model) == whole
    assert image.read_bytes() == content and len(model.drawn) == 1 and not model.asked


@pytest.mark.parametrize("damage", [b"", b"no picture", None])
def test_a_damaged_image_is_drawn_again(damage, tmp_path):
    """Empty, a text, or cut in half; the verdicts on it are those on the same picture."""
    whole = run(tmp_path, FakeModel())
    image = tmp_path / "images" / "00007.png"
    content = image.read_bytes()
    image.write_bytes(content[: len(content) // 2] if damage is None else damage)
    model = FakeModel()
    assert run(tmp_path, model) == whole
    assert image.read_bytes() == content and len(model.drawn) == 1


def test_a_damaged_image_that_is_as_long_as_before_is_named_with_the_mend(tmp_path):
    class Spoiling(FakeModel):
        """Spoils the first image, within its length, once all are drawn."""

        def answer(self, *arguments):
            if not self.asked:
                image.write_bytes(bytes(image.stat().st_size))
            return super().answer(*arguments)

    image = tmp_path / "images" / "00000.png"
    with pytest.raises(DataError, match=f"{re.escape(str(image))}: not an image .*delete that file and run again"):
        run(tmp_path, Spoiling())
    assert scenes().check_complete(tmp_path)[0].startswith("images/00000.png: not an image")
    image.unlink()
    assert run(tmp_path, FakeModel()) == run(tmp_path / "whole", FakeModel())


def test_a_seed_belongs_to_its_prompt_whatever_the_limit(tmp_path):
    everything, some = FakeModel(), FakeModel()
    run(tmp_path / "all", everything)
    rows = run(tmp_path / "some", some, limit=3)
    assert len(rows) == 6 and len(some.drawn) == 3
    assert set(some.drawn) < set(everything.drawn)
    # Going on without the limit draws the rest only.
    assert len(run(tmp_path / "some", some)) == 20
    assert sorted(some.drawn) == sorted(everything.drawn)
    for image in (tmp_path / "all" / "images").iterdir():
        assert image.read_bytes() == (tmp_path / "some" / "images" / image.name).read_bytes()


def test_a_limit_is_spread_evenly_over_whole_groups():
    questions = [item for item in scenes().questions()]
    assert [item.group for item in spread(questions, 3)] == ["00000", "00003", "00006"]
    assert spread(questions, 99) == questions


def test_the_files_of_a_benchmark_are_read_in_pieces_and_once(tmp_path):
    """A table may hold gigabytes of images, and the facts are asked for at every start and end of a run."""
    benchmark, file = scenes(), tmp_path / "rows"
    content = b"x" * 8_000_000
    file.write_bytes(content)
    benchmark.sources = [file]
    tracemalloc.start()
    facts = benchmark.facts
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    assert facts["prompts_sha256"] == hashlib.sha256(content).hexdigest()
    file.unlink()
    assert benchmark.facts == facts


def test_a_folder_of_other_settings_is_refused(tmp_path):
    run(tmp_path, FakeModel())
    other = FakeModel()
    other.description = lambda: {"name": "fake", "sampler": {"steps": 2}, "dtype": "float32"}
    with pytest.raises(SettingsError, match="model.sampler"):
        run(tmp_path, other)


@pytest.mark.parametrize("rest", [b'{"id": "c", "val', '{"id": "c", "value": "ü'.encode()[:-1]])
def test_a_log_loses_only_the_line_that_a_kill_cut_short(rest, tmp_path):
    """Also where it was cut inside a character."""
    path = tmp_path / "log"
    Log(path).append({"id": "a", "value": 1})
    Log(path).append({"id": "b", "value": 2})
    path.write_bytes(path.read_bytes() + rest)
    assert list(read_log(path)) == ["a", "b"]
    Log(path).append({"id": "d", "value": 4})
    assert {name: row["value"] for name, row in read_log(path).items()} == {"a": 1, "b": 2, "d": 4}


class LosesTheJudge:
    """A judge that answers once in the first process, and then no more."""

    name, batch_size = "judge", 2

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def verdicts(self, rows: list[dict], folder: Path) -> Iterator[dict]:
        for number, row in enumerate(rows):
            if self.rank == 0 and number:
                raise JudgeError("rank 0 has lost its judge")
            yield {"id": row["id"], "correct": True}


def one_of_two(rank: int, folder: Path) -> None:
    """Evaluate a share, then grade it again with a judge that is lost; leave what came, and the error."""
    world = World.join()
    model = FakeModel()
    evaluation = Evaluation(model, scenes(), folder / "two", batch_size=2, world=world)
    evaluation.open()
    evaluation.outputs(most=1)
    rows = evaluation.graded()
    (folder / f"rows{rank}").write_text(to_lines(rows) + f"{len(model.drawn)} {len(model.asked)}")
    evaluation.benchmark.grader = LosesTheJudge(rank)
    with pytest.raises(JudgeError) as lost:
        evaluation.graded()
    (folder / f"rows-lost{rank}").write_text(str(lost.value))
    world.leave()


def test_two_processes_give_the_rows_of_one(tmp_path):
    run_forked(one_of_two, 2, tmp_path)
    outcomes = [(tmp_path / f"rows{rank}").read_text().splitlines() for rank in range(2)]
    assert outcomes[0][:-1] == outcomes[1][:-1]
    drawn, asked = zip(*(map(int, outcome[-1].split()) for outcome in outcomes), strict=True)
    assert sum(drawn) == sum(asked) == 10 and min(drawn) >= 4
    assert [json.loads(line) for line in outcomes[0][:-1]] == run(tmp_path / "one", FakeModel())
    for image in (tmp_path / "one" / "images").iterdir():
        assert image.read_bytes() == (tmp_path / "two" / "images" / image.name).read_bytes()
    # Where one loses its judge, the other goes on to its end, what came is kept, and both say so. Of five batches of
    # two, the first has the 1st, 3rd and 5th, of which one verdict comes; the second has the 2nd and 4th.
    lost = [(tmp_path / f"rows-lost{rank}").read_text() for rank in range(2)]
    assert lost[0] == "rank 0 has lost its judge" and "failed in another process" in lost[1]
    kept = [json.loads(line)["id"] for line in (tmp_path / "two" / "verdicts.judge.jsonl").read_text().splitlines()]
    assert kept == [f"draw/{number:05d}" for number in (0, 2, 3, 6, 7)]
