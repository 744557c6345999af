"""The true liquid model with one thing taken away or added, at equal parameters: what each part is worth.

`compare.py --arms true true:pooled true:tau=fixed true:untied true:memory` measures it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from errors import UserError
from liquid_diffusion import (
    STEP_SHARE,
    InputConv,
    RealLiquidCell,
    SpatialLiquidProcessor,
    State,
    TrueLiquidDiffusionModel,
)


class PooledProcessor(SpatialLiquidProcessor):
    """The cells see what is left of the features after global average pooling, and add one number a channel."""

    def forward(self, x: Tensor, embedding: Tensor, state: State | None = None) -> State:
        h_global, h_local, h_detail = state or (None, None, None)
        x = x.mean((2, 3), keepdim=True)  # (B, C0, 1, 1)
        medium = self.to_medium(x)
        coarse = self.to_coarse(medium)
        h_global = self.cells["global"](coarse, embedding, h_global)
        h_local = self.cells["local"](torch.cat([medium, h_global], dim=1), embedding, h_local)
        h_detail = self.cells["detail"](torch.cat([x, h_local], dim=1), embedding, h_detail)
        return h_global, h_local, h_detail


class PooledLiquid(TrueLiquidDiffusionModel):
    """Liquid cells without space: only the two 3x3 convolutions around them see where a pixel lies."""

    processor_type = PooledProcessor


class FixedTauCell(RealLiquidCell):
    """tau is the middle of its range, for every input, time, pixel and channel."""

    has_kernel = False

    def __init__(self, in_channels: int, channels: int, embedding_dim: int, **options):
        super().__init__(in_channels, channels, embedding_dim, **options)
        self.input = InputConv(in_channels, channels)  # the drive alone
        self.time = nn.Linear(embedding_dim, channels, bias=False)

    def _drive_and_tau(self, features: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        drive = features + offset[:, :, None, None]
        return drive, torch.full_like(drive, (self.tau_min + self.tau_max) / 2)


class FixedTauProcessor(SpatialLiquidProcessor):
    """Three cells whose time constants are given."""

    cell_type = FixedTauCell


class FixedTauLiquid(TrueLiquidDiffusionModel):
    """Time constants are not learned; what that saves in parameters is spent on width."""

    processor_type = FixedTauProcessor

    def __init__(self, in_channels: int = 3, num_classes: int = 0, channels: Sequence[int] = (36, 26, 26), **options):
        super().__init__(in_channels, num_classes, channels, **options)


class UntiedCell(RealLiquidCell):
    """Each step after the first, which starts from zeros and has no convolution, has recurrent weights of its own."""

    def __init__(self, in_channels: int, channels: int, embedding_dim: int, **options):
        super().__init__(in_channels, channels, embedding_dim, **options)
        if self.solver not in STEP_SHARE:
            raise UserError(f"solver: untied steps need one of {', '.join(STEP_SHARE)}, got {self.solver!r}")
        self.recurrent = nn.ModuleList(
            [nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(self.num_steps - 1)]
        )
        for step in self.recurrent:
            nn.init.orthogonal_(step.weight, gain=0.8)

    def set_solver(self, solver: str, num_steps: int) -> None:
        if "recurrent" in self._modules and (solver, num_steps) != (self.solver, self.num_steps):
            raise UserError(
                "solver: an untied model has weights of its own for each step, and no ODE to solve otherwise"
            )
        super().set_solver(solver, num_steps)

    def forward(self, x: Tensor, embedding: Tensor, h: Tensor | None = None) -> Tensor:
        if h is not None:
            raise UserError("state: an untied model starts each call from zeros")
        drive, tau = self.drive_and_tau(x, embedding)
        share = STEP_SHARE[self.solver](self.horizon / self.num_steps / tau)
        h = share * self.activation(drive)
        for recurrent in self.recurrent:
            h = torch.lerp(h, self.activation(recurrent(h) + drive), share)
        return h


class UntiedProcessor(SpatialLiquidProcessor):
    """Three cells without weight tying."""

    cell_type = UntiedCell


class UntiedLiquid(TrueLiquidDiffusionModel):
    """No weight tying: a plain residual network with gates, narrower to be of the same size.

    Its steps are layers: `set_solver` raises UserError for another number of them or another scheme.
    """

    processor_type = UntiedProcessor

    def __init__(self, in_channels: int = 3, num_classes: int = 0, channels: Sequence[int] = (18, 14, 15), **options):
        super().__init__(in_channels, num_classes, channels, **options)


class MemoryLiquid(TrueLiquidDiffusionModel):
    """The state of one denoising step starts the next: the reverse diffusion is the time series that it follows."""

    carries_state = True


ABLATIONS = {"pooled": PooledLiquid, "tau=fixed": FixedTauLiquid, "untied": UntiedLiquid, "memory": MemoryLiquid}
