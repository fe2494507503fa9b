"""train.mixed_precision auto: bfloat16 where the hardware computes in it, float32 elsewhere."""

import pytest
import torch

from pixart_ft.config.train import load_config
from pixart_ft.training.start import with_precision


@pytest.mark.parametrize(
    ("cuda", "gpu_has_it", "processor", "expected"),
    [
        (False, True, (), "no"),
        (False, True, ("_is_amx_tile_supported",), "bf16"),
        (False, True, ("_is_avx512_bf16_supported",), "bf16"),
        (True, True, (), "bf16"),
        (True, False, ("_is_amx_tile_supported",), "no"),  # the processor does not compute
    ],
)
def test_auto_goes_by_the_device_that_computes(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, gpu_has_it: bool, processor: tuple[str, ...], expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or gpu_has_it
    )
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name in processor)
    assert with_precision(load_config("quickstart")).train.mixed_precision == expected


@pytest.mark.parametrize("word", ["no", "bf16", "fp16"])
def test_a_precision_that_is_named_is_kept(word: str) -> None:
    config = load_config("quickstart", {"train.mixed_precision": word})
    assert with_precision(config) is config
