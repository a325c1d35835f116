"""The notebooks run from a folder of their own, with small numbers, and what is committed is what they print."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
MOST_BYTES = 450_000
PATIENCE_SECONDS = 1800
"""How long a cell may take: against a hang, not a measure of speed."""

SMALL = {
    "quickstart": {"STEPS": 4, "BATCH_SIZE": 4, "VAL_SAMPLES": 4, "DRAWINGS": 4},
    "reading_an_ablation": {
        "STEPS": 2,
        "VALIDATE_EVERY": 2,
        "SEEDS": [0, 1],
        "BATCH_SIZE": 4,
        "VAL_SAMPLES": 4,
        "DRAWINGS": 4,
        # Scores of four drawings may be equal in every run; then there is no p.
        "CHECKED": "understanding loss",
    },
    "information_plane": {"STEPS": 4, "VALIDATE_EVERY": 2, "BATCH_SIZE": 4, "VAL_SAMPLES": 4},
    "your_own_data": {"STEPS": 4, "BATCH_SIZE": 4, "VAL_SAMPLES": 4},
}
"""What takes the place of the numbers in a notebook's cell that is tagged `parameters`."""

SAID = {
    "quickstart": "162 tensors with the same names and shapes",
    "reading_an_ablation": "table.csv says the same",
    "information_plane": "the posterior has collapsed to the prior",
    "your_own_data": "samples drawn so far are broken",
}
"""What the prose is about must be what a notebook prints."""


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def parameters_cell(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    return cell


def values(source: str) -> dict:
    found: dict = {}
    exec(source, found)
    return {name: value for name, value in found.items() if name != "__builtins__"}


def test_every_notebook_is_tested() -> None:
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_it_runs_anywhere(name, tmp_path, monkeypatch) -> None:
    notebook = read(name)
    cell = parameters_cell(notebook)
    assert values(cell.source).keys() == SMALL[name].keys()
    cell.source = "\n".join(f"{parameter} = {value!r}" for parameter, value in SMALL[name].items())
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    NotebookClient(notebook, timeout=PATIENCE_SECONDS, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"], "a notebook writes below runs/ only"
    if name != "information_plane":  # nothing collapses in so few steps
        assert SAID[name] in printed(notebook)


@pytest.mark.parametrize("name", SMALL)
def test_what_is_committed_was_run_from_top_to_bottom(name) -> None:
    notebook = read(name)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs), "its figures are included"
    assert not [output for output in outputs if output.output_type == "error"]
    timed = [cell for cell in cells if "execution" in cell.metadata]
    assert not timed, "for a small diff, execute with --ExecutePreprocessor.record_timing=False"
    assert (NOTEBOOKS / f"{name}.ipynb").stat().st_size <= MOST_BYTES


@pytest.mark.parametrize("name", SMALL)
def test_what_it_prints(name) -> None:
    text = printed(read(name))
    assert SAID[name] in text
    assert not re.search(r"Warning|it/s|\r|(?<![\w.])/(home|root|tmp|usr|work|Users)/", text)


def printed(notebook: nbformat.NotebookNode) -> str:
    return "\n".join(words(output) for cell in code_cells(notebook) for output in cell.outputs)


def words(output: nbformat.NotebookNode) -> str:
    if output.output_type == "stream":
        return output.text
    return "\n".join(text for kind, text in output.get("data", {}).items() if kind.startswith("text/"))


def test_links_lead_somewhere() -> None:
    for name in SMALL:
        prose = "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
        for target in re.findall(r"\]\(([^)#:]+)\)", prose):
            assert (NOTEBOOKS / target).exists(), f"{name}: {target}"
