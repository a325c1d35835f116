"""The tokenizer that ships knows Moving Scenes: it is small, and better than a guess."""

import pytest
import torch

from infotok_lit.assets import ASSETS
from infotok_lit.commands.compress import open_tokenizer
from infotok_lit.errors import MissingFileError
from infotok_lit.video.moving_scenes import MovingScenes
from infotok_lit.video.official import load_tokenizer
from infotok_lit.video.tokenizer import SIZES, VideoTokenizer, keep_clipwide
from infotok_lit.video.windows import to_frames, to_pixels

FOLDER = ASSETS / "videotok_scenes"


@pytest.fixture(scope="module")
def tokenizer() -> VideoTokenizer:
    return load_tokenizer(FOLDER)


def quality(wanted: torch.Tensor, found: torch.Tensor) -> float:
    error = (wanted.float() - found.float()).square().flatten(1).mean(1)
    return float((10 * torch.log10(255**2 / error)).mean())


def test_it_is_small_and_of_the_size_that_it_is_named_after(tokenizer: VideoTokenizer) -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 3_000_000
    assert tokenizer.config == SIZES["scenes"]
    assert tokenizer.complexity.mean > 0


@torch.no_grad()
def test_unseen_clips_come_back_better_than_their_mean_colour(tokenizer: VideoTokenizer) -> None:
    scenes = MovingScenes("val", side=32)
    clips = torch.stack([torch.from_numpy(scenes.draw(index, 9)[1]) for index in range(24)])
    pixels = to_pixels(clips)
    codes = tokenizer.encode(pixels).codes
    token_map = tokenizer.token_map(pixels, codes)
    half = keep_clipwide(token_map, torch.full((24,), 0.5))
    whole = quality(clips, to_frames(tokenizer.decode(codes)))
    part = quality(clips, to_frames(tokenizer.decode(codes * half[:, None])))
    guess = quality(clips, to_frames(pixels.mean((2, 3, 4), keepdim=True).expand_as(pixels)))
    assert whole > part > guess
    assert whole > guess + 1.5


def test_a_name_that_is_no_folder_is_told_what_is_wanted() -> None:
    with pytest.raises(MissingFileError, match="harmon_scenes32: name a folder .* or embedded"):
        open_tokenizer("harmon_scenes32", "cpu")
