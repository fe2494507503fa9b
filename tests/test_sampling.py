"""The sampling loop, guidance and decoding on the tiny pipeline.

Oracles: a network that knows the noise, the closed form of guidance, and the stock pipeline's decoder.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, PixArtSigmaPipeline
from torch import Tensor, nn

from pixart_ft.data.captions import drop_captions, pad_text
from pixart_ft.diffusion.process import q_posterior
from pixart_ft.diffusion.schedules import NoiseSchedule
from pixart_ft.errors import UserError
from pixart_ft.models import load_transformer, load_vae
from pixart_ft.sampling import _guide, decode_latents, sample_latents

SHAPE = (4, 8, 8)
SCHEDULE = NoiseSchedule.linear()


class Oracle(nn.Module):
    """Answers with the exact prediction for one x0, at the noise level of the timestep it is given."""

    def __init__(self, x0: Tensor, prediction_type: str) -> None:
        super().__init__()
        self.x0, self.kind, self.weight = x0, prediction_type, nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, timestep: Tensor, **_: object) -> tuple[Tensor]:
        alpha_bar = SCHEDULE.alpha_bar[timestep].view(-1, 1, 1, 1)
        a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        eps = (x - a * self.x0) / s
        posterior = q_posterior(SCHEDULE, self.x0.double(), x.double(), timestep).mean
        mean = {
            "epsilon": eps,
            "v_prediction": a * eps - s * self.x0,
            "sample": self.x0.expand_as(x),
            "posterior_mean": posterior,
        }[self.kind]
        return (torch.cat([mean, torch.zeros_like(x)], dim=1).float(),)


class WithVariance(nn.Module):
    """A network whose variance half is one number everywhere."""

    def __init__(self, network: nn.Module, value: float) -> None:
        super().__init__()
        self.network, self.value = network, value

    def forward(self, *args: object, **kwargs: object) -> tuple[Tensor]:
        mean = self.network(*args, **kwargs)[0][:, : SHAPE[0]]
        return (torch.cat([mean, torch.full_like(mean, self.value)], dim=1),)


@pytest.fixture(scope="module")
def network(tiny: Path) -> nn.Module:
    network: nn.Module = load_transformer(str(tiny), dtype=torch.float32)
    return network


@pytest.fixture(scope="module")
def vae(tiny: Path) -> AutoencoderKL:
    return load_vae(str(tiny), dtype=torch.float32)


def texts(lengths: Sequence[int]) -> list[Tensor]:
    """Embeddings of captions of these lengths."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, 32, generator=generator) for length in lengths]


NULL = torch.randn(1, 32, generator=torch.Generator().manual_seed(2))


def sample(
    network: nn.Module,
    seeds: Sequence[int] = (0,),
    *,
    captions: Sequence[Tensor] | None = None,
    null: Tensor = NULL,
    prediction_type: str = "epsilon",
    sampler: str = "ddim",
    steps: int = 5,
    guidance: float = 4.5,
    **settings: object,
) -> Tensor:
    embeds, mask = pad_text(captions or texts([3 + seed % 4 for seed in seeds]))
    return sample_latents(
        network,
        SCHEDULE,
        prediction_type,  # type: ignore[arg-type]
        embeds,
        mask,
        null,
        sampler=sampler,
        steps=steps,
        guidance=guidance,
        generators=[torch.Generator().manual_seed(seed) for seed in seeds],
        shape=SHAPE,
        **settings,  # type: ignore[arg-type]
    )


def seen(network: nn.Module, **settings: object) -> tuple[list[dict[str, Tensor]], Tensor]:
    """The network's inputs, call by call, and the latents."""
    calls: list[dict[str, Tensor]] = []
    hook = network.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append({"x": args[0], **kwargs}), with_kwargs=True
    )
    try:
        return calls, sample(network, **settings)  # type: ignore[arg-type]
    finally:
        hook.remove()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "settings",
    [
        {"sampler": "ddim", "steps": 1},
        {"sampler": "ddim", "steps": 7, "spacing": "trailing"},
        {"sampler": "ddim", "steps": 20, "eta": 1.0},
        {"sampler": "ddpm", "steps": 20, "variance": "beta"},
        {"sampler": "ddpm", "steps": 13, "variance": "learned", "spacing": "trailing"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_exact_network_leads_to_its_picture(prediction_type: str, settings: dict[str, object]) -> None:
    x0 = 3 * torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    latents = sample(Oracle(x0, prediction_type).eval(), [0, 1], prediction_type=prediction_type, **settings)  # type: ignore[arg-type]
    assert (latents - x0).abs().max() < 2e-4


@pytest.mark.parametrize("settings", [{"sampler": "ddim"}, {"sampler": "ddpm", "variance": "learned"}])
def test_a_posterior_mean_is_that_of_the_trained_step_however_few_are_taken(settings: dict[str, object]) -> None:
    """The same way to the picture as by the noise; float32 keeps x0 to 1e-3 at the first step, which counts least."""
    x0 = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(4))
    paths = [
        torch.stack([call["x"][0] for call in seen(Oracle(x0, kind).eval(), prediction_type=kind, **settings)[0]])
        for kind in ("epsilon", "posterior_mean")
    ]
    torch.testing.assert_close(*paths, rtol=0, atol=1e-3)


@pytest.mark.parametrize("settings", [{"sampler": "ddim"}, {"sampler": "ddim", "eta": 1.0}, {"sampler": "ddpm"}])
def test_batch_mates_do_not_change_a_picture(network: nn.Module, settings: dict[str, object]) -> None:
    seeds, captions = range(8), texts(range(1, 9))
    together = sample(network, seeds, captions=captions, **settings)  # type: ignore[arg-type]
    for seed, caption, latents in zip(seeds, captions, together, strict=True):
        alone = sample(network, [seed], captions=[caption], **settings)[0]  # type: ignore[arg-type]
        assert (latents - alone).abs().max() < 1e-5 * alone.abs().max()


def test_what_reaches_the_network(network: nn.Module) -> None:
    calls, latents = seen(network, seeds=[0, 1], steps=4, spacing="trailing")
    assert latents.dtype == torch.float32
    assert [call["timestep"].tolist() for call in calls] == [[t] * 4 for t in (999, 749, 499, 249)]
    for call in calls:
        assert call["timestep"].dtype == torch.int64
        assert call["x"].dtype == torch.float32
        assert torch.equal(call["x"][:2], call["x"][2:])
    first = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    assert torch.equal(calls[0]["x"][1], first)


@pytest.mark.parametrize("null_length", [1, 9])
def test_unconditional_input_is_that_of_dropped_captions(network: nn.Module, null_length: int) -> None:
    captions, null = texts([3, 5]), torch.randn(null_length, 32)
    calls, _ = seen(network, seeds=[0, 1], captions=captions, null=null, steps=1)
    length = max(5, null_length)
    for half, expected in enumerate((drop_captions(captions, [True, True], null), captions)):
        embeds, mask = pad_text(expected, length)
        rows = slice(2 * half, 2 * half + 2)
        assert calls[0]["encoder_hidden_states"][rows].numpy().tobytes() == embeds.numpy().tobytes()
        given = calls[0]["encoder_attention_mask"][rows]
        assert given.dtype == mask.dtype and given.numpy().tobytes() == mask.numpy().tobytes()


def test_guidance_moves_all_mean_channels_and_no_variance() -> None:
    without, given = torch.randn(2, 3, 8, 2, 2)
    guided = _guide(torch.cat([without, given]), 4, 4.5)
    assert torch.allclose(guided[:, :4], without[:, :4] + 4.5 * (given - without)[:, :4])
    assert torch.equal(guided[:, 4:], given[:, 4:])


def test_guidance_one_runs_the_conditional_branch_alone(network: nn.Module) -> None:
    calls, latents = seen(network, guidance=1.0)
    assert [len(call["x"]) for call in calls] == [1] * 5
    assert torch.equal(latents, sample(network, guidance=1.0, null=torch.full((7, 32), float("nan"))))
    caption = texts([3])
    own = sample(network, captions=caption, null=caption[0], guidance=4.5)  # u = c
    assert torch.allclose(
        own, sample(network, captions=caption, guidance=1.0), rtol=0, atol=1e-4 * own.abs().max().item()
    )
    assert (latents - sample(network, guidance=4.5)).abs().max() > 0.1


@pytest.mark.parametrize(("value", "bound"), [(-1.0, "beta_tilde"), (1.0, "beta")])
def test_learned_variance_is_the_networks_own(network: nn.Module, value: float, bound: str) -> None:
    learned = sample(WithVariance(network, value).eval(), sampler="ddpm", variance="learned")
    fixed = sample(network, sampler="ddpm", variance=bound)
    other = sample(WithVariance(network, 0.0).eval(), sampler="ddpm", variance="learned")
    assert torch.allclose(learned, fixed, rtol=0, atol=1e-5 * fixed.abs().max().item())
    assert (learned - other).abs().max() > 1e-3 * fixed.abs().max()


def test_ddim_at_eta_one_is_ddpm_with_the_same_noise(network: nn.Module) -> None:
    ddim, ddpm = sample(network, eta=1.0), sample(network, sampler="ddpm", variance="beta_tilde")
    assert torch.allclose(ddim, ddpm, rtol=0, atol=1e-5 * ddpm.abs().max().item())
    assert (ddim - sample(network)).abs().max() > 1e-3 * ddpm.abs().max()


def test_same_seed_same_bits_and_the_global_random_state_is_left_alone(network: nn.Module) -> None:
    before = torch.get_rng_state()
    first = sample(network, sampler="ddpm")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert torch.equal(sample(network, sampler="ddpm"), first)
    torch.set_rng_state(before)


def test_autocast_runs_the_network_in_the_half_type_and_keeps_latents_float32(network: nn.Module) -> None:
    half = sample(network, autocast=torch.bfloat16)
    exact = sample(network)
    assert half.dtype == torch.float32
    assert 0 < (half - exact).abs().max() < 0.2 * exact.abs().max()


def test_progress_and_refusals(network: nn.Module) -> None:
    steps: list[int] = []
    sample(network, steps=3, progress=lambda: steps.append(1))
    assert len(steps) == 3
    with pytest.raises(ValueError, match="choose from ddim, ddpm"):
        sample(network, sampler="dim")
    with pytest.raises(ValueError, match="choose 1 to 1000"):
        sample(network, steps=1001)
    inner = network.get_submodule("transformer_blocks.0")
    inner.train()
    try:
        with pytest.raises(ValueError, match="training mode"):
            sample(network)
    finally:
        inner.eval()


def test_decoding_is_the_stock_pipelines(tiny: Path, vae: AutoencoderKL) -> None:
    latents = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    pipeline = PixArtSigmaPipeline.from_pretrained(str(tiny))
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / 0.13025, return_dict=False)[0]
    stock = pipeline.image_processor.postprocess(decoded, output_type="pil")
    ours = decode_latents(vae, latents)
    assert [picture.size for picture in ours] == [(64, 64)] * 3
    for picture, other in zip(ours, stock, strict=True):
        a, b = (torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8).int() for p in (picture, other))
        assert (a - b).abs().max() <= 1 and (a != b).float().mean() < 0.01  # ours are decoded one at a time
        assert a.float().std() > 1  # not one flat colour


def test_decoding_adds_the_shift_and_refuses_what_is_not_finite(tiny: Path, vae: AutoencoderKL) -> None:
    latents = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    shifted = load_vae(str(tiny), dtype=torch.float32)
    shifted.register_to_config(shift_factor=0.5)
    expected = decode_latents(vae, latents + 0.5 * 0.13025)[0]
    assert decode_latents(shifted, latents)[0].tobytes() == expected.tobytes()
    with pytest.raises(UserError, match="sampling gave NaN"):
        decode_latents(vae, latents * float("inf"))
    shifted.decoder.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match="the VAE gave NaN"):
        decode_latents(shifted, latents)
