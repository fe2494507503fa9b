"""The losses between two log lines, averaged whole and by quartile of t."""

from collections.abc import Mapping

from torch import Tensor

QUARTILES = 4


class LossWindow:
    """Sums of every term since the last log line, whole and by quartile of t; part of the checkpoint."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}

    def add(self, terms: Mapping[str, Tensor], t: Tensor, weight: Tensor, num_steps: int) -> None:
        """Add per-sample terms (N,), times the weights (N,) that undo the law of their t (N,), all on the CPU."""
        quartile = t * QUARTILES // num_steps
        for name, values in terms.items():
            sums = self.sums.setdefault(name, [0.0] * (2 * QUARTILES + 1))
            for q in range(QUARTILES):
                sums[q] += values[quartile == q].double().sum().item()
                sums[QUARTILES + q] += weight[quartile == q].double().sum().item()
            sums[-1] += len(values)

    def means(self) -> dict[str, float]:
        """`name` and `name_q1`..`name_q4` (q1 has the least noise); a quartile nobody visited is left out.

        A quartile is divided by its weights, since importance sampling does not visit it every fourth time.
        """
        out = {}
        for name, sums in self.sums.items():
            totals, weights, count = sums[:QUARTILES], sums[QUARTILES:-1], sums[-1]
            out[name] = sum(totals) / count
            out |= {f"{name}_q{q + 1}": totals[q] / weights[q] for q in range(QUARTILES) if weights[q]}
        return out
