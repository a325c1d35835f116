"""Compare variants of a configuration over seeds, or search for good ones; each run is a normal `fit`.

A second call goes on where the first one stopped; several calls, on one machine or on several that share the study's
folder, work on one study together. The settings of the study itself can be overridden on the command line.
"""

import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from infotok_lit.study.config import Study


def main(argv: Sequence[str]) -> int:
    """`ablate --config FILE [--workers N] [--report_only true] [overrides]`; 1 if something did not finish."""
    parser = build_parser()
    given = parser.parse_args(list(argv[1:]))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        arguments = parser.instantiate(given)
        study = read_study(arguments)
        complete = arguments.report_only or _run(study, arguments)
        from infotok_lit.study.report import write_report

        report = write_report(study)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same call goes on from here\n")
        return 130
    sys.stdout.write(f"{report}\n")
    return 0 if complete else 1


def build_parser() -> "ArgumentParser":
    """The command line: what belongs to this machine, and the settings of a study."""
    from jsonargparse import ArgumentParser

    from infotok_lit.study.config import Study

    parser = ArgumentParser(prog="python -m infotok_lit ablate", description=__doc__)
    parser.add_argument("--config", action="config", help="a study's YAML file; may be repeated, later ones win")
    parser.add_argument("--workers", type=int, default=1, help="how many runs at a time, here")
    parser.add_argument("--threads", type=int | None, default=None, help="CPU threads per run; with workers > 1: 1")
    parser.add_argument("--gpus", type=list[str], default=[], help="GPUs that the workers share, such as [0,1]")
    parser.add_argument("--report_only", type=bool, default=False, help="run nothing, report what there is")
    parser.add_class_arguments(Study)
    return parser


def read_study(arguments: "Namespace") -> "Study":
    """The study that instantiated arguments describe; ValueError if its settings do not fit together."""
    from dataclasses import fields

    from infotok_lit.study.config import Study

    return Study(**{field.name: arguments[field.name] for field in fields(Study)})


def _run(study: "Study", arguments: "Namespace") -> bool:
    from infotok_lit.study.run import Resources, run_study

    return run_study(study, Resources(arguments.workers, arguments.threads, arguments.gpus))
