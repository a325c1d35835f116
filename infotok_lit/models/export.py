"""Strip a model to an inference folder: what training added is left behind, and the names are the official ones."""

import shutil
import tempfile
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
    """Write an inference folder (checkpoints.py) in one step: it is complete, or it is not there.

    Args:
        base: the model without heads; weights are written as they are, or cast to `dtype`.
        out: the folder to make.
        provenance: lines of the model card.
        file_format: `pth` writes single files as the official code loads them.
        force: replace an existing folder.

    Raises:
        ExportExistsError: if `out` exists and `force` is false.
    """
    from infotok_lit.checkpoints import write_config

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
        **_term_weights(saved),
        "weights": "raw (no moving average)",
    }


def _term_weights(saved: dict[str, Any]) -> dict[str, str]:
    """lambda, alpha and beta of each branch at the checkpoint, which older ones do not hold."""
    return {
        f"weights of the terms ({branch})": ", ".join(f"{name} {value:.3g}" for name, value in weights.items())
        for branch, weights in saved.get("term_weights", {}).items()
    }
