"""The folder of a saved pipeline: it opens as a stock one, and in ours with the scheduler that was saved."""

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import PixArtSigmaPipeline

from pixart_ft.files import write_text
from pixart_ft.schedulers import SCHEDULERS, PixArtScheduler
from pixart_ft.schedulers.stock import stock_twin

_SUBFOLDER = "pixart_ft_scheduler"
_WHERE = ("revision", "cache_dir", "token", "local_files_only", "force_download", "proxies")  # of a Hub model


def open_as_stock(folder: Path, index_name: str, scheduler: Any) -> None:
    """Say in the index that this is a PixArtSigmaPipeline, whose scheduler is the nearest of diffusers'.

    One of ours stands beside it in a subfolder. Warns where diffusers has none that comes near.
    """
    index = json.loads((folder / index_name).read_text(encoding="utf-8"))
    index["_class_name"] = PixArtSigmaPipeline.__name__
    shutil.rmtree(folder / _SUBFOLDER, ignore_errors=True)  # of an earlier save
    if isinstance(scheduler, PixArtScheduler):
        twin = stock_twin(scheduler)
        if twin is None:
            warnings.warn(
                "no scheduler of diffusers knows fractional timesteps or a posterior mean: this folder opens only "
                "where pixart_ft is installed",
                stacklevel=4,
            )
        else:
            twin.save_pretrained(folder / "scheduler")
            scheduler.save_pretrained(folder / _SUBFOLDER)
            index["scheduler"] = ["diffusers", type(twin).__name__]
    write_text(folder / index_name, json.dumps(index, indent=2, sort_keys=True) + "\n")


def own_scheduler(place: str | os.PathLike[str], stock: Any, where: Mapping[str, Any]) -> PixArtScheduler | None:
    """The scheduler that `open_as_stock` put beside `stock`, unless another was saved over that since.

    place: folder or Hub id; where: arguments of `from_pretrained`, of which those that find a Hub model count.
    """
    if Path(place).is_dir() and not (Path(place) / _SUBFOLDER).is_dir():
        return None
    found = {key: where[key] for key in _WHERE if key in where}
    try:
        config = PixArtScheduler.load_config(str(place), subfolder=_SUBFOLDER, **found)
    except OSError:  # a Hub model that is no pipeline of this class
        return None
    kinds = {kind.__name__: kind for kind in SCHEDULERS.values()}
    own: PixArtScheduler = kinds[config["_class_name"]].from_config(config)
    twin = stock_twin(own)
    return own if twin is not None and twin.to_json_string() == stock.to_json_string() else None
