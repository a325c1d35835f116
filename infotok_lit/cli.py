"""The command line: which subcommand runs, and answers that need nothing heavy.

Only the standard library is imported here, so that help and typing errors are answered at once.
"""

import errno
import os
import select
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from infotok_lit import __version__
from infotok_lit.assets import find_config
from infotok_lit.errors import INTERRUPTED, ExplainedError, did_you_mean

COMMANDS = {
    "fit": (
        "infotok_lit.commands.fit",
        "fine-tune a model; without arguments: the quickstart on a small embedded model",
    ),
    "validate": ("infotok_lit.commands.fit", "measure both tasks, with the same configuration as fit"),
    "check": ("infotok_lit.commands.check", "look at the data before training: lengths, cuts, broken samples"),
    "cache": ("infotok_lit.commands.cache", "encode the images once, so that training steps need not"),
    "export": ("infotok_lit.commands.export", "strip a run to an inference folder"),
    "describe": ("infotok_lit.commands.describe", "ask a model about images"),
    "generate": ("infotok_lit.commands.generate", "draw images from prompts"),
    "evaluate": ("infotok_lit.commands.evaluate", "score models on the benchmarks that the field reports"),
    "ablate": ("infotok_lit.commands.ablate", "compare variants over seeds, or search for good ones"),
    "probe": ("infotok_lit.commands.probe", "measure what the tokens of a model hold about Scenes, in bits"),
    "estimate": ("infotok_lit.commands.estimate", "say what memory and computation a configuration takes, before fit"),
    "bench": ("infotok_lit.commands.bench", "time training per term, or `bench inference`, `evaluate`, `reading`"),
    "gpu_check": ("infotok_lit.commands.gpu_check", "check on one card that all works, and how fast, within minutes"),
    "compress": ("infotok_lit.commands.compress", "compress a video to the tokens that it deserves"),
    "decompress": ("infotok_lit.commands.compress", "decode what `compress` wrote"),
    "rate_distortion": ("infotok_lit.commands.rate_distortion", "quality of compressed videos against their bits"),
    "budget_evidence": ("infotok_lit.commands.budget_evidence", "measure what an image's tokens are worth"),
    "video_evidence": ("infotok_lit.commands.video_evidence", "measure what a video tokenizer gains by choosing"),
}
"""Subcommand -> the module whose function of this name runs it, or whose main(argv) does, and a line of help."""
MENDABLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
    *(errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR),
)
"""What a user can mend in the file system: no permission, no space, nothing there, a file in place of a folder."""
UNREAD = 141
"""The exit status of a program that wrote more than was read: 128 + the number of SIGPIPE."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the process's exit status."""
    try:
        with own_warnings_in_a_line():
            return _run(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        _fail("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # It may be another pipe than stdout, such as one to a process that reads data.
        if not _stdout_is_closed():
            raise
        return UNREAD
    finally:
        _stdout_is_closed()


@contextmanager
def own_warnings_in_a_line() -> Iterator[None]:
    """Show our warnings without the place and the line of code that they come from; those of libraries keep theirs."""
    usual = warnings.formatwarning

    def formatted(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if category is UserWarning and Path(filename).is_relative_to(Path(__file__).parent):
            return f"infotok_lit: warning: {message}\n"
        return usual(message, category, filename, lineno, line)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = usual


def _run(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        _say(_usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        _say(f"infotok_lit {__version__}")
        return 0
    command = arguments[0]
    if command not in COMMANDS:
        return _fail(f"no subcommand {command!r}{did_you_mean(command, COMMANDS)}\n\n{_usage()}")
    try:
        _find_configs(arguments[1:])
        module = import_module(COMMANDS[command][0])
        if hasattr(module, "main"):
            return module.main(arguments)
        from infotok_lit.commands.parsing import run

        return run(getattr(module, command), arguments)
    except ExplainedError as error:
        return _fail(str(error))
    except OSError as error:
        if error.errno not in MENDABLE:
            raise
        return _fail(f"{error.filename or 'a file'}: {error.strerror}")


def _usage() -> str:
    lines = [f"  {name:<17}{text}" for name, (_, text) in COMMANDS.items()]
    return "usage: python -m infotok_lit SUBCOMMAND [...]\n\n" + "\n".join(lines) + "\n\nSUBCOMMAND --help says more."


def _find_configs(arguments: Sequence[str]) -> None:
    """Raise MissingFileError for a --config that is neither a file nor the name of one that ships."""
    for i, argument in enumerate(arguments):
        if argument in ("--config", "-c") and i + 1 < len(arguments):
            find_config(arguments[i + 1])
        elif argument.startswith("--config="):
            find_config(argument.removeprefix("--config="))


def _stdout_is_closed() -> bool:
    """Whether nobody reads on, as behind `| head`; then what is left to write goes nowhere, rather than failing."""
    try:
        stdout = sys.stdout.fileno()
    except (OSError, ValueError):  # it is no file, or closed
        return False
    if not hasattr(select, "poll"):  # as on Windows
        return False
    polled = select.poll()
    polled.register(stdout, select.POLLOUT)
    closed = any(event & select.POLLERR for _, event in polled.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return closed


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _fail(text: str) -> int:
    sys.stderr.write(f"infotok_lit: {text}\n")
    return 2
