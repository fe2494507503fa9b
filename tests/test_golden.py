"""Every expected array of the golden files, recomputed by the package's own functions in float64 and in float32.

Oracle: tests/golden/golden_dev.{json,npz}, made by an independent float64 implementation that was checked
against public reference code. The JSON drives everything: configurations, array names, roles. With
PIXART_FT_GOLDEN=PREFIX, PREFIX.json and PREFIX.npz are checked instead. Each group prints how many of its
expected arrays were compared; an expected array without a counterpart fails. The scheduler classes, driven step by
step with the files' noise, must reproduce the same trajectories. Tolerance: 1e-9 of max(1, |x|); in float32 see
`float32_tolerance`.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

from pixart_ft.diffusion import likelihood, objectives, process, sigmas, solvers, weighting
from pixart_ft.diffusion.names import Decoder, LossSpace, Quantity, Variance
from pixart_ft.diffusion.schedules import NoiseSchedule
from tests.helpers.golden_files import Golden, load_golden, mixture_denoiser, mixture_network
from tests.helpers.golden_samplers import LOOKUPS, sde_value, sigma_value, traj_value
from tests.helpers.golden_schedulers import scheduled_sigma_value, scheduled_traj_value

TOLERANCE = 1e-9

Value = Callable[[Golden, str], Tensor | None]  # the counterpart of an array, or None for a name that it does not know
SPACES: dict[str, LossSpace] = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


@pytest.fixture(scope="module")
def golden() -> Golden:
    return load_golden()


def schedule_value(golden: Golden, name: str) -> Tensor | None:
    _, identifier, array = name.split("/")
    _, schedule = golden.schedules("schedule", identifier)
    t, ones = torch.arange(schedule.num_steps), torch.ones(schedule.num_steps, 1, dtype=torch.float64)
    match array:
        case "posterior_mean_coef_x0":
            return process.q_posterior(schedule, ones, 0 * ones, t).mean[:, 0]
        case "posterior_mean_coef_xt":
            return process.q_posterior(schedule, 0 * ones, ones, t).mean[:, 0]
        case "alphas_cumprod":
            return schedule.alpha_bar
        case "posterior_log_variance_clipped":
            return schedule.posterior_log_variance
        case "karras_sigma":
            return schedule.sigmas
    if found := re.fullmatch(r"min_snr([\d.]+)_(eps|x0|v)", array):
        space = SPACES[found[2]]
        return weighting.loss_weights(schedule, "min_snr", space, min_snr_gamma=float(found[1]))
    return getattr(schedule, array, None)


def pointwise_value(golden: Golden, name: str) -> Tensor | None:
    _, identifier, array = name.split("/")
    _, schedule = golden.schedules("pointwise", identifier)
    inputs = {
        key: golden.arrays[f"pointwise/{identifier}/{key}"] for key in ("k", "x0", "eps", "other", "var_channels")
    }
    t, x0, eps, other = inputs["k"].long(), inputs["x0"], inputs["eps"], inputs["other"]
    x_t = process.q_sample(schedule, x0, t, eps)
    posterior = process.q_posterior(schedule, x0, x_t, t)
    kinds: dict[str, Quantity] = {**SPACES, "mean": "posterior_mean", "score": "score"}
    targets = {
        "eps": process.to_eps,
        "x0": process.to_x0,
        "v": process.to_v,
        "mean": process.to_posterior_mean,
        "score": process.to_score,
        "su": process.to_step_noise,
    }
    if found := re.fullmatch(r"(\w+)_from_(\w+)\(other\)", array):
        known = found[1] in targets and found[2] in kinds
        return targets[found[1]](schedule, other, x_t, t, kinds[found[2]]) if known else None
    if found := re.fullmatch(r"ddim_(sigma|posterior_mean)_eta([\d.]+)(\(x0,x_t\))?", array):
        if found[1] == "sigma":
            return solvers.ddim_sigma(schedule, float(found[2]))[t]
        prediction = process.predict(schedule, x0, x_t, t, "sample")
        return solvers.ddim_step(schedule, prediction, x_t, t, eta=float(found[2]), noise=torch.zeros_like(x_t))
    match array:
        case "x_t":
            return x_t
        case "v_from_x0_eps":
            return process.velocity(schedule, x0, eps, t)
        case "su_mean(other)":
            return process.to_posterior_mean(schedule, other, x_t, t, "step_noise")
        case "su_merge_eps(other,eps)":
            return process.merge_noises(schedule, eps, other, t)[0]
        case "su_merge_w(other,eps)":
            return process.merge_noises(schedule, eps, other, t)[1]
        case "posterior_mean(x0,x_t)":
            return posterior.mean
        case "posterior_variance":
            return posterior.variance
        case "posterior_log_variance_clipped":
            return posterior.log_variance
        case "learned_range_log_variance":
            return process.learned_range_log_variance(schedule, inputs["var_channels"], t)
    return None


def hybrid_value(golden: Golden, name: str) -> Tensor | None:
    _, identifier, decoder, *rest = name.split("/")
    _, schedule = golden.schedules("hybrid", identifier)
    inputs = {key: golden.arrays[f"hybrid/{identifier}/{decoder}/{key}"] for key in ("k", "x0", "eps", "model_output")}
    t, x0, eps = inputs["k"].long(), inputs["x0"], inputs["eps"]
    noised = process.Noised.of(schedule, x0, t, eps)
    if rest[-1] == "x_t":
        return noised.x_t
    scale = 1.0
    if found := re.search(r"vb_scale_(?:lambda)?(T_over_1000|[\d.e+-]+)", name):
        scale = schedule.num_steps / 1000 if found[1] == "T_over_1000" else float(found[1])
    model_output = inputs["model_output"].clone().requires_grad_()
    names: dict[str, Decoder] = {"exact_cdf": "discretized", "tanh_cdf": "discretized_tanh"}
    simple = objectives.simple_term(schedule, model_output, noised, "epsilon")
    variance_alone, decoder = objectives.variance_alone(model_output), names.get(rest[0], "gaussian")
    literal: Variance = "learned_range"
    vlb = objectives.vlb_term(schedule, variance_alone, noised, "epsilon", decoder=decoder, variance=literal)
    loss = simple + scale * vlb
    if rest[-1] == "grad":
        return torch.autograd.grad(loss.mean(), model_output)[0]
    term = {"mse": simple, "vb_bits": vlb, "loss": loss}.get(rest[-1])
    return None if term is None else term.detach()


def gmm_value(golden: Golden, name: str) -> Tensor | None:
    """Checks the mixture, which the trajectories rely on."""
    _, check, array = name.split("/")
    x, (a, s) = golden.arrays[f"gmm/{check}/x"], golden.arrays[f"gmm/{check}/a_s"]
    x0_hat, log_density = mixture_denoiser(golden, x, a, s)
    eps = (x - a * x0_hat) / s
    return {"x0_hat": x0_hat, "eps": eps, "score": -eps / s, "logp": log_density}.get(array)


@functools.cache
def bound_of(golden: Golden, identifier: str, variance: str, decoder: Decoder) -> likelihood.Bound:
    original, schedule = golden.schedules("vlb", identifier)
    variances: dict[str, Variance] = {"learned_range": "learned_range", "small": "beta_tilde", "large": "beta"}
    noise = golden.arrays[f"vlb/{identifier}/noise"]
    data = "gaussian" if decoder == "gaussian" else "discretized"
    return likelihood.variational_bound(
        schedule,
        functools.partial(mixture_network, golden, original),
        golden.arrays[f"vlb/{identifier}/x0_{data}"],
        "epsilon",
        noise=lambda index: noise[index],
        variance=variances[variance],
        decoder=decoder,
    )


def vlb_value(golden: Golden, name: str) -> Tensor | None:
    _, identifier, *rest = name.split("/")
    if rest == ["timesteps"]:
        return golden.schedules("vlb", identifier)[1].timesteps
    variance, decoder, array = rest
    names = {"vb": "terms", "prior": "prior", "total": "total", "x0_mse": "x0_mse", "eps_mse": "eps_mse"}
    known = variance in ("learned_range", "small", "large") and decoder in get_args(Decoder)
    return getattr(bound_of(golden, identifier, variance, decoder), names[array]) if known and array in names else None


def lookup_value(golden: Golden, name: str) -> Tensor | None:
    _, identifier, array = name.split("/")
    _, schedule = golden.schedules("lookup", identifier)
    lookups: dict[str, sigmas.Lookup] = {
        "k_log": "nearest_log",
        "k_linear": "nearest",
        "k_interp": "interpolated",
    }
    if array == "alphas_cumprod":
        return schedule.alpha_bar
    sigma = golden.arrays[f"lookup/{identifier}/sigma"]
    return sigmas.sigma_to_index(schedule, sigma, lookups[array]) if array in lookups else None


VALUES: dict[str, Value] = {
    "schedule": schedule_value,
    "pointwise": pointwise_value,
    "hybrid": hybrid_value,
    "vlb": vlb_value,
    "lookup": lookup_value,
    "gmm": gmm_value,
    "traj": traj_value,
    "sigma": sigma_value,
    "sde": sde_value,
}
SCHEDULED: dict[str, Value] = {"traj": scheduled_traj_value, "sigma": scheduled_sigma_value}
# No class clips x0, knows a network of sigma instead of a timestep, or is a lookup alone.
NOT_SCHEDULED = re.compile(r"traj/.*_clip|sigma/[^/]*/(exact/.*|.*/check_[kD])")


def scheduled(name: str) -> bool:
    """Whether a scheduler class makes this array; none takes an eta above DDPM's."""
    eta = re.search(r"eta([\d.]+)", name)
    return NOT_SCHEDULED.fullmatch(name) is None and (eta is None or float(eta[1]) <= 1)


def float32_tolerance(golden: Golden, name: str) -> Tensor | float:
    """1e-5 for values and 1e-4 for trajectories; more only where the arithmetic itself multiplies roundings.

    For values, 1e-6 times what roundings are multiplied by, if that is more: between x_t, x0 and eps
    1 / sqrt(alpha_bar) where there is little signal and 1 / sqrt(1 - alpha_bar) where there is little noise; from the
    posterior's mean also 1 / its weight of x0; from y to x0, sigma. Along a trajectory the largest
    sqrt(alpha_bar_prev / alpha_bar) of its steps. Shaped to broadcast against the array.
    """
    group, identifier, *_, array = name.split("/")
    if array in ("check_D", "marginal_t_a_s"):
        factor = 1 / golden.arrays[name][:, 2:]
        if array == "check_D":
            factor = golden.arrays[f"{name.removesuffix(array)}check_sigma"].view(-1, 1, 1, 1, 1)
        return (1e-6 * factor).clamp(min=1e-5)
    if array in ("sigmas", "check_k"):
        return 1e-5
    if group == "sigma":
        variances = 1 + golden.arrays[f"{name.removesuffix(array)}sigmas"] ** 2
        return 1e-4 * (variances[:-1] / variances[1:]).max().sqrt().item()
    if group == "sde":
        return 1e-4
    _, schedule = golden.schedules(group, identifier)
    if group == "traj":
        return 1e-4 * (schedule.alpha_bar_prev / schedule.alpha_bar).max().sqrt().item()
    # What would need a signal where there is none is in no file, so there the factor does not matter.
    a, s = schedule.alpha_bar.sqrt(), (1 - schedule.alpha_bar).sqrt()
    factor = 1 / torch.minimum(torch.where(a > 0, a, 1), s)
    if array.startswith(("x0_from_mean", "eps_from_mean")):
        factor = factor / schedule.posterior_x0_weight
    tolerance = (1e-6 * factor).clamp(min=1e-5)
    if group == "vlb":
        return tolerance if array in ("vb", "x0_mse", "eps_mse") else tolerance.max().item()
    return _at_indices_of(golden, name, tolerance)


def _at_indices_of(golden: Golden, name: str, table: Tensor) -> Tensor:
    """Entries of a table at the indices k of an array, which lie in its own folder or in one above it."""
    parts = name.split("/")
    folders = ("/".join(parts[:depth]) for depth in range(len(parts) - 1, 0, -1))
    k = next(golden.arrays[f"{folder}/k"] for folder in folders if f"{folder}/k" in golden.arrays)
    return table[k.long()].view(-1, *[1] * (golden.arrays[name].ndim - 1))


def mismatch(ours: Tensor, expected: Tensor) -> Tensor:
    """Difference over max(1, |expected|), elementwise; infinite where one is finite and the other is not."""
    ours = ours.to(torch.float64).broadcast_to(expected.shape)
    difference = torch.where(ours == expected, 0.0, (ours - expected).abs() / expected.abs().clamp(min=1))
    return difference.nan_to_num(nan=torch.inf)


def compare(
    golden: Golden, inputs: Golden, names: list[str], value: Value, tolerance: Callable[[str], Tensor | float]
) -> str:
    """Fails unless each of these arrays has a counterpart within tolerance; returns what was compared."""
    problems, worst = [], 0.0
    for name in names:
        ours = value(inputs, name)
        if ours is None:
            problems.append(f"{name}: no counterpart")
            continue
        difference = mismatch(ours, golden.arrays[name])
        worst = max(worst, difference.max().item())
        if bool((difference > tolerance(name)).any()):
            problems.append(f"{name}: off by {difference.max():.1e}")
    assert names, "the file has no expected array of this group"
    assert not problems, "\n".join(problems)
    return f"worst {worst:.1e}"


def in_float32(golden: Golden) -> Golden:
    """All arrays in float32 but the noise levels that are looked up, of which float32 is too coarse a notion."""
    kept = re.compile(r"sigma/.*/(check_sigma|sigmas)")
    arrays = {name: array if kept.fullmatch(name) else array.float() for name, array in golden.arrays.items()}
    return dataclasses.replace(golden, arrays=arrays)


def report(capsys: pytest.CaptureFixture[str], line: str) -> None:
    with capsys.disabled():
        print(f"\ngolden {line}", end=" ")


@pytest.mark.parametrize("group", VALUES)
def test_group(golden: Golden, group: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = golden.expected(group)
    worst = compare(golden, golden, names, VALUES[group], lambda name: TOLERANCE)
    report(capsys, f"{group}: compared {len(names)} of {len(names)} expected arrays, {worst}")


@pytest.mark.parametrize("group", ["pointwise", "hybrid", "vlb", "traj", "sigma", "sde"])
def test_group_in_float32(golden: Golden, group: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = golden.expected(group)
    worst = compare(golden, in_float32(golden), names, VALUES[group], functools.partial(float32_tolerance, golden))
    report(capsys, f"{group} in float32: compared {len(names)} of {len(names)} expected arrays, {worst}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("group", SCHEDULED)
def test_schedulers(golden: Golden, group: str, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]) -> None:
    """The scheduler classes, called as a pipeline calls them but with the files' noise, pass the same states."""
    names = [name for name in golden.expected(group) if scheduled(name)]
    if dtype == torch.float64:
        worst = compare(golden, golden, names, SCHEDULED[group], lambda name: TOLERANCE)
    else:
        tolerance = functools.partial(float32_tolerance, golden)
        worst = compare(golden, in_float32(golden), names, SCHEDULED[group], tolerance)
    total = len(golden.expected(group))
    report(
        capsys, f"{group} by schedulers in {str(dtype)[6:]}: compared {len(names)} of {total} expected arrays, {worst}"
    )


@pytest.mark.parametrize("variant", LOOKUPS)
@pytest.mark.parametrize("method", ["euler", "heun", "edm_alg2", "euler_churn", "euler_ancestral_eta0.7"])
def test_sigma_schedulers_where_the_file_may_not_go(golden: Golden, variant: str, method: str) -> None:
    """Coarse levels, where the lookups differ, and churn below its cap from the first step on: as the plain loop does.

    The loop is the one that the files prove; levels, timesteps and the start's variance are worked out by numpy.
    """
    chain = {"id": "coarse", "name": "linear", "T": 40, "args": {"rescale": True}, "sigma_min": 0.1, "sigma_max": 9.0}
    entry = chain | {"N": 9, "rho": 4.0, "churn": [1.5, 0.0, math.inf, 1.1]}
    shape = golden.arrays["gmm/means"].shape[1:]
    drawn = torch.randn(10, 2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    arrays = golden.arrays | {"sigma/coarse/latent": drawn[0], "sigma/coarse/noise": drawn[1:]}
    coarse = dataclasses.replace(golden, config={"sigma": [entry]}, arrays=arrays)
    for name in (f"sigma/coarse/{variant}/sigmas", f"sigma/coarse/{variant}/{method}"):
        expected = sigma_value(coarse, name)
        assert expected is not None
        coarse.arrays[name] = expected
        ours = scheduled_sigma_value(coarse, name)
        assert ours is not None and mismatch(ours, expected).max() < TOLERANCE


def test_respacing(golden: Golden, capsys: pytest.CaptureFixture[str]) -> None:
    for entry in golden.respacing:
        schedule = NoiseSchedule.linear(entry["T"]).respaced(entry["spec"])
        accepted = [entry["timesteps"], entry.get("timesteps_exact_rational", entry["timesteps"])]
        assert schedule.timesteps.tolist() in accepted, entry["spec"]
    report(capsys, f"respacing: compared {len(golden.respacing)} of {len(golden.respacing)} lists")


def test_every_expected_array_belongs_to_a_known_group(golden: Golden) -> None:
    assert golden.groups <= set(VALUES)
