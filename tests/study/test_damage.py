"""Whatever is torn, emptied or lost, a study goes on: finished cells count from their folders, and damage is said."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
from study.studies import METRICS, start, states, wait_until

from infotok_lit.study.cells import row_cells
from infotok_lit.study.config import Metric
from infotok_lit.study.record import read_record


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def holed(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096:40960] = bytes(36864)
    path.write_bytes(content)


DAMAGES = {
    "torn": torn,
    "holed": holed,
    "binary": lambda path: path.write_bytes(bytes(range(256)) * 100),
    "text": lambda path: path.write_text('{"op_code": 0}\n'),
    "cut to the header": lambda path: path.write_bytes(path.read_bytes()[:50]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_storage_is_set_aside_and_stops_nothing(bench, capsys, damage) -> None:
    study = bench.study(["a", "b"], seeds=(0,))
    bench.run(study)
    path = bench.home / "out" / "study.db"
    DAMAGES[damage](path)
    content = path.read_bytes()
    longer = bench.study(["a", "b"], seeds=(0, 1))
    assert bench.run(longer)
    assert set(bench.starts().values()) == {1} and len(bench.starts()) == 4
    (aside,) = path.parent.glob("study.db.damaged-*")
    assert aside.read_bytes() == content and str(aside) in capsys.readouterr().err


def test_an_empty_storage_is_filled(bench) -> None:
    study = bench.study(["a"], seeds=(0,))
    bench.run(study)
    (bench.home / "out" / "study.db").write_bytes(b"")
    assert bench.run(study) and bench.starts() == {("a", 0): 1}


def test_a_storage_that_is_damaged_while_it_is_used_stops_nothing(bench, capfd) -> None:
    study = bench.study(["waits", "a"], seeds=(0,))
    call = start(bench, study)
    wait_until(lambda: ("waits", 0) in bench.starts())
    (bench.home / "out" / "study.db").write_bytes(bytes(range(256)) * 100)
    time.sleep(1.5)
    (bench.home / "gate").touch()
    call.join(300)
    assert call.exitcode == 0 and set(states(study).values()) == {"finished"}
    assert set(bench.starts().values()) == {1}
    shown = capfd.readouterr().err
    assert "damaged-" in shown and "Traceback" not in shown


@pytest.mark.parametrize("content", ["", "{", "[]", '{"state": "finished"}', "\0" * 20, '{"attempts": [{"x": 1}]}'])
def test_a_damaged_record_is_a_cell_to_run_again(bench, capsys, content) -> None:
    study = bench.study(["a", "b"], seeds=(0,))
    bench.run(study)
    path = row_cells(study)[0].folder / "cell.json"
    path.write_text(content)
    assert bench.run(study)
    assert bench.starts() == {("a", 0): 2, ("b", 0): 1}
    assert f"{path} is empty or damaged" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{}", None])
def test_a_finished_cell_whose_result_is_damaged_or_gone_runs_again(bench, capsys, content) -> None:
    study = bench.study(["a", "b"], seeds=(0,))
    bench.run(study)
    path = row_cells(study)[0].run_folder / "result.json"
    path.unlink() if content is None else path.write_text(content)
    assert states(study)["a", 0] == "damaged"
    assert bench.run(study) and bench.starts() == {("a", 0): 2, ("b", 0): 1}
    assert f"{path} is gone or damaged" in capsys.readouterr().err


def test_a_run_that_lacks_a_metric_at_its_end_is_not_run_again_in_vain(bench) -> None:
    study = bench.study(["a"], seeds=(0,))
    misspelt = replace(study, metrics=METRICS | {"answers": Metric("val/understanding/answer/overall")})
    assert not bench.run(misspelt) and not bench.run(misspelt)
    assert bench.starts() == {("a", 0): 1}
    (cell,) = row_cells(study)
    assert read_record(cell.folder).reason.endswith(f"or delete {cell.folder} to have it run again")
    assert bench.run(study) and bench.starts() == {("a", 0): 1}


def test_a_metric_that_is_added_later_is_missing_where_it_was_not_measured(bench) -> None:
    study = bench.study(["a"], seeds=(0,))
    bench.run(study)
    later = replace(study, metrics=METRICS | {"new": Metric("val/new")})
    assert not bench.run(later) and bench.starts() == {("a", 0): 1}


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"state": "finished"}'])
def test_a_run_without_a_readable_result_has_failed(bench, content) -> None:
    study = bench.study(["a"], seeds=(0,))
    (bench.home / "results" / "a-0.json").write_text(content or "null")
    assert not bench.run(study)
    assert "left no readable result.json" in read_record(row_cells(study)[0].folder).reason


def test_a_run_that_stopped_early_has_failed(bench) -> None:
    study = bench.study(["a"], seeds=(0,))
    path = bench.home / "results" / "a-0.json"
    path.write_text(path.read_text().replace('"finished"', '"interrupted"'))
    assert not bench.run(study)
    assert "says interrupted at step 4" in read_record(row_cells(study)[0].folder).reason
