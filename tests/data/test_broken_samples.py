"""Broken samples in a run: skipped, named, counted, and too many of them stop it."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from stand_ins import Numbers, as_shard, data, fit

from infotok_lit.data.datamodule import UnifiedDataModule
from infotok_lit.data.image_text import ImageTextFolder
from infotok_lit.data.shards import ImageTextShards
from infotok_lit.data.stream import BrokenSampleTally

PHOTOS = Path(__file__).parents[1] / "fixtures" / "photos"

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*", "ignore:.*No validation data.*", "ignore:.*LeafSpec.*"
)


def test_broken_samples_are_counted_named_and_remembered(tmp_path, caplog):
    module = UnifiedDataModule(Numbers(40, broken=[7]), max_broken_share=0.2, val_samples=10)
    fit(tmp_path, module, max_steps=5)
    drawn = 5 * 2 * 32
    # 1 of 40 is broken, so 1/39 of a skip per good draw: 8.2, give or take
    assert 3 <= module.broken_samples <= 16
    assert caplog.text.count("skipped a broken sample: number 7: it is broken") == 1
    state = torch.load(tmp_path / "end.ckpt", weights_only=True)["UnifiedDataModule"]["broken"]
    assert state == {"good": drawn, "broken": module.broken_samples, "first": ["number 7: it is broken"]}
    resumed = UnifiedDataModule(Numbers(40, broken=[7]), max_broken_share=0.2, val_samples=10)
    fit(tmp_path, resumed, str(tmp_path / "end.ckpt"), max_steps=6)
    assert module.broken_samples <= resumed.broken_samples <= module.broken_samples + 6


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_broken_samples_stop_the_run(tmp_path, workers):
    module = UnifiedDataModule(Numbers(40, broken=range(4)), num_workers=workers, val=Numbers(3))
    with pytest.raises(ValueError, match=r"of \d+ samples drawn so far are broken .*limit is 5.0%.*number [0-3]: it"):
        fit(tmp_path, module, max_steps=20)


def test_the_share_is_judged_after_fifty_draws_or_the_whole_source():
    early = BrokenSampleTally(max_share=0.1, source_size=1000)
    early.count(28, ["a", "b", "c", "a", "b", "c", "a", "b", "c", "d", "e"])
    with pytest.raises(ValueError, match=r"^11 of 60 samples .*\(18.3%, the limit is 10.0%\): a; b; c; d; e\. .*max_b"):
        early.count(21, [])
    with pytest.raises(ValueError, match=r"2 of 13 samples"):
        BrokenSampleTally(max_share=0.1, source_size=13).count(11, ["a", "b"])
    BrokenSampleTally(max_share=0.1, source_size=13).count(18, ["a", "b"])  # 10 % is not above 10 %
    BrokenSampleTally(max_share=1.0, source_size=13).count(0, ["a"] * 100)


def test_broken_validation_samples_are_named_but_not_counted(tmp_path, caplog):
    module = data(val=Numbers(10, broken=[2]))
    fit(tmp_path, module, max_steps=4)
    assert caplog.text.count("skipped a broken sample: number 2") == 1
    assert module.broken_samples == 0


@pytest.fixture
def messy_photos(tmp_path: Path) -> Path:
    """The photographs with a text file, an empty file, a truncated file and a missing file among them."""
    folder = tmp_path / "photos"
    shutil.copytree(PHOTOS, folder)
    (folder / "text.jpg").write_text("not a picture")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "short.jpg").write_bytes((PHOTOS / "coins.jpg").read_bytes()[:5000])
    rows = json.loads((PHOTOS / "annotations.json").read_text())
    broken = [{"image": f"{name}.jpg", "caption": "a picture"} for name in ("text", "empty", "short", "gone")]
    (folder / "annotations.json").write_text(json.dumps(rows + broken))
    return folder


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_photographs_with_broken_files_among_them(messy_photos, tmp_path, caplog, kind):
    caplog.set_level(logging.WARNING)
    if kind == "folder":
        source = ImageTextFolder(str(messy_photos / "annotations.json"))
    else:
        source = ImageTextShards(str(as_shard(messy_photos)), cache=str(tmp_path / "cache"))
    recorder = fit(tmp_path, UnifiedDataModule(source, max_broken_share=0.5), max_steps=2)
    seen = {name for read, drawn, _ in recorder.steps for name in read + drawn}
    assert len(seen) == 13
    named = ["text", "empty", "short"] + (["gone"] if kind == "folder" else [])
    assert caplog.text.count("skipped a broken sample") == len(named)
    with pytest.raises(ValueError, match=r"broken"):
        fit(tmp_path, UnifiedDataModule(source), max_steps=4, limit_val_batches=0)
