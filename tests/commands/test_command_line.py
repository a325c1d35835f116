"""How the command line ends where nobody reads on, where the user stops it, and where nothing could be written."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from infotok_lit import cli
from infotok_lit.commands import describe
from infotok_lit.errors import SettingsError
from infotok_lit.files import check_target


def test_what_nobody_reads_is_no_error() -> None:
    script = (
        "import sys\n"
        "from infotok_lit import cli\n"
        "cli._run = lambda arguments: sum(sys.stdout.write('x' * 999 + '\\n') for _ in range(int(arguments[0]))) * 0\n"
        "sys.exit(cli.main())\n"
    )
    # A single line is written at the end only, if python buffers it.
    for lines, statuses in ((1000, {cli.UNREAD}), (1, {0, cli.UNREAD})):
        reading, writing = os.pipe()
        os.close(reading)
        command = [sys.executable, "-c", script, str(lines)]
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=500)
        os.close(writing)
        assert done.returncode in statuses and done.stderr == ""


def test_another_broken_pipe_is_an_error(monkeypatch) -> None:
    def broken(arguments: list[str]) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(cli, "_run", broken)
    with pytest.raises(BrokenPipeError):
        cli.main(["fit"])


def test_ctrl_c_ends_a_command_in_a_sentence(monkeypatch, capsys) -> None:
    def stopped(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(describe, "find_images", stopped)
    assert cli.main(["describe", "--model", "harmon_scenes32", "--image", "a.png"]) == 130
    assert capsys.readouterr().err == "infotok_lit: interrupted\n"


@pytest.mark.parametrize(
    ("command", "file"),
    [
        ("bench", ""),
        ("bench inference", ""),
        ("bench evaluate --model nowhere", ""),
        ("bench reading --family nowhere", ""),
        ("estimate --model.class_path nowhere", ""),
        ("gpu_check --sizes nowhere", ""),
        ("probe --model nowhere", ""),
        ("video_evidence --model nowhere", ""),
        ("compress --model nowhere --video nowhere", ""),
        ("decompress --model nowhere --stream nowhere", ""),
        ("rate_distortion --model nowhere --video nowhere", "rate_distortion.csv"),
        ("budget_evidence --model nowhere", "table.md"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_any_work(command, file, tmp_path, capsys) -> None:
    """The work may take hours, and its result would have no place: nothing else of the command is even looked at."""
    (tmp_path / "plain").write_text("mine")
    (tmp_path / "folder" / file).mkdir(parents=True, exist_ok=True)
    for out, said in (("folder", "exists; choose another name"), ("plain/x", f"{tmp_path / 'plain'} is a file, not")):
        assert cli.main([*command.split(), "--out", str(tmp_path / out)]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and said in lines[0]


@pytest.mark.parametrize("force", [True, False])
def test_no_device_or_pipe_is_replaced_by_a_file(force, tmp_path) -> None:
    """The superuser of a container could replace even /dev/null."""
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", Path(os.devnull)):
        with pytest.raises(SettingsError, match=f"{place} is a device or a pipe"):
            check_target(place, force)


def test_our_warnings_are_one_line_and_those_of_libraries_name_their_place() -> None:
    usual = warnings.formatwarning
    with cli.own_warnings_in_a_line():
        assert warnings.formatwarning("take care", UserWarning, cli.__file__, 3) == "infotok_lit: warning: take care\n"
        for category, place in ((UserWarning, pytest.__file__), (DeprecationWarning, cli.__file__)):
            shown = warnings.formatwarning("it changes", category, place, 3)
            assert shown.startswith(f"{place}:3: {category.__name__}: it changes\n")
    assert warnings.formatwarning is usual
