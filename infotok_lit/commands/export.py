"""`export`: strip a run to an inference folder."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    """`export --ckpt RUN_OR_CKPT --out DIR`."""
    parser = argparse.ArgumentParser(prog="python -m infotok_lit export", description=__doc__)
    parser.add_argument("--ckpt", required=True, type=Path, help="a run folder, or one of its checkpoints")
    parser.add_argument("--out", required=True, type=Path, help="the folder to write")
    parser.add_argument("--format", choices=("safetensors", "pth"), default="safetensors", help="pth: official files")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="cast the weights; default: as they are"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing folder")
    arguments = parser.parse_args(argv[1:])
    if arguments.out.exists() and not arguments.force:
        parser.error(f"{arguments.out} exists; choose another folder, or replace it with --force")
    from infotok_lit.checkpoints import CHECKPOINT_KEY, CheckpointError, find_checkpoint, read_run
    from infotok_lit.models.export import export_model, run_provenance
    from infotok_lit.modules.base_model import rebuild_base
    from infotok_lit.modules.video_tokenizer import export_run
    from infotok_lit.video.folder import FAMILY

    try:
        path = find_checkpoint(arguments.ckpt) or arguments.ckpt
        if not path.is_file():
            raise FileNotFoundError(f"there is no checkpoint of a run at {path}")
        checkpoint = read_run(path)
        if checkpoint[CHECKPOINT_KEY]["family"] == FAMILY:
            if arguments.format != "safetensors" or arguments.dtype is not None:
                raise ValueError(
                    "a video tokenizer is exported to safetensors as it is: leave out --format and --dtype"
                )
            export_run(checkpoint, path, arguments.out, arguments.force)
            sys.stdout.write(f"wrote {arguments.out}\n")
            return 0
        base = rebuild_base(checkpoint)
    except (CheckpointError, FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    export_model(
        base, arguments.out, run_provenance(checkpoint, path), arguments.format, arguments.dtype, arguments.force
    )
    sys.stdout.write(f"wrote {arguments.out}\n")
    return 0
