"""Trains the demo's PixArt-Sigma transformer, and its small T5 with it, on the latents of pictures in several styles.

The loss is the hybrid one of Nichol & Dhariwal (2021): noise error (weighted by t, on the simple term alone) plus
the learned-range bound, with captions dropped to the null caption. Muon moves the matrices of the blocks,
AdamW the rest. Float32 weights; the matrix products in bfloat16 where that is faster. Resumable: every step draws
from a generator seeded by its index, on the processor, whatever device trains.
"""

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
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
from pixart_ft.model.attention import use_kernels
from pixart_ft.model.network import network_output
from pixart_ft.model.vae import LatentScale, encode_moments

BATCH = 64
CAPTION_DROPOUT = 0.1
MIN_SNR_GAMMA = 5.0  # min-SNR tames the low noise, which is all texture
MAX_DEBIASED = 30.0  # 1/sqrt(snr) lifts the high noise, where the caption decides the shape (debiased weight, capped)
EMA_DECAY = 0.9995
CHECKPOINT_STEPS = 100
MUON_RATE, ADAMW_RATE = 1.5e-3, 7e-4  # peaks
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


def kept_tokenizer(folder: Path, captions: Sequence[str], warm: Path | None) -> T5Tokenizer:
    """The one in `folder`, made once: learnt from the captions again, it would give a few pieces other numbers.

    A warm start brings its own, by whose numbers its text encoder knows the pieces; exits where another lies there.
    """
    if not folder.is_dir() and warm is not None:
        shutil.copytree(warm / "tokenizer", folder)
    if not folder.is_dir():
        build_tokenizer(captions).save_pretrained(str(folder))
    tokenizer = T5Tokenizer.from_pretrained(str(folder))
    if warm is not None and tokenizer.get_vocab() != T5Tokenizer.from_pretrained(str(warm / "tokenizer")).get_vocab():
        sys.exit(
            f"{folder} is not the tokenizer of --warm-start {warm}, whose text encoder would read every caption "
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


def patches(latents: torch.Tensor, side: int = 4) -> torch.Tensor:
    """Latents (N, C, H, W) as rows of the transformer's patches, each (row, column, channel): (N H W / 16, 16 C)."""
    n, c, h, w = latents.shape
    cut = latents.reshape(n, c, h // side, side, w // side, side)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(-1, side * side * c)


def rotation(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """The orthogonal R with patches(new) @ R nearest to patches(old), of the same pictures (orthogonal Procrustes).

    Orthogonal, since white noise in the new latents is then white noise in the old ones: x_t @ R is what the old
    network knows, at every t.
    """
    u, _, v = torch.linalg.svd(patches(new).T.double() @ patches(old).double())
    return (u @ v).float()


def turned_ends(old: Mapping[str, torch.Tensor], r: torch.Tensor) -> dict[str, torch.Tensor]:
    """First and last layer of a transformer of other latents, made to read and write latents x for which x @ r are its.

    The first reads x @ r; the last gives eps_old @ r^T, which is eps. The variance's channels, which no rotation can
    carry over, all get their mean.
    """
    first, last, bias = (old[key] for key in ("pos_embed.proj.weight", "proj_out.weight", "proj_out.bias"))
    width, c, side, _ = first.shape
    n = side * side * c
    read = (first.permute(0, 2, 3, 1).reshape(width, n) @ r.T).reshape(width, side, side, c).permute(0, 3, 1, 2)
    given = torch.cat([last, bias[:, None]], dim=1).reshape(side, side, 2 * c, -1)
    eps = (r @ given[:, :, :c].reshape(n, -1)).reshape(side, side, c, -1)
    variance = given[:, :, c:].mean(2, keepdim=True).expand_as(eps)
    turned = torch.cat([eps, variance], dim=2).reshape(2 * n, -1)
    return {"pos_embed.proj.weight": read, "proj_out.weight": turned[:, :-1], "proj_out.bias": turned[:, -1]}


def warm_start(folder: Path, r: torch.Tensor) -> tuple[PixArtTransformer2DModel, T5EncoderModel]:
    """Another demo's transformer, its ends turned by `r` (see `rotation`), and its text encoder.

    They draw in the new latents what they drew in the old ones. Their tokenizer must stay: with another one, which cuts
    the names into other pieces, what the captions mean is lost.
    """
    transformer = PixArtTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
    assert isinstance(transformer, PixArtTransformer2DModel)
    old = transformer.state_dict()
    transformer.load_state_dict({**old, **turned_ends(old, r)})
    return transformer, T5EncoderModel.from_pretrained(folder / "text_encoder")


def encode_pictures(vae: AutoencoderKL, pictures: np.ndarray, path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, std) of every picture's posterior, times the scaling factor; kept in `path`."""
    if not path.is_file():
        found = [encode_moments(vae, to_pixels(pictures[i : i + 8])) for i in range(0, len(pictures), 8)]
        torch.save(tuple(torch.cat(found).unbind(1)), path)
    mean, std = torch.load(path, weights_only=True)
    scale = LatentScale.of(vae.config)
    return scale.scaled(mean), std * scale.scale


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


class BaseTraining:
    """Transformer, text encoder, their average and optimizers; `run` trains them, resuming from a checkpoint."""

    def __init__(
        self,
        transformer: PixArtTransformer2DModel,
        text_encoder: T5EncoderModel,
        tokenizer: T5Tokenizer,
        latents: tuple[torch.Tensor, torch.Tensor],
        pictures: Sequence[Example],
        folder: Path,
        *,
        batch: int = BATCH,
        device: str = "cpu",
    ):
        """`latents` are the (mean, std) of `pictures`, row by row."""
        assert len(latents[0]) == len(pictures)
        self.transformer, self.text_encoder = transformer.to(device), text_encoder.to(device)
        self.batch, self.device, self.dtype = batch, device, fastest_dtype(device)
        self.mean, self.std = (latent.to(device) for latent in latents)
        self.frequencies = torch.tensor([picture.frequency for picture in pictures])
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
            decay=EMA_DECAY,
            file=folder / "state.pt",
        )

    def loss(self, step: int) -> dict[str, torch.Tensor]:
        """The step's terms, each averaged over the batch: the weighted "loss", "simple" and "vlb"."""
        g = torch.Generator().manual_seed(step)
        rows = torch.multinomial(self.frequencies, self.batch, generator=g)
        shape = (self.batch, *self.mean.shape[1:])
        chosen = torch.multinomial(self.shares[rows], 1, generator=g)[:, 0]
        dropped = torch.rand(self.batch, generator=g) < CAPTION_DROPOUT
        texts = torch.where(dropped, self.null, self.captions[rows, chosen])
        # one t from each of `batch` equal strata, in an order unrelated to the pictures'
        u = (torch.randperm(self.batch, generator=g) + torch.rand(self.batch, generator=g)) / self.batch
        t = (u * self.schedule.num_steps).long().clamp(max=self.schedule.num_steps - 1).to(self.device)
        wobble, eps = (torch.randn(shape, generator=g).to(self.device) for _ in range(2))
        x0 = self.mean[rows.to(self.device)] + self.std[rows.to(self.device)] * wobble
        noised = Noised.of(self.schedule, x0, t, eps)
        length = int(self.mask[texts].sum(1).max())
        ids, mask = self.ids[texts, :length].to(self.device), self.mask[texts, :length].to(self.device)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            embeds = self.text_encoder(ids, attention_mask=mask).last_hidden_state
            output = network_output(self.transformer, noised.x_t, t, embeds, mask)
        simple = simple_term(self.schedule, output, noised, "epsilon")
        vlb = vlb_term(self.schedule, variance_alone(output), noised, "epsilon")
        snr = self.schedule.snr.to(self.device)[t].float()
        weight = (MIN_SNR_GAMMA / snr).clamp(max=1.0) * snr.rsqrt().clamp(min=1.0, max=MAX_DEBIASED)
        return {"loss": (weight * simple + vlb).mean(), "simple": simple.mean(), "vlb": vlb.mean()}

    def run(self, steps: int, *, compiled: bool = True, minutes: float = float("inf")) -> None:
        """Train up to `steps` or for `minutes`, with a line of averaged losses every 25 steps and a checkpoint now and
        then. The rates follow `steps`, so a training in pieces names the same number every time."""
        if self.device == "cpu":
            use_kernels(self.transformer)
        if compiled:
            for block in self.transformer.transformer_blocks:
                block.compile()
        self.modules.train()
        began, start = time.monotonic(), self.course.step
        running: dict[str, float] = {}
        while self.course.step < steps and time.monotonic() - began < 60 * minutes:
            terms = self.loss(self.course.step)
            self.course.update(terms["loss"], learning_rate_factor(self.course.step, steps))
            for name, value in terms.items():
                running[name] = 0.98 * running.get(name, value.item()) + 0.02 * value.item()
            if self.course.step % 25 == 0:
                rate = (self.course.step - start) / (time.monotonic() - began)
                parts = "  ".join(f"{name} {value:.4f}" for name, value in running.items())
                print(f"base {self.course.step}/{steps}  {parts}  {rate:.2f} steps/s", flush=True)
            if self.course.step % CHECKPOINT_STEPS == 0:
                self.course.save()
        self.course.save()

    def use_average(self) -> None:
        """Put the average in place of the last weights: this is what is shipped."""
        with torch.no_grad():
            for name, p in self.modules.named_parameters():
                p.copy_(self.course.average[name])
        self.modules.eval()
