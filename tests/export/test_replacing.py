"""An export replaces an earlier export and nothing else, and what it replaces is whole until the new one is."""

import os
import signal
from pathlib import Path

import lightning.pytorch as pl
import pytest
from tiny import TinyModule, scenes_data, tiny_model

from infotok_lit.callbacks import ExportInference
from infotok_lit.checkpoints import exported_family
from infotok_lit.cli import main as command_line
from infotok_lit.errors import ExplainedError
from infotok_lit.files import free_path, whole_folder
from infotok_lit.models import export as module
from infotok_lit.models.export import ExportError, ExportExistsError, export_model


def content(folder: Path) -> dict[str, bytes | str]:
    """Everything below a folder: files by their bytes, links by where they lead."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> Path:
    """An export that is there already."""
    folder = tmp_path_factory.mktemp("old") / "export"
    export_model(tiny_model(seed=0), folder, {"run": "old"})
    return folder


def copy(folder: Path, to: Path) -> Path:
    to.mkdir(parents=True)
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_an_earlier_export_is_replaced_by_force_alone(old, tmp_path) -> None:
    out = copy(old, tmp_path / "out")
    with pytest.raises(ExportExistsError, match="--force"):
        export_model(tiny_model(seed=1), out, {})
    assert content(out) == content(old)
    export_model(tiny_model(seed=1), out, {"run": "new"}, force=True)
    assert "run: new" in (out / "README.md").read_text()
    assert (out / "harmon.safetensors").read_bytes() != (old / "harmon.safetensors").read_bytes()
    assert list(tmp_path.iterdir()) == [out]


def test_the_other_format_and_another_family_replace_it_too(old, tmp_path) -> None:
    out = copy(old, tmp_path / "out")
    export_model(tiny_model("openuni"), out, {}, file_format="pth", force=True)
    assert exported_family(out) == "openuni"
    assert not (out / "harmon.safetensors").exists()


def labels(old: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "labels.csv").write_text("two years of work")


def run_folder(old: Path, folder: Path) -> None:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "last.ckpt").write_bytes(b"weights")
    (folder / "config.yaml").write_text("model: {}")
    copy(old, folder / "export")


def parent_of_runs(old: Path, folder: Path) -> None:
    run_folder(old, folder / "version_0")


def an_export_with_notes(old: Path, folder: Path) -> None:
    copy(old, folder)
    (folder / "notes.txt").write_text("mine")


def an_export_with_a_folder(old: Path, folder: Path) -> None:
    run_folder(old, copy(old, folder) / "run")


def an_export_with_a_link(old: Path, folder: Path) -> None:
    (copy(old, folder) / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(old / "tokenizer.json")


def a_link_to_an_export(old: Path, folder: Path) -> None:
    folder.symlink_to(old)


def a_dangling_link(old: Path, folder: Path) -> None:
    folder.symlink_to(folder.with_name("nowhere"))


def a_file(old: Path, folder: Path) -> None:
    folder.write_text("mine")


def a_transformers_folder(old: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    (folder / "tokenizer.json").write_text("{}")


TARGETS = {
    labels: "labels.csv, which no export wrote",
    run_folder: "checkpoints, config.yaml, export, which no export wrote",
    parent_of_runs: "version_0, which no export wrote",
    an_export_with_notes: "notes.txt, which no export wrote",
    an_export_with_a_folder: "run, which no export wrote",
    an_export_with_a_link: "tokenizer.json, which no export wrote",
    a_link_to_an_export: "is a link",
    a_dangling_link: "is a link",
    a_file: "is not a folder",
    a_transformers_folder: "holds no export",
}


@pytest.mark.parametrize("make", TARGETS, ids=lambda make: make.__name__)
def test_nothing_else_is_replaced_even_by_force(old, tmp_path, make) -> None:
    make(old, tmp_path / "out")
    before, was = content(tmp_path), content(old)
    with pytest.raises(ExportExistsError, match=f"{TARGETS[make]}.*[Cc]hoose another folder"):
        export_model(tiny_model(), tmp_path / "out", {}, force=True)
    assert content(tmp_path) == before and content(old) == was


@pytest.mark.parametrize("target", [".", ".."])
def test_the_working_folder_and_what_holds_it_stay(old, tmp_path, monkeypatch, target) -> None:
    export = copy(old, tmp_path / "export")
    monkeypatch.chdir(export)
    before = content(tmp_path)
    with pytest.raises(ExportExistsError, match="is the working folder, or holds it"):
        export_model(tiny_model(), Path(target), {}, force=True)
    assert content(tmp_path) == before


def test_the_command_says_why_and_stops(old, tmp_path, capsys) -> None:
    labels(old, tmp_path / "labels")
    assert command_line(["export", "--ckpt", "any", "--out", str(tmp_path / "labels"), "--force"]) == 2
    assert "labels.csv, which no export wrote" in capsys.readouterr().err.splitlines()[-1]
    assert content(tmp_path) == {"labels/labels.csv": b"two years of work"}


# What goes wrong while it is written


def full(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def full_like_torch(*_: object, **__: object) -> None:
    raise RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file")


@pytest.mark.parametrize(
    ("name", "fail"),
    [
        ("write_config", full),
        ("model_card", full),
        ("write_config", KeyboardInterrupt),
        ("torch.save", full_like_torch),
    ],
)
def test_what_fails_leaves_the_old_export_and_nothing_else(old, tmp_path, monkeypatch, name, fail) -> None:
    out = copy(old, tmp_path / "out")

    def failing(*arguments: object, **options: object) -> None:
        if isinstance(fail, type):
            raise fail
        fail()

    monkeypatch.setattr(name if "." in name else f"{module.__name__}.{name}", failing)
    expected = KeyboardInterrupt if fail is KeyboardInterrupt else ExportError
    with pytest.raises(expected) as stopped:
        export_model(tiny_model(seed=1), out, {}, file_format="pth", force=True)
    assert content(tmp_path) == {f"out/{name}": value for name, value in content(old).items()}
    if expected is ExportError:
        assert f"{out} cannot be written (" in str(stopped.value) and "\n" not in str(stopped.value)


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("trouble", "ends"), [(full, OSError), (sigterm, SystemExit)])
def test_a_swap_that_fails_is_taken_back(tmp_path, monkeypatch, trouble, ends) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "a").write_text("old")
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if (self / "b").exists():
            trouble()
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(ends), whole_folder(out, ["a"]) as folder:
        (folder / "b").write_text("new")
    assert content(tmp_path) == {"out/a": b"old"}
    assert list(tmp_path.iterdir()) == [out]


def test_a_kill_costs_nothing_that_was_there(tmp_path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "a").write_text("old")
    child = os.fork()
    if child == 0:
        with whole_folder(out, ["a"]) as folder:
            (folder / "b").write_text("half of the new")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert content(out) == {"a": b"old"}


def test_what_appears_in_the_old_folder_meanwhile_is_kept(tmp_path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "a").write_text("old")
    with whole_folder(out, ["a"]) as folder:
        (folder / "b").write_text("new")
        (out / "late.txt").write_text("someone's")
    assert content(out) == {"b": b"new"}
    (kept,) = (path for path in tmp_path.iterdir() if path != out)
    assert content(kept) == {"late.txt": b"someone's"}


def test_a_new_folder_that_fails_is_not_there(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "model_card", full)
    with pytest.raises(ExportError, match="No space left"):
        export_model(tiny_model(), tmp_path / "out", {})
    assert list(tmp_path.iterdir()) == []


def test_a_card_names_a_run_whose_folder_has_no_utf8_name(tmp_path) -> None:
    export_model(tiny_model(), tmp_path / "out", {"run": Path(os.fsdecode(b"caf\xe9"))})
    assert "run: caf\\udce9" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_a_place_that_cannot_be_written_is_one_message(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ExportError, match="out cannot be written "):
        export_model(tiny_model(), tmp_path / "file" / "out", {})

    def read_only(path: Path, *_: object, **__: object) -> None:
        if path.name.startswith("."):
            raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(ExportError, match="out cannot be written .Read-only file system."):
        export_model(tiny_model(), tmp_path / "out", {})


def test_the_next_free_name_is_free_of_links_too(tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out-2").symlink_to("nowhere")
    assert free_path(tmp_path / "out") == tmp_path / "out-3"
    assert free_path(tmp_path / "new") == tmp_path / "new"


# At the end of fit


def fit(folder: Path, callback: ExportInference, *others: pl.Callback) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=2,
        max_epochs=1,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback, *others],
    )
    trainer.fit(TinyModule(()), scenes_data())
    return trainer


def test_the_callback_refuses_an_existing_target_before_training(tmp_path) -> None:
    (tmp_path / "exported").mkdir()
    with pytest.raises(FileExistsError, match="force: true"):
        fit(tmp_path / "run", ExportInference(str(tmp_path / "exported")))


@pytest.mark.filterwarnings("always")
def test_force_never_costs_more_than_an_export(old, tmp_path) -> None:
    labels(old, tmp_path / "labels")
    export = copy(old, tmp_path / "exported")
    with pytest.warns(UserWarning, match="labels.csv, which no export wrote.*goes to .*labels-2"):
        fit(tmp_path / "run", ExportInference(str(tmp_path / "labels"), force=True))
    assert content(tmp_path / "labels") == {"labels.csv": b"two years of work"}
    assert exported_family(tmp_path / "labels-2") == "harmon"
    fit(tmp_path / "run", ExportInference(str(export), force=True))
    assert "run: old" not in (export / "README.md").read_text()


def test_what_the_user_put_into_a_runs_export_stays(old, tmp_path) -> None:
    an_export_with_notes(old, tmp_path / "run" / "export")
    callback = ExportInference()
    fit(tmp_path / "run", callback)
    assert (tmp_path / "run" / "export" / "notes.txt").read_text() == "mine"
    assert callback.target(tmp_path / "run") == tmp_path / "run" / "export-2"
    assert exported_family(tmp_path / "run" / "export-2") == "harmon"


def test_an_export_of_another_run_stays_where_no_run_has_a_folder_of_its_own(old, tmp_path) -> None:
    export = copy(old, tmp_path / "run" / "export")
    before = content(export)
    callback = ExportInference()
    fit(tmp_path / "run", callback)
    assert content(export) == before and exported_family(tmp_path / "run" / "export-2") == "harmon"
    fit(tmp_path / "again", callback)
    assert exported_family(tmp_path / "again" / "export") == "harmon"


class Meanwhile(pl.Callback):
    """Something happens during training."""

    def __init__(self, happen) -> None:
        self.happen = happen

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.happen()


def test_no_training_ends_without_weights(tmp_path) -> None:
    """The target appeared, or its place became a file, after training had begun."""
    target = tmp_path / "exported"
    fit(tmp_path / "run", ExportInference(str(target)), Meanwhile(target.mkdir))
    assert list(target.iterdir()) == [] and exported_family(tmp_path / "exported-2") == "harmon"
    place = tmp_path / "place"
    fit(tmp_path / "run", ExportInference(str(place / "out")), Meanwhile(lambda: place.write_text("a file now")))
    assert exported_family(tmp_path / "run" / "export") == "harmon"


def test_a_read_only_target_is_refused_before_training(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ExplainedError, match="cannot be written, because .* is read-only"):
        fit(tmp_path / "run", ExportInference(str(tmp_path / "exported")))
