"""What a user would otherwise pick for a liquid cell: `torchdiffeq` around the same cell, and the cells of `ncps`.

Each peer is a function that runs one forward and one backward pass of a cell on the detail cell's features, which are
of shape (B, in_channels, H, W), or on part of their pixels. The mapping is the kindest to `ncps` that we know:

- Its cells have no space. A pixel is an element of their batch, with the detail cell's inputs and as many hidden units
  as that has channels; they are spared its 3x3 neighbourhoods.
- `LTC` runs one element of a sequence with as many `ode_unfolds` as the detail cell has ODE steps.
- `CfC` is a closed form and needs no steps: one element of a sequence. Unrolled over the ODE steps it is timed too.
- Theirs are timed on as many pixels at once as are fastest, and scaled to all: LTC keeps some (pixels, units, units)
  values a step, which on a CPU have to fit its cache.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hardware import synchronize
from liquid_diffusion import RealLiquidCell, TrueLiquidDiffusionModel

# That an ncps cell is timed on. On a CPU, of 256 to 16,384 those of the least measured time a pixel (one thread);
# on a GPU as many as keep it busy and leave LTC's memory under 10 GB (counted, not measured).
PIXELS = {"ltc": 256, "cfc": 4096, "cfc-unrolled": 1024}
PIXELS_GPU = 64 * 1024
GRADIENT = 1.0  # that every output of a cell is given


class TorchdiffeqCell(RealLiquidCell):
    """The same cell and parameters, its Euler steps taken by `torchdiffeq.odeint`."""

    has_kernel = False

    def integrate(
        self, h: Tensor | None, drive: Tensor, tau: Tensor, horizon: float | None = None, num_steps: int | None = None
    ) -> Tensor:
        from torchdiffeq import odeint

        horizon, num_steps = horizon or self.horizon, num_steps or self.num_steps
        times = torch.linspace(0, horizon, num_steps + 1, device=drive.device)
        h = torch.zeros_like(drive) if h is None else h
        return odeint(lambda _, h: (self.target(h, drive) - h) / tau, h, times, method="euler")[-1]


def drive_by_torchdiffeq(model: TrueLiquidDiffusionModel) -> TrueLiquidDiffusionModel:
    """The model itself, its three cells driven by torchdiffeq from now on."""
    for cell in model.processor.cells.values():
        cell.__class__ = TorchdiffeqCell  # the same parameters and settings, another loop over the steps
    return model


class PixelCell(nn.Module):
    """An `ncps` cell run over pixels: forward(pixels (N, inputs)) -> (N, units)."""

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
    """The cell at full resolution, which costs the most."""
    return model.processor.cells["detail"]


def cell_inputs(cell: RealLiquidCell, batch_size: int, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random features (B, in_channels, side, side), which take a gradient as in the model, and time embeddings."""
    x = torch.randn(batch_size, cell.input.depthwise.in_channels, side, side, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    return x.requires_grad_(), torch.randn(batch_size, cell.time.in_features, device=device)


def as_pixels(x: Tensor, kind: str) -> Tensor:
    """Features (B, C, H, W) -> as many of their pixels as a `PixelCell` is timed on, (N, C), which take a gradient."""
    pixels = x.detach().permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    return pixels[: PIXELS[kind] if x.device.type == "cpu" else PIXELS_GPU].clone().requires_grad_()


def forward_backward(cell: nn.Module, inputs: tuple[Tensor, ...], precision: str) -> Callable[[], None]:
    """A function that runs a cell on its inputs, gives its output a gradient, and returns when all gradients are there.

    It forgets them at its next call.
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
    """Between the outputs of two cells, over the largest output; both in fp32, in training."""
    with torch.no_grad():
        a, b = ours(*inputs), theirs(*inputs)
    return ((a - b).abs().max() / a.abs().max()).item()
