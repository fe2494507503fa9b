"""The losses. Oracles: closed forms, exact zeros of gradients, float64. See also test_golden.py."""

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from pixart_ft.diffusion import process
from pixart_ft.diffusion.names import FixedVariance, LossSpace, PredictionType
from pixart_ft.diffusion.objectives import hybrid_loss, simple_loss, su_factors, su_loss, vlb_loss, vlb_term
from pixart_ft.diffusion.schedules import NoiseSchedule
from pixart_ft.diffusion.weighting import loss_weights

LINEAR, COSINE = NoiseSchedule.linear(), NoiseSchedule.cosine()
ZERO_SNR = LINEAR.zero_terminal_snr()
T = torch.tensor([0, 1, 500, 999])
TYPES: tuple[PredictionType, ...] = get_args(PredictionType)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def batch(schedule: NoiseSchedule = LINEAR) -> tuple[Tensor, Tensor, Tensor]:
    """x0, x_t, eps at the four indices T."""
    x0, eps = draw(4, 4, 3, 3), draw(4, 4, 3, 3, seed=1)
    return x0, process.q_sample(schedule, x0, T, eps), eps


def output_for(kind: PredictionType, x0: Tensor, x_t: Tensor, schedule: NoiseSchedule = LINEAR) -> Tensor:
    """What a network of that kind says at the indices T when it means this x0."""
    converters = {
        "epsilon": process.to_eps,
        "sample": process.to_x0,
        "v_prediction": process.to_v,
        "posterior_mean": process.to_posterior_mean,
    }
    return converters[kind](schedule, x0, x_t, T, "sample")


@pytest.mark.parametrize("space", TYPES)
@pytest.mark.parametrize("prediction_type", TYPES)
def test_each_half_of_the_output_is_moved_by_its_own_term_alone(
    prediction_type: PredictionType, space: LossSpace
) -> None:
    x0, x_t, eps = batch()
    output = draw(4, 8, 3, 3, seed=2).requires_grad_()
    terms = hybrid_loss(LINEAR, output, x0, x_t, eps, T, prediction_type, space=space)
    by_vlb = torch.autograd.grad(terms["vlb"].sum(), output, retain_graph=True)[0]
    by_simple = torch.autograd.grad(terms["simple"].sum(), output)[0]
    assert (by_vlb[:, :4] == 0).all() and (by_simple[:, 4:] == 0).all()
    assert (by_vlb[:, 4:] != 0).all() and (by_simple[:, :4] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_hybrid_of_a_half_precision_output_is_finite_and_equals_float64(
    schedule: NoiseSchedule, prediction_type: PredictionType, dtype: torch.dtype
) -> None:
    x0, x_t, eps = batch(schedule)
    output = (3 * draw(4, 8, 3, 3, seed=2, dtype=dtype)).requires_grad_()
    terms = hybrid_loss(schedule, output, x0.float(), x_t.float(), eps.float(), T, prediction_type)
    exact = hybrid_loss(schedule, output.double(), x0, x_t, eps, T, prediction_type)
    for name, term in terms.items():
        assert term.dtype == torch.float32 and term.isfinite().all()
        torch.testing.assert_close(term.double(), exact[name], rtol=1e-5, atol=1e-5)
    assert torch.autograd.grad(terms["loss"].mean(), output)[0].isfinite().all()


@pytest.mark.parametrize("prediction_type", TYPES)
def test_simple_is_the_mean_squared_error_of_what_is_predicted(
    prediction_type: PredictionType,
) -> None:
    x0, x_t, eps = batch()
    offset = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    output = output_for(prediction_type, x0, x_t) + offset.view(4, 1, 1, 1)
    terms = simple_loss(LINEAR, output, x0, x_t, eps, T, prediction_type)
    torch.testing.assert_close(terms["simple"], offset**2)
    assert torch.equal(terms["loss"], terms["simple"])
    # Variance channels, where there are any, change nothing.
    with_variance = simple_loss(LINEAR, torch.cat([output, eps], dim=1), x0, x_t, eps, T, prediction_type)
    assert torch.equal(with_variance["simple"], terms["simple"])


def test_an_eps_network_may_be_trained_by_any_error() -> None:
    """An error d of eps is one of d / a in v, of s d / a in x0, of c s d / a in the posterior's mean."""
    x0, x_t, eps = batch()
    output = draw(4, 4, 3, 3, seed=2)
    squared = ((output - eps) ** 2).mean(dim=(1, 2, 3))
    factors = {
        "epsilon": torch.ones(4, dtype=torch.float64),
        "v_prediction": 1 / LINEAR.alpha_bar[T],
        "sample": 1 / LINEAR.snr[T],
        "posterior_mean": process.posterior_x0_weight(LINEAR)[T] ** 2 / LINEAR.snr[T],
    }
    for space in TYPES:
        terms = simple_loss(LINEAR, output, x0, x_t, eps, T, "epsilon", space=space)
        torch.testing.assert_close(terms["simple"], factors[space] * squared, rtol=1e-9, atol=0)


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("name", ["constant", "min_snr", "soft_min_snr", "p2", "debiased", "elbo"])
def test_one_prediction_has_one_weighted_error_in_every_space(name: str, prediction_type: PredictionType) -> None:
    x0, x_t, eps = batch()
    output = output_for(prediction_type, x0 + draw(4, 4, 3, 3, seed=3), x_t)

    def weighted(space: LossSpace) -> Tensor:
        weight = loss_weights(LINEAR, name, space)[T]  # type: ignore[arg-type]
        return simple_loss(LINEAR, output, x0, x_t, eps, T, prediction_type, space=space, weight=weight)["loss"]

    for space in TYPES:
        torch.testing.assert_close(weighted(space), weighted("sample"), rtol=1e-9, atol=0)


@pytest.mark.parametrize("space", TYPES)
def test_the_elbo_weight_makes_the_error_the_bound(space: LossSpace) -> None:
    """With variance beta tilde: for t > 0 the divergence in nats, at t = 0 the decoder's quadratic part."""
    x0, x_t, eps = batch()
    output = draw(4, 4, 3, 3, seed=2)
    weight = loss_weights(LINEAR, "elbo", space)[T]
    nats = simple_loss(LINEAR, output, x0, x_t, eps, T, "epsilon", space=space, weight=weight)["loss"]
    bound = math.log(2) * vlb_term(LINEAR, output, x0, x_t, T, "epsilon", variance="beta_tilde")
    bound[0] -= 0.5 * math.log(2 * math.pi * LINEAR.posterior_variance[1].item())
    torch.testing.assert_close(nats, bound, rtol=1e-9, atol=0)


def test_without_signal_v_and_x0_networks_train_in_both_spaces_and_eps_is_refused() -> None:
    x0, x_t, eps = batch(ZERO_SNR)
    for prediction_type in ("v_prediction", "sample"):
        output = draw(4, 8, 3, 3, seed=2).requires_grad_()
        for space in TYPES:
            terms = hybrid_loss(ZERO_SNR, output, x0, x_t, eps, T, prediction_type, space=space)
            assert terms["loss"].isfinite().all()
            assert torch.autograd.grad(terms["loss"].sum(), output)[0].isfinite().all()
    for space in ("v_prediction", "sample", "posterior_mean"):
        with pytest.raises(ValueError, match="epsilon cannot determine x0 at t = 999"):
            simple_loss(ZERO_SNR, eps, x0, x_t, eps, T, "epsilon", space=space)


def test_huber_is_the_square_up_to_delta_and_a_line_beyond() -> None:
    x0, x_t, eps = batch()
    offset = torch.tensor([0.1, -0.5, 2.0, -3.0], dtype=torch.float64).view(4, 1, 1, 1)

    def penalty(delta: float) -> Tensor:
        return simple_loss(LINEAR, eps + offset, x0, x_t, eps, T, "epsilon", norm="huber", huber_delta=delta)["simple"]

    torch.testing.assert_close(penalty(0.5), torch.tensor([0.01, 0.25, 1.75, 2.75], dtype=torch.float64))
    torch.testing.assert_close(penalty(3.0), offset.flatten() ** 2)
    torch.testing.assert_close(penalty(1e6), offset.flatten() ** 2)


def test_a_weight_acts_on_the_simple_term_alone_and_leaves_its_name_unweighted() -> None:
    x0, x_t, eps = batch()
    output, weight = draw(4, 8, 3, 3, seed=2), torch.tensor([0.0, 1.0, 2.0, 0.5], dtype=torch.float32)
    plain = hybrid_loss(LINEAR, output, x0, x_t, eps, T, "epsilon", vlb_scale=0.5)
    weighted = hybrid_loss(LINEAR, output, x0, x_t, eps, T, "epsilon", vlb_scale=0.5, weight=weight)
    assert torch.equal(weighted["simple"], plain["simple"]) and torch.equal(weighted["vlb"], plain["vlb"])
    torch.testing.assert_close(weighted["loss"], weight.double() * plain["simple"] + 0.5 * plain["vlb"])
    assert weighted["loss"].dtype == torch.float64


def test_hybrid_is_simple_plus_the_scaled_bound() -> None:
    x0, x_t, eps = batch()
    output = draw(4, 8, 3, 3, seed=2)
    terms = hybrid_loss(LINEAR, output, x0, x_t, eps, T, "epsilon", vlb_scale=0.25)
    torch.testing.assert_close(terms["loss"], terms["simple"] + 0.25 * terms["vlb"])
    torch.testing.assert_close(terms["vlb"], vlb_term(LINEAR, output, x0, x_t, T, "epsilon"))
    torch.testing.assert_close(terms["simple"], simple_loss(LINEAR, output, x0, x_t, eps, T, "epsilon")["simple"])


@pytest.mark.parametrize("prediction_type", TYPES)
def test_the_pure_bound_moves_mean_and_variance(prediction_type: PredictionType) -> None:
    x0, x_t, eps = batch()
    output = draw(4, 8, 3, 3, seed=2).requires_grad_()
    terms = vlb_loss(LINEAR, output, x0, x_t, eps, T, prediction_type, vlb_scale=0.25)
    hybrid = hybrid_loss(LINEAR, output, x0, x_t, eps, T, prediction_type)
    torch.testing.assert_close(terms["vlb"], hybrid["vlb"])
    torch.testing.assert_close(terms["simple"], hybrid["simple"])
    torch.testing.assert_close(terms["loss"], 0.25 * terms["vlb"])
    (gradient,) = torch.autograd.grad(terms["loss"].sum(), output)
    assert (gradient != 0).all() and not terms["simple"].requires_grad


@pytest.mark.parametrize("variance", ["beta_tilde", "beta"])
def test_the_bound_with_a_fixed_variance_is_that_of_a_network_that_says_so(variance: FixedVariance) -> None:
    """-1 says beta tilde at every t; +1 says beta, except at t = 0, where the fixed one is beta tilde's again."""
    x0, x_t, eps = batch()
    output = draw(4, 4, 3, 3, seed=2)
    says = torch.full_like(output, 1.0 if variance == "beta" else -1.0)
    says[0] = -1.0
    learned = vlb_loss(LINEAR, torch.cat([output, says], dim=1), x0, x_t, eps, T, "epsilon")["vlb"]
    for network in (output, torch.cat([output, 9 * says], dim=1)):  # variance channels are passed over
        fixed = vlb_loss(LINEAR, network, x0, x_t, eps, T, "epsilon", variance=variance)["vlb"]
        torch.testing.assert_close(fixed, learned, rtol=1e-12, atol=1e-12)


def test_the_bound_of_a_perfect_network() -> None:
    """Right mean and beta tilde: no divergence for t > 0, and at t = 0 the decoder's log variance alone."""
    x0, x_t, eps = batch()
    vlb = vlb_term(LINEAR, torch.cat([eps, -torch.ones_like(eps)], dim=1), x0, x_t, T, "epsilon")
    decoder = 0.5 * math.log2(2 * math.pi * LINEAR.posterior_variance[1].item())
    torch.testing.assert_close(vlb, torch.tensor([decoder, 0, 0, 0], dtype=torch.float64), rtol=1e-10, atol=1e-10)


def test_the_bound_of_a_network_with_the_wrong_variance() -> None:
    """Right mean, variance beta instead of beta tilde = r beta: KL is (r - 1 - log r) / 2 nats."""
    x0, x_t, eps = batch()
    vlb = vlb_term(LINEAR, torch.cat([eps, torch.ones_like(eps)], dim=1), x0, x_t, T, "epsilon")
    ratio = LINEAR.posterior_variance[T] / LINEAR.betas[T]
    torch.testing.assert_close(vlb[1:], 0.5 * (ratio - 1 - ratio.log())[1:] / math.log(2), rtol=1e-8, atol=1e-12)


def test_the_bound_against_torchs_own_divergence() -> None:
    x0, x_t, _ = batch()
    output = draw(4, 8, 3, 3, seed=2)
    log_variance = process.learned_log_variance(LINEAR, output[:, 4:], T)
    q, mean = (
        process.q_posterior(LINEAR, x0, x_t, T),
        process.to_posterior_mean(LINEAR, output[:, :4], x_t, T, "epsilon"),
    )
    p = torch.distributions.Normal(mean, torch.exp(0.5 * log_variance))
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(q.mean, torch.exp(0.5 * q.log_variance)), p)
    nats = torch.where(T.view(4, 1, 1, 1) == 0, -p.log_prob(x0), kl)
    expected = nats.mean(dim=(1, 2, 3)) / math.log(2)
    torch.testing.assert_close(vlb_term(LINEAR, output, x0, x_t, T, "epsilon"), expected, rtol=1e-9, atol=1e-9)


def test_the_discretized_decoder_is_the_density_times_the_bin() -> None:
    """With a standard deviation far above the half width 1/255, bits = bits of the density + log2(127.5)."""
    schedule = NoiseSchedule.from_betas([0.3, 0.3])
    x0, eps = 0.3 * draw(4, 4, 3, 3).clamp(-3, 3), draw(4, 4, 3, 3, seed=1)
    t = torch.zeros(4, dtype=torch.int64)
    x_t, output = process.q_sample(schedule, x0, t, eps), torch.cat([eps + 0.1, torch.ones_like(eps)], dim=1)
    smooth = vlb_term(schedule, output, x0, x_t, t, "epsilon")
    for decoder in ("discretized", "discretized_tanh"):
        bits = vlb_term(schedule, output, x0, x_t, t, "epsilon", decoder=decoder)
        torch.testing.assert_close(bits, smooth + math.log2(127.5), rtol=0, atol=2e-3)


def test_the_discretized_decoder_keeps_its_digits_in_both_tails() -> None:
    """A bin six standard deviations from the mean, against the C library's erfc, which has no cancellation there."""
    schedule, t = NoiseSchedule.from_betas([0.02, 0.02]), torch.zeros(2, dtype=torch.int64)
    std = schedule.posterior_variance[1].sqrt().item()
    x0 = torch.tensor([3 * std, -3 * std], dtype=torch.float64).view(2, 1, 1, 1)
    x_t = process.q_sample(schedule, x0, t, torch.zeros_like(x0))
    output = torch.cat([-x0, torch.full_like(x0, -1.0)], dim=1)
    bits = vlb_term(schedule, output, x0, x_t, t, "sample", decoder="discretized")
    near, far = ((6 - sign / (255 * std)) / math.sqrt(2) for sign in (1, -1))
    expected = -math.log2(0.5 * (math.erfc(near) - math.erfc(far)))
    torch.testing.assert_close(bits, torch.full((2,), expected, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_sus_raw_form_is_the_one_of_two_noises_scaled(prediction_type: PredictionType) -> None:
    """Eq. 1.8: x_{t-1} and the predicted one differ by the step's noises, times beta / alpha, draw by draw."""
    x0, x_t, eps = batch()
    rest, output = draw(4, 4, 3, 3, seed=4), draw(4, 8, 3, 3, seed=2)
    raw, noises = (
        su_loss(LINEAR, output, x0, x_t, eps, rest, T, prediction_type, form)["simple"]
        for form in ("su_raw", "su_noises")
    )
    torch.testing.assert_close(raw, su_factors(LINEAR)["raw_per_noises"][T] * noises, rtol=1e-9, atol=0)


def test_sus_reduced_form_is_what_remains_in_expectation() -> None:
    """Eqs. 1.13 and 1.14. The forms are quadratic in `rest`, so the average over +1 and -1 is the expectation."""
    x0, x_t, eps = batch()
    output, sign = draw(4, 4, 3, 3, seed=2), draw(4, 4, 3, 3, seed=4).sign()

    def noises(rest: Tensor) -> Tensor:
        return su_loss(LINEAR, output, x0, x_t, eps, rest, T, "epsilon", "su_noises")["simple"]

    reduced = su_loss(LINEAR, output, x0, x_t, eps, sign, T, "epsilon", "su_reduced")["simple"]
    factors = {name: table[T] for name, table in su_factors(LINEAR).items()}
    expected = factors["noises_per_reduced"] * reduced + factors["constant"]
    torch.testing.assert_close((noises(sign) + noises(-sign)) / 2, expected, rtol=1e-12, atol=1e-15)
    # It is Ho's L_simple, and does not depend on the rest.
    torch.testing.assert_close(reduced, simple_loss(LINEAR, output, x0, x_t, eps, T, "epsilon")["simple"])
    assert not torch.allclose(noises(sign), noises(-sign))


def test_sus_raw_form_is_0_for_the_step_that_was_taken() -> None:
    """A network that says the very noises of the step, `rest` included, gets x_{t-1} right."""
    x0, x_t, eps = batch()
    rest = draw(4, 4, 3, 3, seed=4)
    _, step_noise = process.merge_noises(LINEAR, eps, rest, T)
    output = process.to_eps(LINEAR, step_noise, x_t, T, "step_noise")
    for form in ("su_raw", "su_noises"):
        loss = su_loss(LINEAR, output, x0, x_t, eps, rest, T, "epsilon", form)["loss"]
        torch.testing.assert_close(loss, torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-20)


def test_mistakes_are_named() -> None:
    x0, x_t, eps = batch()
    with pytest.raises(ValueError, match="needs a learned variance: 8 output channels, not 4"):
        hybrid_loss(LINEAR, eps, x0, x_t, eps, T, "epsilon")
    with pytest.raises(ValueError, match="unknown prediction type 'flow'; choose epsilon, "):
        simple_loss(LINEAR, eps, x0, x_t, eps, T, "flow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs a learned variance: 8 output channels, not 4"):
        vlb_loss(LINEAR, eps, x0, x_t, eps, T, "epsilon")
    with pytest.raises(ValueError, match="unknown loss space 'noise'; choose epsilon, "):
        simple_loss(LINEAR, eps, x0, x_t, eps, T, "epsilon", space="noise")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown norm 'l1'; choose squared or huber"):
        simple_loss(LINEAR, eps, x0, x_t, eps, T, "epsilon", norm="l1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown form 'su'; choose su_raw, su_noises or su_reduced"):
        su_loss(LINEAR, eps, x0, x_t, eps, eps, T, "epsilon", "su")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown decoder 'laplace'; choose gaussian"):
        vlb_term(LINEAR, draw(4, 8, 3, 3), x0, x_t, T, "epsilon", decoder="laplace")  # type: ignore[arg-type]
