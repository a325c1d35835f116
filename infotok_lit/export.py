"""Strip a model to an inference folder: what training added is left behind, and the names are the official ones."""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from infotok_lit.models.unified import UnifiedModel

Format = Literal["safetensors", "pth"]
DType = Literal["float32", "bfloat16", "float16"]


class ExportExistsError(FileExistsError):
    """The target of an export exists and was not to be replaced."""


def export_model(
    base: "UnifiedModel",
    out: Path,
    provenance: dict[str, Any],
    file_format: Format = "safetensors",
    dtype: DType | None = None,
    force: bool = False,
) -> None:
    """Write an inference folder (models/folder.py) in one step: it is complete, or it is not there.

    Args:
        base: the model without heads; weights are written as they are, or cast to `dtype`.
        out: the folder to make.
        provenance: lines of the model card.
        file_format: `pth` writes single files as the official code loads them.
        force: replace an existing folder.

    Raises:
        ExportExistsError: if `out` exists and `force` is false.
    """
    from infotok_lit.models.folder import write_config

    if out.exists() and not force:
        raise ExportExistsError(f"{out} exists; choose another folder, or replace it with --force")
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        for stem, weights in base.official_weights().items():
            _write_weights(staging, stem, weights, file_format, dtype, base)
        write_config(staging, base.family, base.description())
        base.save_tokenizer(staging)
        (staging / "README.md").write_text(model_card(base, provenance))
        # Temporary folders, and the files that safetensors writes, are for their owner alone.
        staging.chmod(0o755)
        for path in staging.iterdir():
            path.chmod(0o644)
        if out.exists():
            shutil.rmtree(out)
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_weights(
    folder: Path,
    stem: str,
    weights: dict[str, "Tensor"],
    file_format: Format,
    dtype: DType | None,
    base: "UnifiedModel",
) -> None:
    import torch
    from huggingface_hub import save_torch_state_dict

    if dtype is not None:
        cast: dict[int, Tensor] = {}
        # One cast per storage, so that tied weights stay tied.
        target = getattr(torch, dtype)
        weights = {
            name: cast.setdefault(t.data_ptr(), t.to(target)) if t.is_floating_point() else t
            for name, t in weights.items()
        }
    if file_format == "pth":
        suffix, content = (".pth", weights) if stem == base.family else (".ckpt", {"model": weights})
        torch.save(content, folder / f"{stem}{suffix}")
        return
    contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_torch_state_dict(
        contiguous,
        folder,
        filename_pattern=f"{stem}{{suffix}}.safetensors",
        max_shard_size="100GB",
        metadata={"format": "pt", "family": base.family, "weights": "raw"},
        shared_tensors_to_discard=[name for name in base.official_aliases if name in weights],
    )


def model_card(base: "UnifiedModel", provenance: dict[str, Any]) -> str:
    """The README.md of an inference folder."""
    from infotok_lit import __version__

    parameters = sum(parameter.numel() for parameter in base.parameters())
    lines = [f"- {name}: {value}" for name, value in provenance.items()]
    return "\n".join(
        [
            f"# {base.family}, fine-tuned with infotok_lit {__version__}",
            "",
            f"{parameters:,} parameters. Weights carry the official names; everything training-only was stripped.",
            "",
            *lines,
            "",
            "```",
            "python -m infotok_lit describe --model FOLDER --image IMAGE --prompt QUESTION",
            "python -m infotok_lit generate --model FOLDER --prompt CAPTION --out image.png",
            "```",
            "",
        ]
    )


def run_provenance(checkpoint: dict[str, Any], source: Path) -> dict[str, Any]:
    """What a model card says of the run that a checkpoint belongs to."""
    saved = checkpoint["infotok_lit"]
    objective = saved["objective"]
    return {
        "run": source,
        "step": saved["step"],
        "initial weights": saved["init_from"] or "random",
        "terms": ", ".join(objective["terms"]) or "none (plain fine-tuning)",
        "bottleneck": objective["bottleneck"],
        "weight (lambda)": objective["weight"],
        "weights": "raw (no moving average)",
    }


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
    from infotok_lit.models.checkpoint import CheckpointError
    from infotok_lit.modules.run import find_checkpoint, read_run, rebuild_base

    try:
        path = find_checkpoint(arguments.ckpt) or arguments.ckpt
        if not path.is_file():
            raise FileNotFoundError(f"there is no checkpoint of a run at {path}")
        checkpoint = read_run(path)
        base = rebuild_base(checkpoint)
    except (CheckpointError, FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    export_model(
        base, arguments.out, run_provenance(checkpoint, path), arguments.format, arguments.dtype, arguments.force
    )
    sys.stdout.write(f"wrote {arguments.out}\n")
    return 0
