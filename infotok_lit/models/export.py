"""Strip a model to an inference folder: what training added is left behind, and the names are the official ones."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from infotok_lit.assets import EMBEDDED
from infotok_lit.checkpoints import CONFIG_FILE, exported_family, write_config
from infotok_lit.errors import ExplainedError
from infotok_lit.files import whole_folder
from infotok_lit.hub import SCHEME
from infotok_lit.models.family import families, family

if TYPE_CHECKING:
    from torch import Tensor

    from infotok_lit.models.unified import UnifiedModel

Format = Literal["safetensors", "pth"]
DType = Literal["float32", "bfloat16", "float16"]
Weights = Literal["averaged", "raw"]

CARD = "README.md"
BUDGET_STEM = "budget"
"""What the file is called that says which tokens are read at a budget."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


class ExportError(ExplainedError, OSError):
    """An export cannot be written; the message says where and why."""


class ExportExistsError(ExportError, FileExistsError):
    """Something stands where an export is to be, and is not replaced."""


# Writing


def export_model(
    base: "UnifiedModel",
    out: Path,
    provenance: Mapping[str, Any],
    file_format: Format = "safetensors",
    dtype: DType | None = None,
    force: bool = False,
    weights: Weights = "raw",
    init_from: str | None = None,
    also: Callable[[Path], None] | None = None,
) -> None:
    """Write an inference folder (checkpoints.py) in one step: it is complete, or it is not there.

    Args:
        base: the model without heads; weights are written as they are, or cast to `dtype`.
        out: the folder to make.
        provenance: lines of the model card.
        file_format: `pth` writes single files as the official code loads them.
        force: replace an earlier export.
        weights: whether these are the weights of a step or the average of many: noted in the files.
        init_from: where the run's initial weights came from, for the model card.
        also: writes further files into the folder.

    Raises:
        ExportExistsError: if something stands at `out` that is not to be replaced, or that no export wrote.
        ExportError: if `out` cannot be written.
    """
    earlier = replaceable_files(out, force)
    with explained(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(out, earlier) as folder:
            for stem, tensors in base.official_weights().items():
                _write_weights(folder, stem, tensors, file_format, dtype, weights, base)
            write_config(folder, base.family, base.config.to_dict())
            base.processor.tokenizer.save_pretrained(folder)
            # A path may hold half a surrogate pair, which is no UTF-8.
            (folder / CARD).write_bytes(model_card(base, provenance, init_from).encode(errors="backslashreplace"))
            if also is not None:
                also(folder)


@contextmanager
def explained(out: Path) -> Iterator[None]:
    """What the system refuses comes out as one message that names the folder."""
    try:
        yield
    except ExplainedError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise ExportError(f"{out} cannot be written ({reason}); nothing that was there is lost") from error


def _write_weights(
    folder: Path,
    stem: str,
    tensors: dict[str, "Tensor"],
    file_format: Format,
    dtype: DType | None,
    weights: Weights,
    base: "UnifiedModel",
) -> None:
    import torch
    from huggingface_hub import save_torch_state_dict
    from safetensors import SafetensorError

    if dtype is not None:
        cast: dict[int, Tensor] = {}
        # One cast per storage, so that tied weights stay tied.
        target = getattr(torch, dtype)
        tensors = {
            name: cast.setdefault(t.data_ptr(), t.to(target)) if t.is_floating_point() else t
            for name, t in tensors.items()
        }
    try:
        if file_format == "pth":
            suffix, content = (".pth", tensors) if stem == base.family else (".ckpt", {"model": tensors})
            torch.save(content, folder / f"{stem}{suffix}")
            return
        save_torch_state_dict(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            folder,
            filename_pattern=f"{stem}{{suffix}}.safetensors",
            max_shard_size="100GB",
            metadata={"format": "pt", "family": base.family, "weights": weights},
            shared_tensors_to_discard=[name for name in base.official_aliases if name in tensors],
        )
    except (SafetensorError, RuntimeError) as error:
        # A full disk is not an OSError to these libraries.
        raise OSError(f"{stem}: {str(error).splitlines()[0]}") from error


# Replacing


def replaceable_files(out: Path, force: bool, stems: set[str] = frozenset()) -> list[str] | None:
    """The names of the files of the earlier export that may be replaced; None where nothing stands.

    Args:
        stems: what weight files may be called, beside those of the families.

    Raises:
        ExportExistsError: if there is something else, or anything and not `force`.
    """
    if not os.path.lexists(out):
        return None
    if not force:
        raise ExportExistsError(f"{out} exists; choose another folder, or replace an earlier export with --force")
    if out.is_symlink():
        reason = "is a link"
    elif not out.is_dir():
        reason = "is not a folder"
    elif Path.cwd().resolve().is_relative_to(out.resolve()):
        reason = "is the working folder, or holds it"
    else:
        found = sorted(path.name for path in out.iterdir())
        known = {CONFIG_FILE, CARD, *TOKENIZER_FILES} | weight_files(stems)
        ours = {path.name for path in out.iterdir() if path.is_file() and not path.is_symlink()}
        others = [name for name in found if name not in ours & known]
        if not others and (not found or exported_family(out) is not None):
            return found
        what = f"holds {', '.join(others[:3])}{', ...' if len(others) > 3 else ''}, which no export wrote"
        reason = what if others else f"holds no export: its {CONFIG_FILE} is not an export's"
    raise ExportExistsError(f"{out} {reason}, so it is not replaced: only an earlier export is. Choose another folder")


def weight_files(stems: set[str] = frozenset()) -> set[str]:
    """What files with weights of an export may be called.

    Args:
        stems: what they may be called without a suffix, beside those of the families.
    """
    known = {BUDGET_STEM, *stems}.union(*(family(name).stems for name in families()))
    return {f"{stem}.{suffix}" for stem in known for suffix in ("safetensors", "pth", "ckpt")}


# The model card


def model_card(base: "UnifiedModel", provenance: Mapping[str, Any], init_from: str | None = None) -> str:
    """The README.md of an inference folder, with the header that the Hugging Face hub reads."""
    from infotok_lit import __version__

    parameters = sum(parameter.numel() for parameter in base.parameters())
    lines = [f"- {name}: {value}" for name, value in provenance.items()]
    return "\n".join(
        [
            "---",
            _card_header(base.family, init_from),
            "---",
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


def _card_header(name: str, init_from: str | None) -> str:
    """The YAML of a model card: whose weights these were, and under which licence they may be passed on."""
    from huggingface_hub import ModelCardData

    ours = init_from in (None, EMBEDDED)
    on_hub = init_from is not None and init_from.startswith(SCHEME)
    return ModelCardData(
        # Of weights that are not ours we do not know the licence: whoever publishes them names it.
        license="apache-2.0" if ours else "other",
        license_name=None if ours else "that-of-the-initial-weights",
        library_name="infotok_lit",
        pipeline_tag="any-to-any",
        base_model="/".join(init_from.removeprefix(SCHEME).split("/")[:2]) if on_hub else None,
        tags=["infotok", name, "image-to-text", "text-to-image", "arxiv:2602.01554"],
    ).to_yaml()


def run_provenance(checkpoint: Mapping[str, Any], source: Path, weights: str) -> dict[str, Any]:
    """What a model card says of the run that a checkpoint belongs to.

    Args:
        weights: which weights of the run these are, in words.
    """
    saved = checkpoint["infotok_lit"]
    objective = saved["objective"]
    return {
        "run": source,
        "step": saved["step"],
        "initial weights": saved["init_from"] or "random",
        "terms": ", ".join(objective["terms"]) or "none (plain fine-tuning)",
        "bottleneck": objective["bottleneck"],
        **_term_weights(saved),
        "weights": weights,
    }


def _term_weights(saved: Mapping[str, Any]) -> dict[str, str]:
    """lambda, alpha and beta of each branch at the checkpoint, which older ones do not hold."""
    return {
        f"weights of the terms ({branch})": ", ".join(f"{name} {value:.3g}" for name, value in weights.items())
        for branch, weights in saved.get("term_weights", {}).items()
    }
