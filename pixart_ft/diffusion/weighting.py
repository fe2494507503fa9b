"""The law of t: to which step of the process a training sample is noised, given a uniform draw."""

import torch
from torch import Tensor


def uniform_timesteps(u: Tensor, num_steps: int) -> Tensor:
    """t (N,) int64, uniform on 0..num_steps-1, from u (N,) float64 uniform on [0, 1)."""
    return (u.to(torch.float64) * num_steps).to(torch.int64).clamp(0, num_steps - 1)


def stratified_timesteps(u: Tensor, draw_indices: Tensor, global_batch: int, num_steps: int) -> Tensor:
    """t (N,) int64, one in each of `global_batch` equal strata of 0..num_steps-1: uniform over the batch.

    The stratum is the draw index (N,) modulo the global batch, however ranks and accumulation share it out.
    """
    stratum = draw_indices.to(u.device) % global_batch
    return uniform_timesteps((stratum + u.to(torch.float64)) / global_batch, num_steps)
