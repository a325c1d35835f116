"""The .itk stream: its bits are those that are claimed, it comes back as it went, and damage is refused in words."""

import io
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from tiny_video import TINY, noise, tiny_tokenizer

from infotok_lit.cli import main as command_line
from infotok_lit.errors import DataError, SettingsError
from infotok_lit.video.bitstream import Header, Record, index_bytes, pack_indices, unpack_indices
from infotok_lit.video.codec import (
    CodecConfig,
    compress,
    encode_window,
    fingerprint,
    keep_by_score,
    read_stream,
    window_rates,
)
from infotok_lit.video.mask_coder import MaskEncoder
from infotok_lit.video.tokenizer import VideoTokenizer
from infotok_lit.video.windows import FrameCutter, Padding, blend, in_windows, to_frames, to_pixels, window_count

RATE = Fraction(30000, 1001)
HEADER_BYTES, RECORD_BYTES = 47, 12


@pytest.fixture(scope="module")
def tokenizer() -> VideoTokenizer:
    return tiny_tokenizer()


def compressed(tokenizer: VideoTokenizer, frames: np.ndarray, **settings) -> bytes:
    file = io.BytesIO()
    compress(tokenizer, frames, RATE, file, CodecConfig(**settings))
    return file.getvalue()


def decoded(tokenizer: VideoTokenizer, content: bytes) -> np.ndarray:
    return np.stack(list(read_stream(tokenizer, io.BytesIO(content), "x.itk").frames()))


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((1, 1, 1), {}),
        ((1, 16, 16), {}),
        ((5, 9, 50), {"window": 5}),
        ((21, 24, 33), {"window": 9, "overlap": 3, "rate": 1.0}),
        ((20, 16, 16), {"window": 9, "overlap": 0, "rule": "window"}),
        ((3, 40, 70), {"tile": 32, "rate": 1 / 16}),
    ],
)
def test_any_length_and_size_comes_back(tokenizer: VideoTokenizer, shape: tuple, settings: dict) -> None:
    frames = noise(*shape)
    file = io.BytesIO()
    report = compress(tokenizer, frames, RATE, file, CodecConfig(**settings))
    video = read_stream(tokenizer, io.BytesIO(file.getvalue()), "x.itk")
    assert (video.header.frames, video.header.height, video.header.width) == shape
    assert video.header.frame_rate == RATE
    result = np.stack(list(video.frames()))
    assert result.shape == frames.shape and result.dtype == np.uint8
    assert report.frames == shape[0] and report.pixels == math.prod(shape)


def test_tokens_may_be_larger_than_the_steps_of_padding() -> None:
    wide = replace(TINY, temporal_compression=16, spatial_compression=32, channel_multipliers=(1,) * 6)
    tokenizer, frames = tiny_tokenizer(wide), noise(20, 20, 70)
    assert decoded(tokenizer, compressed(tokenizer, frames, overlap=0)).shape == frames.shape


def test_the_file_has_the_bits_that_are_claimed(tokenizer: VideoTokenizer) -> None:
    frames = noise(25, 32, 48)
    file = io.BytesIO()
    report = compress(tokenizer, frames, RATE, file, CodecConfig(rate=0.5, window=9, overlap=1))
    windows = 3
    grid = 3 * 4 * 6
    assert report.tokens == windows * grid
    assert report.code_bits == 8  # 8 x 5 x 5 = 200 codes
    assert report.kept == sum(grid - 1 - math.floor((1 - rate) * (grid - 1)) for rate in report.rates)
    assert report.file_bits == 8 * len(file.getvalue())
    index_and_mask = report.mask_bits + 8 * report.kept
    assert report.file_bits == index_and_mask + 8 * (HEADER_BYTES + RECORD_BYTES * windows)
    assert report.bpp16 == pytest.approx(16 * 8 * len(file.getvalue()) / frames[..., 0].size)
    assert report.paper_bpp16 == pytest.approx(16 * (8 * report.kept / report.tokens + 1) / (4 * 8 * 8))


def test_a_window_is_decoded_from_its_kept_tokens_alone(tokenizer: VideoTokenizer) -> None:
    frames = noise(9, 32, 32)
    result = decoded(tokenizer, compressed(tokenizer, frames, rate=0.3, window=9))
    with torch.no_grad():
        pixels = to_pixels(torch.from_numpy(frames)[None])
        codes = tokenizer.encode(pixels).codes
        token_map = tokenizer.token_map(pixels, codes)
        kept = keep_by_score(token_map, torch.tensor(0.3))
        expected = to_frames(tokenizer.decode(codes * kept[:, None]))[0]
    assert np.abs(result.astype(int) - expected.numpy()).max() <= 1


def test_rates_follow_the_rule(tokenizer: VideoTokenizer) -> None:
    errors = torch.tensor([0.1, 0.2, 0.3])
    rule = CodecConfig(rate=0.4)
    assert torch.allclose(window_rates(errors, rule, tokenizer), torch.tensor([0.2, 0.4, 0.6]))
    assert torch.allclose(window_rates(errors, replace(rule, rule="window"), tokenizer), torch.full((3,), 0.4))
    rounded = window_rates(errors, replace(rule, rate_steps=4), tokenizer)
    assert rounded.tolist() == [0.25, 0.5, 0.5]
    with pytest.raises(SettingsError, match="does not know the mean error"):
        window_rates(errors, replace(rule, rule="training"), tokenizer)
    trained = tiny_tokenizer()
    trained.complexity.update(torch.tensor(0.1))
    assert torch.allclose(window_rates(errors, replace(rule, rule="training"), trained), torch.tensor([0.4, 0.8, 1.0]))


@pytest.mark.parametrize("frames", [1, 8, 9, 10, 15, 20, 31])
@pytest.mark.parametrize("overlap", [0, 3])
def test_windows_cover_a_stream_of_unknown_length(frames: int, overlap: int) -> None:
    size = 9
    numbers = [np.full((1, 1, 3), i, dtype=np.uint8) for i in range(frames)]
    windows = [clip[:, 0, 0, 0].tolist() for clip in in_windows(iter(numbers), size, overlap)]
    assert len(windows) == window_count(frames, size, overlap)
    step = size - overlap
    assert windows == [list(range(i * step, min(i * step + size, frames))) for i in range(len(windows))]
    assert windows[-1][-1] == frames - 1
    if len(windows) > 1:
        assert len(windows[-1]) > overlap


def test_an_hour_needs_no_more_memory_than_a_minute(tokenizer: VideoTokenizer, monkeypatch) -> None:
    """Frames are taken one at a time, and let go when their window is encoded."""
    alive: list[int] = []
    taken = 0

    def frames() -> Iterator[np.ndarray]:
        nonlocal taken
        for _ in range(60):
            taken += 1
            yield np.zeros((16, 16, 3), dtype=np.uint8)

    def watched(model: VideoTokenizer, clip: torch.Tensor, cutter: FrameCutter):
        alive.append(taken - clip.shape[0])
        return encode_window(model, clip, cutter)

    monkeypatch.setattr("infotok_lit.video.codec.encode_window", watched)
    compress(tokenizer, frames(), RATE, io.BytesIO(), CodecConfig(window=5, overlap=0))
    assert alive == list(range(0, 60, 5))
    content = compressed(tokenizer, np.zeros((60, 16, 16, 3), dtype=np.uint8), window=5, overlap=0)
    opened = read_stream(tokenizer, io.BytesIO(content), "x.itk").frames()
    assert next(opened).shape == (16, 16, 3)


def test_overlapping_windows_fade_into_each_other() -> None:
    black, white = torch.zeros(3, 1, 1, 3), torch.full((3, 1, 1, 3), 200.0)
    assert blend(black, white)[:, 0, 0, 0].tolist() == [50, 100, 150]


@pytest.mark.parametrize("overlap", [1, 2, 8])
def test_blended_frames_are_rounded(overlap: int) -> None:
    """To the nearest level, reckoned in fractions; and what does not move stays as it is."""
    pairs = torch.cartesian_prod(torch.arange(256), torch.arange(256)).to(torch.uint8)
    earlier, later = (part.reshape(1, 256, 256, 1).expand(overlap, -1, -1, -1) for part in pairs.T)
    first, second, whole = earlier.long(), later.long(), overlap + 1
    share = torch.arange(overlap, 0, -1)[:, None, None, None]
    # |found - exact| <= 1/2, times the number of steps and two.
    off = 2 * (blend(earlier, later).long() * whole - (first * share + second * (whole - share)))
    assert off.abs().max() <= whole
    assert torch.equal(blend(earlier, earlier), earlier)


@pytest.mark.parametrize("size", [(16, 16), (20, 90), (100, 40), (64, 64)])
def test_tiles_join_to_the_frame_that_was_cut(size: tuple[int, int]) -> None:
    clip = torch.from_numpy(noise(3, *size))
    cutter = FrameCutter(*size, tile=48)
    tiles = list(cutter.cut(clip))
    count, *padded = cutter.padded_shape(3)
    assert len(tiles) == count and all(list(tile.shape[1:4]) == padded for tile in tiles)
    assert (cutter.join(tiles, 3).int() - clip.int()).abs().max() == 0


def test_padding_keeps_to_multiples_and_is_undone() -> None:
    for frames, height, width in ((1, 1, 1), (2, 17, 16), (9, 30, 31), (16, 5, 64)):
        clip = torch.from_numpy(noise(frames, height, width))
        padding = Padding.of(frames, height, width)
        padded = padding.pad(clip)
        assert (padded.shape[0] - 1) % 8 == 0 and padded.shape[1] % 16 == 0 and padded.shape[2] % 16 == 0
        assert torch.equal(padding.crop(padded), clip)


@pytest.mark.parametrize("bits", [1, 7, 10, 16])
def test_indices_are_packed_without_a_gap(bits: int) -> None:
    indices = np.random.default_rng(0).integers(0, 1 << bits, 37)
    code = pack_indices(indices, bits)
    assert len(code) == index_bytes(37, bits) == math.ceil(37 * bits / 8)
    assert np.array_equal(unpack_indices(code, 37, bits), indices)
    assert pack_indices(indices[:0], bits) == b""


# Damage


def test_a_stream_cut_anywhere_is_refused(tokenizer: VideoTokenizer) -> None:
    content = compressed(tokenizer, noise(10, 16, 16), window=5)
    for length in range(len(content)):
        with pytest.raises(DataError):
            read_stream(tokenizer, io.BytesIO(content[:length]), "x.itk")


def test_a_byte_changed_anywhere_is_refused(tokenizer: VideoTokenizer) -> None:
    content = compressed(tokenizer, noise(10, 16, 16), window=5)
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 0x41
        with pytest.raises(DataError):
            read_stream(tokenizer, io.BytesIO(bytes(damaged)), "x.itk")


def test_bytes_after_the_end_are_refused(tokenizer: VideoTokenizer) -> None:
    content = compressed(tokenizer, noise(5, 16, 16), window=5)
    with pytest.raises(DataError, match="goes on after its last window"):
        read_stream(tokenizer, io.BytesIO(content + b"\0"), "x.itk")


def test_noise_is_refused(tokenizer: VideoTokenizer) -> None:
    rng = np.random.default_rng(0)
    for length in (0, 3, 46, 47, 400):
        with pytest.raises(DataError):
            read_stream(tokenizer, io.BytesIO(rng.bytes(length)), "x.itk")


def test_another_tokenizer_is_refused(tokenizer: VideoTokenizer) -> None:
    content = compressed(tokenizer, noise(5, 16, 16), window=5)
    with pytest.raises(DataError, match="another tokenizer"):
        read_stream(tiny_tokenizer(seed=1), io.BytesIO(content), "x.itk")


def test_another_version_is_refused_by_its_number(tokenizer: VideoTokenizer) -> None:
    content = bytearray(compressed(tokenizer, noise(5, 16, 16), window=5))
    content[4] = 7
    with pytest.raises(DataError, match="version 7"):
        read_stream(tokenizer, io.BytesIO(bytes(content)), "x.itk")


def forged(tokenizer: VideoTokenizer, kept: int, mask_code: bytes, index_code: bytes) -> bytes:
    """A stream of one window with right checksums, whatever is in it."""
    header = Header(fingerprint(tokenizer), 16, 16, 5, RATE, window=5, overlap=1, tile=256).to_bytes()
    body = struct.pack("<II", len(mask_code), kept) + mask_code + index_code
    return header + body + struct.pack("<I", zlib.crc32(body))


def test_hostile_windows_with_right_checksums_are_refused(tokenizer: VideoTokenizer) -> None:
    for kept, mask_code, index_code in (
        (3, b"", b"\0\0\0"),  # the mask keeps another number of tokens
        (1 << 31, b"", b""),
        (0, b"\xff" * 100_000, b""),
    ):
        content = forged(tokenizer, kept, mask_code, index_code)
        with pytest.raises(DataError):
            list(read_stream(tokenizer, io.BytesIO(content), "x.itk").frames())
    good = compressed(tokenizer, noise(5, 16, 16), window=5, rate=1.0)
    mask_length, kept = struct.unpack("<II", good[HEADER_BYTES : HEADER_BYTES + 8])
    mask_code = good[HEADER_BYTES + 8 : HEADER_BYTES + 8 + mask_length]
    with pytest.raises(DataError, match="no tokenizer made"):
        # Index 255 of 200 codes.
        content = forged(tokenizer, kept, mask_code, b"\xff" * kept)
        list(read_stream(tokenizer, io.BytesIO(content), "x.itk").frames())


def test_a_small_file_cannot_ask_for_much_work(tokenizer: VideoTokenizer) -> None:
    """Right checksums and a right mask, that keeps nothing of many tokens: refused before anything is decoded."""
    header = Header(fingerprint(tokenizer), 256, 256, 900, RATE, window=9, overlap=0, tile=256).to_bytes()
    encoder, grid = MaskEncoder(), (1, 3, 32, 32)
    records = [Record(encoder.encode(np.zeros(grid, dtype=bool)), 0, b"").to_bytes() for _ in range(100)]
    with pytest.raises(DataError, match="fewer tokens than any rate keeps"):
        read_stream(tokenizer, io.BytesIO(header + b"".join(records)), "x.itk")


def test_a_video_that_is_too_large_is_refused_before_a_window_of_it_is_held(tokenizer: VideoTokenizer) -> None:
    taken = 0

    def frames() -> Iterator[np.ndarray]:
        nonlocal taken
        for number in range(1, 17):
            taken = number
            yield np.broadcast_to(np.uint8(0), (1 << 14, 1 << 13, 3))

    with pytest.raises(DataError, match="a tile of 16384 pixels, 1 frames long"):
        compress(tokenizer, frames(), RATE, io.BytesIO(), CodecConfig(tile=1 << 14))
    assert taken == 1


@pytest.mark.parametrize(
    "changed",
    [
        {"tile": 40},
        {"width": 9000, "height": 9000, "frames": 1, "tile": 9008},
        {"width": 60_000, "height": 1, "frames": 81, "window": 81, "tile": 60_000},
        {"width": 0},
        {"height": 1 << 20},
        {"frames": 0},
        {"overlap": 5},
        {"frame_rate": Fraction(0)},
        {"width": 60_000, "height": 60_000},
        {"tile": 0},
    ],
)
def test_headers_that_ask_for_too_much_are_refused(changed: dict) -> None:
    header = Header(b"\0" * 8, 16, 16, 5, RATE, window=5, overlap=1, tile=256)
    with pytest.raises(DataError):
        replace(header, **changed)


def test_windows_that_the_tokenizer_cannot_take_are_refused(tokenizer: VideoTokenizer) -> None:
    assert CodecConfig().window_for(tokenizer) == TINY.max_frames == 17
    for settings in ({"window": 25}, {"window": 3, "overlap": 3}):
        with pytest.raises(SettingsError, match="takes at most 17"):
            CodecConfig(**settings).window_for(tokenizer)
    for settings in ({"rate": 0.01}, {"rate": float("nan")}, {"tile": 40}, {"tile": 1 << 16}, {"overlap": -1}):
        with pytest.raises(SettingsError):
            CodecConfig(**settings)
    with pytest.raises(DataError, match="no frames"):
        compress(tokenizer, iter(()), RATE, io.BytesIO())


def test_what_is_read_is_never_replaced(tmp_path, capsys) -> None:
    source = tmp_path / "x.mp4"
    source.write_bytes(b"precious")
    (tmp_path / "soft.mp4").symlink_to(source)
    (tmp_path / "hard.mp4").hardlink_to(source)
    for command, option in (("compress", "--video"), ("decompress", "--stream")):
        for out in (source, tmp_path / "soft.mp4", tmp_path / "hard.mp4"):
            arguments = [command, "--model", "embedded", option, str(source), "--out", str(out), "--force"]
            assert command_line(arguments) == 2
            assert f"{out} is what is read" in capsys.readouterr().err
    assert source.read_bytes() == b"precious"
