"""How the command line ends where nobody reads on, and where the user stops it."""

import os
import subprocess
import sys

import pytest

from infotok_lit import cli
from infotok_lit.commands import describe


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
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120)
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
