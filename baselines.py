"""What the liquid model is compared with: a ladder of U-Nets, and the liquid itself with one thing changed.

    compare.py --arms true unet:38k unet:150k
    compare.py --arms true true:pooled true:tau=fixed true:untied true:memory

The U-Nets are `diffusers.UNet2DModel`, configured, behind the same call as the liquid models. Each ablation takes one
thing away from the true model, or adds one, at an equal number of parameters, and so shows what that part is worth.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffusion.scheduler import Denoiser
from kernels.convolution import Conv3x3, use_kernel
from liquid_diffusion import (
    STEP_FRACTION,
    InputConv,
    RealLiquidCell,
    SpatialLiquidProcessor,
    State,
    TrueLiquidDiffusionModel,
)


class UNetReference(Denoiser):
    """A U-Net with the residual blocks of Ho et al. 2020 (appendix B); by default as large as the liquid models.

    At this size the shape decides. The default, two levels of 16 and 8 channels without a block in the middle, is the
    best shape with two or three levels that was tried (LOG.md).

    channels: of each level, finest first. attention_level: the level with self-attention, which then the middle block
    has, too; None means no attention at all. forward(x (B, C, H, W), t (B,), labels=(B,) or None) -> (B, C, H, W); it
    takes and returns None as its state. Raises ImportError if diffusers is not installed.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 0,
        channels: Sequence[int] = (16, 8),
        layers_per_block: int = 1,
        time_embedding_dim: int | None = None,
        mid_block: bool = False,
        attention_level: int | None = None,
    ):
        super().__init__()
        try:
            from diffusers import UNet2DModel
        except ImportError:
            raise ImportError("the U-Net needs diffusers; pip install -r requirements-compare.txt") from None
        self.num_classes = num_classes
        attends = [level == attention_level for level in range(len(channels))]
        self.unet = UNet2DModel(
            in_channels=in_channels,
            out_channels=in_channels,
            block_out_channels=tuple(channels),
            layers_per_block=layers_per_block,
            time_embedding_dim=time_embedding_dim,
            mid_block_type="UNetMidBlock2D" if mid_block else None,
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
            norm_num_groups=min(32, channels[0] // 4),  # four channels per group, as in DDPM
            attention_head_dim=None,
            add_attention=attention_level is not None,
            num_class_embeds=num_classes + 1 if num_classes else None,
        )
        use_kernel(self.unet)
        for parameter in self.unet.conv_out.parameters():  # untrained, it leaves the prediction to the preconditioning
            nn.init.zeros_(parameter)

    def forward(
        self, x: Tensor, t: Tensor, state: None = None, *, labels: Tensor | None = None, return_state: bool = False
    ):
        if self.num_classes and labels is None:
            labels = t.new_full((len(x),), self.num_classes)
        output = self.unet(x, t, class_labels=labels).sample
        return (output, None) if return_state else output


class PooledProcessor(SpatialLiquidProcessor):
    """The cells see only the globally averaged features, and so add one number per channel."""

    def forward(self, x: Tensor, embedding: Tensor, state: State | None = None) -> State:
        h_global, h_local, h_detail = state or (None, None, None)
        x = x.mean((2, 3), keepdim=True)  # (B, C0, 1, 1)
        medium = self.to_medium(x)
        coarse = self.to_coarse(medium)
        h_global = self.global_cell(coarse, embedding, h_global)
        h_local = self.local_cell(torch.cat([medium, h_global], dim=1), embedding, h_local)
        h_detail = self.detail_cell(torch.cat([x, h_local], dim=1), embedding, h_detail)
        return h_global, h_local, h_detail


class PooledLiquid(TrueLiquidDiffusionModel):
    """Liquid cells without space: only the two 3x3 convolutions around them see where a pixel is."""

    processor_type = PooledProcessor


class FixedTauCell(RealLiquidCell):
    """tau is the middle of its range for every input, time, pixel and channel."""

    has_kernel = False  # pyright: ignore[reportAssignmentType] - for the base class it depends on the solver

    def __init__(self, in_channels: int, channels: int, embedding_dim: int, **options):
        super().__init__(in_channels, channels, embedding_dim, **options)
        side = self.input.depthwise.kernel_size[0]
        self.input = InputConv(in_channels, channels, side)  # the drive alone
        self.time = nn.Linear(embedding_dim, channels, bias=False)

    def _drive_and_tau(self, features: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        drive = features + offset[:, :, None, None]
        return drive, torch.full_like(drive, (self.tau_min + self.tau_max) / 2)


class FixedTauProcessor(SpatialLiquidProcessor):
    """Three cells with fixed time constants."""

    cell_type = FixedTauCell


class FixedTauLiquid(TrueLiquidDiffusionModel):
    """Time constants are not learned; the parameters that this saves are spent on width."""

    processor_type = FixedTauProcessor

    def __init__(self, in_channels: int = 3, num_classes: int = 0, channels: Sequence[int] = (36, 26, 25), **options):
        super().__init__(in_channels, num_classes, channels, **options)


class UntiedCell(RealLiquidCell):
    """Each step has recurrent weights of its own, except the first: it starts from zeros and needs none."""

    def __init__(self, in_channels: int, channels: int, embedding_dim: int, **options):
        super().__init__(in_channels, channels, embedding_dim, **options)
        if self.solver not in STEP_FRACTION:
            raise ValueError(f"solver: untied steps need one of {', '.join(STEP_FRACTION)}, got {self.solver!r}")
        steps = [Conv3x3(channels, channels, bias=False) for _ in range(self.num_steps - 1)]
        for step in steps:
            nn.init.orthogonal_(step.weight, gain=0.8)
        self.recurrent = nn.ModuleList(steps)

    def set_solver(self, solver: str, num_steps: int) -> None:
        if "recurrent" in self._modules and (solver, num_steps) != (self.solver, self.num_steps):
            raise ValueError(
                "solver: an untied model has other weights in each step, so there is no ODE to solve differently"
            )
        super().set_solver(solver, num_steps)

    def forward(self, x: Tensor, embedding: Tensor, h: Tensor | None = None) -> Tensor:
        if h is not None:
            raise ValueError("state: an untied model starts each call from zeros")
        drive, tau = self.drive_and_tau(x, embedding)
        fraction = STEP_FRACTION[self.solver](self.horizon / self.num_steps / tau)
        state = fraction * self.activation(drive)
        for recurrent in self.recurrent:
            state = torch.lerp(state, self.activation(recurrent(state) + drive), fraction)
        return state


class UntiedProcessor(SpatialLiquidProcessor):
    """Three cells without weight tying."""

    cell_type = UntiedCell


class UntiedLiquid(TrueLiquidDiffusionModel):
    """No weight tying: a plain residual network with gates, narrower so that it has the same size.

    Its steps are layers: `set_solver` raises ValueError for another number of steps or another solver.
    """

    processor_type = UntiedProcessor

    def __init__(self, in_channels: int = 3, num_classes: int = 0, channels: Sequence[int] = (18, 14, 15), **options):
        super().__init__(in_channels, num_classes, channels, **options)


class MemoryLiquid(TrueLiquidDiffusionModel):
    """Each denoising step starts from the state of the step before: the reverse diffusion is its time series."""

    carries_state = True


ABLATIONS = {"pooled": PooledLiquid, "tau=fixed": FixedTauLiquid, "untied": UntiedLiquid, "memory": MemoryLiquid}
