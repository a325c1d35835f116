"""Images of odd modes against pixels worked out by hand."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infotok_lit.batch import BrokenSampleError
from infotok_lit.data.image_file import MOST_PIXELS, read_image, to_rgb
from infotok_lit.data.image_text import SampleOptions
from infotok_lit.errors import SettingsError

PHOTOS = Path(__file__).parents[1] / "fixtures" / "photos"


def encode(image: Image.Image, kind: str = "PNG", **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def two_pixels(mode: str, left, right, kind: str = "PNG", **settings) -> bytes:
    """A 20x20 image whose left half has one value and whose right half another."""
    image = Image.new(mode, (20, 20), left)
    image.paste(right, (10, 0, 20, 20))
    return encode(image, kind, **settings)


@pytest.mark.parametrize(
    ("data", "left", "right"),
    [
        (two_pixels("RGB", (1, 2, 3), (200, 100, 50)), (1, 2, 3), (200, 100, 50)),
        (two_pixels("L", 7, 250), (7, 7, 7), (250, 250, 250)),
        (two_pixels("1", 0, 1), (0, 0, 0), (255, 255, 255)),
        # 128/255 of the value, the rest of white: 255 + 128/255 * (v - 255)
        (two_pixels("LA", (0, 0), (55, 128)), (255, 255, 255), (155, 155, 155)),
        (two_pixels("RGBA", (9, 9, 9, 0), (55, 155, 255, 128)), (255, 255, 255), (155, 205, 255)),
        (two_pixels("RGB", (1, 2, 3), (200, 100, 50), transparency=(1, 2, 3)), (255, 255, 255), (200, 100, 50)),
        (two_pixels("CMYK", (255, 0, 0, 0), (0, 0, 0, 255), "TIFF"), (0, 255, 255), (0, 0, 0)),
        # 16 bits: 65535 -> 255, 257 * 100 -> 100
        (two_pixels("I;16", 65535, 25700), (255, 255, 255), (100, 100, 100)),
        (two_pixels("I", 65535, 25700, "TIFF"), (255, 255, 255), (100, 100, 100)),
    ],
)
def test_modes(data, left, right):
    image = read_image(data, "odd")
    assert image.mode == "RGB"
    assert np.abs(np.subtract(image.getpixel((0, 5)), left)).max() <= 1
    assert np.abs(np.subtract(image.getpixel((19, 5)), right)).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "I", "I;16", "F"])
def test_an_image_that_is_open_already_is_seen_as_its_file_is(mode):
    image = Image.new("L", (20, 20), 9).convert(mode) if mode != "PA" else Image.new("RGBA", (20, 20)).convert("PA")
    if mode == "RGB":
        image.info["transparency"] = (9, 9, 9)
    if mode == "F":
        with pytest.raises(BrokenSampleError, match="floating-point pixels have no agreed range"):
            to_rgb(image)
        return
    kind = "TIFF" if mode in ("CMYK", "I") else "PNG"
    stored = image if mode != "PA" else image.convert("RGBA")
    assert np.array_equal(to_rgb(image), read_image(encode(stored, kind)))


def test_palette_with_transparency():
    image = Image.new("P", (20, 20), 1)
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.paste(2, (10, 0, 20, 20))
    read = read_image(encode(image, transparency=2), "palette")
    assert read.getpixel((0, 0)) == (40, 50, 60)
    assert read.getpixel((19, 0)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_by_257():
    values = np.arange(0, 65536, 7, dtype=np.uint16)[:9216].reshape(96, 96)
    read = np.asarray(read_image(encode(Image.fromarray(values)), "ramp"))
    expected = np.array([[round(int(v) / 257) for v in row] for row in values])
    assert (read == expected[..., None]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_against_hand_rotated_pixels(orientation):
    upright = np.random.default_rng(0).integers(0, 256, (12, 17, 3), dtype=np.uint8)
    # What the camera stores so that a viewer which obeys the tag shows `upright` (EXIF 2.32, table 6).
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    assert (np.asarray(read_image(data, "turned")) == upright).all()


def test_odd_exif_tags_lose_no_photograph():
    """A number where the maker's name belongs, as some editors leave it, cannot be written again by Pillow."""
    orientation, maker = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0), struct.pack(">HHII", 0x010F, 5, 1, 38)
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + maker + orientation + struct.pack(">III", 0, 1, 1)
    upright = np.random.default_rng(0).integers(0, 256, (12, 17, 3), dtype=np.uint8)
    data = encode(Image.fromarray(np.rot90(upright, 1).copy()), "PNG", exif=exif)
    assert (np.asarray(read_image(data, "turned")) == upright).all()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing."""
    chunks = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b""))):
        chunks += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return chunks


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"I am a text file", "not an image of a known format"),
        (encode(Image.new("RGB", (1, 1))), "1x1 pixels: the short side is under the limit of 9"),
        (encode(Image.new("RGB", (8, 60))), "the short side"),
        (encode(Image.new("RGB", (100, 10))), "aspect ratio"),
        (encode(Image.new("RGB", (10, 100))), "aspect ratio"),
        (png_header(10_000, 10_000), "more than the limit"),
        (png_header(30_000, 30_000), "decompression bomb"),
        (encode(Image.new("F", (20, 20)), "TIFF"), "floating-point"),
        ((PHOTOS / "coins.jpg").read_bytes()[:9000], "truncated"),
        (encode(Image.effect_noise((64, 64), 50))[:600], ""),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_broken_images_are_named_with_the_reason(data, reason, tmp_path):
    path = tmp_path / "picture.jpg"
    path.write_bytes(data)
    for source, name in ((data, "row 7"), (path, "row 7"), (path, None)):
        with pytest.raises(BrokenSampleError) as caught:
            read_image(source, name)
        assert str(caught.value).startswith(f"{name or path}: ")
        assert reason in str(caught.value)
        assert " at 0x" not in str(caught.value)  # no memory address: the same words in every process


def test_missing_file_is_named(tmp_path):
    with pytest.raises(BrokenSampleError, match=r"there is no file .*gone.png"):
        read_image(tmp_path / "gone.png")


def test_limits_are_arguments():
    assert read_image(encode(Image.new("L", (1, 1), 9)), min_side=1).getpixel((0, 0)) == (9, 9, 9)
    assert read_image(encode(Image.new("L", (100, 10))), max_aspect=10.1).size == (100, 10)
    assert read_image(encode(Image.new("L", (99, 10)))).size == (99, 10)


def test_integers_beyond_sixteen_bits_have_no_agreed_range():
    for values in ((0, 2**31 - 1), (-5, 5)):
        image = Image.fromarray(np.tile(np.array(values, np.int32), (20, 10)))
        with pytest.raises(BrokenSampleError, match="of more than 16 bits have no agreed range"):
            read_image(encode(image, "TIFF"))


def test_more_pixels_than_pillow_decodes_are_refused_as_a_limit():
    SampleOptions(max_pixels=MOST_PIXELS)
    with pytest.raises(SettingsError, match="max_pixels is 178956971, and Pillow decodes no more than 178956970"):
        SampleOptions(max_pixels=MOST_PIXELS + 1)
    side = 13378  # 178,970,884 pixels
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(png_header(side, side)))


def test_photographs_are_read_as_pillow_reads_them():
    for path in sorted(PHOTOS.glob("*.jpg")):
        assert (np.asarray(read_image(path)) == np.asarray(Image.open(path).convert("RGB"))).all()


def test_a_large_jpeg_is_decoded_smaller_if_so_wanted(tmp_path):
    path = tmp_path / "large.jpg"
    Image.radial_gradient("L").convert("RGB").resize((960, 640)).save(path, quality=95)
    whole, draft = read_image(path), read_image(path, jpeg_draft=128)
    assert draft.size == (240, 160), "a quarter; an eighth of 640 would be below 128"
    near, far = (np.asarray(image.resize((64, 64)), dtype=float) for image in (draft, whole))
    assert np.abs(near - far).mean() < 1
    assert read_image(path, jpeg_draft=400).size == (960, 640), "a half would be below"


def test_a_draft_changes_nothing_where_there_is_none(tmp_path):
    Image.radial_gradient("L").convert("RGB").save(tmp_path / "a.png")
    Image.radial_gradient("L").convert("RGB").save(tmp_path / "a.jpg")
    for name, side in (("a.png", 16), ("a.jpg", 200)):
        one, other = (np.asarray(read_image(tmp_path / name, jpeg_draft=draft)) for draft in (None, side))
        assert (one == other).all()
