"""`ablate`: compare variants of a configuration over seeds, or search for good ones."""

import signal
import sys
from collections.abc import Sequence

from infotok_lit.commands.parsing import run
from infotok_lit.errors import INTERRUPTED, ExplainedError, SettingsError
from infotok_lit.study.config import Study
from infotok_lit.study.launch import Resources


def ablate(study: Study, resources: Resources, report_only: bool = False) -> int:
    """Compare variants of a configuration over seeds, or search for good ones; each run is a normal `fit`.

    A second call goes on where the first one stopped; several calls, on one machine or on several that share the
    study's folder and its storage, work on one study together.

    Args:
        report_only: Run nothing, report what there is.

    Returns:
        0; 1 if something has not finished, or lacks a metric; 130 if it was interrupted.
    """
    from infotok_lit.study.report import write_report
    from infotok_lit.study.run import is_complete, run_study

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        complete = is_complete(study) if report_only else run_study(study, resources)
        report = write_report(study)
    except ExplainedError:
        raise
    except OSError as error:
        raise SettingsError(f"out: {study.out} cannot be written to: {error}") from error
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same call goes on from here\n")
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
    sys.stdout.write(f"{report}\n")
    return 0 if complete else 1


def main(argv: Sequence[str]) -> int:
    """`ablate --config STUDY.yaml [--workers N] [--report_only] [settings of the study]`."""
    return run(ablate, argv, config=True)
