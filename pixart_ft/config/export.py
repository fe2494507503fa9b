"""The configurations of `pixart-ft export` and `pixart-ft convert`. No torch here: help is instant."""

from typing import Literal

from pydantic import Field

from pixart_ft.config.reading import Config
from pixart_ft.config.train import LARGEST_RANK, Folder, Source, Weights

Dialect = Literal["peft", "diffusers", "comfy", "kohya", "merged"]


class ConvertConfig(Config):
    """A file of the original PixArt-Sigma layout to be made a diffusers folder, or a folder to be made such a file."""

    file: Folder = Field(
        description="file of the original layout (.pth, .bin, .safetensors); or the way back: a diffusers folder, or a "
        "run that trained the whole network"
    )
    out: Folder = Field(description="where it is to be: a folder; on the way back a .safetensors or .pth file")
    weights: Weights = Field("ema", description="averaged or last weights, of a file or a run that has both")
    image_size: int | None = Field(
        None, ge=64, le=4096, multiple_of=16, description="pixels; null = as the file's table of positions says"
    )
    heads: int = Field(16, ge=1, le=128, description="attention heads, which no file says; every PixArt has 16")
    parts: Source | None = Field(
        None, description="model whose VAE, text encoder, tokenizer and schedule are put beside it; null = none"
    )


class ExportConfig(Config):
    """What a run trained, to be written as other programs read it."""

    unused = (
        ("rank", "to", lambda to: to != "merged"),
        ("single_file", "to", lambda to: to == "merged"),
    )

    run: Folder = Field(description="run folder, RUN@STEP, a Hub id, or the folder of an adapter or a model")
    to: Dialect = Field(
        description="who is to read it: peft; diffusers' load_lora_adapter; comfy = ComfyUI; kohya = OneTrainer and "
        "kohya's scripts; merged = anybody, as a whole pipeline with the adapter in its weights"
    )
    out: Folder = Field(description="folder to be made")
    weights: Weights = Field("ema", description="averaged or last weights of the run")
    base: Source | None = Field(None, description="the base it was trained on; null = where it was then")
    rank: int | None = Field(
        None,
        ge=1,
        le=LARGEST_RANK,
        description="of the LoRA that comes nearest, where the reader knows nothing but LoRAs and this is none; null = "
        "64",
    )
    everywhere: bool = Field(
        False, description="let what was trained at some timesteps act at all, since no other program limits it"
    )
    single_file: bool = Field(
        False, description="merged: the transformer once more, in one .safetensors of the authors' layout, for ComfyUI"
    )
