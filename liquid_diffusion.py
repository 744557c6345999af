"""The TRUE liquid denoiser: recurrent convolutional cells that follow an ODE with adaptive time constants.

    tau(x, t) * dh/dt = -h + f(W_rec * h + W_in * x + W_t e(t))            (`*` is a 2-D convolution)

`RealLiquidCell` integrates one such equation, `SpatialLiquidProcessor` couples three of them (from slow and coarse to
fast and fine), and `TrueLiquidDiffusionModel` makes a diffusion denoiser of the three. The equation is that of liquid
time-constant networks (Hasani et al. 2021, eq. 1 and 2), with a convolutional state that keeps its place in the image.
"""

import copy
import importlib.util
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from choices import ODEINT_SOLVERS, SOLVERS
from diffusion.scheduler import Denoiser
from kernels import cell_input, liquid_kernel
from kernels.convolution import Conv3x3

# One step of size a = dt / tau moves the state by the fraction g(a) of its way to f: h <- h + g(a) (f - h).
STEP_FRACTION: dict[str, Callable[[Tensor], Tensor]] = {
    "euler": lambda a: a,  # explicit; a bounded f bounds h only while a <= 1
    "semi-implicit": lambda a: a / (1 + a),  # the fused solver of Hasani et al. 2021, algorithm 1
    "exponential": lambda a: -torch.expm1(-a),  # exact if f does not change during the step
}
ACTIVATIONS = {"silu": F.silu, "tanh": torch.tanh}  # only tanh keeps the state bounded

# The bounds of each cell's tau, for a horizon of 2. With 3, 5 and 7 steps, tau_min keeps Euler's dt / tau below 1.
TAU_RANGE = {"global": (0.7, 4.0), "local": (0.45, 4.0), "detail": (0.3, 4.0)}

# With random steps, each training step draws {multiple of the usual ODE steps: probability}. Four times the steps come
# close to the equation's exact solution; without them rk4 and dopri5 drift away from what was trained. On average they
# cost 1.2 times the usual steps.
STEP_MULTIPLES = {0.5: 0.4, 1: 0.4, 2: 0.1, 4: 0.1}

COARSE = 0.5  # the multiple of the ODE steps in the coarse part of a training (`TrainConfig.coarse_first`)

State = tuple[Tensor, Tensor, Tensor]  # h of the global, local and detail cell


def scaled_steps(ode_steps: Sequence[int], multiple: float) -> list[int]:
    """Each number of ODE steps times `multiple`, rounded up."""
    return [math.ceil(multiple * steps) for steps in ode_steps]


class TimeEmbedding(nn.Module):
    """Sinusoids of the timestep (Vaswani et al. 2017, section 3.5) through two linear layers, plus a class vector.

    forward(t (B,), labels (B,) or None) -> (B, dim). Label `num_classes` means "no class", and so does None.
    """

    frequencies: Tensor

    def __init__(self, dim: int, num_classes: int = 0):
        super().__init__()
        self.register_buffer("frequencies", torch.exp(-math.log(10_000) * torch.arange(dim // 2) / (dim // 2)), False)
        self.layers = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.classes = nn.Embedding(num_classes + 1, dim) if num_classes else None

    def forward(self, t: Tensor, labels: Tensor | None = None) -> Tensor:
        angles = t[:, None].float() * self.frequencies
        embedding = self.layers(torch.cat([angles.cos(), angles.sin()], dim=1))
        if self.classes is not None:
            if labels is None:
                labels = torch.full_like(t, self.classes.num_embeddings - 1)
            embedding = embedding + self.classes(labels)
        return F.silu(embedding)


class InputConv(nn.Module):
    """Layer normalisation (over C, H, W), then a depthwise-separable convolution: the `W_in` of a cell.

    forward(x (B, in_channels, H, W)) -> (B, out_channels, H, W). side: of the depthwise kernel, odd.
    """

    def __init__(self, in_channels: int, out_channels: int, side: int):
        super().__init__()
        self.norm = nn.GroupNorm(1, in_channels, affine=False)  # the next layer is affine already
        self.depthwise = nn.Conv2d(in_channels, in_channels, side, padding=side // 2, groups=in_channels)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1)
        with torch.no_grad():
            self.depthwise.weight[:, :, side // 2, side // 2] += 1  # start near the identity

    def forward(self, x: Tensor) -> Tensor:
        if cell_input.fits(x, self.depthwise):
            return cell_input.input_conv(x, self.depthwise, self.pointwise, self.norm.eps)
        return self.pointwise(self.depthwise(self.norm(x)))


class RealLiquidCell(nn.Module):
    """A convolutional liquid cell: integrates the ODE above over `horizon` in `num_steps` steps.

    The drive `W_in x + W_t e` and tau are computed once per call; each step recomputes only `W_rec * h`.
    tau = tau_min + (tau_max - tau_min) sigmoid(...), for each pixel and channel, in the same unit as the horizon.
    input_kernel: the side of the depthwise kernel of `W_in`.

    Raises ValueError for an unknown solver or activation, fewer than 1 step, or a tau range that is not
    0 < tau_min < tau_max; ImportError for a solver of torchdiffeq where that is not installed.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        embedding_dim: int,
        *,
        num_steps: int,
        tau_range: tuple[float, float],
        horizon: float = 2.0,
        solver: str = "euler",
        activation: str = "silu",
        input_kernel: int = 5,
    ):
        super().__init__()
        if not 0 < tau_range[0] < tau_range[1]:
            raise ValueError(f"tau range: must be 0 < tau_min < tau_max, got {tau_range}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.tau_min, self.tau_max = tau_range
        self.horizon = horizon
        self.activation = ACTIVATIONS[activation]
        self.set_solver(solver, num_steps)
        self.input = InputConv(in_channels, 2 * channels, input_kernel)  # for the drive and for the logit of tau
        self.time = nn.Linear(embedding_dim, 2 * channels, bias=False)
        self.recurrent = Conv3x3(channels, channels, bias=False)
        # orthogonal rows of norm 0.8: an untrained cell's state stays near its drive
        nn.init.orthogonal_(self.recurrent.weight, gain=0.8)

    def set_solver(self, solver: str, num_steps: int) -> None:
        """Choose how the same ODE is integrated; `dopri5` chooses its own steps."""
        if solver not in SOLVERS:
            raise ValueError(f"solver: must be one of {', '.join(SOLVERS)}, got {solver!r}")
        if num_steps < 1:
            raise ValueError(f"ODE steps: must be at least 1, got {num_steps}")
        if solver in ODEINT_SOLVERS and importlib.util.find_spec("torchdiffeq") is None:
            raise ImportError(f"solver {solver!r}: needs torchdiffeq; pip install -r requirements-compare.txt")
        self.solver, self.num_steps = solver, num_steps

    @property
    def has_kernel(self) -> bool:
        """Whether `liquid_kernel` computes this cell's equation; variants with another equation say no."""
        return self.activation is F.silu and self.solver in liquid_kernel.SOLVERS

    def drive_and_tau(self, x: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, in_channels, H, W), embedding (B, embedding_dim) -> drive and tau, each (B, channels, H, W)."""
        return self._drive_and_tau(self.input(x), self.time(embedding))

    def _drive_and_tau(self, features: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        drive, logit = (features + offset[:, :, None, None]).chunk(2, dim=1)
        return drive, self.tau_min + (self.tau_max - self.tau_min) * torch.sigmoid(logit)

    def target(self, h: Tensor, drive: Tensor) -> Tensor:
        """f(W_rec * h + drive), where the state is heading: (B, channels, H, W)."""
        return self.activation(self.recurrent(h) + drive)

    def integrate(
        self, h: Tensor | None, drive: Tensor, tau: Tensor, horizon: float | None = None, num_steps: int | None = None
    ) -> Tensor:
        """The state after `horizon` (the cell's own by default), starting from h (B, channels, H, W) or None, zeros."""
        horizon = self.horizon if horizon is None else horizon
        num_steps = self.num_steps if num_steps is None else num_steps
        if self.solver in ODEINT_SOLVERS:
            return self._odeint(torch.zeros_like(drive) if h is None else h, drive, tau, horizon, num_steps)
        fraction = STEP_FRACTION[self.solver](horizon / num_steps / tau)
        fraction = fraction.to(drive.dtype)  # on CUDA, autocast divides in float32
        # the first step from zeros needs no convolution: W_rec * 0 = 0
        state = fraction * self.activation(drive) if h is None else h
        for _ in range(num_steps - (h is None)):
            state = torch.lerp(state, self.target(state, drive), fraction)
        return state

    def _odeint(self, h: Tensor, drive: Tensor, tau: Tensor, horizon: float, num_steps: int) -> Tensor:
        from torchdiffeq import odeint

        adaptive = self.solver == "dopri5"
        times = torch.linspace(0, horizon, 2 if adaptive else num_steps + 1, dtype=h.dtype, device=h.device)

        def derivative(_: Tensor, h: Tensor) -> Tensor:
            return (self.target(h, drive) - h) / tau

        return odeint(derivative, h, times, method=self.solver, rtol=1e-5, atol=1e-5)[-1]  # pyright: ignore[reportReturnType]

    def forward(self, x: Tensor, embedding: Tensor, h: Tensor | None = None) -> Tensor:
        """x (B, in_channels, H, W), embedding (B, embedding_dim), h (B, channels, H, W) -> the new h."""
        features, offset = self.input(x), self.time(embedding)
        if self.has_kernel and liquid_kernel.fits(features):
            weight, dt, tau_range = self.recurrent.weight, self.horizon / self.num_steps, (self.tau_min, self.tau_max)
            return liquid_kernel.integrate(h, features, offset, weight, self.num_steps, self.solver, dt, tau_range)
        return self.integrate(h, *self._drive_and_tau(features, offset))


class SpatialLiquidProcessor(nn.Module):
    """Three coupled liquid cells over one horizon: global (slow, 1/4 resolution), local (medium, 1/2), detail (fast).

    The slow cell runs first, and each cell reads the features of its scale together with the slower cell's state.
    forward(x (B, C0, H, W), embedding, state) -> state, a tuple (global, local, detail) of shapes
    (B, C2, H/4, W/4), (B, C1, H/2, W/2), (B, C0, H, W), where channels = (C0, C1, C2). options: those of the cells.

    Raises what `RealLiquidCell` raises.
    """

    cell_type = RealLiquidCell  # the ablations have others

    def __init__(
        self,
        channels: Sequence[int],
        embedding_dim: int,
        *,
        ode_steps: Sequence[int],
        **options,
    ):
        super().__init__()
        fine, medium, coarse = channels
        self.to_medium = nn.Conv2d(fine, medium, 1)
        self.to_coarse = nn.Conv2d(medium, coarse, 1)

        def cell(name: str, in_channels: int, channels: int, num_steps: int) -> RealLiquidCell:
            own = {"num_steps": num_steps, "tau_range": TAU_RANGE[name]}
            return self.cell_type(in_channels, channels, embedding_dim, **own, **options)

        slow, middle, fast = ode_steps
        self.global_cell = cell("global", coarse, coarse, slow)
        self.local_cell = cell("local", medium + coarse, medium, middle)
        self.detail_cell = cell("detail", fine + medium, fine, fast)

    @property
    def cells(self) -> dict[str, RealLiquidCell]:
        """The cells by their names, from slow to fast."""
        return {"global": self.global_cell, "local": self.local_cell, "detail": self.detail_cell}

    def scales(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The features x (B, C0, H, W) at half and at quarter resolution: (B, C1, H/2, W/2), (B, C2, H/4, W/4)."""
        medium = self.to_medium(F.avg_pool2d(x, 2))
        return medium, self.to_coarse(F.avg_pool2d(medium, 2))

    def forward(self, x: Tensor, embedding: Tensor, state: State | None = None) -> State:
        h_global, h_local, h_detail = state or (None, None, None)
        medium, coarse = self.scales(x)
        h_global = self.global_cell(coarse, embedding, h_global)
        h_local = self.local_cell(beside(medium, h_global), embedding, h_local)
        h_detail = self.detail_cell(beside(x, h_local), embedding, h_detail)
        return h_global, h_local, h_detail


class _Upsample(torch.autograd.Function):
    """Its gradient is the sum over 2x2 pixels. Written as a pooling, it compiles to a loop without atomic additions."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="nearest")

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return 4 * F.avg_pool2d(gradient, 2)


def upsample(x: Tensor) -> Tensor:
    """Nearest-neighbour doubling of both sides: (B, C, H, W) -> (B, C, 2H, 2W)."""
    return _Upsample.apply(x)


def beside(features: Tensor, slower: Tensor) -> Tensor:
    """What a cell reads: its scale's features (B, C, H, W) and the slower cell's state (B, D, H/2, W/2)."""
    return torch.cat([features, upsample(slower)], dim=1)


class TrueLiquidDiffusionModel(Denoiser):
    """A diffusion denoiser whose work is done by three coupled liquid cells; 38 thousand parameters for RGB images.

    forward(x (B, C, H, W), t (B,), state=None, labels=(B,) or None) -> (B, C, H, W). With `return_state` it returns a
    pair of that and the cells' state, which may be passed to the next call; state None means zeros. H and W must be
    multiples of 4. With `num_classes` > 0 the model is class-conditional, and label `num_classes` means "no class".
    `ode_steps` are the steps of the (global, local, detail) cells. With `random_steps` each training step uses a random
    multiple of them (`draw_steps`), so that the weights learn the equation and not one way of stepping through it.
    `input_kernel` is the side of the depthwise kernel of each cell's `W_in`.

    Raises ValueError for sides that are not multiples of 4, and what `RealLiquidCell` raises.
    """

    processor_type = SpatialLiquidProcessor  # the ablations have others

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 0,
        channels: Sequence[int] = (32, 24, 24),
        embedding_dim: int = 24,
        ode_steps: Sequence[int] = (3, 5, 7),
        solver: str = "euler",
        activation: str = "silu",
        random_steps: bool = False,
        input_kernel: int = 5,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.ode_steps = tuple(ode_steps)
        self.random_steps = random_steps
        self.embedding = TimeEmbedding(embedding_dim, num_classes)
        self.stem = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.processor = self.processor_type(
            channels,
            embedding_dim,
            ode_steps=ode_steps,
            solver=solver,
            activation=activation,
            input_kernel=input_kernel,
        )
        self.head = Conv3x3(channels[0], in_channels)
        for parameter in self.head.parameters():  # an untrained network leaves the prediction to the preconditioning
            nn.init.zeros_(parameter)

    def set_solver(self, solver: str | None = None, ode_steps: Sequence[int] | None = None) -> None:
        """Integrate the same ODE differently: another solver, or other steps of the (global, local, detail) cells."""
        for i, cell in enumerate(self.processor.cells.values()):
            cell.set_solver(solver or cell.solver, ode_steps[i] if ode_steps else cell.num_steps)

    def current_steps(self) -> tuple[int, ...]:
        """The numbers of ODE steps now set for the (global, local, detail) cells."""
        return tuple(cell.num_steps for cell in self.processor.cells.values())

    def with_steps(self, ode_steps: Sequence[int]) -> "TrueLiquidDiffusionModel":
        """The same weights, not copied, whose ODE takes other steps; this model stays as it is. On the same device."""
        other = copy.deepcopy(self, {id(value): value for value in (*self.parameters(), *self.buffers())})
        other.set_solver(ode_steps=ode_steps)
        return other

    def draw_steps(self, generator: torch.Generator, *, coarse: bool = False) -> None:
        """In training: set the ODE steps of the next forward pass.

        They are `ode_steps`, with `random_steps` times a random one of STEP_MULTIPLES, and with `coarse` half of that.
        """
        if not self.training:
            return
        multiple = COARSE if coarse else 1
        if self.random_steps:
            drawn = torch.multinomial(torch.tensor(list(STEP_MULTIPLES.values())), 1, generator=generator)
            multiple *= list(STEP_MULTIPLES)[int(drawn)]
        self.set_solver(ode_steps=scaled_steps(self.ode_steps, multiple))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        state: State | None = None,
        *,
        labels: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, State]:
        if x.shape[-1] % 4 or x.shape[-2] % 4:
            raise ValueError(f"image size: both sides must be multiples of 4, got {x.shape[-2]}x{x.shape[-1]}")
        features = self.stem(x)
        after = self.processor(features, self.embedding(t, labels), state)
        output = self.head(features + after[-1])
        return (output, after) if return_state else output
