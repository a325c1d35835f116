"""Images with text in WebDataset tar shards, with random access to every sample.

A sample is the members of a tar that share a name up to its first dot: an image (.jpg, .jpeg, .png, .webp), with
.json (any layout of `row_text.py`) and/or .txt (a caption).
"""

from pathlib import Path

from infotok_lit.batch import BrokenSampleError
from infotok_lit.data.fetch import default_cache, expand_braces, local_copy
from infotok_lit.data.image_text import DESCRIBE_QUESTIONS, ImageTextSource, SampleOptions
from infotok_lit.data.packed_rows import PackedRows
from infotok_lit.data.row_text import RowText
from infotok_lit.data.shard_index import read_member, read_member_text, shard_index
from infotok_lit.errors import DataError


class ImageTextShards(ImageTextSource):
    """Samples in tar files: local, behind a URL, or written by a command."""

    def __init__(
        self,
        shards: str | list[str],
        cache: str | None = None,
        caption_key: str = "caption",
        first_turn_only: bool = False,
        describe_questions: list[str] | None = None,
        min_side: int = 9,
        max_aspect: float = 10.0,
    ) -> None:
        """Fetch and index the shards, or find their index in the cache.

        Args:
            shards: One or more paths, URLs (http, https, s3 and what else fsspec knows) or `pipe:COMMAND`; each may
                hold brace patterns such as `shard-{000000..000009}.tar`. A command is run by the shell. What is not a
                local file is copied into the cache whole, and kept there.
            cache: The folder for fetched shards and indices; default: infotok_lit/shards in the user's cache folder.
            caption_key: The key that holds a caption in .json members.
            first_turn_only: Use only the first exchange of a LLaVA conversation; default: any of them, at random.
            describe_questions: What is asked where the answer is a caption; default: a few paraphrases.
            min_side: Images with a smaller side, in pixels, are broken samples.
            max_aspect: Images whose long side is this many short sides or more are broken samples.
        """
        questions = DESCRIBE_QUESTIONS if describe_questions is None else tuple(describe_questions)
        options = SampleOptions(caption_key, first_turn_only, questions, min_side, max_aspect)
        folder = default_cache() if cache is None else Path(cache)
        folder.mkdir(parents=True, exist_ok=True)
        patterns = [shards] if isinstance(shards, str) else shards
        self._addresses = [address for pattern in patterns for address in expand_braces(pattern)]
        self._paths = [local_copy(address, folder) for address in self._addresses]
        rows = [
            {**entry, "shard": number}
            for number, path in enumerate(self._paths)
            for entry in shard_index(path, folder, options)
        ]
        label = ", ".join(patterns)
        if not rows:
            raise DataError(f"the shards hold no samples: {label or 'none were given'}")
        super().__init__(label, PackedRows(rows), [row["serves"] for row in rows], options)

    def _open(self, row: int) -> tuple[str, Path | bytes, RowText]:
        entry = self._rows[row]
        name = f"{self._addresses[entry['shard']]}: {entry['key']}"
        if "broken" in entry:
            raise BrokenSampleError(f"{name}: {entry['broken']}")
        # One handle per sample: forked workers must not share a file position, and opening takes microseconds.
        with self._paths[entry["shard"]].open("rb") as file:
            image, json_member, txt_member = (read_member(file, entry.get(kind)) for kind in ("image", "json", "txt"))
        return name, image, read_member_text(json_member, txt_member, self._options)
