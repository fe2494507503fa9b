"""Pictures as cameras, phones and other programs write them: which file, which frame, which colours.

Oracles: Little CMS called by hand, profiles made from the specification, Pillow's own refusals.
"""

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import ExifTags, Image, ImageCms, PngImagePlugin

from pixart_ft.data.folders import read_folder
from pixart_ft.data.pixels import Fit, Size, cut, departs, fitted, is_picture, read_picture, refused_types
from pixart_ft.errors import UserError
from tests.helpers.pictures import profile_of, srgb_profile, wide_profile


def colour(path: Path) -> tuple[int, ...]:
    found = read_picture(path).picture.getpixel((1, 1))
    assert isinstance(found, tuple)
    return found


def by_hand(value: tuple[int, ...] | int, mode: str, profile: bytes) -> tuple[int, ...]:
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    made = Image.new(mode, (1, 1), value)
    done = ImageCms.profileToProfile(made, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert done is not None
    found = done.getpixel((0, 0))
    assert isinstance(found, tuple)
    return found


@pytest.mark.parametrize("end", ["png", "jpg", "webp", "tif"])
def test_colours_of_a_wide_gamut_come_to_srgb(tmp_path: Path, end: str) -> None:
    """Adobe RGB's red of 200 is one of 233 in sRGB: x^2.2 with its primaries, by the numbers of its inventors."""
    path, value = tmp_path / f"a.{end}", (200, 60, 40)
    options: dict[str, dict[str, Any]] = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}
    exact = options.get(end, {})
    Image.new("RGB", (8, 8), value).save(path, icc_profile=wide_profile(), **exact)
    expected = by_hand(value, "RGB", wide_profile())
    assert abs(expected[0] - 233) <= 2
    assert max(abs(a - b) for a, b in zip(colour(path), expected, strict=True)) <= (3 if end == "jpg" else 0)
    assert departs(path.read_bytes()) == "to sRGB 1"


def test_every_kind_of_pixel_comes_to_srgb(tmp_path: Path) -> None:
    """Transparency stays, palettes and greys have colours too; 16 bits of grey by a profile of greys."""
    path, wide, grey = tmp_path / "a.png", wide_profile(), profile_of({}, 1.8, b"GRAY")
    Image.new("RGBA", (8, 8), (200, 60, 40, 255)).save(path, icc_profile=wide)
    assert colour(path) == by_hand((200, 60, 40), "RGB", wide)
    Image.new("RGBA", (8, 8), (200, 60, 40, 0)).save(path, icc_profile=wide)
    assert colour(path) == (255, 255, 255)
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([200, 60, 40])
    palette.save(path, icc_profile=wide)
    assert colour(path) == by_hand((200, 60, 40), "RGB", wide)
    for made in (Image.new("L", (8, 8), 100), Image.new("LA", (8, 8), (100, 255))):
        made.save(path, icc_profile=grey)
        assert colour(path) == by_hand(100, "L", grey) != (100, 100, 100)
    Image.fromarray(numpy.full((8, 8), 100 * 257, numpy.uint16)).save(path, icc_profile=grey)
    assert colour(path) == by_hand(100, "L", grey)


def test_a_profile_that_says_srgb_changes_no_bit_and_one_that_is_none_is_told(tmp_path: Path) -> None:
    path, noise = tmp_path / "a.png", numpy.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=numpy.uint8)
    for profile, note in ((srgb_profile(), ()), (b"no profile", ("its colour profile cannot be used and is ignored",))):
        Image.fromarray(noise).save(path, icc_profile=profile)
        opened = read_picture(path)
        assert numpy.array_equal(numpy.asarray(opened.picture), noise)
        assert (opened.departs, opened.notes) == (departs(path.read_bytes()), note) == ("", note)
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.tif", icc_profile=wide_profile())
    assert read_picture(tmp_path / "a.tif").notes and colour(tmp_path / "a.tif") == (255, 0, 0)


@pytest.mark.parametrize("end", ["gif", "webp", "png"])
def test_of_an_animation_the_first_frame_with_something_on_it_is_taken_and_told(tmp_path: Path, end: str) -> None:
    path, empty = tmp_path / f"a.{end}", Image.new("RGB", (16, 16), "white")
    drawn = empty.copy()
    drawn.paste("red", (0, 0, 8, 16))
    exact: dict[str, Any] = {"lossless": True} if end == "webp" else {}
    empty.save(path, save_all=True, append_images=[drawn, empty], duration=100, **exact)
    assert colour(path) == (255, 0, 0) and departs(path.read_bytes()) == "frame 1"
    assert read_picture(path).notes == ("the frame or page 2 of 3 is taken, since those before are of one colour",)
    drawn.save(path, save_all=True, append_images=[empty], duration=100, **exact)
    opened = read_picture(path)
    assert opened.departs == "" and opened.notes == ("the frame or page 1 of 2 is taken",)


def test_large_and_sound_is_read_and_the_limits_of_pillow_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, about = tmp_path / "a.png", PngImagePlugin.PngInfo()
    about.add_text("workflow", "a" * 2**21, zip=True)
    Image.new("RGB", (16, 16), "red").save(path, pnginfo=about)
    with pytest.raises(ValueError, match=r"(?i)too large"):
        Image.open(path)
    assert colour(path) == (255, 0, 0)
    Image.new("RGB", (16, 16), "red").save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # as 182 million are beyond Pillow's 179
    with pytest.raises(Image.DecompressionBombError):
        Image.open(path)
    assert colour(path) == (255, 0, 0) and is_picture(path)
    assert (Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK) == (100, 2**20)


def test_sixteen_bits_of_colour_keep_their_high_byte(tmp_path: Path) -> None:
    """A PNG from its specification, since Pillow writes none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\0" + struct.pack(">3H", 200 * 257, 60 * 257, 40 * 257) * 4
    head = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(row * 4)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    assert colour(tmp_path / "a.png") == (200, 60, 40)


@pytest.mark.parametrize("name", ["a.jfif", "a.JPE", "a", "a.jpg_large", "a.gif", "a.avif", "a.jp2", "a.ppm", "a.tga"])
def test_pictures_are_known_by_name_or_by_their_first_bytes(tmp_path: Path, name: str) -> None:
    if Path(name).suffix in refused_types():
        pytest.skip("this Pillow reads no AVIF")
    kind = {"a.gif": "GIF", "a.avif": "AVIF", "a.jp2": "JPEG2000", "a.ppm": "PPM", "a.tga": "TGA"}.get(name, "JPEG")
    Image.new("RGB", (8, 8), "red").save(tmp_path / name, format=kind)
    (tmp_path / "a.txt").write_text("red")
    (tmp_path / "notes").write_text("no picture")
    (tmp_path / "random").write_bytes(bytes(range(256)) * 8)
    os.utime(tmp_path / "random")
    assert [row.name for row in read_folder(tmp_path)] == [name]
    assert colour(tmp_path / name)[0] > 250


# Sizes


def noise(size: Size) -> Image.Image:
    values = numpy.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=numpy.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize("at", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("turned", [False, True])
def test_a_crop_is_a_part_of_the_picture_along_its_longer_side(at: float, turned: bool) -> None:
    """Where nothing is scaled it is so to the bit."""
    begin = round(20 * at)
    size, part = ((16, 36), (0, begin, 16, begin + 16)) if turned else ((36, 16), (begin, 0, begin + 16, 16))
    picture = noise(size)
    expected = torch.from_numpy(numpy.array(picture.crop(part))).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(fitted(picture, Fit((16, 16), at)), expected)
    assert torch.equal(fitted(picture, Fit((16, 16), at, mirrored=True)), expected.flip(-1))


def test_what_is_not_cropped_is_squeezed_whole() -> None:
    picture = noise((36, 16))
    expected = torch.from_numpy(numpy.array(picture.resize((32, 16), Image.Resampling.LANCZOS))).permute(2, 0, 1)
    assert torch.equal(fitted(picture, Fit((32, 16), None)), expected / 127.5 - 1)


def test_fits_have_names_of_their_own_and_squares_the_one_they_had() -> None:
    fits = [Fit((64, 64)), Fit((64, 32)), Fit((64, 64), 0.25), Fit((64, 64), None), Fit((64, 64), mirrored=True)]
    assert fits[0].name == 64 and len({str(fit.name) for fit in fits}) == len(fits)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_read_small_tells_what_it_is_like_whole(tmp_path: Path, orientation: int) -> None:
    path, exif = tmp_path / "a.jpg", Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.effect_noise((96, 40), 50).convert("RGB").save(path, exif=exif)
    whole, small = read_picture(path), read_picture(path, small=True)
    assert whole.size == small.size == whole.picture.size
    assert small.picture.size == tuple(side // 8 for side in whole.size)
    assert (whole.departs, whole.notes) == (small.departs, small.notes)
    path.write_bytes(path.read_bytes()[:-300])
    for small_too in (False, True):
        with pytest.raises(UserError, match="truncated"):
            read_picture(path, small=small_too)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "GIF", "BMP"])
def test_others_are_read_as_they_are(tmp_path: Path, kind: str) -> None:
    Image.new("RGB", (96, 40), "red").save(tmp_path / "a", kind)
    assert read_picture(tmp_path / "a", small=True).picture.size == read_picture(tmp_path / "a").size == (96, 40)


@pytest.mark.parametrize("fit", [Fit((32, 32)), Fit((32, 32), 0.0), Fit((16, 64), 1.0, True), Fit((64, 8), 0.25)])
def test_a_fit_keeps_something_of_a_part_as_its_picture_shows(fit: Fit) -> None:
    """Of columns and rows of 4 pixels, none of which is cut through."""
    for box in [(x, 0, x + 4, 64) for x in range(0, 128, 4)] + [(0, y, 128, y + 4) for y in range(0, 64, 4)]:
        picture = Image.new("L", (128, 64))
        picture.paste(255, box)
        brightest = max(cut(picture.convert("RGB"), fit).tobytes())
        assert fit.keeps(picture.size, box) == (brightest > 100), box
