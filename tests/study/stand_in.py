"""A stand-in for `fit` that starts at once: tests of how cells are shared out need hundreds of runs.

It notes when it starts and ends, leaves the result.json that the test prepared for its variant and seed, and does
what its variant's name asks for. Only the standard library is imported.
"""

import json
import os
import sys
import time
import zipfile
from pathlib import Path

PATIENCE = 300.0
"""Seconds until a run that nobody lets go ends by itself: a test that fails leaves none behind for good."""


def main(home: Path, arguments: list[str]) -> int:
    options = dict(argument.removeprefix("--").split("=", 1) for argument in arguments if "=" in argument)
    run = Path(json.loads(options["trainer.logger"])["init_args"]["save_dir"])
    variant, seed = options.get("stub.variant", "plain"), options["seed_everything"]
    resumed = options.get("ckpt_path") == "last"
    note(home, f"start {run} {os.getpid()} {'resumed' if resumed else 'fresh'} {os.environ.get('OMP_NUM_THREADS')}")
    sys.stdout.write(f"stand-in for {arguments[0]}: {variant}, seed {seed}\n")
    if variant.startswith("fails") and not (home / "mended").exists():
        sys.stdout.write("something broke\n")
        return 3
    if variant.startswith("waits") and not resumed:
        checkpoint(run)
        end = time.monotonic() + PATIENCE
        while not (home / "gate").exists() and time.monotonic() < end:
            time.sleep(0.02)
    if variant.startswith("dies_late"):
        if resumed:
            leave(home, run, variant, seed, validated=False)
            return 0  # nothing left to train, and no validation any more
        first = not (home / f"died-{seed}").exists()
        (home / f"died-{seed}").touch()
        if first:
            checkpoint(run)
            return 5
    time.sleep(float(options.get("stub.seconds", 0)))
    leave(home, run, variant, seed)
    note(home, f"end {run} {os.getpid()}")
    return 0


def leave(home: Path, run: Path, variant: str, seed: str, validated: bool = True) -> None:
    run.mkdir(parents=True, exist_ok=True)
    result = json.loads((home / "results" / f"{variant}-{seed}.json").read_text())
    if not validated:
        result["validation"] = result["validation"][:1]
    (run / "result.json").write_text(json.dumps(result))


def checkpoint(run: Path) -> None:
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(run / "checkpoints" / "last.ckpt", "w") as file:
        file.writestr("weights", "none")


def note(home: Path, line: str) -> None:
    """One write, so that lines of several processes do not mix."""
    descriptor = os.open(home / "notes", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{line}\n".encode())
    os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
