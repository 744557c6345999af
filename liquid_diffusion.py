"""The TRUE liquid denoiser: recurrent convolutional cells that follow an ODE with adaptive time constants.

    tau(x, t) * dh/dt = -h + f(W_rec * h + W_in * x + W_t e(t))            (`*` is a 2-D convolution)

`RealLiquidCell` integrates one such equation, `SpatialLiquidProcessor` couples three of them (slow and coarse to
fast and fine), `TrueLiquidDiffusionModel` makes a diffusion denoiser of it. The equation is that of liquid
time-constant networks (Hasani et al. 2021, eq. 1 and 2) with a convolutional, spatially resolved state.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import liquid_kernel
from errors import UserError

# One step of size a = dt / tau moves the state by the share g(a) of its way to f: h <- h + g(a) (f - h).
STEP_SHARE = {
    "euler": lambda a: a,  # explicit; a bounded f bounds h only while a <= 1
    "semi-implicit": lambda a: a / (1 + a),  # the fused solver of Hasani et al. 2021, algorithm 1
    "exponential": lambda a: -torch.expm1(-a),  # exact for a frozen f
}
ODEINT_SOLVERS = ("midpoint", "rk4", "dopri5")  # torchdiffeq's, on the same cell, meant for sampling
SOLVERS = (*STEP_SHARE, *ODEINT_SOLVERS)
ACTIVATIONS = {"silu": F.silu, "tanh": torch.tanh}  # only tanh bounds the state

SPEEDS = ("global", "local", "detail")  # slow to fast, coarse to fine
# The bounds of tau, in units of a horizon of 2. With 3, 5 and 7 steps each tau_min keeps Euler's dt / tau under 1.
TAU_RANGE = {"global": (0.7, 4.0), "local": (0.45, 4.0), "detail": (0.3, 4.0)}

# With random steps: the shares of a model's numbers of steps that training draws from, and how often each comes. Four
# times as many are nearly the equation itself: without them rk4 and dopri5 lead elsewhere than training did.
ODE_STEP_SHARES = {0.5: 0.2, 1: 0.4, 2: 0.2, 4: 0.2}

State = tuple[Tensor, Tensor, Tensor]  # h of the global, local and detail cell


def scaled_steps(ode_steps: Sequence[int], share: float) -> list[int]:
    """A share of some numbers of ODE steps; a share of a step is rounded up."""
    return [math.ceil(share * steps) for steps in ode_steps]


class TimeEmbedding(nn.Module):
    """Sinusoids of the timestep (Vaswani et al. 2017, section 3.5) through two linear layers, plus a class vector.

    forward(t (B,), labels (B,) or None) -> (B, dim). Class `num_classes` means "no class" and is what None gives.
    """

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
    """Layer normalisation (over C, H, W), then a depthwise-separable 3x3 convolution, the `W_in` of a cell.

    forward(x (B, in_channels, H, W)) -> (B, out_channels, H, W).
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(1, in_channels, affine=False)  # an affine map would only repeat the next layer's
        self.depthwise = nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1)
        with torch.no_grad():
            self.depthwise.weight[:, :, 1, 1] += 1  # starts near the identity

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(self.norm(x)))


class RealLiquidCell(nn.Module):
    """A convolutional liquid cell: integrates the ODE above over `horizon` in `num_steps` steps.

    The drive `W_in x + W_t e` and tau are computed once a call; each step recomputes `W_rec * h` alone.
    tau = tau_min + (tau_max - tau_min) sigmoid(...), per pixel and per channel, in the units of the horizon.

    Raises UserError for an unknown solver or activation, a number of steps under 1, or a tau range that is not
    0 < tau_min < tau_max.
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
    ):
        super().__init__()
        if not 0 < tau_range[0] < tau_range[1]:
            raise UserError(f"tau range: must be 0 < tau_min < tau_max, got {tau_range}")
        if activation not in ACTIVATIONS:
            raise UserError(f"activation: must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.tau_min, self.tau_max = tau_range
        self.horizon = horizon
        self.activation = ACTIVATIONS[activation]
        self.set_solver(solver, num_steps)
        self.input = InputConv(in_channels, 2 * channels)  # drive and tau's logit
        self.time = nn.Linear(embedding_dim, 2 * channels, bias=False)
        self.recurrent = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        nn.init.orthogonal_(
            self.recurrent.weight, gain=0.8
        )  # orthogonal rows of norm 0.8: the state starts near its drive

    def set_solver(self, solver: str, num_steps: int) -> None:
        """Choose how the same ODE is integrated; `dopri5` sets its own steps."""
        if solver not in SOLVERS:
            raise UserError(f"solver: must be one of {', '.join(SOLVERS)}, got {solver!r}")
        if num_steps < 1:
            raise UserError(f"ODE steps: must be at least 1, got {num_steps}")
        self.solver, self.num_steps = solver, num_steps

    @property
    def has_kernel(self) -> bool:
        """Whether `liquid_kernel` computes the same; a cell that computes something else says no."""
        return self.activation is F.silu and self.solver in liquid_kernel.SOLVERS

    def drive_and_tau(self, x: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, in_channels, H, W), embedding (B, embedding_dim) -> drive and tau, each (B, channels, H, W)."""
        return self._drive_and_tau(self.input(x), self.time(embedding))

    def _drive_and_tau(self, features: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        drive, logit = (features + offset[:, :, None, None]).chunk(2, dim=1)
        return drive, self.tau_min + (self.tau_max - self.tau_min) * torch.sigmoid(logit)

    def target(self, h: Tensor, drive: Tensor) -> Tensor:
        """f(W_rec * h + drive): where the state is heading, (B, channels, H, W)."""
        return self.activation(self.recurrent(h) + drive)

    def integrate(
        self, h: Tensor | None, drive: Tensor, tau: Tensor, horizon: float | None = None, num_steps: int | None = None
    ) -> Tensor:
        """The state after `horizon` (the cell's own by default) from h (B, channels, H, W); None is zeros, exactly."""
        horizon = self.horizon if horizon is None else horizon
        num_steps = self.num_steps if num_steps is None else num_steps
        if self.solver in ODEINT_SOLVERS:
            h = torch.zeros_like(drive) if h is None else h
            return self._odeint(h, drive, tau, horizon, num_steps)
        share = STEP_SHARE[self.solver](horizon / num_steps / tau).to(
            drive.dtype
        )  # on CUDA autocast divides in float32
        for _ in range(num_steps):
            # the first step from zeros needs no convolution: W_rec * 0 = 0
            h = share * self.activation(drive) if h is None else torch.lerp(h, self.target(h, drive), share)
        return h

    def _odeint(self, h: Tensor, drive: Tensor, tau: Tensor, horizon: float, num_steps: int) -> Tensor:
        try:
            from torchdiffeq import odeint
        except ImportError:
            raise UserError(
                f"solver {self.solver!r}: needs torchdiffeq; pip install -r requirements-compare.txt"
            ) from None
        adaptive = self.solver == "dopri5"
        times = torch.linspace(0, horizon, 2 if adaptive else num_steps + 1, dtype=h.dtype, device=h.device)

        def derivative(_: Tensor, h: Tensor) -> Tensor:
            return (self.target(h, drive) - h) / tau

        return odeint(derivative, h, times, method=self.solver, rtol=1e-5, atol=1e-5)[-1]

    def forward(self, x: Tensor, embedding: Tensor, h: Tensor | None = None) -> Tensor:
        """x (B, in_channels, H, W), embedding (B, embedding_dim), h (B, channels, H, W) -> the new h."""
        features, offset = self.input(x), self.time(embedding)
        if self.has_kernel and liquid_kernel.fits(features):
            weight, dt, tau_range = self.recurrent.weight, self.horizon / self.num_steps, (self.tau_min, self.tau_max)
            return liquid_kernel.integrate(h, features, offset, weight, self.num_steps, self.solver, dt, tau_range)
        return self.integrate(h, *self._drive_and_tau(features, offset))


class SpatialLiquidProcessor(nn.Module):
    """Three coupled liquid cells over one horizon: global (slow, 1/4 resolution), local (medium, 1/2), detail (fast).

    The slow cell goes first, and each cell reads its scale's features beside what the slower one found.
    forward(x (B, C0, H, W), embedding, state) -> state, a tuple (global, local, detail) of shapes
    (B, C2, H/4, W/4), (B, C1, H/2, W/2), (B, C0, H, W), where channels = (C0, C1, C2).

    Raises UserError for a solver, activation or number of steps that `RealLiquidCell` refuses.
    """

    cell_type = RealLiquidCell  # ablations have others

    def __init__(
        self,
        channels: Sequence[int],
        embedding_dim: int,
        *,
        ode_steps: Sequence[int],
        solver: str,
        activation: str,
    ):
        super().__init__()
        fine, medium, coarse = channels
        self.to_medium = nn.Conv2d(fine, medium, 1)
        self.to_coarse = nn.Conv2d(medium, coarse, 1)
        inputs = {"global": (coarse, coarse), "local": (medium + coarse, medium), "detail": (fine + medium, fine)}
        self.cells = nn.ModuleDict(
            {
                name: self.cell_type(
                    *inputs[name],
                    embedding_dim,
                    num_steps=num_steps,
                    tau_range=TAU_RANGE[name],
                    solver=solver,
                    activation=activation,
                )
                for name, num_steps in zip(SPEEDS, ode_steps, strict=True)
            }
        )

    def forward(self, x: Tensor, embedding: Tensor, state: State | None = None) -> State:
        h_global, h_local, h_detail = state or (None, None, None)
        medium = self.to_medium(F.avg_pool2d(x, 2))
        coarse = self.to_coarse(F.avg_pool2d(medium, 2))
        h_global = self.cells["global"](coarse, embedding, h_global)
        h_local = self.cells["local"](torch.cat([medium, upsample(h_global)], dim=1), embedding, h_local)
        h_detail = self.cells["detail"](torch.cat([x, upsample(h_local)], dim=1), embedding, h_detail)
        return h_global, h_local, h_detail


class _Upsample(torch.autograd.Function):
    """Its gradient is a sum over 2x2 pixels; written so, it compiles to a loop and not to one atomic add a value."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="nearest")

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return 4 * F.avg_pool2d(gradient, 2)


def upsample(x: Tensor) -> Tensor:
    """Nearest-neighbour doubling of both sides: (B, C, H, W) -> (B, C, 2H, 2W)."""
    return _Upsample.apply(x)


class TrueLiquidDiffusionModel(nn.Module):
    """A diffusion denoiser whose work is done by three coupled liquid cells; 38 thousand parameters for RGB images.

    forward(x (B, C, H, W), t (B,), state=None, labels=(B,) or None) -> (B, C, H, W), or with `return_state` a pair of
    that and the cells' state, which may be passed to the next call; None is the state of zeros. H and W are any
    multiples of 4. `num_classes` > 0 makes the model class-conditional; label `num_classes` means "no class".
    `ode_steps` are those of (global, local, detail); with `random_steps` each training step draws a multiple of them
    (`ODE_STEP_SHARES`), so that the weights learn the equation and not one way of stepping through it.

    Raises UserError for sides that 4 does not divide and for settings that `RealLiquidCell` refuses.
    """

    processor_type = SpatialLiquidProcessor  # ablations have others

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 0,
        channels: Sequence[int] = (32, 24, 24),
        embedding_dim: int = 32,
        ode_steps: Sequence[int] = (3, 5, 7),
        solver: str = "euler",
        activation: str = "silu",
        random_steps: bool = False,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.ode_steps = tuple(ode_steps)
        self.random_steps = random_steps
        self.embedding = TimeEmbedding(embedding_dim, num_classes)
        self.stem = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.processor = self.processor_type(
            channels, embedding_dim, ode_steps=ode_steps, solver=solver, activation=activation
        )
        self.head = nn.Conv2d(channels[0], in_channels, 3, padding=1)
        nn.init.zeros_(self.head.weight)  # the first prediction is the preconditioning's alone
        nn.init.zeros_(self.head.bias)

    def set_solver(self, solver: str | None = None, ode_steps: Sequence[int] | None = None) -> None:
        """Integrate the same ODE otherwise: another solver, other steps for (global, local, detail)."""
        for i, cell in enumerate(self.processor.cells.values()):
            cell.set_solver(solver or cell.solver, ode_steps[i] if ode_steps else cell.num_steps)

    def current_steps(self) -> tuple[int, ...]:
        """The numbers of ODE steps that `set_solver` set last, of (global, local, detail)."""
        return tuple(cell.num_steps for cell in self.processor.cells.values())

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
            raise UserError(f"image size: both sides must be multiples of 4, got {x.shape[-2]}x{x.shape[-1]}")
        features = self.stem(x)
        state = self.processor(features, self.embedding(t, labels), state)
        output = self.head(features + state[-1])
        return (output, state) if return_state else output
