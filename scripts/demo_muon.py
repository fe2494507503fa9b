"""Muon for the demo's networks: torch.optim.Muon, all matrices of one shape at once."""

import torch


class BatchedMuon(torch.optim.Optimizer):
    """torch.optim.Muon with match_rms_adamw and Nesterov momentum, whatever the number of dimensions.

    Convolutions count as matrices of (out, in x height x width). All matrices of one shape are made orthogonal
    together, in bfloat16 where the device has it and in float32 elsewhere (a processor that emulates bfloat16 takes
    twenty times as long).
    """

    COEFFICIENTS, STEPS, EPSILON = (3.4445, -4.7750, 2.0315), 5, 1e-7

    def __init__(
        self,
        parameters: list[torch.nn.Parameter],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.Tensor]] = {}
            for p in group["params"]:
                by_shape.setdefault(p.flatten(1).shape, []).append(p)
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            for shape, matrices in by_shape.items():
                self._move(shape, matrices, group)

    def _move(self, shape: torch.Size, matrices: list[torch.Tensor], group: dict) -> None:
        grads: list[torch.Tensor] = [p.grad for p in matrices if p.grad is not None]
        assert len(grads) == len(matrices)
        buffers = [self.state[p]["momentum_buffer"] for p in matrices]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        steps = torch._foreach_lerp(grads, buffers, group["momentum"])
        x = torch.stack([step.flatten(1) for step in steps]).to(self.dtype)
        x = x.mT.contiguous() if shape[0] > shape[1] else x
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=self.EPSILON)
        a, b, c = self.COEFFICIENTS
        for _ in range(self.STEPS):  # Newton-Schulz: towards the nearest orthogonal matrix
            gram = x @ x.mT
            x = ((gram @ gram).mul_(c).add_(gram, alpha=b) @ x).add_(x, alpha=a)
        x = (x.mT if shape[0] > shape[1] else x).float()
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        directions = [step.reshape(p.shape) for step, p in zip(x.unbind(), matrices, strict=True)]
        torch._foreach_add_(matrices, directions, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)
