"""The U-Net to compare with: `diffusers.UNet2DModel`, configured, behind the same call as the liquid models."""

from collections.abc import Sequence

from torch import Tensor, nn

from errors import UserError

# Rung -> shape. From 600k up they are DDPM's own (Ho et al. 2020, appendix B) with fewer channels: c, 2c, 2c, 2c, two
# residual blocks a level, attention on the second level and in the middle. Below, the best of those tried (RESULTS.md).
DDPM_SHAPE = {"layers_per_block": 2, "mid_block": True, "attention_level": 1}
LADDER = {
    "38k": {},
    "38k-flat": {"channels": (16,), "layers_per_block": 2, "time_embedding_dim": 32},
    "150k": {"channels": (24, 24), "mid_block": True},
    "600k": {"channels": (16, 32, 32, 36), **DDPM_SHAPE},
    "2.4m": {"channels": (32, 64, 64, 72), **DDPM_SHAPE},
    "4m": {"channels": (44, 88, 88, 88), **DDPM_SHAPE},
    "35.7m": {"channels": (128, 256, 256, 256), **DDPM_SHAPE},
}


class UNetReference(nn.Module):
    """A U-Net with the residual blocks of Ho et al. 2020 (appendix B); by default sized to the liquid models.

    At this size the shape decides. The default, two levels of 16 and 8 channels without a block between the halves, is
    the best two- or three-level shape of those tried (RESULTS.md).

    channels: of each level, finest first. attention_level: the level with self-attention, or None for none, also not in
    the middle. forward(x (B, C, H, W), t (B,), labels=(B,) or None) -> (B, C, H, W); its state is None, given and
    returned. Raises UserError if diffusers is not installed.
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
            raise UserError("--model unet: needs diffusers; pip install -r requirements-compare.txt") from None
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
            norm_num_groups=min(32, channels[0] // 4),  # four channels a group, as DDPM has
            attention_head_dim=None,
            add_attention=attention_level is not None,
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
