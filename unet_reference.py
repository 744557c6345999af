"""The U-Net to compare with: `diffusers.UNet2DModel`, configured, behind the same call as the liquid models."""

from collections.abc import Sequence

from torch import Tensor, nn

from errors import UserError


class UNetReference(nn.Module):
    """A U-Net with the residual blocks of Ho et al. 2020 (appendix B), sized to the liquid models' parameter count.

    At this size the shape decides. The default, two levels of 16 and 8 channels without a block between the halves, is
    the best two- or three-level shape of those tried (RESULTS.md).

    forward(x (B, C, H, W), t (B,), labels=(B,) or None) -> (B, C, H, W); its state is None, given and returned.
    Raises UserError if diffusers is not installed.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 0,
        channels: Sequence[int] = (16, 8),
        layers_per_block: int = 1,
        time_embedding_dim: int | None = None,
    ):
        super().__init__()
        try:
            from diffusers import UNet2DModel
        except ImportError:
            raise UserError("--model unet: needs diffusers; pip install -r requirements-compare.txt") from None
        self.num_classes = num_classes
        self.unet = UNet2DModel(
            in_channels=in_channels,
            out_channels=in_channels,
            block_out_channels=tuple(channels),
            layers_per_block=layers_per_block,
            time_embedding_dim=time_embedding_dim,
            mid_block_type=None,
            down_block_types=("DownBlock2D",) * len(channels),
            up_block_types=("UpBlock2D",) * len(channels),
            norm_num_groups=4,
            add_attention=False,
            num_class_embeds=num_classes + 1 if num_classes else None,
        )
        nn.init.zeros_(self.unet.conv_out.weight)  # the first prediction is the preconditioning's alone
        nn.init.zeros_(self.unet.conv_out.bias)

    def forward(
        self, x: Tensor, t: Tensor, state: None = None, *, labels: Tensor | None = None, return_state: bool = False
    ):
        if self.num_classes and labels is None:
            labels = t.new_full((len(x),), self.num_classes)
        output = self.unet(x, t, class_labels=labels).sample
        return (output, None) if return_state else output
