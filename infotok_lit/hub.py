"""Models on the Hugging Face hub: fetched into the hub's own cache, and published.

`HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN` and `HF_HUB_OFFLINE` mean what they mean to huggingface_hub, which is imported when
it is needed.
"""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from infotok_lit.checkpoints import WEIGHTS_FILES, exported_family
from infotok_lit.errors import MissingFileError
from infotok_lit.weight_files import CheckpointError, local_checkpoint

SCHEME = "hf://"
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
DESCRIPTIONS = ("*.json", "*.txt", "*.jinja", "README.md")
"""What says what a repository is, and its tokenizer."""
TOKENIZER = "tokenizer_config.json"
"""What a folder with a tokenizer holds."""


def is_on_hub(source: str | Path) -> bool:
    """Whether a model is named on the hub: `hf://OWNER/NAME[/FILE]`, or `OWNER/NAME` that cannot be a path here."""
    text = str(source)
    if text.startswith(SCHEME):
        return True
    path = Path(text)
    return REPOSITORY.fullmatch(text) is not None and path.suffix not in SUFFIXES and not path.parent.exists()


def full_name(source: str) -> str:
    """A name on the hub with its scheme, so that it is one wherever it is read; anything else as it is."""
    return f"{SCHEME}{source.removeprefix(SCHEME)}" if is_on_hub(source) else source


def fetch(source: str | Path) -> Path:
    """The path of a model: as it is given or, for a name on the hub, in the hub's cache.

    Of a repository come the files that are read, and no others.

    Raises:
        MissingFileError: if the hub has no such thing, or cannot be reached and the cache does not hold it.
        CheckpointError: for another kind of URL, or a repository whose weights must be named.
    """
    if not is_on_hub(source):
        return local_checkpoint(source)
    repository, inside = _split(source)
    from huggingface_hub import hf_hub_download

    with _explained(str(source)):
        if Path(inside).suffix in SUFFIXES:
            return Path(hf_hub_download(repository, inside))
        return _fetch_folder(repository, inside)


def tokenizer_beside(source: str | Path) -> str | None:
    """What names the tokenizer that lies beside a model's weights, of which none is fetched; None if there is none.

    Of a repository it is the name, which outlives the cache of this machine. Raises as `fetch`.
    """
    if not is_on_hub(source):
        return str(source) if (local_checkpoint(source) / TOKENIZER).exists() else None
    repository, inside = _split(source)
    if Path(inside).suffix in SUFFIXES:
        return None
    with _explained(str(source)):
        folder = _fetch_descriptions(repository, inside)
    # No name leads to a folder in a repository.
    return (str(folder) if inside else repository) if (folder / TOKENIZER).exists() else None


def _split(source: str | Path) -> tuple[str, str]:
    """OWNER/NAME, and the file or folder in it or nothing."""
    owner, _, rest = str(source).removeprefix(SCHEME).partition("/")
    name, _, inside = rest.partition("/")
    repository = f"{owner}/{name}"
    if not REPOSITORY.fullmatch(repository) or ".." in inside.split("/"):
        raise CheckpointError(f"{source} is no name on the hub: write {SCHEME}OWNER/NAME or {SCHEME}OWNER/NAME/FILE")
    return repository, inside


def _fetch_descriptions(repository: str, inside: str) -> Path:
    """The folder `inside` a repository, or all of it, without weights."""
    from huggingface_hub import snapshot_download

    patterns = [f"{inside}/{pattern}" if inside else pattern for pattern in DESCRIPTIONS]
    return Path(snapshot_download(repository, allow_patterns=patterns)) / inside


def _fetch_folder(repository: str, inside: str) -> Path:
    """The folder `inside` a repository, or all of it, with the weights that read_weights reads from a folder."""
    from huggingface_hub import HfApi, snapshot_download

    prefix = f"{inside}/" if inside else ""
    folder = _fetch_descriptions(repository, inside)
    if exported_family(folder) is not None:
        snapshot_download(repository, allow_patterns=[f"{prefix}*{suffix}" for suffix in SUFFIXES])
        return folder
    for file in map(Path, WEIGHTS_FILES):
        snapshot_download(repository, allow_patterns=f"{prefix}{file.stem}*{file.suffix}")
        if any(folder.glob(f"{file.stem}*{file.suffix}")):
            return folder
    files = [file for file in HfApi().list_repo_files(repository) if file.endswith(SUFFIXES)]
    raise CheckpointError(
        f"{repository} on the hub holds no weights under a name that is known: name one of its files, such as "
        f"{SCHEME}{repository}/{files[0]}"
        if files
        else f"{repository} on the hub holds no weights"
    )


def push(folder: Path, repository: str, replaced: Collection[str], private: bool = False) -> str:
    """Publish an exported folder as a repository, which is made if there is none; returns its address.

    Args:
        replaced: files that go from a repository that has them, unless the folder has them too: an earlier export's
            weights, which would be read in the place of these.

    Raises:
        CheckpointError: if the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        with _explained(repository):
            address = HfApi().create_repo(repository, private=private, exist_ok=True)
            HfApi().upload_folder(
                repo_id=repository,
                folder_path=folder,
                commit_message="Upload with infotok_lit",
                delete_patterns=sorted(replaced),
            )
    except MissingFileError as error:
        raise CheckpointError(f"{folder} was not published: {error}") from error
    return str(address)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Whatever the hub says becomes one message."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise MissingFileError(f"{name} is gated: accept its terms on its page and log in (`hf auth login`)") from error
    except errors.RepositoryNotFoundError as error:
        raise MissingFileError(
            f"there is no {name} here, nor at {constants.ENDPOINT}; if it is private, log in (`hf auth login`)"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise MissingFileError(f"{name} is not here, and {constants.ENDPOINT} cannot be reached to fetch it") from error
    except errors.EntryNotFoundError as error:
        raise MissingFileError(f"the repository has no such file: {name}") from error
    except (OSError, ValueError, errors.HTTPError) as error:
        if isinstance(error, CheckpointError):
            raise
        said = (str(error) or type(error).__name__).splitlines()[0]
        answered = isinstance(error, errors.HfHubHTTPError) or not isinstance(error, errors.HTTPError)
        what = "says" if answered else "cannot be reached:"
        raise MissingFileError(f"{name}: {constants.ENDPOINT} {what} {said}") from error
