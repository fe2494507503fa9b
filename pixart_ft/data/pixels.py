"""The one way from a picture file to the VAE's pixels: which files are pictures, which frame, in what colours."""

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import ExifTags, Image, ImageColor, ImageOps, PngImagePlugin, UnidentifiedImageError

from pixart_ft.errors import UserError

if TYPE_CHECKING:  # torch waits until there is a picture to load: a wrong folder is known at once
    from torch import Tensor

TRANSFORM = "exif, on white, centre square, lanczos, 1"
"""Names what `load_picture` does; part of every cache key. Change it when `load_picture` changes."""

# What Pillow reads of itself and what is one picture. No video, no vector graphics: those it hands to other programs.
_FORMATS = (
    *("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF", "JPEG2000"),
    *("PPM", "QOI", "TGA", "PSD", "ICO", "ICNS", "PCX", "SGI", "DDS"),
)
_SIGNED = frozenset(_FORMATS) - {"TGA", "PCX", "DIB", "SGI"}  # those that no other file is taken for
_MOVING = frozenset({"GIF", "WEBP", "PNG", "AVIF"})  # frames of a film; those of others are pages, layers, views
_ON_ITS_SIDE = (5, 6, 7, 8)  # of EXIF's orientations
_SAME_COLOUR = 2  # of 255: a profile that is within this of sRGB is one of the many makers' sRGB

Size = tuple[int, int]  # width and height, pixels
Box = tuple[int, int, int, int]  # left, top, right and bottom, pixels


def enlarged(picture: Size, size: Size) -> float:
    """By what a picture's sides are multiplied until it covers a size."""
    return max(size[0] / picture[0], size[1] / picture[1])


def cropped(picture: Size, size: Size) -> float:
    """The share of a picture that lies outside then, where that is more than a line of pixels."""
    lost = 1 - size[0] * size[1] / (enlarged(picture, size) ** 2 * picture[0] * picture[1])
    return 0.0 if lost < 1.5 / max(picture) else lost


@dataclass(frozen=True, slots=True)
class Fit:
    """How a picture is brought to a size.

    at         what is kept of what is too long for it: from the beginning (0), of the middle, from the end (1); None:
               all, squeezed
    mirrored   left and right change places
    """

    size: Size
    at: float | None = 0.5
    mirrored: bool = False

    @property
    def name(self) -> object:
        """What tells it from others in a cache, where squares cut from the centre were there first."""
        width, height = self.size
        plain = width if width == height else list(self.size)
        return plain if self == Fit(self.size) else [plain, self.at, self.mirrored]

    def keeps(self, picture: Size, box: Box) -> bool:
        """Whether it leaves something of this part of a picture."""
        scale, begin_of = enlarged(picture, self.size), self.at
        if begin_of is None:
            return True
        kept = [(begin_of * (own - side / scale), side / scale) for own, side in zip(picture, self.size, strict=True)]
        return all(
            first < begin + length and last > begin
            for (begin, length), first, last in zip(kept, box[:2], box[2:], strict=True)
        )


@dataclass(frozen=True)
class Opened:
    """A picture in RGB, upright, on white.

    size      of it in its file, upright; that of `picture`, unless that was read small
    departs   how it was read where that is not the usual way, a part of its name in the cache; "" for most
    notes     what its owner should know of that
    """

    picture: Image.Image
    size: Size
    departs: str
    notes: tuple[str, ...]


@cache
def picture_types() -> frozenset[str]:
    """How the names of picture files end that are read whatever is inside, in small letters, dot included."""
    return frozenset(end for end, kind in Image.registered_extensions().items() if kind in _FORMATS)


@cache
def refused_types() -> frozenset[str]:
    """How the names of picture files end that are not read, but named: other programs', and raw ones of cameras."""
    others = {".avif", ".heic", ".heif", ".hif", ".jxl", ".svg", ".exr", ".hdr", ".xcf", ".psb", ".ai"}
    raw = {".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"}
    no_pictures = {".pdf", ".mpg", ".mpeg", ".h5", ".hdf", ".bufr", ".grib", ".iim"}
    return frozenset((others | raw | set(Image.registered_extensions())) - picture_types() - no_pictures)


def is_picture(path: Path) -> bool:
    """Whether a file is a picture by its first bytes, whatever its name."""
    try:
        with _large_pictures(), Image.open(path, formats=[kind for kind in _known() if kind in _SIGNED]):
            return True
    except Exception:  # a file that is none makes Pillow raise almost anything
        return False


def load_picture(path: str | Path, size: int | Size) -> "Tensor":
    """The picture as (3, height, width) float32 in [-1, 1]; `size` is its side, or width and height.

    As `read_picture` gives it, cropped to the centre, Lanczos. Raises UserError naming the path.
    """
    return fitted(read_picture(path).picture, size)


def picture_pixels(picture: Image.Image, size: int | Size) -> "Tensor":
    """As `load_picture`, of a picture in memory."""
    return fitted(_rgb(picture, _to_srgb(picture)), size)


def cut(picture: Image.Image, fit: int | Size | Fit) -> Image.Image:
    """An RGB picture as the VAE sees it, see `load_picture`."""
    fit = fit if isinstance(fit, Fit) else Fit((fit, fit) if isinstance(fit, int) else fit)
    if fit.at is None:
        found = picture.resize(fit.size, Image.Resampling.LANCZOS)
    else:
        found = ImageOps.fit(picture, fit.size, Image.Resampling.LANCZOS, centering=(fit.at, fit.at))
    return ImageOps.mirror(found) if fit.mirrored else found


def fitted(picture: Image.Image, fit: int | Size | Fit) -> "Tensor":
    """An RGB picture as pixels, see `load_picture`."""
    import numpy
    import torch

    pixels = torch.from_numpy(numpy.array(cut(picture, fit))).permute(2, 0, 1).contiguous()
    return pixels.to(torch.float32) / 127.5 - 1


def read_picture(
    where: object, content: bytes | None = None, background: str = "white", *, small: bool = False
) -> Opened:
    """In RGB: upright by EXIF, colours to sRGB by its profile, transparency on a colour; of an animation one frame.

    where     the path, or as text what messages name
    content   the file's bytes; None: they are read from the path
    background   the colour that transparency is laid on
    small        read a JPEG whole, and so find what is wrong with it, but make an eighth of it: a third of the time

    Raises UserError naming it.
    """
    with _opened(where, content) as it:
        return _read(it, background, small)


def read_mask(where: object, content: bytes, *, alpha: bool) -> Image.Image:
    """In grey, upright, as large as the picture: white where it counts; by `alpha`, where it is not transparent.

    What is transparent in a mask of its own does not count, whatever its colour.

    where   what messages name

    Raises UserError naming it.
    """
    with _opened(where, content) as it:
        if not alpha:
            return _rgb(it, None, "black").convert("L")
        _turn_to_frame(it)
        mask = ImageOps.exif_transpose(it)
        shows = mask.has_transparency_data
        return mask.convert("RGBA").getchannel("A") if shows else Image.new("L", mask.size, 255)


@contextmanager
def _opened(where: object, content: bytes | None) -> Iterator[Image.Image]:
    """A picture file of these bytes, else at that path; whatever is wrong with it is a UserError naming it."""
    try:
        with (
            _large_pictures(),
            Image.open(str(where) if content is None else io.BytesIO(content), formats=_known()) as it,
        ):
            yield it
    except UnidentifiedImageError:
        raise UserError(f"{where}: cannot identify it as a picture of a format that is read") from None
    except Exception as error:  # a broken file makes Pillow raise almost anything
        raise UserError(f"{where}: {str(error) or type(error).__name__}") from error


def departs(content: bytes, background: str = "white") -> str:
    """How `read_picture` would depart from its usual way for a file of these bytes, mostly without decoding it."""
    try:
        with _large_pictures(), Image.open(io.BytesIO(content), formats=_known()) as opened:
            frame, transform = _turn_to_frame(opened), _to_srgb(opened)
            return _departs(frame, transform, _lies_on(opened, background))
    except Exception:  # it cannot be read: said where it is
        return ""


def _departs(frame: int, transform: object, colour: str) -> str:
    ways = {f"frame {frame}": frame, "to sRGB 1": transform is not None, f"on {colour}": colour}
    return " ".join(way for way, taken in ways.items() if taken)


def _lies_on(opened: Image.Image, background: str) -> str:
    """The colour behind a picture, as #rrggbb; "" where it is white, or nothing shows it."""
    red, green, blue = ImageColor.getrgb(background)[:3]
    colour = f"#{red:02x}{green:02x}{blue:02x}"
    return colour if colour != "#ffffff" and opened.has_transparency_data else ""


def _read(opened: Image.Image, background: str, small: bool) -> Opened:
    notes = []
    size = None
    if small and opened.format == "JPEG":
        size = opened.size[::-1] if opened.getexif().get(ExifTags.Base.Orientation) in _ON_ITS_SIDE else opened.size
        opened.draft(None, (1, 1))
    frame, count = _turn_to_frame(opened), getattr(opened, "n_frames", 1)
    if count > 1 and opened.format not in ("MPO", "PSD"):  # whose others are views of the whole, and layers of it
        before = ", since those before are of one colour" if frame else ""
        notes.append(f"the frame or page {frame + 1} of {count} is taken{before}")
    transform = _to_srgb(opened)
    if transform is None and opened.info.get("icc_profile") and not _fits(opened):
        notes.append("its colour profile cannot be used and is ignored")
    colour = _lies_on(opened, background)
    picture = _rgb(opened, transform, background)
    return Opened(picture, size or picture.size, _departs(frame, transform, colour), tuple(notes))


def _turn_to_frame(opened: Image.Image) -> int:
    """To the first frame of an animation that is not of one colour, since many begin with an empty one; its number."""
    if opened.format in _MOVING and getattr(opened, "is_animated", False):
        for frame in range(getattr(opened, "n_frames", 1)):
            opened.seek(frame)
            if opened.convert("RGBA").getcolors(1) is None:
                return frame
        opened.seek(0)
    return 0


def _rgb(opened: Image.Image, transform: "_Transform | None", background: str = "white") -> Image.Image:
    """Upright by EXIF, in sRGB, transparency on a colour."""
    picture = ImageOps.exif_transpose(opened)
    if picture.mode.startswith("I"):
        picture = _eight_bits(picture)
    elif picture.mode == "F":
        raise ValueError("its numbers have no known white; save it with 8 or 16 bits")
    if transform is not None:
        alpha = picture.convert("RGBA").getchannel("A") if picture.has_transparency_data else None
        picture = transform(picture)
        if alpha is not None:
            picture.putalpha(alpha)
    if picture.has_transparency_data:
        colours = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colours.size, background), colours).convert("RGB")
    return picture.convert("RGB")


def _eight_bits(picture: Image.Image) -> Image.Image:
    """16-bit greys (modes I;16 and I) to 8 bits; Pillow's own conversion clips all above 255 to white."""
    import numpy

    values = numpy.asarray(picture).astype(numpy.float64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("its numbers have no known white; save it with 8 or 16 bits")
    return Image.fromarray((values / 257).round().astype(numpy.uint8))


# Colours


class _Transform:
    """Colours of a profile to sRGB."""

    def __init__(self, profile: bytes) -> None:
        from PIL import ImageCms

        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        self.mode = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}[source.profile.xcolor_space]
        self._transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), self.mode, "RGB")
        self._lock = threading.Lock()  # it keeps the colour it met last

    def __call__(self, picture: Image.Image) -> Image.Image:
        from PIL import ImageCms

        with self._lock:
            found = ImageCms.applyTransform(picture.convert(self.mode), self._transform)
        assert found is not None
        return found

    def changes(self) -> bool:
        """Whether colours come out as others; those of the many makers' sRGB profiles do not."""
        import numpy

        steps = numpy.linspace(0, 255, 18).round().astype(numpy.uint8)
        bands = len(Image.new(self.mode, (1, 1)).getbands())
        colours = numpy.stack(numpy.meshgrid(*[steps] * min(bands, 3)), -1).reshape(-1, 18, min(bands, 3))
        if self.mode == "CMYK":
            return True
        before = Image.fromarray(colours if bands == 3 else colours[..., 0])
        difference = numpy.asarray(self(before)).astype(int) - numpy.asarray(before.convert("RGB")).astype(int)
        return bool(abs(difference).max() > _SAME_COLOUR)


@lru_cache(16)  # the pictures of a folder share a few
def _transform_of(profile: bytes) -> _Transform | None:
    """None where its colours are those of sRGB. Raises almost anything for what is no profile."""
    found = _Transform(profile)
    return found if found.changes() else None


def _fits(opened: Image.Image) -> bool:
    """Whether the picture's profile is one, and of such pictures."""
    try:
        transform = _Transform(opened.info["icc_profile"])
    except Exception:
        return False
    return _is_for(transform, opened)


def _is_for(transform: _Transform, opened: Image.Image) -> bool:
    grey = opened.mode in ("1", "L", "LA", "La") or opened.mode.startswith("I")
    return {"CMYK": opened.mode == "CMYK", "L": grey, "RGB": opened.mode != "CMYK"}[transform.mode]


def _to_srgb(opened: Image.Image) -> _Transform | None:
    """What brings the picture's colours to sRGB; None where they are, or its profile says nothing of use."""
    profile = opened.info.get("icc_profile")
    try:
        transform = _transform_of(profile) if profile else None
    except Exception:  # no profile, or one of colours that no picture here has: noted by `_read`
        return None
    return transform if transform is not None and _is_for(transform, opened) else None


# Pillow's limits


@cache
def _known() -> tuple[str, ...]:
    """The formats that this build of Pillow reads."""
    Image.init()
    return tuple(kind for kind in _FORMATS if kind in Image.OPEN)


_limits = threading.Lock()
_readers: list[tuple[int | None, int, int]] = []


@contextmanager
def _large_pictures() -> Iterator[None]:
    """Read what is large and sound: up to a billion pixels and 64 MiB of text in a PNG.

    Pillow's own limits guard a service against strangers' files, so they come back when the last reader is done.
    """
    with _limits:
        before = (Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)
        _readers.append(_readers[0] if _readers else before)
        Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = 2**29, 2**26, 2**28
    try:
        yield
    finally:
        with _limits:
            first = _readers.pop()
            if not _readers:
                Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = first
