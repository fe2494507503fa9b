"""Which steps of a process to keep: plain integers, no tensors. Symbols: `pixart_ft.diffusion`."""

from collections.abc import Sequence

from pixart_ft.diffusion.names import IndexSpacing, unknown


def spaced_indices(num_steps: int, count: int, spacing: IndexSpacing = "iddpm") -> list[int]:
    """`count` increasing indices into a process of `num_steps`, for a sampler that takes `count` steps.

    iddpm: both ends included (Nichol & Dhariwal 2021), except that a single step is T-1, where sampling
    starts; trailing: every (T/count)-th counted from T-1, as diffusers' DDIM has it; leading: every
    (T//count)-th from 0, which stops short of T-1. Raises ValueError when count is not in 1..T.
    """
    if not 1 <= count <= num_steps:
        raise ValueError(f"cannot take {count} steps of a process of {num_steps}; choose 1 to {num_steps}")
    if spacing == "iddpm":
        return _section_indices(num_steps, [count]) if count > 1 else [num_steps - 1]
    if spacing == "trailing":
        # diffusers calls numpy.arange, which rounds its step so; a plain T/count breaks some ties otherwise.
        stride = num_steps - (num_steps - num_steps / count)
        return [round(num_steps - i * stride) - 1 for i in reversed(range(count))]
    if spacing == "leading":
        return [i * (num_steps // count) for i in range(count)]
    raise unknown(spacing, "spacing", IndexSpacing)


def sampled_indices(num_steps: int, steps: int | str, spacing: IndexSpacing = "iddpm") -> list[int]:
    """The indices of a sampler's steps: a number of them by `spacing`, or as a respacing says, which has its own.

    Raises ValueError for what cannot be kept, and where the last section keeps its least noise alone: there sampling
    would begin.
    """
    if isinstance(steps, int):
        return spaced_indices(num_steps, steps, spacing)
    kept = kept_indices(num_steps, steps)
    if steps.endswith(",1"):
        raise ValueError(f"of the sections {steps} the last begins the sampling, by its least noise; give it 2 or more")
    return kept


def kept_indices(num_steps: int, spec: int | str | Sequence[int]) -> list[int]:
    """The indices that a respacing keeps, increasing (Nichol & Dhariwal 2021, sec. 4).

    `spec` as in `NoiseSchedule.respaced`. Raises ValueError for what cannot be kept.
    """
    if isinstance(spec, int):
        return _section_indices(num_steps, [spec])
    if not isinstance(spec, str):
        kept = [int(index) for index in spec]
        if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= num_steps:
            raise ValueError(f"kept indices must increase within 0..{num_steps - 1}, got {kept}")
        return kept
    try:
        if spec.startswith("ddim"):
            return _stride_indices(num_steps, int(spec.removeprefix("ddim")))
        counts = [int(part) for part in spec.split(",")]
    except ValueError as error:
        raise ValueError(
            f"cannot respace {num_steps} steps by {spec!r} ({error}); write '20', '10,10,10' or 'ddim20'"
        ) from error
    return _section_indices(num_steps, counts)


def _section_indices(num_steps: int, counts: list[int]) -> list[int]:
    kept: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        size = num_steps // len(counts) + (section < num_steps % len(counts))
        if not 1 <= count <= size:
            raise ValueError(f"cannot keep {count} of the {size} steps of section {section + 1}; choose 1 to {size}")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            # The authors' code accumulates the stride; exact multiples round differently for some counts.
            position += stride
        start += size
    return kept


def _stride_indices(num_steps: int, count: int) -> list[int]:
    for stride in range(1, num_steps + 1):
        if len(range(0, num_steps, stride)) == count:
            return list(range(0, num_steps, stride))
    raise ValueError(f"no integer stride gives exactly {count} steps")
