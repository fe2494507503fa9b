"""The configurations of PixArt-Sigma-XL-2, which are all of it that is read before a training begins. Shared."""

import json
from pathlib import Path
from typing import Any

_PARTS: dict[str, dict[str, Any]] = {
    "model_index.json": {
        "_class_name": "PixArtSigmaPipeline",
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "PixArtTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    },
    "transformer/config.json": {
        "_class_name": "PixArtTransformer2DModel",
        "num_layers": 28,
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "in_channels": 4,
        "out_channels": 8,
        "patch_size": 2,
        "cross_attention_dim": 1152,
        "caption_channels": 4096,
        "use_additional_conditions": False,
    },
    "vae/config.json": {
        "_class_name": "AutoencoderKL",
        "latent_channels": 4,
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "scaling_factor": 0.13025,
        "force_upcast": True,
    },
    "text_encoder/config.json": {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": 32128,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    },
    "scheduler/scheduler_config.json": {
        "_class_name": "DPMSolverMultistepScheduler",
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
    },
}


def real_size(folder: Path, side: int) -> Path:
    """Write them, for pictures of side x side pixels, and return the folder."""
    own = {"sample_size": side // 8, "interpolation_scale": side // 512}
    for name, content in _PARTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({**content, **(own if name.startswith("transformer") else {})}))
    return folder
