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


def or_whole(interval: Sequence[float], last: int) -> Interval:
    """The interval; WHOLE for one from 0 to `last`, or to one above, which are all the timesteps of a process."""
    low, high = interval
    return WHOLE if low == 0 and last <= high <= last + 1 else (float(low), float(high))


def end_faults(key: str, interval: Interval, last: int) -> list[str]:
    """What is wrong with the ends of an adapter's interval, of timesteps 0 to `last`; one above that is no mistake."""
    return [] if interval == WHOLE else _end_faults(key, interval, last, last + 1)


def guidance_interval_faults(interval: Interval | None, calls: Sequence[float] | None, last: int) -> list[str]:
    """What keeps guidance from acting between these two of the network's timesteps, 0 to `last`.

    calls: the timesteps of the network calls to come; None where a solver chooses its own.
    """
    if interval is None:
        return []
    key = "guidance_interval"
    return _end_faults(key, interval, last, last) or [
        f"{key} {shown(interval)} {idle}, so guidance would never act; {_unit(last)}" for idle in _idle(interval, calls)
    ]


def adapter_interval_faults(intervals: Sequence[Interval], calls: Sequence[float] | None, remedy: str) -> list[str]:
    """What keeps adapters from acting at any of the calls, as for guidance, and what to do."""
    return [
        f"the adapter acts at {shown(interval)} alone, which {idle}; {remedy}"
        for interval in dict.fromkeys(intervals)
        for idle in _idle(interval, calls)
    ]


def _end_faults(key: str, interval: Interval, last: int, most: int) -> list[str]:
    low, high = interval
    if low > high:
        return [f"{key} {shown(interval)} ends before it begins; {_unit(last)}"]
    if not 0 <= low <= high <= most:
        return [f"{key} {shown(interval)} reaches beyond the timesteps; {_unit(last)}"]
    return []


def _idle(interval: Interval, calls: Sequence[float] | None) -> list[str]:
    """That no call lies in it, where none does."""
    if calls is None or any(holds(interval, timestep) for timestep in calls):
        return []
    return [f"holds none of this run's {len(calls)} network calls, at timesteps {max(calls):g} to {min(calls):g}"]


def _unit(last: int) -> str:
    return f"it is in the network's timesteps, from 0 (the least noise) to {last}"
