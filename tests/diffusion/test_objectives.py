"""The losses. Oracles: closed forms, exact zeros of gradients, float64. See also test_golden.py."""

import math
from dataclasses import replace
from typing import cast, get_args

import pytest
import torch
from torch import Tensor

from pixart_ft.diffusion import process
from pixart_ft.diffusion.names import FixedVariance, LossSpace, Norm, PredictionType, SuForm
from pixart_ft.diffusion.objectives import simple_term, su_factors, su_term, variance_alone, vlb_term
from pixart_ft.diffusion.process import Noised
from pixart_ft.diffusion.schedules import NoiseSchedule
from pixart_ft.diffusion.weighting import loss_weights
from tests.helpers.networks import randn

LINEAR, COSINE = NoiseSchedule.linear(), NoiseSchedule.cosine()
ZERO_SNR = LINEAR.zero_terminal_snr()
T = torch.tensor([0, 1, 500, 999])
TYPES: tuple[PredictionType, ...] = get_args(PredictionType)


def batch(schedule: NoiseSchedule = LINEAR) -> Noised:
    """Data noised to the four indices T."""
    return Noised.of(schedule, randn(4, 4, 3, 3), T, randn(4, 4, 3, 3, seed=1))


def output_for(kind: PredictionType, x0: Tensor, x_t: Tensor, schedule: NoiseSchedule = LINEAR) -> Tensor:
    """What a network of that kind says at the indices T when it means this x0."""
    converters = {
        "epsilon": process.to_eps,
        "sample": process.to_x0,
        "v_prediction": process.to_v,
        "posterior_mean": process.to_posterior_mean,
        "score": process.to_score,
        "step_noise": process.to_step_noise,
    }
    return converters[kind](schedule, x0, x_t, T, "sample")


@pytest.mark.parametrize("space", TYPES)
@pytest.mark.parametrize("prediction_type", TYPES)
def test_each_half_of_the_output_is_moved_by_its_own_term_alone(
    prediction_type: PredictionType, space: LossSpace
) -> None:
    noised = batch()
    output = randn(4, 8, 3, 3, seed=2).requires_grad_()
    vlb = vlb_term(LINEAR, variance_alone(output), noised, prediction_type)
    (by_vlb,) = torch.autograd.grad(vlb.sum(), output)
    (by_simple,) = torch.autograd.grad(simple_term(LINEAR, output, noised, prediction_type, space=space).sum(), output)
    assert (by_vlb[:, :4] == 0).all() and (by_simple[:, 4:] == 0).all()
    assert (by_vlb[:, 4:] != 0).all() and (by_simple[:, :4] != 0).all()
    whole = vlb_term(LINEAR, output, noised, prediction_type)
    torch.testing.assert_close(whole, vlb, rtol=0, atol=0)
    assert (torch.autograd.grad(whole.sum(), output)[0] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_terms_of_a_half_precision_output_are_finite_and_equal_float64(
    schedule: NoiseSchedule, prediction_type: PredictionType, dtype: torch.dtype
) -> None:
    noised = batch(schedule)
    half = Noised(noised.x0.float(), noised.eps.float(), T, noised.x_t.float())
    output = (3 * randn(4, 8, 3, 3, seed=2, dtype=dtype)).requires_grad_()
    for find in (simple_term, vlb_term):
        term, exact = (
            find(schedule, output, half, prediction_type),
            find(schedule, output.double(), noised, prediction_type),
        )
        assert term.dtype == torch.float32 and term.isfinite().all()
        torch.testing.assert_close(term.double(), exact, rtol=1e-5, atol=1e-5)
        assert torch.autograd.grad(term.mean(), output)[0].isfinite().all()


@pytest.mark.parametrize("prediction_type", TYPES)
def test_simple_is_the_mean_squared_error_of_what_is_predicted(
    prediction_type: PredictionType,
) -> None:
    noised = batch()
    offset = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    output = output_for(prediction_type, noised.x0, noised.x_t) + offset.view(4, 1, 1, 1)
    simple = simple_term(LINEAR, output, noised, prediction_type)
    torch.testing.assert_close(simple, offset**2)
    # Variance channels, where there are any, change nothing.
    with_variance = torch.cat([output, noised.eps], dim=1)
    assert torch.equal(simple_term(LINEAR, with_variance, noised, prediction_type), simple)


def test_an_eps_network_may_be_trained_by_any_error() -> None:
    """An error d of eps is one of d / a in v, of s d / a in x0, of c s d / a in the posterior's mean, of -d / s in the
    score, of sqrt(beta) d / s in the step's noise.
    """
    noised = batch()
    output = randn(4, 4, 3, 3, seed=2)
    squared = ((output - noised.eps) ** 2).mean(dim=(1, 2, 3))
    factors = {
        "epsilon": torch.ones(4, dtype=torch.float64),
        "v_prediction": 1 / LINEAR.alpha_bar[T],
        "sample": 1 / LINEAR.snr[T],
        "posterior_mean": LINEAR.posterior_x0_weight[T] ** 2 / LINEAR.snr[T],
        "score": 1 / (1 - LINEAR.alpha_bar[T]),
        "step_noise": LINEAR.betas[T] / (1 - LINEAR.alpha_bar[T]),
    }
    for space in TYPES:
        simple = simple_term(LINEAR, output, noised, "epsilon", space=space)
        torch.testing.assert_close(simple, factors[space] * squared, rtol=1e-9, atol=0)


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("name", ["constant", "min_snr", "soft_min_snr", "p2", "debiased", "elbo"])
def test_one_prediction_has_one_weighted_error_in_every_space(name: str, prediction_type: PredictionType) -> None:
    noised = batch()
    output = output_for(prediction_type, noised.x0 + randn(4, 4, 3, 3, seed=3), noised.x_t)

    def weighted(space: LossSpace) -> Tensor:
        weight = loss_weights(LINEAR, name, space)[T]  # type: ignore[arg-type]
        return weight * simple_term(LINEAR, output, noised, prediction_type, space=space)

    for space in TYPES:
        torch.testing.assert_close(weighted(space), weighted("sample"), rtol=1e-9, atol=0)


@pytest.mark.parametrize("space", TYPES)
def test_the_elbo_weight_makes_the_error_the_bound(space: LossSpace) -> None:
    """With variance beta tilde: for t > 0 the divergence in nats, at t = 0 the decoder's quadratic part."""
    noised = batch()
    output = randn(4, 4, 3, 3, seed=2)
    nats = loss_weights(LINEAR, "elbo", space)[T] * simple_term(LINEAR, output, noised, "epsilon", space=space)
    bound = math.log(2) * vlb_term(LINEAR, output, noised, "epsilon", variance="beta_tilde")
    bound[0] -= 0.5 * math.log(2 * math.pi * LINEAR.posterior_variance[1].item())
    torch.testing.assert_close(nats, bound, rtol=1e-9, atol=0)


def test_without_signal_v_and_x0_networks_train_in_both_spaces_and_eps_is_refused() -> None:
    noised = batch(ZERO_SNR)
    for prediction_type in ("v_prediction", "sample"):
        output = randn(4, 8, 3, 3, seed=2).requires_grad_()
        for space in TYPES:
            simple = simple_term(ZERO_SNR, output, noised, prediction_type, space=space)
            loss = simple + vlb_term(ZERO_SNR, output, noised, prediction_type)
            assert loss.isfinite().all()
            assert torch.autograd.grad(loss.sum(), output)[0].isfinite().all()
    for space in ("v_prediction", "sample", "posterior_mean"):
        with pytest.raises(ValueError, match="epsilon cannot determine x0 at t = 999"):
            simple_term(ZERO_SNR, noised.eps, noised, "epsilon", space=space)


def test_huber_is_the_square_up_to_delta_and_a_line_beyond() -> None:
    noised = batch()
    offset = torch.tensor([0.1, -0.5, 2.0, -3.0], dtype=torch.float64).view(4, 1, 1, 1)

    def penalty(delta: float) -> Tensor:
        return simple_term(LINEAR, noised.eps + offset, noised, "epsilon", norm="huber", huber_delta=delta)

    torch.testing.assert_close(penalty(0.5), torch.tensor([0.01, 0.25, 1.75, 2.75], dtype=torch.float64))
    torch.testing.assert_close(penalty(3.0), offset.flatten() ** 2)
    torch.testing.assert_close(penalty(1e6), offset.flatten() ** 2)


@pytest.mark.parametrize("variance", ["beta_tilde", "beta"])
def test_the_bound_with_a_fixed_variance_is_that_of_a_network_that_says_so(variance: FixedVariance) -> None:
    """-1 says beta tilde at every t; +1 says beta, except at t = 0, where the fixed one is beta tilde's again."""
    noised = batch()
    output = randn(4, 4, 3, 3, seed=2)
    says = torch.full_like(output, 1.0 if variance == "beta" else -1.0)
    says[0] = -1.0
    learned = vlb_term(LINEAR, torch.cat([output, says], dim=1), noised, "epsilon")
    for network in (output, torch.cat([output, 9 * says], dim=1)):  # variance channels are passed over
        fixed = vlb_term(LINEAR, network, noised, "epsilon", variance=variance)
        torch.testing.assert_close(fixed, learned, rtol=1e-12, atol=1e-12)


def test_the_bound_of_a_perfect_network() -> None:
    """Right mean and beta tilde: no divergence for t > 0, and at t = 0 the decoder's log variance alone."""
    noised = batch()
    vlb = vlb_term(LINEAR, torch.cat([noised.eps, -torch.ones_like(noised.eps)], dim=1), noised, "epsilon")
    decoder = 0.5 * math.log2(2 * math.pi * LINEAR.posterior_variance[1].item())
    torch.testing.assert_close(vlb, torch.tensor([decoder, 0, 0, 0], dtype=torch.float64), rtol=1e-10, atol=1e-10)


def test_the_bound_of_a_network_with_the_wrong_variance() -> None:
    """Right mean, variance beta instead of beta tilde = r beta: KL is (r - 1 - log r) / 2 nats."""
    noised = batch()
    vlb = vlb_term(LINEAR, torch.cat([noised.eps, torch.ones_like(noised.eps)], dim=1), noised, "epsilon")
    ratio = LINEAR.posterior_variance[T] / LINEAR.betas[T]
    torch.testing.assert_close(vlb[1:], 0.5 * (ratio - 1 - ratio.log())[1:] / math.log(2), rtol=1e-8, atol=1e-12)


def test_the_bound_against_torchs_own_divergence() -> None:
    noised = batch()
    output = randn(4, 8, 3, 3, seed=2)
    log_variance = process.learned_log_variance(LINEAR, output[:, 4:], T)
    q, mean = (
        process.q_posterior(LINEAR, noised.x0, noised.x_t, T),
        process.to_posterior_mean(LINEAR, output[:, :4], noised.x_t, T, "epsilon"),
    )
    p = torch.distributions.Normal(mean, torch.exp(0.5 * log_variance))
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(q.mean, torch.exp(0.5 * q.log_variance)), p)
    nats = torch.where(T.view(4, 1, 1, 1) == 0, -p.log_prob(noised.x0), kl)
    expected = nats.mean(dim=(1, 2, 3)) / math.log(2)
    torch.testing.assert_close(vlb_term(LINEAR, output, noised, "epsilon"), expected, rtol=1e-9, atol=1e-9)


def test_the_discretized_decoder_is_the_density_times_the_bin() -> None:
    """With a standard deviation far above the half width 1/255, bits = bits of the density + log2(127.5)."""
    schedule = NoiseSchedule.from_betas([0.3, 0.3])
    x0, eps = 0.3 * randn(4, 4, 3, 3).clamp(-3, 3), randn(4, 4, 3, 3, seed=1)
    t = torch.zeros(4, dtype=torch.int64)
    noised, output = Noised.of(schedule, x0, t, eps), torch.cat([eps + 0.1, torch.ones_like(eps)], dim=1)
    smooth = vlb_term(schedule, output, noised, "epsilon")
    for decoder in ("discretized", "discretized_tanh"):
        bits = vlb_term(schedule, output, noised, "epsilon", decoder=decoder)
        torch.testing.assert_close(bits, smooth + math.log2(127.5), rtol=0, atol=2e-3)


def test_the_discretized_decoder_keeps_its_digits_in_both_tails() -> None:
    """A bin six standard deviations from the mean, against the C library's erfc, which has no cancellation there."""
    schedule, t = NoiseSchedule.from_betas([0.02, 0.02]), torch.zeros(2, dtype=torch.int64)
    std = schedule.posterior_variance[1].sqrt().item()
    x0 = torch.tensor([3 * std, -3 * std], dtype=torch.float64).view(2, 1, 1, 1)
    noised = Noised.of(schedule, x0, t, torch.zeros_like(x0))
    output = torch.cat([-x0, torch.full_like(x0, -1.0)], dim=1)
    bits = vlb_term(schedule, output, noised, "sample", decoder="discretized")
    near, far = ((6 - sign / (255 * std)) / math.sqrt(2) for sign in (1, -1))
    expected = -math.log2(0.5 * (math.erfc(near) - math.erfc(far)))
    torch.testing.assert_close(bits, torch.full((2,), expected, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_sus_raw_form_is_the_one_of_two_noises_scaled(prediction_type: PredictionType) -> None:
    """Eq. 1.8: x_{t-1} and the predicted one differ by the step's noises, times beta / alpha, draw by draw."""
    noised = batch()
    rest, output = randn(4, 4, 3, 3, seed=4), randn(4, 8, 3, 3, seed=2)
    raw, noises = (su_term(LINEAR, output, noised, rest, prediction_type, form) for form in ("su_raw", "su_noises"))
    torch.testing.assert_close(raw, su_factors(LINEAR)["raw_per_noises"][T] * noises, rtol=1e-9, atol=0)


def test_sus_reduced_form_is_what_remains_in_expectation() -> None:
    """Eqs. 1.13 and 1.14. The forms are quadratic in `rest`, so the average over +1 and -1 is the expectation."""
    noised = batch()
    output, sign = randn(4, 4, 3, 3, seed=2), randn(4, 4, 3, 3, seed=4).sign()

    def noises(rest: Tensor) -> Tensor:
        return su_term(LINEAR, output, noised, rest, "epsilon", "su_noises")

    reduced = su_term(LINEAR, output, noised, sign, "epsilon", "su_reduced")
    factors = {name: table[T] for name, table in su_factors(LINEAR).items()}
    expected = factors["noises_per_reduced"] * reduced + factors["constant"]
    torch.testing.assert_close((noises(sign) + noises(-sign)) / 2, expected, rtol=1e-12, atol=1e-15)
    # It is Ho's L_simple, and does not depend on the rest.
    torch.testing.assert_close(reduced, simple_term(LINEAR, output, noised, "epsilon"))
    assert not torch.allclose(noises(sign), noises(-sign))


def test_sus_raw_form_is_0_for_the_step_that_was_taken() -> None:
    """A network that says the very noises of the step, `rest` included, gets x_{t-1} right."""
    noised = batch()
    rest = randn(4, 4, 3, 3, seed=4)
    _, step_noise = process.merge_noises(LINEAR, noised.eps, rest, T)
    output = process.to_eps(LINEAR, step_noise, noised.x_t, T, "step_noise")
    for form in ("su_raw", "su_noises"):
        error = su_term(LINEAR, output, noised, rest, "epsilon", form)
        torch.testing.assert_close(error, torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-20)


def test_mistakes_are_named() -> None:
    noised = batch()
    eps = noised.eps
    with pytest.raises(ValueError, match="needs a network with variance channels: 8 output channels, not 4"):
        vlb_term(LINEAR, variance_alone(eps), noised, "epsilon")
    with pytest.raises(ValueError, match="unknown prediction type 'flow'; choose epsilon, "):
        simple_term(LINEAR, eps, noised, "flow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs a network with variance channels: 8 output channels, not 4"):
        vlb_term(LINEAR, eps, noised, "epsilon")
    with pytest.raises(ValueError, match="unknown loss space 'noise'; choose epsilon, "):
        simple_term(LINEAR, eps, noised, "epsilon", space="noise")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown norm 'l1'; choose squared or huber"):
        simple_term(LINEAR, eps, noised, "epsilon", norm="l1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown form 'su'; choose su_raw, su_noises or su_reduced"):
        su_term(LINEAR, eps, noised, eps, "epsilon", "su")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown decoder 'laplace'; choose gaussian"):
        vlb_term(LINEAR, randn(4, 8, 3, 3), noised, "epsilon", decoder="laplace")  # type: ignore[arg-type]


# Areas


@pytest.mark.parametrize("term", ["simple", "huber", "su_raw", "su_noises", "su_reduced", "vlb"])
def test_an_area_leaves_what_lies_in_it_alone(term: str) -> None:
    """As if the samples were no larger; nothing outside is moved; by halves as the two means together."""
    whole, output, rest = batch(), randn(4, 8, 3, 3, seed=2), randn(4, 4, 3, 3, seed=3)

    def of(noised: Noised, output: Tensor, rest: Tensor) -> Tensor:
        if term == "vlb":
            return vlb_term(LINEAR, output, noised, "epsilon")
        if term in ("simple", "huber"):
            norm: Norm = "huber" if term == "huber" else "squared"
            return simple_term(LINEAR, output, noised, "epsilon", space="v_prediction", norm=norm)
        return su_term(LINEAR, output, noised, rest, "step_noise", cast(SuForm, term))

    def part(width: slice) -> Tensor:
        there = (whole.x0[..., width], whole.t, whole.eps[..., width])
        return of(Noised.of(LINEAR, *there), output[..., width], rest[..., width])

    area = torch.zeros(4, 4, 3, 3)
    area[..., :1] = 1.0
    inside, outside = part(slice(1)), part(slice(1, 3))
    moved = output.clone().requires_grad_()
    found = of(replace(whole, area=area), moved, rest)
    torch.testing.assert_close(found, inside)
    (gradient,) = torch.autograd.grad(found.sum(), moved)
    assert (gradient[..., 1:] == 0).all() and (gradient[:, :4, :, 0] != 0).any()
    mixed = of(replace(whole, area=(area + 0.5) / 1.5), output, rest)  # weights 1 and 1/3, the outside twice as wide
    torch.testing.assert_close(mixed, (inside + 2 * outside / 3) / (1 + 2 / 3))
    assert (of(replace(whole, area=torch.zeros_like(area)), output, rest) == 0).all()
