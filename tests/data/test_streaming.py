"""Shards behind a server: what is fetched when, what is kept, and what is said if it cannot be."""

import json
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from stand_ins import Numbers, Recorder, make_trainer
from test_shards import RNG, write_shard

from infotok_lit.batch import Source
from infotok_lit.data import Mixture
from infotok_lit.data.datamodule import UnifiedDataModule
from infotok_lit.data.fetch import local_copy
from infotok_lit.data.shards import ImageTextShards, streamed_order
from infotok_lit.data.stream import BranchDataset, EndlessSampler, Request
from infotok_lit.errors import DataError

SHARDS, SIZE = 6, 5


@dataclass
class Server:
    address: str
    folder: Path
    asked: list[str] = field(default_factory=list)
    """The files that were sent, in order."""
    fails: Counter = field(default_factory=Counter)
    """File -> how many more requests end in an error."""

    @property
    def shards(self) -> str:
        return f"{self.address}/s-{{0..{SHARDS - 1}}}.tar"


@pytest.fixture
def server(tmp_path: Path):
    """Six shards of five samples; sample i has the caption "i"."""
    folder = tmp_path / "bucket"
    folder.mkdir()
    image = _jpeg(tmp_path)
    for shard in range(SHARDS):
        members = []
        for index in range(shard * SIZE, (shard + 1) * SIZE):
            members += [(f"{index:03d}.jpg", image), (f"{index:03d}.txt", str(index).encode())]
        write_shard(folder / f"s-{shard}.tar", members)

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None: ...

        def do_GET(self) -> None:
            name = self.path.strip("/")
            if state.fails[name] > 0:
                state.fails[name] -= 1
                return self.send_error(503, "busy for a moment")
            state.asked.append(name)
            return super().do_GET()

        def copyfile(self, source: Any, outputfile: Any) -> None:
            """Files named cut... are promised whole, and sent by half."""
            content = source.read()
            outputfile.write(content[: len(content) // 2] if "cut" in self.path else content)

    running = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=running.serve_forever, daemon=True).start()
    state = Server(f"http://127.0.0.1:{running.server_port}", folder)
    yield state
    running.shutdown()
    running.server_close()


def _jpeg(folder: Path) -> bytes:
    Image.linear_gradient("L").convert("RGB").resize((12, 12)).save(folder / "image.jpg")
    return (folder / "image.jpg").read_bytes()


def stream(server: Server, cache: Path, address: str | None = None, **settings: Any) -> ImageTextShards:
    return ImageTextShards(address or server.shards, cache=str(cache), **settings)


def captions(source: Source, indices: Any) -> list[int]:
    return [int(source.sample("generation", int(index), RNG()).caption) for index in indices]


def kept(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.tar"))


def test_a_shard_is_fetched_when_it_is_read_and_once(server, tmp_path) -> None:
    source = stream(server, tmp_path / "cache")
    assert server.asked == ["s-0.tar"], "the first says how large they are"
    assert source.branch_length("generation") == SHARDS * SIZE
    assert captions(source, [17, 16, 2, 15]) == [17, 16, 2, 15]
    assert server.asked == ["s-0.tar", "s-3.tar"]
    assert captions(stream(server, tmp_path / "cache"), range(30)) == list(range(30))
    assert sorted(server.asked) == [f"s-{shard}.tar" for shard in range(SHARDS)]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_lanes_share_the_shards_out(world) -> None:
    """With as many lanes as processes, no shard is read by two; a pass is a permutation whatever the numbers."""
    sizes, block = np.full(12, 20), 4
    order = streamed_order(sizes, np.random.default_rng(1), mixed=2, lanes=world, block=block)
    assert sorted(order) == list(range(240))
    readers: dict[int, set[int]] = {}
    for position, index in enumerate(order):
        readers.setdefault(index // 20, set()).add(position // block % world)
    assert all(len(ranks) == 1 for ranks in readers.values())


@pytest.mark.parametrize("mixed", [1, 3])
def test_few_shards_are_read_at_a_time(mixed) -> None:
    sizes = np.array([7, 20, 13, 20, 20, 5, 20, 20])
    order = streamed_order(sizes, np.random.default_rng(0), mixed=mixed, lanes=1, block=4)
    shard_of = np.repeat(np.arange(8), sizes)[order]
    spans = {shard: np.flatnonzero(shard_of == shard)[[0, -1]] for shard in range(8)}
    alive = [sum(first <= place <= last for first, last in spans.values()) for place in range(len(order))]
    assert sorted(order) == list(range(125))
    assert max(alive) <= mixed + 1
    assert mixed == 1 or max(alive) > 1, "neighbours are mixed"


def fit(server: Server, cache: Path, folder: Path, steps: int, resume: str | None = None, workers: int = 0) -> Recorder:
    data = UnifiedDataModule(
        stream(server, cache, mixed_shards=2),
        val=stream(server, cache, server.address + "/s-0.tar"),
        understanding_batch_size=2,
        generation_batch_size=2,
        val_samples=2,
        num_workers=workers,
    )
    recorder = Recorder()
    trainer = make_trainer(str(folder), max_steps=steps, limit_val_batches=0)
    trainer.fit(recorder, datamodule=data, ckpt_path=resume, weights_only=True)
    trainer.save_checkpoint(folder / "end.ckpt")
    return recorder


def test_a_stream_resumes_exactly_with_an_empty_cache_and_other_workers(server, tmp_path) -> None:
    whole = fit(server, tmp_path / "a", tmp_path, 20)
    part = fit(server, tmp_path / "b", tmp_path, 7)
    server.asked.clear()
    rest = fit(server, tmp_path / "c", tmp_path, 20, resume=str(tmp_path / "end.ckpt"), workers=2)
    assert part.steps + rest.steps == whole.steps
    drawn = [name for step in whole.steps[:15] for name in step[1]]
    assert len(set(drawn)) == SHARDS * SIZE, "a pass draws each once"


def test_a_run_fetches_as_it_goes_and_one_shard_ahead(server, tmp_path) -> None:
    source = stream(server, tmp_path, mixed_shards=1)
    sampler = EndlessSampler(
        source.branch_length("generation"),
        batch_size=1,
        seed=[0],
        start=lambda: 0,
        permute=partial(source.order, "generation", block=1),
        lookahead=source.lookahead("generation", 1),
    )
    first = next(iter(sampler))
    assert first.ahead is not None and first.ahead // SIZE != first.index // SIZE
    server.asked.clear()
    source.prefetch("generation", SIZE * 4)
    assert _soon(lambda: server.asked == ["s-4.tar"] and len(kept(tmp_path)) == 2)
    captions(source, [SIZE * 4 + 1])
    assert server.asked == ["s-4.tar"], "it was there already"


def _soon(happened: Any) -> bool:
    end = time.monotonic() + 120
    while not happened() and time.monotonic() < end:
        time.sleep(0.01)
    return happened()


def test_a_shard_that_has_left_the_cache_is_fetched_ahead_again(server, tmp_path) -> None:
    size = (server.folder / "s-0.tar").stat().st_size
    source = stream(server, tmp_path, cache_gb=2.5 * size / 1e9)
    for shard in (4, 5, 4):
        source.prefetch("generation", SIZE * shard)
        source._fetching.join()
        assert server.asked[-1] == f"s-{shard}.tar"
        captions(source, range(15))


@pytest.mark.parametrize("mixed_in", [False, True])
def test_a_broken_sample_is_replaced_without_another_shard(server, tmp_path, mixed_in) -> None:
    """In one pass each shard is fetched once, though each has a broken sample and the cache holds few shards."""
    image = _jpeg(tmp_path)
    for shard in range(SHARDS):
        names = range(shard * SIZE, (shard + 1) * SIZE)
        members = [(f"{i:03d}.jpg", b"broken" if i % SIZE == 2 else image) for i in names]
        members += [(f"{i:03d}.txt", str(i).encode()) for i in names]
        write_shard(server.folder / f"s-{shard}.tar", sorted(members))
    size = (server.folder / "s-0.tar").stat().st_size
    streamed = stream(server, tmp_path / "cache", cache_gb=3.5 * size / 1e9, mixed_shards=1)
    source = Mixture([streamed, Numbers(30)], parts=[1, 1]) if mixed_in else streamed
    samples = BranchDataset(source, "generation", seed=0)
    server.asked.clear()
    draws = [samples[Request(int(i), 0, None)] for i in source.order("generation", RNG(), block=1)]
    broken = [draw for draw in draws if draw.skipped and "s-" in draw.skipped[0]]
    assert len(broken) == SHARDS
    assert all(draw.sample.name.split(": ")[0] == draw.skipped[0].split(": ")[0] for draw in broken), "same shard"
    assert set(Counter(server.asked).values()) == {1}


def test_a_shard_of_broken_samples_alone_is_replaced_by_others(server, tmp_path) -> None:
    names = range(SIZE, 2 * SIZE)
    members = [(f"{i:03d}.jpg", b"broken") for i in names] + [(f"{i:03d}.txt", b"x") for i in names]
    write_shard(server.folder / "s-1.tar", sorted(members))
    draw = BranchDataset(stream(server, tmp_path), "generation", seed=0)[Request(SIZE, 0, None)]
    assert len(draw.skipped) > SIZE and "s-1.tar" not in draw.sample.name


@pytest.mark.parametrize("address", ["pipe:cat {folder}/s-1.tar -", "{address}/s-1.tar?token=a/b"])
def test_sizes_name_the_file_of_a_command_and_of_an_address_with_a_query(server, tmp_path, address) -> None:
    address = address.format(folder=server.folder, address=server.address)
    (tmp_path / "sizes.json").write_text('{"s-1.tar": 7, "s-2.tar": 9}')
    (server.folder / "s-1.tar?token=a").mkdir()
    (server.folder / "s-1.tar?token=a" / "b").write_bytes((server.folder / "s-1.tar").read_bytes())
    assert len(stream(server, tmp_path / "cache", address, sizes=str(tmp_path / "sizes.json"))) == 7
    with pytest.raises(DataError, match=r"sizes: no name in it is that of the shard .*s-0\.tar"):
        stream(server, tmp_path / "cache", f"{server.address}/s-0.tar", sizes=str(tmp_path / "sizes.json"))


def test_the_cache_is_bounded_and_deletes_only_what_was_fetched(server, tmp_path) -> None:
    cache = tmp_path / "cache"
    size = (server.folder / "s-0.tar").stat().st_size
    source = stream(server, cache, cache_gb=2.5 * size / 1e9)
    (cache / "mine.tar").write_bytes(b"x" * 10 * size)
    assert captions(source, range(30)) == list(range(30))
    assert len([path for path in kept(cache) if path.name != "mine.tar"]) == 2
    assert (cache / "mine.tar").stat().st_size == 10 * size
    assert captions(source, [0, 1]) == [0, 1], "what went is fetched again"


def test_what_is_used_stays_longest(server, tmp_path) -> None:
    size = (server.folder / "s-0.tar").stat().st_size
    source = stream(server, tmp_path, cache_gb=2.5 * size / 1e9)
    captions(source, [5, 0, 10])  # s-0 was asked for after s-1
    server.asked.clear()
    captions(source, [0, 5])
    assert server.asked == ["s-1.tar"]


def test_another_number_of_samples_than_assumed(server, tmp_path, caplog) -> None:
    image = _jpeg(tmp_path)
    members = [(f"{index}.jpg", image) for index in range(2)] + [
        (f"{index}.txt", str(index).encode()) for index in range(2)
    ]
    write_shard(server.folder / "s-1.tar", sorted(members))
    more = [member for index in range(8) for member in ((f"{index}.jpg", image), (f"{index}.txt", str(index).encode()))]
    write_shard(server.folder / "s-2.tar", more)
    source = stream(server, tmp_path / "cache")
    assert captions(source, range(5, 10)) == [0, 1, 0, 1, 0]
    assert "2 samples serve generation where 5 were assumed, so in a pass some are drawn again" in caplog.text
    seen = {
        int(source.sample("generation", 10 + i, np.random.default_rng(seed)).caption)
        for i in range(5)
        for seed in range(9)
    }
    assert seen == set(range(8)), "over several passes, all"
    (server.folder / "sizes.json").write_text(json.dumps({f"s-{n}.tar": {1: 2, 2: 8}.get(n, 5) for n in range(SHARDS)}))
    told = stream(server, tmp_path / "cache", sizes=f"{server.address}/sizes.json")
    assert told.branch_length("generation") == 30
    assert captions(told, range(5, 15)) == [0, 1, *range(8)]


def test_room_that_another_process_makes_changes_no_draw(server, tmp_path, monkeypatch) -> None:
    """Each shard goes once between fetching and indexing it, and once between that and reading it."""
    image = _jpeg(tmp_path)
    more = [member for index in range(8) for member in ((f"{index}.jpg", image), (f"{index}.txt", str(index).encode()))]
    write_shard(server.folder / "s-2.tar", more)

    def drawn(source: ImageTextShards) -> list[str]:
        return [source.sample("generation", 10, np.random.default_rng(seed)).caption for seed in range(8)]

    expected = drawn(stream(server, tmp_path / "a"))
    source, gone = stream(server, tmp_path / "b"), set()

    def swept(address: str, cache: Path, limit: int | None = None) -> Path:
        path = local_copy(address, cache, limit)
        if address not in gone:
            gone.add(address)
            path.unlink()
        return path

    monkeypatch.setattr("infotok_lit.data.shards.local_copy", swept)
    assert len(set(expected)) > 1 and drawn(source) == expected
    gone.clear()
    assert drawn(source) == expected


def test_what_cannot_be_fetched_is_said(server, tmp_path) -> None:
    with pytest.raises(DataError, match=rf"the shard {server.address}/nothing.tar cannot be fetched"):
        stream(server, tmp_path, f"{server.address}/nothing.tar")
    with pytest.raises(DataError, match=r"the shard nosuch://bucket/a.tar cannot be fetched: .*nosuch"):
        stream(server, tmp_path, "nosuch://bucket/a.tar")
    with pytest.raises(DataError, match=r"the shard http://127.0.0.1:9/a.tar cannot be fetched: .*(?i:connect)"):
        stream(server, tmp_path, "http://127.0.0.1:9/a.tar")
    server.fails["s-0.tar"] = 2
    assert captions(stream(server, tmp_path), [0]) == [0], "a hiccup is overcome"


def test_a_large_shard_of_a_server_that_gives_no_parts_of_files(server, tmp_path) -> None:
    content = np.random.default_rng(0).bytes(12 << 20)
    (server.folder / "large.tar").write_bytes(content)
    assert local_copy(f"{server.address}/large.tar", tmp_path).read_bytes() == content
    assert server.asked == ["large.tar"], "in one piece"


def test_what_is_broken_is_not_kept(server, tmp_path) -> None:
    (server.folder / "cut.tar").write_bytes((server.folder / "s-0.tar").read_bytes())
    with pytest.raises(DataError, match=r"the shard .*cut.tar cannot be fetched"):
        stream(server, tmp_path / "cache", f"{server.address}/cut.tar")
    (server.folder / "page.tar").write_text("<html>Please log in</html>")
    with pytest.raises(DataError, match=r"what http.*page.tar gave is no uncompressed tar; it is not kept"):
        stream(server, tmp_path / "cache", f"{server.address}/page.tar")
    assert [path for path in (tmp_path / "cache").iterdir() if path.suffix in (".tar", ".part")] == []


def test_a_worker_that_cannot_fetch_says_so_in_one_sentence(server, tmp_path) -> None:
    source = stream(server, tmp_path / "cache")
    for shard in range(1, SHARDS):
        (server.folder / f"s-{shard}.tar").unlink()
    data = UnifiedDataModule(source, source, understanding_batch_size=2, generation_batch_size=2, num_workers=1)
    with pytest.raises(DataError) as raised:
        make_trainer(str(tmp_path), max_steps=20, limit_val_batches=0).fit(Recorder(), datamodule=data)
    assert str(raised.value).startswith(f"the shard {server.address}/s-")
    assert "Traceback" not in str(raised.value)


def test_a_stream_is_split_by_shards(server, tmp_path) -> None:
    train, val = stream(server, tmp_path).split(0.3)
    lengths = [part.branch_length("generation") for part in (train, val)]
    assert lengths == [20, 10]
    assert sorted(captions(train, range(20)) + captions(val, range(10))) == list(range(30))
