"""The losses between two log lines, averaged whole and by quartile of t."""

from collections.abc import Mapping

from torch import Tensor

QUARTILES = 4


class LossWindow:
    """Sums of every term since the last log line, whole and by quartile of t; part of the checkpoint."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}

    def add(self, terms: Mapping[str, Tensor], t: Tensor, num_steps: int) -> None:
        """Add per-sample terms (N,) with their t (N,), all on the CPU."""
        quartile = t * QUARTILES // num_steps
        for name, values in terms.items():
            sums = self.sums.setdefault(name, [0.0] * (2 * QUARTILES))
            for q in range(QUARTILES):
                chosen = values[quartile == q].double()
                sums[q] += chosen.sum().item()
                sums[QUARTILES + q] += len(chosen)

    def means(self) -> dict[str, float]:
        """`name` and `name_q1`..`name_q4` (q1 has the least noise); a quartile nobody visited is left out."""
        out = {}
        for name, sums in self.sums.items():
            totals, counts = sums[:QUARTILES], sums[QUARTILES:]
            out[name] = sum(totals) / sum(counts)
            out |= {f"{name}_q{q + 1}": totals[q] / counts[q] for q in range(QUARTILES) if counts[q]}
        return out
