"""Trains the demo's PixArt-Sigma transformer, and its small T5 with it, on the latents of pictures in several styles.

The loss is the hybrid one of Nichol & Dhariwal (2021): noise error (weighted by t, on the simple term alone) plus
the learned-range bound, with captions dropped to the null caption. Muon moves the matrices of the blocks,
AdamW the rest. Float32 weights; the matrix products in bfloat16 where that is faster. While the rates are high, most
pictures are drawn a little turned, moved and smaller, so that the network learns things and not pixels.
Resumable: every step draws from generators seeded by its index.
"""

import json
import math
import shutil
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from demo_captions import Example
from demo_course import Course
from demo_muon import BatchedMuon
from demo_vae import to_pixels
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from pixart_ft.diffusion.objectives import simple_term, variance_alone, vlb_term
from pixart_ft.diffusion.process import Noised
from pixart_ft.diffusion.schedules import NoiseSchedule
from pixart_ft.files import write_file
from pixart_ft.model.attention import use_kernels
from pixart_ft.model.network import network_output
from pixart_ft.model.vae import LatentScale, encode_moments

BATCH = 64
CAPTION_DROPOUT = 0.1
MIN_SNR_GAMMA = 5.0  # min-SNR tames the low noise, which is all texture
MAX_DEBIASED = 30.0  # 1/sqrt(snr) lifts the high noise, where the caption decides the shape (debiased weight, capped)
EMA_DECAY = 0.9995
LINE_SECONDS, CHECKPOINT_SECONDS = 30.0, 180.0
LOOK_STEPS = 500  # between two looks at what is held out
LOOK_TIMESTEPS = tuple(range(50, 1000, 100))
MOVED_COPIES = 3  # of every picture, kept beside it
MOVED_SHARE = 0.6  # of the drawn pictures at the peak rates; none while the rates fall, for clean pictures in the end
TURN, SHIFT, SHRINK = 6.0, 0.03, 0.12  # degrees, share of the side, share of the size: at most
MUON_RATE, ADAMW_RATE = 1.5e-3, 7e-4  # peaks
# To finish a trained model: the share of the peaks where its rates begin to fall, and from which share of the timesteps
# on half of the draws are, since shapes are decided there.
FINISHING, FINISHING_HIGH = 0.1, 0.6
FINISHING_EMA_DECAY = 0.99
DECAY_SHARE = 0.25  # the last quarter of the steps takes the learning rate linearly to zero
EXTRA_IDS = 100


def build_tokenizer(captions: Sequence[str], vocabulary: int = 2000) -> T5Tokenizer:
    """A Unigram vocabulary in T5's conventions (pad 0, end 1, unknown 2), learnt from the captions."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    printable = [chr(c) for c in range(33, 127)]
    tokenizer.train_from_iterator(
        captions,
        trainers.UnigramTrainer(
            vocab_size=vocabulary,
            special_tokens=["<pad>", "</s>", "<unk>"],
            unk_token="<unk>",
            initial_alphabet=printable,
        ),
    )
    pieces = [(token, score) for token, score in json.loads(tokenizer.to_str())["model"]["vocab"]]
    extra = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(EXTRA_IDS))]
    return T5Tokenizer(vocab=pieces + extra, extra_ids=EXTRA_IDS)


def kept_tokenizer(folder: Path, captions: Sequence[str], finished: Path | None) -> T5Tokenizer:
    """The one in `folder`, made once: learnt from the captions again, it would give a few pieces other numbers.

    A model to finish brings its own, by whose numbers its text encoder knows the pieces; exits where another lies.
    """
    if not folder.is_dir() and finished is not None:
        shutil.copytree(finished / "tokenizer", folder)
    if not folder.is_dir():
        build_tokenizer(captions).save_pretrained(str(folder))
    tokenizer = T5Tokenizer.from_pretrained(str(folder))
    if finished and tokenizer.get_vocab() != T5Tokenizer.from_pretrained(str(finished / "tokenizer")).get_vocab():
        sys.exit(
            f"{folder} is not the tokenizer of --finish {finished}, whose text encoder would read every caption "
            "wrongly; give another --work, or delete that folder and what was trained with it"
        )
    return tokenizer


def build_text_encoder(vocabulary: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            tie_word_embeddings=False,
        )
    )


def build_transformer(width: int = 256, layers: int = 8, caption_channels: int = 128) -> PixArtTransformer2DModel:
    """PixArt-Sigma's own configuration at 256 pixels, narrow, shallow and with 4 x 4 patches: 64 image tokens."""
    transformer = PixArtTransformer2DModel(
        num_attention_heads=width // 64,
        attention_head_dim=64,
        num_layers=layers,
        in_channels=4,
        out_channels=8,
        patch_size=4,
        sample_size=32,
        cross_attention_dim=width,
        caption_channels=caption_channels,
        interpolation_scale=0.5,
        use_additional_conditions=False,
    )
    for module in transformer.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
            torch.nn.init.zeros_(module.bias)
    for block in transformer.transformer_blocks:  # the network starts as if it had no captions, and predicts zero
        torch.nn.init.zeros_(block.attn2.to_out[0].weight)
    torch.nn.init.normal_(transformer.adaln_single.linear.weight, std=0.02)
    torch.nn.init.zeros_(transformer.proj_out.weight)
    return transformer


def trained_networks(folder: Path) -> tuple[PixArtTransformer2DModel, T5EncoderModel]:
    """Transformer and text encoder of a demo model, in float32."""
    transformer = PixArtTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
    assert isinstance(transformer, PixArtTransformer2DModel)
    return transformer, T5EncoderModel.from_pretrained(folder / "text_encoder").float()


def moved(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each picture (N, 3, H, W) turned, moved and made smaller by a little; white around it.

    None is mirrored: a network that saw some so draws things that look both ways at once.
    """
    n = len(pictures)
    turn, shift_x, shift_y, shrink = (2 * torch.rand(4, n, generator=generator) - 1).to(pictures.device)
    angle, scale = math.pi / 180 * TURN * turn, 1 + SHRINK * (1 + shrink) / 2
    x = torch.stack([scale * angle.cos(), -scale * angle.sin(), 2 * SHIFT * shift_x], dim=1)
    y = torch.stack([scale * angle.sin(), scale * angle.cos(), 2 * SHIFT * shift_y], dim=1)
    grid = F.affine_grid(torch.stack([x, y], dim=1), list(pictures.shape), align_corners=False)
    return 1 - F.grid_sample(1 - pictures, grid, align_corners=False)  # what lies outside is read as zero


@torch.no_grad()
def encode_pictures(
    vae: AutoencoderKL, pictures: np.ndarray, path: Path, *, copies: int = 0, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, std) of every picture's posterior, times the scaling factor, float16, each (1 + copies, N, 4, H, W).

    First of the pictures as they are, then of `copies` moved ones. Kept in `path`.
    """
    if not path.is_file():
        vae, generator = vae.to(device), torch.Generator().manual_seed(0)
        batch, rows = (8 if device == "cpu" else 64), []
        for start in range(0, len(pictures), batch):
            plain = to_pixels(pictures[start : start + batch]).to(device)
            found = [encode_moments(vae, x) for x in (plain, *(moved(plain, generator) for _ in range(copies)))]
            rows.append(torch.stack(found).cpu())  # (1 + copies, n, 2, 4, H, W)
        mean, std = torch.cat(rows, dim=1).unbind(2)
        scale = LatentScale.of(vae.config)
        kept = (scale.scaled(mean).half(), (std * scale.scale).half())
        write_file(path, lambda aside: torch.save(kept, aside))
    mean, std = torch.load(path, weights_only=True)
    assert mean.shape[:2] == (1 + copies, len(pictures)), f"{path} is of other pictures: delete it"
    return mean, std


def fastest_dtype(device: str) -> torch.dtype:
    """The type of matrix products: bfloat16 on a GPU and where the processor multiplies it faster than float32."""
    if device != "cpu":
        return torch.bfloat16
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(512, 512, dtype=dtype)
        began = time.perf_counter()
        for _ in range(4):
            x @ x
        seconds[dtype] = time.perf_counter() - began
    return min(seconds, key=lambda dtype: seconds[dtype])


def learning_rate_factor(step: int, steps: int) -> float:
    """Warm-up over 200 steps, constant, then linear to zero over the last quarter."""
    decay = (steps - step) / max(1, round(DECAY_SHARE * steps))
    return min(1.0, (step + 1) / 200, decay)


def finishing_factor(step: int, steps: int) -> float:
    """Of a model that is trained already: warm-up over 30 steps, linear to zero."""
    return FINISHING * min(1.0, (step + 1) / 30) * (steps - step) / steps


class Every:
    """True once in so many seconds."""

    def __init__(self, seconds: float):
        self.seconds, self.last = seconds, time.monotonic()

    def due(self) -> bool:
        if time.monotonic() - self.last < self.seconds:
            return False
        self.last = time.monotonic()
        return True


class BaseTraining:
    """Transformer, text encoder, their average and optimizers; `run` trains them, resuming from a checkpoint."""

    def __init__(
        self,
        transformer: PixArtTransformer2DModel,
        text_encoder: T5EncoderModel,
        tokenizer: T5Tokenizer,
        latents: tuple[torch.Tensor, torch.Tensor],
        pictures: Sequence[Example],
        held_out: Collection[int],
        folder: Path,
        *,
        batch: int = BATCH,
        device: str = "cpu",
        finishing: bool = False,
    ):
        """`latents` are those of `pictures`, by `encode_pictures`; rows in `held_out` are not learned.

        finishing  networks that are trained already: smaller rates that fall from the first step on, no moved pictures,
                   more of the high noise
        """
        assert latents[0].shape[1] == len(pictures)
        self.transformer, self.text_encoder = transformer.to(device), text_encoder.to(device)
        self.batch, self.device, self.dtype = batch, device, fastest_dtype(device)
        self.mean, self.std = (latent.to(device) for latent in latents)
        self.held_out = torch.tensor(sorted(held_out), dtype=torch.int64)
        self.frequencies = torch.tensor([picture.frequency for picture in pictures])
        self.frequencies[self.held_out] = 0.0
        texts = sorted({text for picture in pictures for text, _ in picture.captions})
        number = {text: i for i, text in enumerate(texts)}
        width = max(len(picture.captions) for picture in pictures)
        self.captions = torch.zeros(len(pictures), width, dtype=torch.int64)
        self.shares = torch.zeros(len(pictures), width)
        for row, picture in enumerate(pictures):
            for k, (text, share) in enumerate(picture.captions):
                self.captions[row, k], self.shares[row, k] = number[text], share
        self.null = len(texts)  # the null caption is last
        tokens = tokenizer([*texts, ""], padding="longest", return_tensors="pt")
        self.ids, self.mask = tokens.input_ids, tokens.attention_mask
        self.schedule = NoiseSchedule.linear()
        self.modules = torch.nn.ModuleDict({"transformer": transformer, "text_encoder": text_encoder})
        matrices = [p for p in transformer.transformer_blocks.parameters() if p.ndim == 2 and min(p.shape) > 6]
        self.course = Course(
            self.modules,
            BatchedMuon(matrices, weight_decay=0.05, dtype=self.dtype),
            rates=(MUON_RATE, ADAMW_RATE),
            decay=FINISHING_EMA_DECAY if finishing else EMA_DECAY,
            file=folder / "state.pt",
        )
        self.finishing = finishing

    def _output(self, noised: Noised, texts: torch.Tensor) -> torch.Tensor:
        """The network's, with captions by their numbers."""
        longest = int(self.mask[texts].sum(1).max())
        length = longest if self.device == "cpu" else self.mask.shape[1]  # on a GPU one shape, compiled once
        ids, mask = self.ids[texts, :length].to(self.device), self.mask[texts, :length].to(self.device)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            embeds = self.text_encoder(ids, attention_mask=mask).last_hidden_state
            return network_output(self.transformer, noised.x_t, noised.t, embeds, mask)

    def loss(self, step: int, moved_share: float = 0.0) -> dict[str, torch.Tensor]:
        """The step's terms, each averaged over the batch: the weighted "loss", "simple" and "vlb"."""
        g = torch.Generator().manual_seed(step)
        noise = torch.Generator(self.device).manual_seed(step)
        rows = torch.multinomial(self.frequencies, self.batch, generator=g)
        chosen = torch.multinomial(self.shares[rows], 1, generator=g)[:, 0]
        dropped = torch.rand(self.batch, generator=g) < CAPTION_DROPOUT
        texts = torch.where(dropped, self.null, self.captions[rows, chosen])
        copies = torch.zeros_like(rows)
        if len(self.mean) > 1:
            is_moved = torch.rand(self.batch, generator=g) < moved_share
            copies = torch.where(is_moved, torch.randint(1, len(self.mean), (self.batch,), generator=g), copies)
        # one t from each of `batch` equal strata, in an order unrelated to the pictures'
        u = (torch.randperm(self.batch, generator=g) + torch.rand(self.batch, generator=g)) / self.batch
        if self.finishing:
            u = torch.where(u < 0.5, 2 * u, FINISHING_HIGH + (1 - FINISHING_HIGH) * (2 * u - 1))
        t = (u * self.schedule.num_steps).long().clamp(max=self.schedule.num_steps - 1).to(self.device)
        copies, rows = copies.to(self.device), rows.to(self.device)
        mean, std = self.mean[copies, rows].float(), self.std[copies, rows].float()
        wobble, eps = (torch.randn(mean.shape, generator=noise, device=self.device) for _ in range(2))
        noised = Noised.of(self.schedule, mean + std * wobble, t, eps)
        output = self._output(noised, texts)
        simple = simple_term(self.schedule, output, noised, "epsilon")
        vlb = vlb_term(self.schedule, variance_alone(output), noised, "epsilon")
        snr = self.schedule.snr.to(self.device)[t].float()
        weight = (MIN_SNR_GAMMA / snr).clamp(max=1.0) * snr.rsqrt().clamp(min=1.0, max=MAX_DEBIASED)
        return {"loss": (weight * simple + vlb).mean(), "simple": simple.mean(), "vlb": vlb.mean()}

    @torch.no_grad()
    def held_out_error(self) -> float:
        """Noise error of the average on what is held out, each with its plain caption at LOOK_TIMESTEPS, always the
        same noise."""
        generator = torch.Generator(self.device).manual_seed(0)
        mean, texts = self.mean[0, self.held_out.to(self.device)].float(), self.captions[self.held_out, 0]
        last = {name: p.clone() for name, p in self.modules.named_parameters()}
        self._put(self.course.average)
        errors = []
        for step in LOOK_TIMESTEPS:
            eps = torch.randn(mean.shape, generator=generator, device=self.device)
            t = torch.full((len(mean),), step, device=self.device)
            noised = Noised.of(self.schedule, mean, t, eps)
            errors.append(simple_term(self.schedule, self._output(noised, texts), noised, "epsilon").mean())
        self._put(last)
        return float(torch.stack(errors).mean())

    def run(self, steps: int, *, compiled: bool = True, minutes: float = float("inf")) -> None:
        """Train up to `steps` or for `minutes`, with a line of averaged losses and a checkpoint now and then. The rates
        follow `steps`, so a training in pieces names the same number every time."""
        if self.device == "cpu":
            use_kernels(self.transformer)
        if compiled:
            for block in self.transformer.transformer_blocks:
                block.compile()
        self.modules.train()
        began, start = time.monotonic(), self.course.step
        line, checkpoint = Every(LINE_SECONDS), Every(CHECKPOINT_SECONDS)
        running: dict[str, torch.Tensor] = {}
        while self.course.step < steps and time.monotonic() - began < 60 * minutes:
            factor = (finishing_factor if self.finishing else learning_rate_factor)(self.course.step, steps)
            is_falling = self.finishing or self.course.step >= (1 - DECAY_SHARE) * steps
            terms = self.loss(self.course.step, 0.0 if is_falling else MOVED_SHARE)
            self.course.update(terms["loss"], factor)
            for name, value in terms.items():
                running[name] = torch.lerp(running.get(name, value.detach()), value.detach(), 0.02)
            if line.due() or self.course.step == steps:
                rate = (self.course.step - start) / (time.monotonic() - began)
                parts = "  ".join(f"{name} {value:.4f}" for name, value in running.items())
                print(f"base {self.course.step}/{steps}  {parts}  {rate:.2f} steps/s", flush=True)
            if self.course.step % LOOK_STEPS == 0 or self.course.step == steps:
                print(f"base {self.course.step}/{steps}  held out {self.held_out_error():.4f}", flush=True)
            if checkpoint.due():
                self.course.save()
        self.course.save()

    def use_average(self) -> None:
        """Put the average in place of the last weights: this is what is shipped."""
        self._put(self.course.average)
        self.modules.eval()

    @torch.no_grad()
    def _put(self, weights: Mapping[str, torch.Tensor]) -> None:
        for name, p in self.modules.named_parameters():
            p.copy_(weights[name])
