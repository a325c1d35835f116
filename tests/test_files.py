"""What a stopped process began to write."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from infotok_lit.cli import main
from infotok_lit.errors import TERMINATED
from infotok_lit.video import codec


def stopped(arguments: list[str], folder: Path) -> int:
    """The exit status of a Python that gets SIGTERM as soon as something hidden is in a folder."""
    process = subprocess.Popen([sys.executable, *arguments])
    try:
        end = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < end and not list(folder.glob(".*")):
            time.sleep(0.01)
        assert list(folder.glob(".*"))
        process.send_signal(signal.SIGTERM)
        return process.wait(30)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("kind", ["whole_file", "whole_folder"])
def test_sigterm_leaves_nothing_half_written(tmp_path, kind) -> None:
    code = (
        "import time; from pathlib import Path; from infotok_lit import files\n"
        f"with files.{kind}(Path({str(tmp_path / 'out')!r})): time.sleep(60)"
    )
    assert stopped(["-c", code], tmp_path) == TERMINATED
    assert not list(tmp_path.iterdir())


def test_a_video_that_is_half_compressed_leaves_nothing(tmp_path, monkeypatch) -> None:
    def stopped_while_writing(tokenizer, frames, frame_rate, file, config, progress) -> None:
        file.write(b"half")
        assert [path.suffix for path in tmp_path.glob(".*")] == [".part"]
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr(codec, "compress", stopped_while_writing)
    (tmp_path / "frames").mkdir()
    for name in "ab":
        Image.new("RGB", (64, 64)).save(tmp_path / "frames" / f"{name}.png")
    command = ["compress", "--model", "embedded", "--video", str(tmp_path / "frames"), "--out", str(tmp_path / "x.itk")]
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == TERMINATED
    assert [path.name for path in tmp_path.iterdir()] == ["frames"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
