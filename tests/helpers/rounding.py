"""How far two results may lie apart that are equal in exact arithmetic. Shared by tests.

The same code on the same shapes and threads gives the same bits, on any processor: `torch.equal` is for that alone.
Another batch size, another kernel or a formula written in another order rounds otherwise, how depends on the
processor; then the bound is one of these, relative to the largest value.
"""

import numpy
from PIL import Image
from torch import Tensor

# One call of a tiny network in float32. Its some 30 operations in a row are sums of at most 256 products. Added one by
# one, n products err by sqrt(n / 2) roundings of 2^-24, of random sign, and so the operations' errors add up to
# sqrt(30) * sqrt(128) * 2^-24 = 3.7e-6; between two such results it is twice that. (Summed in blocks, as most kernels
# do, it is a tenth.)
CALL = 1e-5

# What a sampler of a few steps makes of it, at guidance 4.5: errors of all calls add up, and guidance alone makes up to
# 8 of one. tests/test_rounding.py measures that no sampler passes 16.
GROWTH = 16
PICTURE = GROWTH * CALL

# The same in float64, where nothing else is left: 2^-53 for 2^-24.
PICTURE_FLOAT64 = PICTURE * 2.0**-29


def gap(found: Tensor, wanted: Tensor) -> float:
    """The largest difference of two tensors of one shape, relative to the largest value of `wanted`."""
    assert found.shape == wanted.shape
    found, wanted = found.double(), wanted.double()
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def check_same_picture(found: Image.Image, wanted: Image.Image) -> None:
    """Assert that two decoded pictures differ by rounding alone.

    A decoder's output in -1..1 becomes a byte: it changes, by one, where it lies within 127.5 CALL of a half. Two in a
    thousand do, with outputs of a few units five times as many.
    """
    a, b = (numpy.asarray(picture).astype(int) for picture in (found, wanted))
    assert a.shape == b.shape
    assert abs(a - b).max() <= 1 and (a != b).mean() < 0.01
