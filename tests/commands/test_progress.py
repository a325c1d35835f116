"""Whole files, and a progress bar that stays out of the output."""

import errno
import io
import os
import pty
import subprocess
import sys

import pytest

from infotok_lit.files import write_whole
from infotok_lit.tables import Table


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch) -> None:
    path = tmp_path / "x.png"
    write_whole(path, b"old")
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "disk full")))
    with pytest.raises(OSError, match="disk full") as refused:
        write_whole(path, b"new")
    assert refused.value.filename == str(path), "the user never named the hidden file that it is written to"
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_file_has_the_permissions_of_any_new_file(tmp_path) -> None:
    write_whole(tmp_path / "ours", b"")
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("columns", [None, "60"])
def test_a_table_in_a_file_is_whole_unless_columns_says_otherwise(columns, monkeypatch, capsys) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    Table("", ["", *"abcd"], [["one row", *["1234.5 (100 %)" * 2] * 4]]).show()
    assert ("\u2026" in capsys.readouterr().out) == (columns is not None)


@pytest.mark.parametrize("stdout_is_a_terminal", [False, True])
def test_lines_go_to_stdout_and_the_bar_to_the_terminal(stdout_is_a_terminal) -> None:
    long = "x" * 200
    script = (
        "from infotok_lit.progress import progress_bar\n"
        "with progress_bar(2) as bar:\n"
        f"    bar.write('{long}')\n"
        "    bar.show(1, 'half [of] it [/of]')\n"
    )
    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    stdout = follower if stdout_is_a_terminal else subprocess.PIPE
    done = subprocess.run([sys.executable, "-c", script], stdout=stdout, stderr=follower, env=environment, timeout=500)
    os.close(follower)
    terminal = io.BytesIO()
    while chunk := _read(leader):
        terminal.write(chunk)
    shown = terminal.getvalue().decode()
    assert "half [of] it [/of]" in shown
    assert (long in shown) == stdout_is_a_terminal
    assert done.stdout == (None if stdout_is_a_terminal else f"{long}\n".encode())


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except OSError:  # the end of a pseudo terminal
        return b""
