"""The INSPIRED ("fake liquid") denoiser: the true model's pyramid in plain convolutions.

It has the same stem, the same three scales in the same order (coarse first; each finer scale reads its own features
together with the coarser result), the same conditioning on time and class, and the same head. Where the true model
integrates an ODE with one set of weights, this one stacks residual blocks with weights of their own: it has no ODE, no
tau, no recurrence and no state. It is the control of the experiment: whatever it does as well as the true model is not
due to liquid dynamics.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.scheduler import Denoiser
from kernels.convolution import Conv3x3
from liquid_diffusion import InputConv, TimeEmbedding, upsample


class ResidualBlock(nn.Module):
    """h + conv(SiLU((1 + scale) norm(h) + shift)), scale and shift linear in the time embedding.

    A pre-activation residual block (He et al. 2016, "Identity mappings", fig. 4e) with adaptive group normalisation
    (Dhariwal & Nichol 2021, section 3). forward(h (B, C, H, W), embedding (B, E)) -> (B, C, H, W).
    """

    def __init__(self, channels: int, embedding_dim: int):
        super().__init__()
        self.norm = nn.GroupNorm(4, channels, affine=False)
        self.time = nn.Linear(embedding_dim, 2 * channels)
        self.conv = Conv3x3(channels, channels)
        nn.init.zeros_(self.conv.weight)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.time(embedding)[:, :, None, None].chunk(2, dim=1)
        return h + self.conv(F.silu(torch.addcmul(shift, self.norm(h), 1 + scale)))


class InspiredDiffusionModel(Denoiser):
    """A diffusion denoiser with as many parameters as `TrueLiquidDiffusionModel` (within 1 %) and the same call.

    forward(x (B, C, H, W), t (B,), labels=(B,) or None) -> (B, C, H, W); it takes and returns None as its state.
    channels: at full, half and quarter resolution. depths: residual blocks at quarter, half and full resolution.
    input_kernel: the side of the depthwise kernel with which a scale reads its input, as in the true model.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 0,
        channels: Sequence[int] = (24, 16, 16),
        depths: Sequence[int] = (1, 1, 4),
        embedding_dim: int = 24,
        input_kernel: int = 5,
    ):
        super().__init__()
        self.num_classes = num_classes
        fine, medium, coarse = channels
        self.embedding = TimeEmbedding(embedding_dim, num_classes)
        self.stem = nn.Conv2d(in_channels, fine, 3, padding=1)
        self.to_medium = nn.Conv2d(fine, medium, 1)
        self.to_coarse = nn.Conv2d(medium, coarse, 1)
        self.merge_medium = InputConv(medium + coarse, medium, input_kernel)
        self.merge_fine = InputConv(fine + medium, fine, input_kernel)
        self.coarse_blocks, self.medium_blocks, self.fine_blocks = (
            nn.ModuleList(ResidualBlock(width, embedding_dim) for _ in range(depth))
            for width, depth in zip((coarse, medium, fine), depths, strict=True)
        )
        self.head = Conv3x3(fine, in_channels)
        for parameter in self.head.parameters():  # an untrained network leaves the prediction to the preconditioning
            nn.init.zeros_(parameter)

    def forward(
        self, x: Tensor, t: Tensor, state: None = None, *, labels: Tensor | None = None, return_state: bool = False
    ) -> Tensor | tuple[Tensor, None]:
        embedding = self.embedding(t, labels)
        features = self.stem(x)
        medium = self.to_medium(F.avg_pool2d(features, 2))
        h = self.to_coarse(F.avg_pool2d(medium, 2))
        for block in self.coarse_blocks:
            h = block(h, embedding)
        h = self.merge_medium(torch.cat([medium, upsample(h)], dim=1))
        for block in self.medium_blocks:
            h = block(h, embedding)
        h = self.merge_fine(torch.cat([features, upsample(h)], dim=1))
        for block in self.fine_blocks:
            h = block(h, embedding)
        output = self.head(F.silu(features + h))
        return (output, None) if return_state else output
