"""`cache`: encode the images of a configuration once, so that training steps need not."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse.typing import NonNegativeInt, PositiveInt

from infotok_lit.errors import SettingsError
from infotok_lit.model_choice import chosen_device
from infotok_lit.progress import progress_bar

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import ConcatDataset, DataLoader

    from infotok_lit.batch import Branch, Processor
    from infotok_lit.data.datamodule import UnifiedDataModule
    from infotok_lit.data.latents import LatentWriter


def cache(
    fit_arguments: list[str],
    out: Path,
    batch_size: PositiveInt = 16,
    num_workers: NonNegativeInt = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    shard_size: PositiveInt = 1024,
    part: PositiveInt = 1,
    parts: PositiveInt = 1,
) -> None:
    """Encode the images of a configuration with its frozen autoencoder, for training with --data.init_args.latents.

    All training images are encoded, and those that validation uses. Stopped and started again, it goes on with what is
    missing. Every option that is not listed here is one of fit's, such as --config FILE.

    Args:
        fit_arguments: What `fit` is given.
        out: The folder of latents, new or begun.
        batch_size: Images that are encoded at once.
        num_workers: Processes that read images.
        device: Where to encode; `auto` is cuda if there is one.
        shard_size: Images in a file, at most.
        part: Which of `parts` this process does: several, each on a device of its own, may write into one folder.
        parts: Into how many parts the images are divided.

    Raises:
        SettingsError: for latents of another autoencoder, and for images that are not the same in each epoch.
    """
    if part > parts:
        raise SettingsError(f"part is {part} of {parts}: count them from 1")
    from torch.utils.data import DataLoader

    from infotok_lit.commands.fit import ModelAndData
    from infotok_lit.data.latents import LatentWriter
    from infotok_lit.modules.base_model import encoding_of

    where, cli = chosen_device(device), ModelAndData(fit_arguments, "cache")
    base = cli.model.build_base().eval()
    encoding = encoding_of(base)
    images = images_to_encode(cli.datamodule, base.processor, encoding.branches, part, parts)
    batches = DataLoader(images, batch_size, num_workers=num_workers, collate_fn=list)
    with LatentWriter(out, encoding, shard_size) as writer:
        encoded, broken = _encode_missing(batches, writer, base.autoencoder.to(where), where)
    known = len(images) - encoded - len(broken)
    sys.stdout.write(f"{encoded} images encoded into {out}, {known} were there already; ")
    sys.stdout.write(f"train with --data.init_args.latents {out}\n")
    sys.stdout.writelines(f"broken, and without latents: {message}\n" for message in dict.fromkeys(broken))


def _encode_missing(
    batches: "DataLoader", writer: "LatentWriter", autoencoder: "nn.Module", where: str
) -> tuple[int, list[str]]:
    """Encode what the writer has not got; how many images that was, and what was said of broken ones."""
    import torch

    from infotok_lit.models.common.autoencoders import encode

    encoded = done = 0
    broken: list[str] = []
    with progress_bar(len(batches.dataset)) as bar:
        for batch in batches:
            new = {image.key: image.pixels for image in batch if image.pixels is not None and image.key not in writer}
            if new:
                writer.add(list(new), encode(autoencoder, torch.stack(list(new.values())).to(where)))
            encoded, done = encoded + len(new), done + len(batch)
            broken += [image.broken for image in batch if image.broken is not None]
            bar.show(done, "encoding")
    return encoded, broken


def images_to_encode(
    data: "UnifiedDataModule", processor: "Processor", branches: Sequence["Branch"], part: int = 1, parts: int = 1
) -> "ConcatDataset":
    """All that training draws, and what validation uses: every `parts`-th image from the `part`-th on."""
    from torch.utils.data import ConcatDataset

    from infotok_lit.data.latents import ImagesToEncode
    from infotok_lit.data.stream import branch_length

    found = []
    for branch in branches:
        build = processor.understanding if branch == "understanding" else processor.generation
        trained, validated = data.training_sources[branch], data.validation_sources[branch]
        lengths = [(trained, branch_length(trained, branch))]
        if validated is not trained:
            lengths.append((validated, min(data.val_samples, branch_length(validated, branch))))
        found += [ImagesToEncode(source, branch, range(part - 1, length, parts), build) for source, length in lengths]
    return ConcatDataset(found)
