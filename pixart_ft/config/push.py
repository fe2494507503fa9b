"""The configuration of `pixart-ft push`. No torch here: help is instant."""

from pydantic import Field

from pixart_ft.config.hub import REPO, Publication
from pixart_ft.config.reading import Config
from pixart_ft.config.train import Source, Weights


class PushConfig(Publication, Config):
    """Everything a push is told."""

    run: Source = Field(description="run folder, RUN@STEP, or the folder of an adapter or a model")
    repo: str = Field(description=REPO)
    weights: Weights = Field("ema", description="averaged or last weights of the run")
