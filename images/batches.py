"""What one training step sees, as a pure function of (seed, batch number): images, flips, timesteps, noise, labels.

    batch = training_batch(data, scheduler.draw_timesteps, seed=0, number=41, batch_size=8)

There is no loader state, so batch `number` is the same after a resume, in any number of processes and for every model.
The held-out bank, on which every model is measured, is a fixed batch of the same kind.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from images.datasets import ImageData

BANK_SIZE = 2000
NO_LABEL_PROBABILITY = 0.1  # labels dropped in training, for classifier-free guidance (Ho & Salimans 2022, table 1)


@dataclass(frozen=True)
class Batch:
    """x_0 (B, C, H, W) in [-1, 1], t (B,), eps like x_0, and labels (B,); the label after the last class means none."""

    x_0: Tensor
    t: Tensor
    eps: Tensor
    labels: Tensor


def to_float(images: Tensor) -> Tensor:
    """uint8 images to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] to uint8."""
    return ((images + 1) * 127.5).round().byte()


@lru_cache(maxsize=2)  # the present epoch and, for the batch that straddles two, the next
def _epoch_order(seed: int, epoch: int, size: int, device: torch.device) -> Tensor:
    return torch.randperm(size, generator=random_generator("cpu", seed, epoch, stream=0)).to(device)


def _shuffled(seed: int, first: int, last: int, size: int, device: torch.device) -> Tensor:
    """Entries first to last - 1 of the endless sequence in which every epoch visits each of `size` images once."""
    parts = []
    while first < last:
        epoch, offset = divmod(first, size)
        parts.append(_epoch_order(seed, epoch, size, device)[offset : offset + last - first])
        first += len(parts[-1])
    return torch.cat(parts)


def random_generator(device: torch.device | str, seed: int, number: int, stream: int) -> torch.Generator:
    """A generator for (seed, number) of one stream; the three numbers are mixed into one well-spread seed."""
    mixed = np.random.SeedSequence([seed, number, stream]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(mixed >> np.uint64(1)))


def training_batch(
    data: ImageData,
    draw_timesteps: Callable[[Tensor], Tensor],
    *,
    seed: int,
    number: int,
    batch_size: int,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
) -> Batch:
    """Batch `number` (from 0) on `device`, or one process's part of it; a pure function of the arguments.

    draw_timesteps: maps uniform numbers (B,) in [0, 1) to timesteps (B,). The numbers of a batch are stratified: evenly
    spaced from one random offset (Kingma et al. 2021, appendix I.1), which lowers the variance of the loss. Every epoch
    visits each image once, in its own order. Each device type has its own stream of random numbers.
    """
    size = len(data.train)
    share = slice(batch_size * rank // world_size, batch_size * (rank + 1) // world_size)
    first, last = number * batch_size + share.start, number * batch_size + share.stop
    index = _shuffled(seed, first, last, size, data.train.device)  # on the images' device: copying it there would wait

    random = random_generator(device, seed, number, stream=1)
    mirrored, dropped = torch.rand(2, batch_size, generator=random, device=device)
    offset = torch.rand(1, generator=random, device=device)
    eps = torch.randn(batch_size, *data.shape, generator=random, device=device)[share]

    x_0 = to_float(data.train[index].to(device))
    if data.mirror:
        x_0 = torch.where(mirrored[share, None, None, None] < 0.5, x_0.flip(3), x_0)
    strata = (offset + torch.arange(batch_size, device=device)[share] / batch_size) % 1
    labels = data.train_labels[index].to(device)
    labels = torch.where(dropped[share] < NO_LABEL_PROBABILITY, len(data.classes), labels)
    return Batch(x_0, draw_timesteps(strata), eps, labels)


def memory_noise(
    shape: tuple[int, int, int], *, seed: int, number: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> Tensor:
    """Noise for the noisier images that a model with memory sees before those of batch `number`: (K, B, C, H, W).

    K is 0, 1 or 2, at random for each batch. It is drawn on the CPU, so that it is the same for every device.
    """
    random = random_generator("cpu", seed, number, stream=2)
    passes = int(torch.randint(3, (), generator=random))
    share = slice(batch_size * rank // world_size, batch_size * (rank + 1) // world_size)
    return torch.randn(passes, batch_size, *shape, generator=random)[:, share]


def held_out_bank(data: ImageData, num_timesteps: int, size: int = BANK_SIZE) -> Batch:
    """The frozen bank that every model is measured on: held-out images, t stratified over all T steps, fixed eps.

    It always has `size` entries: a fixed random choice if there are more held-out images, or each image several times,
    with different t and eps, if there are fewer. It does not depend on any run's seed.
    """
    random = torch.Generator().manual_seed(0)
    index = torch.randperm(len(data.held_out), generator=random).repeat(-(-size // len(data.held_out)))[:size]
    t = (torch.arange(size) * num_timesteps // size)[torch.randperm(size, generator=random)]
    x_0 = to_float(data.held_out[index])
    return Batch(x_0, t, torch.randn(x_0.shape, generator=random), data.held_out_labels[index])
