"""The configuration of `pixart-ft convert`. No torch here: help is instant."""

from pydantic import Field

from pixart_ft.config.reading import Config
from pixart_ft.config.train import Folder, Source, Weights


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
