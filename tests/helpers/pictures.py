"""Pictures as cameras, phones and other programs write them."""

import struct
from pathlib import Path

from PIL import ImageCms

from pixart_ft.data.rows import File, Row


def path_of(row: Row) -> Path:
    """The file of a row from a folder."""
    assert isinstance(row.where, Path | File)
    return Path(str(row.where))


def profile_of(primaries: dict[str, tuple[float, float, float]], gamma: float, space: bytes = b"RGB ") -> bytes:
    """An ICC version 2 profile of matrix and gamma, from the ICC's specification alone.

    primaries  XYZ under the D50 white of each of r, g, b; empty for a grey profile
    """
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    xyz = {f"{name}XYZ".encode(): _xyz(value) for name, value in primaries.items()}
    curves = {f"{name}TRC".encode(): curve for name in primaries} or {b"kTRC": curve}
    text = b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(8 + 3 + 67)
    copyright_ = b"text" + bytes(4) + b"none\0" + bytes(3)
    tags = {b"desc": text + bytes(-len(text) % 4), b"cprt": copyright_, b"wtpt": _xyz(_D50), **xyz, **curves}
    table, data, offset = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        table += struct.pack(">4sII", name, offset + len(data), len(value))
        data += value
    head = struct.pack(">I4sI4s4s4s", offset + len(data), bytes(4), 0x02100000, b"mntr", space, b"XYZ ")
    head += struct.pack(">6H4s", 2026, 1, 1, 0, 0, 0, b"acsp") + bytes(28) + _xyz(_D50)[8:] + bytes(48)
    return head + table + data


_D50 = (0.9642, 1.0, 0.8249)


def _xyz(value: tuple[float, float, float]) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(number * 65536) for number in value))


def wide_profile() -> bytes:
    """Adobe RGB (1998), its primaries adapted to D50, gamma 2.2."""
    primaries = {"r": (0.60974, 0.31111, 0.01947), "g": (0.20528, 0.62567, 0.06087), "b": (0.14919, 0.06322, 0.74457)}
    return profile_of(primaries, 2.2)


def srgb_profile() -> bytes:
    """Little CMS's own sRGB."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
