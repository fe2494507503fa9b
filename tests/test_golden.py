"""Every golden array of the groups in scope, recomputed by the package's own functions in float64 and in float32.

Oracle: tests/golden/golden_dev.{json,npz}, made by an independent float64 implementation that was checked
against public reference code. The JSON drives everything: configurations, array names, roles. With
PIXART_FT_GOLDEN=PREFIX, PREFIX.json and PREFIX.npz are checked instead. Each group prints how many of its
expected arrays were compared; an expected array without a counterpart fails; what is not built yet is skipped
and counted as such. Tolerance: 1e-9 of max(1, |x|); in float32 see `float32_tolerance`.
"""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from pixart_ft.diffusion import likelihood, objectives, process, sigmas, solvers, weighting
from pixart_ft.diffusion.schedules import NoiseSchedule

PREFIX = os.environ.get("PIXART_FT_GOLDEN", str(Path(__file__).parent / "golden" / "golden_dev"))
TOLERANCE = 1e-9
NOT_YET = {
    "sigma": "samplers in sigma",
    "sde": "score samplers",
}


Variance = Literal["learned"] | process.FixedVariance
SPACES: dict[str, process.LossSpace] = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


@dataclass(frozen=True, eq=False, repr=False)
class Golden:
    """One pair of files: parts of the JSON, the role of each array by name, the arrays as tensors."""

    config: dict[str, Any]
    respacing: list[dict[str, Any]]
    roles: dict[str, str]
    arrays: dict[str, Tensor]

    def expected(self, group: str) -> list[str]:
        return [name for name, role in self.roles.items() if role == "expected" and name.startswith(f"{group}/")]

    def schedules(self, group: str, identifier: str) -> tuple[NoiseSchedule, NoiseSchedule]:
        """The original process of one configuration, and the (possibly respaced) one in use."""
        entries = self.config["schedules" if group == "schedule" else group]
        (entry,) = (entry for entry in entries if entry["id"] == identifier)
        original = build_schedule(entry)
        return original, original.respaced(entry["respacing"]) if "respacing" in entry else original


def build_schedule(entry: dict[str, Any]) -> NoiseSchedule:
    names = {"b0": "beta_start", "b1": "beta_end", "s": "offset", "cap": "max_beta", "rescale": "rescale"}
    arguments = {names[key]: value for key, value in entry.get("args", {}).items()}
    schedule = getattr(NoiseSchedule, entry["name"])(entry["T"], **arguments)
    return schedule.zero_terminal_snr() if entry.get("zero_snr") else schedule


@pytest.fixture(scope="module")
def golden() -> Golden:
    content = json.loads(Path(f"{PREFIX}.json").read_text())
    roles = {name: facts["role"] for name, facts in content["arrays"].items()}
    arrays = {name: torch.from_numpy(array) for name, array in np.load(f"{PREFIX}.npz").items()}
    return Golden(content["config"], content["respacing"], roles, arrays)


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
    kinds: dict[str, process.Kind] = {**SPACES, "mean": "posterior_mean", "score": "score"}
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
            return process.learned_log_variance(schedule, inputs["var_channels"], t)
    return None


def hybrid_value(golden: Golden, name: str) -> Tensor | None:
    _, identifier, decoder, *rest = name.split("/")
    _, schedule = golden.schedules("hybrid", identifier)
    inputs = {key: golden.arrays[f"hybrid/{identifier}/{decoder}/{key}"] for key in ("k", "x0", "eps", "model_output")}
    t, x0, eps = inputs["k"].long(), inputs["x0"], inputs["eps"]
    x_t = process.q_sample(schedule, x0, t, eps)
    if rest[-1] == "x_t":
        return x_t
    scale = 1.0
    if found := re.search(r"vb_scale_(?:lambda)?(T_over_1000|[\d.e+-]+)", name):
        scale = schedule.num_steps / 1000 if found[1] == "T_over_1000" else float(found[1])
    model_output = inputs["model_output"].clone().requires_grad_()
    names: dict[str, objectives.Decoder] = {"exact_cdf": "discretized", "tanh_cdf": "discretized_tanh"}
    terms = objectives.hybrid_loss(
        schedule, model_output, x0, x_t, eps, t, "epsilon",
        vlb_scale=scale, decoder=names.get(rest[0], "gaussian"),
    )  # fmt: skip
    if rest[-1] == "grad":
        return torch.autograd.grad(terms["loss"].mean(), model_output)[0]
    term = {"mse": "simple", "vb_bits": "vlb", "loss": "loss"}.get(rest[-1])
    return None if term is None else terms[term].detach()


def mixture_denoiser(golden: Golden, x: Tensor, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """E[x0 | x] and log p(x) of x = a x0 + s eps for the file's mixture: the network of its trajectories."""
    weights, means, variances = (golden.arrays[f"gmm/{key}"] for key in ("weights", "means", "variances"))
    noised = a**2 * variances + s**2
    distance = x.unsqueeze(1) - a * means
    log_each = weights.log() - 0.5 * (distance**2 / noised + torch.log(2 * torch.pi * noised)).flatten(2).sum(dim=2)
    share = torch.softmax(log_each, dim=1).view(len(x), -1, 1, 1, 1)
    return (share * (means + a * variances * distance / noised)).sum(dim=1), torch.logsumexp(log_each, dim=1)


def gmm_value(golden: Golden, name: str) -> Tensor | None:
    """Checks the mixture above, which the trajectories rely on."""
    _, check, array = name.split("/")
    x, (a, s) = golden.arrays[f"gmm/{check}/x"], golden.arrays[f"gmm/{check}/a_s"]
    x0_hat, log_density = mixture_denoiser(golden, x, a, s)
    eps = (x - a * x0_hat) / s
    return {"x0_hat": x0_hat, "eps": eps, "score": -eps / s, "logp": log_density}.get(array)


def mixture_network(golden: Golden, original: NoiseSchedule, x: Tensor, timesteps: Tensor) -> Tensor:
    """The network of trajectories and bounds: [eps of the mixture, sin(x + 0.01 timestep)] at original indices (N,)."""
    alpha_bar = process.at(original.alpha_bar, timesteps, x)
    x0, _ = mixture_denoiser(golden, x, alpha_bar[:1].sqrt(), (1 - alpha_bar[:1]).sqrt())
    eps = (x - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
    return torch.cat([eps, torch.sin(x + 0.01 * timesteps.to(x.dtype).view(-1, 1, 1, 1))], dim=1)


@functools.cache
def bound_of(golden: Golden, identifier: str, variance: str, decoder: objectives.Decoder) -> likelihood.Bound:
    original, schedule = golden.schedules("vlb", identifier)
    variances: dict[str, Variance] = {"learned_range": "learned", "small": "beta_tilde", "large": "beta"}
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
    known = variance in ("learned_range", "small", "large") and decoder in get_args(objectives.Decoder)
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


def traj_value(golden: Golden, name: str) -> Tensor | None:
    _, identifier, array = name.split("/")
    original, schedule = golden.schedules("traj", identifier)
    tables = {
        "timesteps": schedule.timesteps,
        "respaced_betas": schedule.betas,
        "respaced_posterior_log_variance_clipped": schedule.posterior_log_variance,
    }
    if array in tables:
        return tables[array]
    method = re.fullmatch(r"(i?ddpm|ddim)_(encode|eta[\d.]+|tilde_beta|beta|greedy|learned_range)(_clip)?", array)
    if method is None:
        return None

    def predict(x: Tensor, t: Tensor) -> process.Prediction:
        output = mixture_network(golden, original, x, schedule.timesteps[t])
        prediction = process.predict(schedule, output, x, t, "epsilon")
        return dataclasses.replace(prediction, x0=prediction.x0.clamp(-1, 1)) if method[3] else prediction

    def step(x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        prediction = predict(x, t)
        if method[2] == "encode":
            return solvers.ddim_encode_step(schedule, prediction, x, t)
        if method[1] == "ddim":
            eta = float(method[2].removeprefix("eta"))
            return solvers.ddim_step(schedule, prediction, x, t, eta=eta, noise=noise)
        variances: dict[str, solvers.Variance] = {
            "tilde_beta": "beta_tilde",
            "beta": "beta",
            "greedy": "none",
            "learned_range": "learned",
        }
        return solvers.ddpm_step(schedule, prediction, x, t, variance=variances[method[2]], noise=noise)

    encode = method[2] == "encode"
    states = [golden.arrays[f"traj/{identifier}/encode_x0" if encode else "traj/x_T"]]
    indices = range(schedule.num_steps - 1) if encode else reversed(range(schedule.num_steps))
    for index, noise in zip(indices, golden.arrays[f"traj/{identifier}/noise"], strict=False):
        states.append(step(states[-1], torch.full((len(states[0]),), index), noise))
    return torch.stack(states)


IN_SCOPE: dict[str, Callable[[Golden, str], Tensor | None]] = {
    "schedule": schedule_value,
    "pointwise": pointwise_value,
    "hybrid": hybrid_value,
    "vlb": vlb_value,
    "lookup": lookup_value,
    "gmm": gmm_value,
    "traj": traj_value,
}


def float32_tolerance(golden: Golden, name: str) -> Tensor | float:
    """1e-5 for values and 1e-4 for trajectories; more only where the arithmetic itself multiplies roundings.

    For values, 1e-6 times what roundings are multiplied by, if that is more: between x_t, x0 and eps
    1 / sqrt(alpha_bar) where there is little signal and 1 / sqrt(1 - alpha_bar) where there is little noise; from the
    posterior's mean also 1 / its weight of x0. Along a trajectory the largest sqrt(alpha_bar_prev / alpha_bar) of its
    steps. Shaped to broadcast against the array.
    """
    group, identifier, *_, array = name.split("/")
    _, schedule = golden.schedules(group, identifier)
    if group == "traj":
        return 1e-4 * (schedule.alpha_bar_prev / schedule.alpha_bar).max().sqrt().item()
    # What would need a signal where there is none is in no file, so there the factor does not matter.
    a, s = schedule.alpha_bar.sqrt(), (1 - schedule.alpha_bar).sqrt()
    factor = 1 / torch.minimum(torch.where(a > 0, a, 1), s)
    if array.startswith(("x0_from_mean", "eps_from_mean")):
        factor = factor / process.posterior_x0_weight(schedule)
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


def compare(golden: Golden, inputs: Golden, group: str, tolerance: Callable[[str], Tensor | float]) -> str:
    """Fails unless every expected array of a group has a counterpart within tolerance; returns what was compared."""
    names = golden.expected(group)
    problems, worst = [], 0.0
    for name in names:
        ours = IN_SCOPE[group](inputs, name)
        if ours is None:
            problems.append(f"{name}: no counterpart")
            continue
        difference = mismatch(ours, golden.arrays[name])
        worst = max(worst, difference.max().item())
        if bool((difference > tolerance(name)).any()):
            problems.append(f"{name}: off by {difference.max():.1e}")
    assert names, "the file has no expected array of this group"
    assert not problems, "\n".join(problems)
    return f"compared {len(names)} of {len(names)} expected arrays, worst {worst:.1e}"


@pytest.mark.parametrize("group", IN_SCOPE)
def test_group(golden: Golden, group: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = compare(golden, golden, group, lambda name: TOLERANCE)
    with capsys.disabled():
        print(f"\ngolden {group}: {report}", end=" ")


@pytest.mark.parametrize("group", ["pointwise", "hybrid", "vlb", "traj"])
def test_group_in_float32(golden: Golden, group: str, capsys: pytest.CaptureFixture[str]) -> None:
    single = dataclasses.replace(golden, arrays={name: array.float() for name, array in golden.arrays.items()})
    report = compare(golden, single, group, functools.partial(float32_tolerance, golden))
    with capsys.disabled():
        print(f"\ngolden {group} in float32: {report}", end=" ")


def test_respacing(golden: Golden, capsys: pytest.CaptureFixture[str]) -> None:
    for entry in golden.respacing:
        schedule = NoiseSchedule.linear(entry["T"]).respaced(entry["spec"])
        accepted = [entry["timesteps"], entry.get("timesteps_exact_rational", entry["timesteps"])]
        assert schedule.timesteps.tolist() in accepted, entry["spec"]
    with capsys.disabled():
        print(f"\ngolden respacing: compared {len(golden.respacing)} of {len(golden.respacing)} lists", end=" ")


@pytest.mark.parametrize("group", NOT_YET)
def test_not_yet_covered(golden: Golden, group: str) -> None:
    count = sum(group_of(name) == group for name, role in golden.roles.items() if role == "expected")
    pytest.skip(f"golden {group}: {count} expected arrays not yet covered ({NOT_YET[group]})")


def test_every_expected_array_belongs_to_a_known_group(golden: Golden) -> None:
    known = {*IN_SCOPE, *NOT_YET}
    assert {group_of(name) for name, role in golden.roles.items() if role == "expected"} <= known


def group_of(name: str) -> str:
    return name.split("/")[0]
