"""The losses. Oracles: closed forms, exact zeros of gradients, float64. See also test_golden.py."""

import math

import pytest
import torch
from torch import Tensor

from pixart_ft.diffusion import process
from pixart_ft.diffusion.objectives import hybrid_loss, simple_loss, vlb_term
from pixart_ft.diffusion.schedules import NoiseSchedule

LINEAR = NoiseSchedule.linear()
T = torch.tensor([0, 1, 500, 999])


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def batch(schedule: NoiseSchedule = LINEAR) -> tuple[Tensor, Tensor, Tensor]:
    """x0, x_t, eps at the four indices T."""
    x0, eps = draw(4, 4, 3, 3), draw(4, 4, 3, 3, seed=1)
    return x0, process.q_sample(schedule, x0, T, eps), eps


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_each_half_of_the_output_is_moved_by_its_own_term_alone(
    prediction_type: process.PredictionType,
) -> None:
    x0, x_t, eps = batch()
    output = draw(4, 8, 3, 3, seed=2).requires_grad_()
    terms = hybrid_loss(LINEAR, output, x0, x_t, eps, T, prediction_type)
    by_vlb = torch.autograd.grad(terms["vlb"].sum(), output, retain_graph=True)[0]
    by_simple = torch.autograd.grad(terms["simple"].sum(), output)[0]
    assert (by_vlb[:, :4] == 0).all() and (by_simple[:, 4:] == 0).all()
    assert (by_vlb[:, 4:] != 0).all() and (by_simple[:, :4] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_hybrid_of_a_half_precision_output_is_finite_and_equals_float64(dtype: torch.dtype) -> None:
    x0, x_t, eps = batch()
    output = (3 * draw(4, 8, 3, 3, seed=2, dtype=dtype)).requires_grad_()
    terms = hybrid_loss(LINEAR, output, x0.float(), x_t.float(), eps.float(), T, "epsilon")
    exact = hybrid_loss(LINEAR, output.double(), x0, x_t, eps, T, "epsilon")
    for name, term in terms.items():
        assert term.dtype == torch.float32
        torch.testing.assert_close(term.double(), exact[name], rtol=1e-5, atol=1e-5)
    assert torch.autograd.grad(terms["loss"].mean(), output)[0].isfinite().all()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_simple_is_the_mean_squared_error_of_what_is_predicted(
    prediction_type: process.PredictionType,
) -> None:
    x0, x_t, eps = batch()
    targets = {"epsilon": eps, "sample": x0, "v_prediction": process.velocity(LINEAR, x0, eps, T)}
    offset = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    output = targets[prediction_type] + offset.view(4, 1, 1, 1)
    terms = simple_loss(LINEAR, output, x0, x_t, eps, T, prediction_type)
    torch.testing.assert_close(terms["simple"], offset**2)
    assert torch.equal(terms["loss"], terms["simple"])
    # Variance channels, where there are any, change nothing.
    with_variance = simple_loss(LINEAR, torch.cat([output, eps], dim=1), x0, x_t, eps, T, prediction_type)
    assert torch.equal(with_variance["simple"], terms["simple"])


def test_hybrid_is_simple_plus_the_scaled_bound() -> None:
    x0, x_t, eps = batch()
    output = draw(4, 8, 3, 3, seed=2)
    terms = hybrid_loss(LINEAR, output, x0, x_t, eps, T, "epsilon", vlb_scale=0.25)
    torch.testing.assert_close(terms["loss"], terms["simple"] + 0.25 * terms["vlb"])
    torch.testing.assert_close(terms["vlb"], vlb_term(LINEAR, output, x0, x_t, T, "epsilon"))
    torch.testing.assert_close(terms["simple"], simple_loss(LINEAR, output, x0, x_t, eps, T, "epsilon")["simple"])


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


def test_mistakes_are_named() -> None:
    x0, x_t, eps = batch()
    with pytest.raises(ValueError, match="needs a learned variance: 8 output channels, not 4"):
        hybrid_loss(LINEAR, eps, x0, x_t, eps, T, "epsilon")
    with pytest.raises(ValueError, match="unknown prediction type 'flow'; choose epsilon, "):
        simple_loss(LINEAR, eps, x0, x_t, eps, T, "flow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown decoder 'laplace'; choose gaussian"):
        vlb_term(LINEAR, draw(4, 8, 3, 3), x0, x_t, T, "epsilon", decoder="laplace")  # type: ignore[arg-type]
