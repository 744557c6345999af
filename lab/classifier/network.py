"""The classifier: seven 3x3 convolutions, whose pooled output `evaluate.py` compares samples and images by.

    classifier, about = load_classifier("pretrained/classifier-cifar10.safetensors")
    features, logits = read(classifier, images)    # uint8 (N, C, H, W) -> float32 (N, 128), (N, classes)

The file has the weights in fp16, under 1 MB, without batch norm: that is folded into the convolutions.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from images.batches import to_float
from kernels.convolution import Conv3x3
from runtime.errors import UserError, reason
from training.checkpoint import read_model, save_model

WIDTHS = (24, 48, 48, 112, 112, 128, 128)  # channels after each convolution: 468 thousand weights
HALVED = (1, 3, 5)  # the convolutions after which both sides are halved, as far as they can be
FEATURES = WIDTHS[-1]
PUBLISHED = Path(__file__).parents[2] / "pretrained"


class Layer(nn.Module):
    """Convolution, maximum over 2x2 pixels where `halved`, batch norm, ReLU: (B, inputs, H, W) -> (B, outputs, ...).

    The norm has no scale of its own, which the next convolution has; so it never changes the order of the values that
    the maximum is taken of, and can be folded into the convolution before it.
    """

    def __init__(self, inputs: int, outputs: int, *, halved: bool, norm: bool):
        super().__init__()
        self.conv = Conv3x3(inputs, outputs, bias=not norm)
        self.halved = halved
        self.norm = nn.BatchNorm2d(outputs) if norm else nn.Identity()
        if isinstance(self.norm, nn.BatchNorm2d):
            self.norm.weight.requires_grad_(False)  # stays 1

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.halved:
            x = F.max_pool2d(x, 2, ceil_mode=True)  # a side of one pixel stays
        return self.norm(x).relu()

    def folded_norm(self) -> dict[str, Tensor]:
        """The weight and bias of a convolution that does what this layer's convolution and norm do in eval mode."""
        norm = self.norm
        if not isinstance(norm, nn.BatchNorm2d) or norm.running_var is None or norm.running_mean is None:
            raise ValueError("this layer has no norm to fold")
        scale = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
        weight = self.conv.weight.detach() * scale[:, None, None, None]
        return {"conv.weight": weight, "conv.bias": norm.bias.detach() - norm.running_mean * scale}


class Classifier(nn.Module):
    """forward(x (B, channels, H, W) in [-1, 1]) -> logits (B, num_classes); H and W are multiples of 4.

    A plain network with few channels where there are many pixels, after Jordan 2024 ("94 % on CIFAR-10 in 3.29 seconds
    on a single GPU", section 3). norm: with batch norm, as it is trained; else with biases, as it is saved.
    """

    def __init__(self, channels: int, num_classes: int, *, norm: bool = False):
        super().__init__()
        ends = zip((channels, *WIDTHS), WIDTHS, strict=False)
        self.channels, self.num_classes = channels, num_classes
        self.layers = nn.ModuleList(
            Layer(*sides, halved=i in HALVED, norm=norm) for i, sides in enumerate(ends)
        )  # fmt: skip
        self.head = nn.Linear(FEATURES, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """(B, 128): the last convolution's output, averaged over the pixels."""
        for layer in self.layers:
            x = layer(x)
        return x.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def folded(self) -> "Classifier":
        """The same function, with the norm of each layer folded into its convolution."""
        plain = Classifier(self.channels, self.num_classes)
        state = {f"head.{name}": value for name, value in self.head.state_dict().items()}
        for i, layer in enumerate(layer for layer in self.layers if isinstance(layer, Layer)):
            state |= {f"layers.{i}.{name}": value for name, value in layer.folded_norm().items()}
        plain.load_state_dict(state)
        return plain.to(self.head.weight.device).eval()


@torch.no_grad()
def read(
    classifier: Classifier, images: Tensor, *, batch_size: int = 250, on_batch: Callable[[int], object] | None = None
) -> tuple[Tensor, Tensor]:
    """(features (N, 128), logits (N, classes)), float32 on the CPU, of uint8 images (N, C, H, W)."""
    device = classifier.head.weight.device
    features = []
    for part in images.split(batch_size):
        x = to_float(part.to(device)).contiguous(memory_format=torch.channels_last)
        features.append(classifier.features(x))
        if on_batch is not None:
            on_batch(len(part))
    found = torch.cat(features)
    return found.cpu(), classifier.head(found).cpu()


def save_classifier(path: Path, classifier: Classifier, about: dict[str, Any]) -> None:
    """Write a folded classifier in fp16. about: what `load_classifier` returns; needs `classes` and `shape`."""
    tensors = {name: value.half() for name, value in classifier.state_dict().items()}
    save_model(path, tensors, {"kind": "classifier", **about})


def load_classifier(path: str | Path) -> tuple[Classifier, dict[str, Any]]:
    """(the classifier in fp32 and eval mode, what its file says of it): `classes`, `shape`, `dataset`, `held_out`.

    Raises UserError, naming the file, if it is unreadable or not a classifier.
    """
    tensors, about = read_model(path)
    if about.get("kind") != "classifier":
        raise UserError(f"{path}: not a classifier; python -m lab.classifier trains one")
    try:
        classifier = Classifier(about["shape"][0], len(about["classes"]))
        classifier.load_state_dict({name: value.float() for name, value in tensors.items()})
    except Exception as error:  # another program may have written anything
        raise UserError(f"{path}: its weights do not fit its metadata ({reason(error)})") from error
    return classifier.eval().to(memory_format=torch.channels_last), about


def published_classifier(classes: Sequence[str], shape: Sequence[int]) -> Path | None:
    """The published classifier of images of this shape (C, H, W) with these classes; None if there is none."""
    for path in sorted(PUBLISHED.glob("classifier-*.safetensors")):
        _, about = load_classifier(path)
        if (tuple(about["classes"]), tuple(about["shape"])) == (tuple(classes), tuple(shape)):
            return path
    return None
