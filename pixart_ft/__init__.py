"""Fine-tune PixArt-Sigma on your own pictures, its learned variance included, and generate with the result."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pixart_ft.adapters.pipelines import fuse, load_lora, set_scale, unload
    from pixart_ft.config.evaluate import EvaluateConfig
    from pixart_ft.config.generate import GenerateConfig
    from pixart_ft.config.push import PushConfig
    from pixart_ft.config.train import TrainConfig, load_config
    from pixart_ft.errors import UserError
    from pixart_ft.evaluation.command import run_evaluation
    from pixart_ft.files import __version__ as __version__
    from pixart_ft.pictures.recipes import read_recipe
    from pixart_ft.sampling.command import run_generation
    from pixart_ft.sampling.pipeline import PixArtPipeline
    from pixart_ft.sampling.settings import Settings
    from pixart_ft.sampling.text_to_image import TextToImage
    from pixart_ft.sharing.push import push
    from pixart_ft.training.run import run_training

__all__ = [
    "EvaluateConfig",
    "GenerateConfig",
    "PixArtPipeline",
    "PushConfig",
    "Settings",
    "TextToImage",
    "TrainConfig",
    "UserError",
    "fuse",
    "load_config",
    "load_lora",
    "push",
    "read_recipe",
    "run_evaluation",
    "run_generation",
    "run_training",
    "set_scale",
    "unload",
]

_HOMES = {  # imported when first asked for, since most bring torch along
    "EvaluateConfig": "config.evaluate",
    "GenerateConfig": "config.generate",
    "PixArtPipeline": "sampling.pipeline",
    "PushConfig": "config.push",
    "Settings": "sampling.settings",
    "TextToImage": "sampling.text_to_image",
    "TrainConfig": "config.train",
    "UserError": "errors",
    "__version__": "files",
    "fuse": "adapters.pipelines",
    "load_config": "config.train",
    "load_lora": "adapters.pipelines",
    "push": "sharing.push",
    "read_recipe": "pictures.recipes",
    "run_evaluation": "evaluation.command",
    "run_generation": "sampling.command",
    "run_training": "training.run",
    "set_scale": "adapters.pipelines",
    "unload": "adapters.pipelines",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
