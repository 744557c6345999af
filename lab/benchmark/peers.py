"""The alternatives to our liquid cell: `torchdiffeq` around the same cell, and the cells of the library `ncps`.

Each is timed as one forward and one backward pass on the features of the detail cell, (B, in_channels, H, W), or on a
part of their pixels. The comparison favours `ncps` wherever there is a choice:

- Its cells know no space. Each pixel is an element of their batch, with the inputs of the detail cell and as many
  hidden units as that has channels. They do not compute its 3x3 convolutions.
- `LTC` sees a sequence of one element, with as many `ode_unfolds` as the detail cell has ODE steps.
- `CfC` is a closed form without steps and sees a sequence of one element. It is also timed unrolled over the ODE steps.
- They are timed on the number of pixels with the least time per pixel, and the time is scaled to all pixels: LTC keeps
  several tensors (pixels, units, units) per step, which on a CPU should fit in the cache.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from liquid_diffusion import RealLiquidCell, TrueLiquidDiffusionModel
from runtime.hardware import synchronize

# How many pixels an ncps cell is timed on. On a CPU: the number from 256 to 16,384 with the least measured time per
# pixel (one thread). On a GPU: enough to keep it busy, with less than 10 GB for LTC (counted, not measured).
PIXELS = {"ltc": 256, "cfc": 4096, "cfc-unrolled": 1024}
PIXELS_GPU = 64 * 1024
GRADIENT = 1.0  # of every output of a cell, for the backward pass


class TorchdiffeqCell(RealLiquidCell):
    """The same cell and parameters, with the Euler steps computed by `torchdiffeq.odeint`."""

    has_kernel = False  # pyright: ignore[reportAssignmentType] - for the base class it depends on the solver

    def integrate(
        self, h: Tensor | None, drive: Tensor, tau: Tensor, horizon: float | None = None, num_steps: int | None = None
    ) -> Tensor:
        from torchdiffeq import odeint

        horizon, num_steps = horizon or self.horizon, num_steps or self.num_steps
        times = torch.linspace(0, horizon, num_steps + 1, device=drive.device)
        h = torch.zeros_like(drive) if h is None else h
        states = odeint(lambda _, h: (self.target(h, drive) - h) / tau, h, times, method="euler")
        return states[-1]  # pyright: ignore[reportReturnType]


def drive_by_torchdiffeq(model: TrueLiquidDiffusionModel) -> TrueLiquidDiffusionModel:
    """Make the three cells of the model use torchdiffeq from now on; returns the same model."""
    for cell in model.processor.cells.values():
        cell.__class__ = TorchdiffeqCell  # the same parameters and settings with another loop over the steps
    return model


class PixelCell(nn.Module):
    """An `ncps` cell that is run on pixels: forward(pixels (N, inputs)) -> (N, units)."""

    def __init__(self, kind: str, inputs: int, units: int, ode_steps: int):
        """kind: `ltc`, `cfc`, or `cfc-unrolled`, which sees its pixel `ode_steps` times."""
        super().__init__()
        from ncps.torch import LTC, CfC

        self.elements = ode_steps if kind == "cfc-unrolled" else 1
        if kind == "ltc":
            self.cell = LTC(inputs, units, return_sequences=False, ode_unfolds=ode_steps)
        else:
            self.cell = CfC(inputs, units, return_sequences=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.cell(pixels[:, None].expand(-1, self.elements, -1))[0]


def detail_cell(model: TrueLiquidDiffusionModel) -> RealLiquidCell:
    """The cell at full resolution, the most expensive one."""
    return model.processor.detail_cell


def cell_inputs(cell: RealLiquidCell, batch_size: int, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(random features (B, in_channels, side, side) that require a gradient, as in the model; time embeddings)."""
    x = torch.randn(batch_size, cell.input.depthwise.in_channels, side, side, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    return x.requires_grad_(), torch.randn(batch_size, cell.time.in_features, device=device)


def as_pixels(x: Tensor, kind: str) -> Tensor:
    """The pixels (N, C) of features (B, C, H, W) that a `PixelCell` is timed on; they require a gradient."""
    pixels = x.detach().permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    return pixels[: PIXELS[kind] if x.device.type == "cpu" else PIXELS_GPU].clone().requires_grad_()


def forward_backward(cell: Callable[..., Any], inputs: tuple[Tensor, ...], precision: str) -> Callable[[], None]:
    """A function that runs the forward and backward pass of a cell and returns when all gradients are computed.

    Each call first drops the gradients of the last one.
    """
    device = inputs[0].device

    def call() -> None:
        for tensor in (*inputs, *cell.parameters()):
            tensor.grad = None
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            output = cell(*inputs)
        output.backward(torch.full_like(output, GRADIENT))
        synchronize(device)

    return call


def largest_difference(ours: RealLiquidCell, theirs: RealLiquidCell, inputs: tuple[Tensor, ...]) -> float:
    """The largest difference between the outputs of two cells, divided by the largest output; in fp32."""
    with torch.no_grad():
        a, b = ours(*inputs), theirs(*inputs)
    return ((a - b).abs().max() / a.abs().max()).item()
