"""Intervals of the network's timesteps, both ends included: where guidance acts, where an adapter does. No torch."""

from collections.abc import Sequence

Interval = tuple[float, float]
WHOLE: Interval = (0.0, 1000.0)  # all timesteps of an adapter, whatever the length of its process


def shown(interval: Sequence[float]) -> str:
    """For messages: [0, 600]."""
    return f"[{interval[0]:g}, {interval[1]:g}]"


def holds(interval: Interval, timestep: float) -> bool:
    """Whether the timestep lies in it."""
    return interval == WHOLE or interval[0] <= timestep <= interval[1]


def covers(interval: Interval, other: Interval) -> bool:
    """Whether it holds all of the other."""
    return interval == WHOLE or interval[0] <= other[0] <= other[1] <= interval[1]


def guidance_interval_faults(interval: Interval | None, calls: Sequence[float] | None, last: int = 999) -> list[str]:
    """What keeps guidance from acting between these two of the network's timesteps, 0 to `last`.

    calls: the timesteps of the network calls to come; None where a solver chooses its own.
    """
    return _faults("guidance_interval", interval, calls, what="guidance", last=last)


def adapter_interval_faults(
    interval: Interval, calls: Sequence[float] | None, *, key: str = "lora_interval"
) -> list[str]:
    """What keeps an adapter from acting at the network's timesteps in `interval`; `calls` as for guidance."""
    return _faults(key, interval, calls, what="the adapter", last=round(WHOLE[1]))


def _faults(key: str, interval: Interval | None, calls: Sequence[float] | None, what: str, last: int) -> list[str]:
    if interval is None:
        return []
    low, high = interval
    unit = f"it is in the network's timesteps, from 0 (the least noise) to {last}"
    if low > high:
        return [f"{key} {shown(interval)} ends before it begins; {unit}"]
    if not 0 <= low <= high <= last:
        return [f"{key} {shown(interval)} reaches beyond the timesteps; {unit}"]
    if calls is not None and not any(holds(interval, timestep) for timestep in calls):
        return [
            f"{key} {shown(interval)} holds none of this run's {len(calls)} network calls, at timesteps "
            f"{max(calls):g} to {min(calls):g}, so {what} would never act; {unit}"
        ]
    return []
