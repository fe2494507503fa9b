"""Picture metrics. Oracles: closed forms of Gaussian features, loops over pictures, invariances, simulation."""

import math
from collections.abc import Callable
from itertools import product
from math import prod

import numpy as np
import pytest
import torch
from torch import Tensor

from pixart_ft.config.evaluate import PictureMetric
from pixart_ft.errors import UserError
from pixart_ft.evaluation.held_out import mean_over_pictures, paired_difference
from pixart_ft.evaluation.metrics import (
    GROUPS,
    NEIGHBOURS,
    caption_similarity,
    cmmd,
    frechet_distance,
    gaussian_kernel,
    kid,
    memorisation,
    mmd,
    pictures_needed,
    prdc,
)

Metric = Callable[[Tensor, Tensor], Tensor]


def normal(count: int, width: int, seed: int, *, mean: float = 0.0, std: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return mean + std * torch.randn(count, width, generator=g, dtype=torch.float64)


def skewed(count: int, width: int, seed: int) -> Tensor:
    """Correlated and not Gaussian."""
    return normal(count, width, seed) @ normal(width, width, 99) + normal(count, width, seed + 50).exp()


def plain(a: np.ndarray, b: np.ndarray) -> float:
    """The Frechet distance as it is written, the root's trace by the eigenvalues of the product."""
    s, r = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(s @ r).real.clip(min=0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + r) - 2 * root)


def test_frechet_is_that_of_the_formula_extrapolated_by_a_line_in_one_over_n() -> None:
    a, b = skewed(60, 5, 1), skewed(80, 5, 2)
    cuts = [(np.delete(a.numpy(), np.s_[g::20], 0), np.delete(b.numpy(), np.s_[g::20], 0)) for g in range(20)]
    less, whole = np.array([plain(*cut) for cut in cuts]), plain(a.numpy(), b.numpy())
    slope, at_zero = np.polyfit(np.array([1.0, 20 / 19]), np.array([whole, less.mean()]), 1)  # in 1 / N, of all
    values = frechet_distance(a, b)
    assert values.mean().item() == pytest.approx(at_zero, rel=1e-9)
    assert slope > 0
    error = np.sqrt(19 / 20 * ((less - less.mean()) ** 2).sum())
    assert mean_over_pictures(values).standard_error == pytest.approx(error, rel=1e-9)


def moments(mean: Tensor, std: float) -> tuple[Tensor, Tensor, Tensor]:
    """The first three of N(mean, std^2 I)."""
    eye = torch.eye(len(mean), dtype=torch.float64)
    outer = torch.einsum("i,jk->ijk", mean, eye)
    third = torch.einsum("i,j,k->ijk", mean, mean, mean)
    third = third + std**2 * (outer + outer.permute(1, 0, 2) + outer.permute(1, 2, 0))
    return mean, torch.outer(mean, mean) + std**2 * eye, third


def cubic(m: tuple[Tensor, ...], n: tuple[Tensor, ...]) -> float:
    """E (x.y / D + 1)^3 of independent x and y with these moments."""
    d = len(m[0])
    return sum(math.comb(3, k + 1) * (m[k] * n[k]).sum().item() / d ** (k + 1) for k in range(3)) + 1


def rbf(m: Tensor, s: float, n: Tensor, r: float, sigma: float) -> float:
    """E exp(-|x - y|^2 / (2 sigma^2)) of x ~ N(m, s^2 I), y ~ N(n, r^2 I)."""
    wide = sigma**2 + s**2 + r**2
    return (sigma**2 / wide) ** (len(m) / 2) * math.exp(-((m - n) ** 2).sum().item() / (2 * wide))


@pytest.mark.parametrize("mean,std", [(0.0, 1.0), (0.4, 1.3)])
def test_distances_of_gaussians_are_the_closed_forms(mean: float, std: float) -> None:
    """Of 40 draws of few pictures the mean is the truth to its error, and of the 95 % intervals most hold it."""
    d, repeats = 4, 40
    zero, shift = torch.zeros(d, dtype=torch.float64), torch.full((d,), mean, dtype=torch.float64)
    of_a, of_b = moments(shift, std), moments(zero, 1.0)
    metrics: dict[str, tuple[Metric, float]] = {
        "fd": (frechet_distance, d * (mean**2 + (std - 1) ** 2)),
        "kid": (kid, cubic(of_a, of_a) + cubic(of_b, of_b) - 2 * cubic(of_a, of_b)),
        "rbf": (
            lambda a, b: mmd(a, b, gaussian_kernel(2.0)),
            rbf(shift, std, shift, std, 2.0) + rbf(zero, 1.0, zero, 1.0, 2.0) - 2 * rbf(shift, std, zero, 1.0, 2.0),
        ),
    }
    for name, (metric, truth) in metrics.items():
        found = [
            mean_over_pictures(metric(normal(100, d, seed, mean=mean, std=std), normal(80, d, 1000 + seed)))
            for seed in range(repeats)
        ]
        means = torch.tensor([each.mean for each in found], dtype=torch.float64)
        assert abs(means.mean() - truth) < 4 * means.std() / repeats**0.5, name
        held = sum(abs(each.mean - truth) < 2.09 * each.standard_error for each in found)  # Student's t, 19 degrees
        assert held >= 33, (name, held)  # of 40 at 95 %: less once in 2000 times


def test_the_plain_frechet_distance_of_few_pictures_is_far_too_large() -> None:
    """What the extrapolation is for: 40 features of 50 pictures, both sets of one law."""
    a, b = normal(50, 40, 1), normal(50, 40, 2)
    assert plain(a.numpy(), b.numpy()) > 10
    assert abs(frechet_distance(a, b).mean().item()) < 3


def test_kernel_distances_are_the_double_loops() -> None:
    a, b = skewed(7, 3, 1), skewed(9, 3, 2)

    def loops(kernel: Callable[[Tensor, Tensor], float], a: Tensor, b: Tensor) -> float:
        def of_one(x: Tensor) -> float:
            pairs = [(i, j) for i, j in product(range(len(x)), repeat=2) if i != j]
            return sum(kernel(x[i], x[j]) for i, j in pairs) / len(pairs)

        return of_one(a) + of_one(b) - 2 * sum(kernel(x, y) for x, y in product(a, b)) / (len(a) * len(b))

    cubes = loops(lambda x, y: (x.dot(y).item() / 3 + 1) ** 3, a, b)
    assert kid(a, b).mean().item() == pytest.approx(cubes, rel=1e-9)
    unit_a, unit_b = a / a.norm(dim=1)[:, None], b / b.norm(dim=1)[:, None]
    gaussian = loops(lambda x, y: math.exp(-((x - y) ** 2).sum().item() / 200), unit_a, unit_b)
    assert cmmd(a, b).mean().item() == pytest.approx(1000 * gaussian, rel=1e-9)
    for metric, (x, y) in ((kid, (a, b)), (cmmd, (unit_a, unit_b))):
        values = metric(x, y)
        assert len(values) == len(a) < GROUPS
        less = torch.stack([metric(x[[r for r in range(7) if r != g]], y[[r for r in range(9) if r % 7 != g]]).mean()
                            for g in range(7)])  # fmt: skip
        torch.testing.assert_close(values, values.mean() + 6 * (less.mean() - less), rtol=1e-9, atol=1e-12)


def test_cmmd_of_two_points_is_its_closed_form() -> None:
    a = torch.tensor([[3.0, 0.0]] * 8, dtype=torch.float64)
    b = torch.tensor([[0.0, 0.5]] * 8, dtype=torch.float64)
    assert cmmd(a, b).mean().item() == pytest.approx(1000 * (2 - 2 * math.exp(-2 / 200)), rel=1e-9)
    assert cmmd(a, a).abs().max() < 1e-9


def test_precision_recall_density_and_coverage_are_the_loops() -> None:
    generated, real = normal(14, 3, 4, mean=1.5, std=1.5), normal(17, 3, 14)

    def balls(x: Tensor) -> list[float]:
        return [sorted((x - x[i]).norm(dim=1).tolist())[NEIGHBOURS] for i in range(len(x))]

    of_real, of_generated = balls(real), balls(generated)
    lies = [[(g - r).norm().item() <= ball for r, ball in zip(real, of_real, strict=True)] for g in generated]
    other = [[(g - r).norm().item() <= ball for r in real] for g, ball in zip(generated, of_generated, strict=True)]
    wanted = {
        "precision": sum(map(any, lies)) / 14,
        "recall": sum(any(column) for column in zip(*other, strict=True)) / 17,
        "density": sum(map(sum, lies)) / 14 / 5,
        "coverage": sum(any(column) for column in zip(*lies, strict=True)) / 17,
    }
    assert wanted["precision"] < 1 and wanted["recall"] < 1
    assert {name: value.mean().item() for name, value in prdc(generated, real).items()} == pytest.approx(wanted)


def test_density_and_coverage_of_one_law_are_their_closed_forms() -> None:
    """Naeem et al. 2020, appendix: whatever the law. 60 draws."""
    n, m, repeats = 30, 24, 60
    found = [prdc(skewed(n, 3, 100 + seed), skewed(m, 3, 1000 + seed)) for seed in range(repeats)]
    truths = {"density": 1.0, "coverage": 1 - prod((m - i) / (n + m - i) for i in range(1, NEIGHBOURS + 1))}
    for name, truth in truths.items():
        values = torch.stack([each[name].mean() for each in found])
        assert abs(values.mean() - truth) < 4 * values.std() / repeats**0.5, name


def test_a_generator_of_one_kind_has_precision_and_no_recall() -> None:
    kinds = torch.tensor([[-10.0, 0, 0], [10, 0, 0]], dtype=torch.float64)
    real = normal(200, 3, 1) + kinds[torch.arange(200) % 2]
    found = {name: value.mean().item() for name, value in prdc(normal(200, 3, 2) + kinds[0], real).items()}
    assert found["precision"] > 0.8 and found["density"] > 0.8
    assert found["recall"] < 0.55 and found["coverage"] < 0.55


def test_metrics_ignore_turns_and_shifts_that_they_should() -> None:
    a, b = skewed(50, 4, 1), skewed(40, 4, 2) + 0.3
    turn = torch.linalg.qr(normal(4, 4, 7)).Q
    moved: list[tuple[Metric, Callable[[Tensor], Tensor]]] = [
        (frechet_distance, lambda x: x @ turn + 3),
        (kid, lambda x: x @ turn),
        (cmmd, lambda x: 5 * x @ turn),
        (lambda x, y: prdc(x, y)["density"], lambda x: 2 * x @ turn - 1),
    ]
    for metric, move in moved:
        torch.testing.assert_close(metric(move(a), move(b)), metric(a, b), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(frechet_distance(a, b[:40]).mean(), frechet_distance(b[:40], a).mean())
    assert kid(a, a)[0].item() < 0  # the unbiased estimate; the pairs of a picture with itself are one set's alone


def test_models_of_one_law_do_not_differ_and_a_worse_one_does_by_its_pairs() -> None:
    """Pictures of one caption are alike in both models, so their difference has a smaller error than either."""
    real, subject = normal(300, 4, 1), normal(300, 4, 2)
    model, other = (0.9 * subject + 0.44 * normal(300, 4, seed) for seed in (3, 4))
    for metric in (frechet_distance, kid):
        good, bad, too = (metric(pictures, real) for pictures in (model, model + 0.5, other + 0.5))
        same, change = paired_difference(bad, too), paired_difference(good, bad)
        assert abs(same.mean) < 3 * same.standard_error
        assert change.mean > 3 * change.standard_error
        assert same.standard_error < 0.8 * mean_over_pictures(bad).standard_error


def test_pictures_of_one_prompt_count_as_one() -> None:
    """Four a prompt, which differ little: the error is what the metric spreads by over draws of other prompts."""
    real, repeats, each = normal(200, 3, 1), 30, 4
    captions = normal(24, 3, 2)

    def fits(pictures: Tensor, _: Tensor, each: int) -> Tensor:
        return caption_similarity(pictures, captions, torch.arange(24).repeat_interleave(4), each)["clip_score"]

    for metric in (frechet_distance, kid, fits):
        means, errors = [], []
        for seed in range(repeats):
            prompts = normal(24, 3, 100 + seed, mean=0.7).repeat_interleave(each, 0)
            found = mean_over_pictures(metric(prompts + normal(96, 3, 900 + seed, std=0.2), real, each))
            means.append(found.mean)
            errors.append(found.standard_error)
        spread = torch.tensor(means).std().item()
        assert 0.7 < np.sqrt(np.mean(np.square(errors))) / spread < 1.6, metric
    one = normal(24, 3, 5)
    copies = caption_similarity(one.repeat_interleave(4, 0), captions, torch.arange(24).repeat_interleave(4), 4)
    for name, values in caption_similarity(one, captions, torch.arange(24)).items():
        torch.testing.assert_close(copies[name], values)


def test_captions_are_told_by_cosines() -> None:
    captions = torch.tensor([[2.0, 0], [0, 1], [-1, 0]], dtype=torch.float64)
    pictures = torch.tensor([[3.0, 4], [1, 0], [0, -2], [1, 0]], dtype=torch.float64)
    found = caption_similarity(pictures, captions, torch.tensor([0, 0, 1, 2]))
    torch.testing.assert_close(found["clip_score"], torch.tensor([60.0, 100, 0, 0], dtype=torch.float64))
    assert found["caption_first"].tolist() == [0, 1, 0, 0]


def test_memorisation_is_chance_for_new_pictures_and_certain_for_copies() -> None:
    """Where all pictures are of one law, the nearest of M + H is a training picture with chance M / (M + H)."""
    repeats, found = 40, []
    for seed in range(repeats):
        found.append(memorisation(normal(50, 3, seed), normal(60, 3, 100 + seed), normal(20, 3, 200 + seed)))
    assert found[0].chance == 0.75
    for name, truth in (("share", 0.75), ("closer", 0.5)):
        estimates = [mean_over_pictures(getattr(each, name)) for each in found]
        means = torch.tensor([each.mean for each in estimates], dtype=torch.float64)
        assert abs(means.mean() - truth) < 4 * means.std() / repeats**0.5, name
        assert sum(abs(e.mean - truth) < 2.09 * e.standard_error for e in estimates) >= 33, name
    training, held_out = normal(60, 3, 1), normal(20, 3, 2)
    copies = memorisation(training[10:40] + 1e-9, training, held_out)
    assert [each.mean().item() for each in (copies.share, copies.closer)] == pytest.approx([1, 1])
    assert copies.training.tolist() == list(range(10, 40))
    assert copies.training_distance.max() < 1e-8
    nearest = (training[10:40, None] - held_out).norm(dim=2).min(1)
    torch.testing.assert_close(copies.held_out_distance, nearest.values, atol=1e-8, rtol=0)
    assert copies.held_out.tolist() == nearest.indices.tolist()


@pytest.mark.parametrize("metric", ["fd", "kid", "cmmd", "prdc", "memorisation"])
def test_too_few_pictures_and_other_widths_are_said(metric: PictureMetric) -> None:
    calls: dict[PictureMetric, Callable[..., object]] = {
        "fd": frechet_distance, "kid": kid, "cmmd": cmmd, "prdc": prdc,
        "memorisation": lambda a, b: memorisation(a, b, b),
    }  # fmt: skip
    call = calls[metric]
    needed = pictures_needed(metric, 6)
    call(normal(needed, 6, 1), normal(needed, 6, 2))
    with pytest.raises(UserError, match=f"metrics: {metric} of {needed - 1} pictures with 6 .*needs {needed} of every"):
        call(normal(needed, 6, 1), normal(needed - 1, 6, 2))
    with pytest.raises(UserError, match="6 and 7 numbers; compare those of one extractor"):
        call(normal(40, 6, 1), normal(40, 7, 2))
