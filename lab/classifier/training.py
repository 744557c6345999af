"""Training a classifier: half an hour on two cores, the same bytes for the same seed."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from images.batches import to_float
from images.datasets import ImageData
from lab.classifier.network import Classifier, load_classifier, read, save_classifier
from training.optimizer import make_optimizer

LABEL_SMOOTHING = 0.1
SETTLED = 5000  # images that the norms' means and variances are taken of, at the end
WARM_UP = 0.15  # of the steps, in which the rate rises to its peak; then it falls to zero on a straight line


def shifted(images: Tensor, by: Tensor, most: int) -> Tensor:
    """Images (B, C, H, W), each moved by its own number of pixels `by` (B, 2), from -most to most; edges are mirrored.

    The result is in channels_last.
    """
    padded = F.pad(images, (most,) * 4, mode="reflect")
    rows = (by[:, :1] + most) + torch.arange(images.shape[2])  # (B, H)
    columns = (by[:, 1:] + most) + torch.arange(images.shape[3])
    image = torch.arange(len(images))[:, None, None]
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def rate(step: int, steps: int) -> float:
    """The learning rate of a step, as a share of the peak."""
    warm = max(1, round(WARM_UP * steps))
    return min((step + 1) / warm, (steps - step) / max(1, steps - warm))


def train_classifier(
    data: ImageData,
    *,
    images: int = 1_000_000,
    batch_size: int = 200,
    lr: float = 6e-3,
    seed: int = 0,
    device: torch.device | str = "cpu",
    on_batch: Callable[[int, float], object] | None = None,
) -> Classifier:
    """Train on the set's training images, shifted and, if the set's `mirror` says so, mirrored at random; folded.

    images: how many are seen in total. lr: the peak of the rate, for Muon. on_batch(images, loss) is called after each
    step. Raises ValueError for a set with fewer than two classes.
    """
    if len(data.classes) < 2:
        raise ValueError(f"needs images of at least two classes, {data.name} has {len(data.classes)}")
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(data.shape[0], len(data.classes), norm=True)
    model.to(device).to(memory_format=torch.channels_last).train()
    optimizer = make_optimizer("muon", model, lr)
    size = len(data.train)
    batch_size = min(batch_size, size)
    steps = max(1, images // batch_size)
    order = torch.cat([torch.randperm(size, generator=random) for _ in range(-(-steps * batch_size // size))])
    most = min(data.shape[1:]) // 16 or int(min(data.shape[1:]) >= 8)  # 2 of 32 pixels
    for step in range(steps):
        index = order[step * batch_size : (step + 1) * batch_size]
        x = to_float(data.train[index])
        by = torch.randint(-most, most + 1, (batch_size, 2), generator=random)
        flips = torch.rand(batch_size, generator=random) < 0.5
        if data.mirror:
            x = torch.where(flips[:, None, None, None], x.flip(3), x)
        x = shifted(x, by, most).to(device)
        loss = F.cross_entropy(model(x), data.train_labels[index].to(device), label_smoothing=LABEL_SMOOTHING)
        for group in optimizer.param_groups:
            group["lr"] = lr * rate(step, steps)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if on_batch is not None:
            on_batch(batch_size, loss.item())
    settle_norms(model, data.train[order[-SETTLED:]], batch_size)
    return model.eval().folded()


@torch.no_grad()
def settle_norms(model: Classifier, images: Tensor, batch_size: int) -> None:
    """Let the norms take the mean and variance of these uint8 images with the weights that there are now."""
    norms = [layer.norm for layer in model.layers if isinstance(layer.norm, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # all batches count alike
    for part in images.split(batch_size):
        if len(part) == batch_size:
            model(to_float(part).to(model.head.weight.device).contiguous(memory_format=torch.channels_last))


def accuracy(classifier: Classifier, images: Tensor, labels: Tensor) -> float:
    """The share of uint8 images (N, C, H, W) that are read as their labels (N,)."""
    return (read(classifier, images)[1].argmax(1) == labels).double().mean().item()


def save_and_check(path: Path, classifier: Classifier, data: ImageData, command: str) -> dict:
    """Write a trained classifier, with the accuracy that it has on the held-out images as saved; the metadata."""
    about = {"dataset": data.name, "classes": list(data.classes), "shape": list(data.shape), "command": command}
    save_classifier(path, classifier, about)
    saved = load_classifier(path)[0]
    held_out = {"accuracy": accuracy(saved, data.held_out, data.held_out_labels), "n": len(data.held_out)}
    save_classifier(path, classifier, about | {"held_out": held_out})
    return about | {"held_out": held_out}
