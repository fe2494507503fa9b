"""How near generated pictures are to real ones, and to their captions: statistics of feature vectors.

Features are (N, D) float64, one row a picture, all of one extractor. Every metric gives values whose mean is the metric
and whose spread is its error, as `held_out.mean_over_pictures` reads them: one a picture where the metric is a mean
over pictures, else one a group. A group is every twentieth row of all sets together; its value is the jackknife's
pseudo-value, told by what the metric changes by when the group is left out (Quenouille 1956; Tukey 1958). `each`
generated pictures of one prompt stand one after another and are no chances of their own: together they are one value,
or leave in one group. So `held_out.paired_difference` compares two models that drew the same captions, row by row, and
were held against the same pictures. Where two sets agree, the metric is degenerate and the error too large, up to
twice: a difference may then be missed, but none is made up.

Every function raises UserError where there are too few pictures for its metric (`pictures_needed`) and where the sets'
features have different widths.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pixart_ft.config.evaluate import PictureMetric
from pixart_ft.errors import UserError

GROUPS = 20
NEIGHBOURS = 5  # of precision, recall, density and coverage; Naeem et al. 2020, sec. 4
_CMMD_SIGMA, _CMMD_SCALE = 10.0, 1000.0  # Jayasumana et al. 2024, sec. 4


def pictures_needed(metric: PictureMetric, width: int) -> int:
    """The least number of pictures of each set that a metric takes, for features of this width."""
    match metric:
        case "fd":  # a group less must leave a covariance of full rank; from 1.2 D on the extrapolation is good
            return max(int(1.2 * width) + 2, 4)
        case "prdc":
            return 2 * (NEIGHBOURS + 1)
        case "clip":
            return 2
    return 4


def frechet_distance(generated: Tensor, real: Tensor, each: int = 1) -> Tensor:
    """|m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)) of the two sets' means and covariances (Heusel et al. 2017), (groups,).

    Of N pictures it is too large by about c / N. The mean of these values is extrapolated to 1 / N = 0 (the jackknife's
    correction, to the same end as Chong & Forsyth 2020), so it may be negative where the sets agree.
    """
    _check("fd", generated, real)
    return _jackknife(_frechet, generated, real, each=each, extrapolated=True)


def kid(generated: Tensor, real: Tensor, each: int = 1) -> Tensor:
    """Squared MMD with the kernel (x.y / D + 1)^3, unbiased (Binkowski et al. 2018), (groups,); 0 where both agree."""
    _check("kid", generated, real)
    return mmd(generated, real, lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3, each)


def cmmd(generated: Tensor, real: Tensor, each: int = 1) -> Tensor:
    """1000 times the unbiased squared MMD of rows of length 1, Gaussian kernel of width 10, (groups,).

    Jayasumana et al. 2024, made for CLIP's features. Their code takes the biased estimate, which is larger by 1000 / N
    times 1 - the mean kernel of the set's pairs, for each of the two sets.
    """
    _check("cmmd", generated, real)
    return _CMMD_SCALE * mmd(_unit(generated), _unit(real), gaussian_kernel(_CMMD_SIGMA), each)


def gaussian_kernel(sigma: float) -> Callable[[Tensor, Tensor], Tensor]:
    """exp(-|x - y|^2 / (2 sigma^2)) of all pairs."""
    return lambda x, y: (-(_distances(x, y) ** 2) / (2 * sigma**2)).exp()


def mmd(a: Tensor, b: Tensor, kernel: Callable[[Tensor, Tensor], Tensor], each: int = 1) -> Tensor:
    """The unbiased squared maximum mean discrepancy (Gretton et al. 2012, eq. 3), (groups,).

    E k(a, a') + E k(b, b') - 2 E k(a, b), pairs of a picture with itself left out. kernel: (N, D), (M, D) -> (N, M).
    """
    of_a, of_b, cross = kernel(a, a), kernel(b, b), kernel(a, b)

    def estimate(i: Tensor, j: Tensor) -> Tensor:
        return _mean_of_pairs(of_a[i][:, i]) + _mean_of_pairs(of_b[j][:, j]) - 2 * cross[i][:, j].mean()

    return _jackknife(estimate, torch.arange(len(a)), torch.arange(len(b)), each=each)


def prdc(generated: Tensor, real: Tensor, each: int = 1) -> dict[str, Tensor]:
    """Precision, recall, density, coverage, each (groups,): are the pictures like real ones, and are all kinds there.

    A ball around a picture reaches to the 5th nearest of its own set. Precision: the share of generated pictures in the
    ball of a real one; recall: of real ones in that of a generated one (Kynkaanniemi et al. 2019). Density: the number
    of real balls that a generated picture lies in, over 5; 1 where both sets agree. Coverage: the share of real balls
    that a generated picture lies in; where N generated and M real ones agree, 1 - prod_{i=1..5} (M - i) / (N + M - i)
    (Naeem et al. 2020).
    """
    _check("prdc", generated, real)
    of_generated, of_real, cross = (
        _distances(x, y) for x, y in ((generated, generated), (real, real), (generated, real))
    )

    def estimate(i: Tensor, j: Tensor) -> Tensor:
        between = cross[i][:, j]
        in_real = between <= _radii(of_real[j][:, j])
        in_generated = between <= _radii(of_generated[i][:, i])[:, None]
        shares = [in_real.any(1), in_generated.any(0), in_real.sum(1) / NEIGHBOURS, in_real.any(0)]
        return torch.stack([share.double().mean() for share in shares])

    values = _jackknife(estimate, torch.arange(len(generated)), torch.arange(len(real)), each=each)
    return dict(zip(("precision", "recall", "density", "coverage"), values.T, strict=True))


def caption_similarity(pictures: Tensor, captions: Tensor, own: Tensor, each: int = 1) -> dict[str, Tensor]:
    """How well pictures (N, D) fit their captions, each (N / each,), by an extractor with a text half.

    captions (C, D): the features of C different texts; own (N,): which of them is each picture's. "clip_score" is
    100 max(cos, 0) of a picture and its caption (Hessel et al. 2021, with 100 for their 2.5). "caption_first" is 1
    where no other caption is more like the picture, else 0; by chance its mean is 1 / C.
    """
    _check("clip", pictures)
    _check_widths(pictures, captions)
    cosines = _unit(pictures) @ _unit(captions).T
    of_own = cosines.gather(1, own[:, None])
    found = {"clip_score": 100 * of_own[:, 0].clamp(min=0), "caption_first": (cosines <= of_own).all(1).double()}
    return {name: values.view(-1, each).mean(1) for name, values in found.items()}


@dataclass(frozen=True)
class Memorisation:
    """Whether generated pictures are nearer to those of the training than to others of its kind.

    share     (groups,) of the generated pictures whose nearest real one was trained on
    chance    what the mean of `share` is where nothing is memorised: the training's share of the real pictures
    closer    (groups,) how often a generated picture is closer to the training set than a held-out one is (Meehan et
              al. 2020, as the area under the curve): 0.5 where nothing is memorised, less where they are far from any
    training, held_out                    (N,) int64, the nearest picture of each set
    training_distance, held_out_distance  (N,) how far it is
    """

    share: Tensor
    chance: float
    closer: Tensor
    training: Tensor
    held_out: Tensor
    training_distance: Tensor
    held_out_distance: Tensor


def memorisation(generated: Tensor, training: Tensor, held_out: Tensor, each: int = 1) -> Memorisation:
    """Nearest neighbours of each generated picture among those trained on and those held out.

    Where pictures are drawn from the captions of one of the two sets, they are nearer to that one by their subject
    alone: draw from the held-out captions, and what is found is memorised.
    """
    _check("memorisation", generated, training, held_out)
    to_training, to_held_out, between = (
        _distances(x, y) for x, y in ((generated, training), (generated, held_out), (held_out, training))
    )

    def estimate(i: Tensor, j: Tensor, k: Tensor) -> Tensor:
        near, far, control = (d.amin(1) for d in (to_training[i][:, j], to_held_out[i][:, k], between[k][:, j]))
        return torch.stack([_wins(near, far).mean(), _wins(near[:, None], control).mean()])

    rows = (torch.arange(len(x)) for x in (generated, training, held_out))
    share, closer = _jackknife(estimate, *rows, each=each).T
    near, far = to_training.min(1), to_held_out.min(1)
    chance = len(training) / (len(training) + len(held_out))
    return Memorisation(share, chance, closer, near.indices, far.indices, near.values, far.values)


def _wins(a: Tensor, b: Tensor) -> Tensor:
    """1 where a < b, a half where they are equal."""
    return (a < b).double() + 0.5 * (a == b)


def _frechet(a: Tensor, b: Tensor) -> Tensor:
    """With S = R^T R and S' = R'^T R', the trace of (S S')^(1/2) is the sum of the singular values of R R'^T."""
    roots = [torch.linalg.qr((x - x.mean(0)) / (len(x) - 1) ** 0.5, mode="r").R for x in (a, b)]
    cross = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + sum((root**2).sum() for root in roots) - 2 * cross


def _jackknife(statistic: Callable[..., Tensor], *sets: Tensor, each: int = 1, extrapolated: bool = False) -> Tensor:
    """Pseudo-values (groups, ...) of a statistic of several sets of rows, which lose the same group together.

    Their mean is the statistic, or where it is `extrapolated` what the sizes of all and of all but a group lead to.
    each: rows of the first set, one after another, that are of one group.
    """
    units = [torch.arange(len(rows)) // (each if i == 0 else 1) for i, rows in enumerate(sets)]
    groups = min(GROUPS, *(int(unit[-1]) + 1 for unit in units))
    whole = statistic(*sets)
    without = [[rows[unit % groups != g] for rows, unit in zip(sets, units, strict=True)] for g in range(groups)]
    parts = torch.stack([statistic(*rest) for rest in without])
    centre = groups * whole - (groups - 1) * parts.mean(0) if extrapolated else whole
    return centre + (groups - 1) * (parts.mean(0) - parts)


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean, (N, M); exactly 0 between equal rows, which the quicker way by products is not."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(distances: Tensor) -> Tensor:
    """From each row to its 5th nearest neighbour, itself left out."""
    return distances.kthvalue(NEIGHBOURS + 1, dim=1).values


def _mean_of_pairs(kernel: Tensor) -> Tensor:
    return (kernel.sum() - kernel.trace()) / (len(kernel) * (len(kernel) - 1))


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=1)


def _check(metric: PictureMetric, *sets: Tensor) -> None:
    _check_widths(*sets)
    least, needed = min(len(rows) for rows in sets), pictures_needed(metric, sets[0].shape[1])
    if least < needed:
        raise UserError(
            f"metrics: {metric} of {least} pictures with {sets[0].shape[1]} features each; it needs {needed} of every "
            "set: take more" + (", or kid or cmmd, which take fewer, or another extractor" if metric == "fd" else "")
        )


def _check_widths(*sets: Tensor) -> None:
    widths = sorted({rows.shape[1] for rows in sets})
    if len(widths) > 1:
        raise UserError(f"features have {' and '.join(map(str, widths))} numbers; compare those of one extractor")
