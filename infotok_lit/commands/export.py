"""`export`: strip a run to an inference folder, and publish it if asked."""

import sys
from pathlib import Path
from typing import Any

from infotok_lit.checkpoints import find_checkpoint, local_checkpoint, read_run
from infotok_lit.errors import MissingFileError, SettingsError
from infotok_lit.hub import push
from infotok_lit.models.export import (
    DType,
    Format,
    Weights,
    export_model,
    replaceable_files,
    run_provenance,
    weight_files,
)
from infotok_lit.sharded_checkpoints import is_sharded_checkpoint
from infotok_lit.video import FAMILY

VIDEO_AS_IT_IS = (
    "a video tokenizer is exported to safetensors as it is: leave out format, dtype, with_budget and push_to_hub"
)


def export(
    ckpt: str,
    out: Path,
    format: Format = "safetensors",
    dtype: DType | None = None,
    weights: Weights = "averaged",
    with_budget: bool = False,
    force: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
) -> None:
    """Strip a run to an inference folder.

    Args:
        ckpt: A run folder, or one of its checkpoints.
        out: The folder to write.
        format: `pth` writes the official files.
        dtype: Cast the weights; default: as they are.
        weights: Of a run that averages its weights, the average or those of the last step.
        with_budget: Also write the small file that `describe --budget` needs, of a run with objective.token_budget.
        force: Replace an earlier export; anything else is never replaced.
        push_to_hub: OWNER/NAME of a repository on the Hugging Face hub; an earlier export's weights there are replaced.
        private: Make that repository private, if it is new.

    Raises:
        ExplainedError: saying what cannot be read, written or published, and the mend.
    """
    replaceable_files(out, force, {FAMILY})
    from infotok_lit.modules.average import average_updates, weights_in_words
    from infotok_lit.modules.base_model import rebuild_base
    from infotok_lit.modules.token_budget import TokenSelector
    from infotok_lit.modules.video_tokenizer import export_run

    path, checkpoint = _checkpoint(ckpt)
    if weights == "averaged" and average_updates(checkpoint) == 0:
        raise SettingsError(f"{path}: the average was never updated and is what training began with: use --weights raw")
    saved = checkpoint["infotok_lit"]
    if saved["family"] == FAMILY:
        if format != "safetensors" or dtype is not None or push_to_hub is not None or with_budget:
            raise SettingsError(VIDEO_AS_IT_IS)
        export_run(checkpoint, path, out, weights, force)
    else:
        base, said = rebuild_base(checkpoint, weights), weights_in_words(checkpoint, weights)
        export_model(
            *(base, out, run_provenance(checkpoint, path, said), format, dtype, force),
            weights="raw" if average_updates(checkpoint) is None else weights,
            init_from=saved["init_from"],
            also=TokenSelector.of_run(checkpoint, base, weights).write if with_budget else None,
        )
    sys.stdout.write(f"wrote {out}\n")
    sys.stdout.write("" if push_to_hub is None else f"published {push(out, push_to_hub, weight_files(), private)}\n")


def _checkpoint(ckpt: str) -> tuple[Path, dict[str, Any]]:
    """The file that `--ckpt` means, and what it holds."""
    given = local_checkpoint(ckpt)
    path = find_checkpoint(given) or given
    if not path.exists() or (path.is_dir() and not is_sharded_checkpoint(path)):
        raise MissingFileError(f"there is no checkpoint of a run at {path}")
    return path, read_run(path)
