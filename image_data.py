"""Data sets as one uint8 tensor each, and batches as a pure function of (seed, batch number).

    data = load_images("cifar10", "data")
    batch = training_batch(data, scheduler.draw_timesteps, seed=0, number=41, batch_size=8)

There is no loader state: batch `number` is the same after a resume, in any number of processes, and for every model.
torchvision is imported where it is used: that takes seconds, which a run that downloads and resizes nothing is spared.
"""

import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from errors import UserError
from image_folder import load_image_folder

HELD_OUT_STRIDE = 50  # without a test split of its own, every fiftieth image of a set is held out
BANK_SIZE = 2000
NO_LABEL_SHARE = 0.1  # labels dropped in training, for classifier-free guidance (Ho & Salimans 2022, table 1)

# name -> the class of torchvision.datasets, and what a user without a network has to place below --data-dir
DOWNLOADS = {
    "cifar10": ("CIFAR10", "cifar-10-python.tar.gz"),
    "fashion-mnist": ("FashionMNIST", "FashionMNIST/raw/*-ubyte.gz (four files)"),
    "mnist": ("MNIST", "MNIST/raw/*-ubyte.gz (four files)"),
}
DATASETS = (*DOWNLOADS, "digits", "folder")
MIRRORED = ("cifar10", "folder")  # sets whose images mean the same when seen in a mirror


@dataclass(frozen=True)
class ImageData:
    """Images as uint8 (N, C, H, W) and labels as int64 (N,), for training and held out."""

    name: str
    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor
    classes: tuple[str, ...]
    mirror: bool  # flip images at random in training
    skipped: tuple[str, ...] = ()  # images of a folder that could not be read, and why

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.train.shape[1:])

    def to(self, device: torch.device) -> "ImageData":
        """The training images and labels on `device`, if they take at most half of its free memory."""
        if device.type != "cuda" or self.train.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
            return self
        return replace(self, train=self.train.to(device), train_labels=self.train_labels.to(device))


def load_images(
    name: str, data_dir: str | Path, image_size: int | None = None, *, skip_bad_images: bool = False
) -> ImageData:
    """Load a data set, downloading it into `data_dir` if it is one of `DOWNLOADS` and not there.

    image_size: resize to squares of that many pixels; None keeps the set's own size (32 for a folder).
    skip_bad_images: leave out the images of a folder that cannot be read instead of refusing them.
    Raises UserError for an unknown name, a size that 4 does not divide, and data that is missing or unreadable.
    """
    if name not in DATASETS:
        raise UserError(f"--dataset: must be one of {', '.join(DATASETS)}, got {name!r}")
    if image_size is not None and (image_size < 4 or image_size % 4):
        raise UserError(f"--image-size: must be a positive multiple of 4, got {image_size}")
    skipped = ()
    if name == "folder":
        folder = load_image_folder(Path(data_dir), image_size or 32, skip_bad_images=skip_bad_images)
        splits, classes, skipped = folder.splits, folder.classes, folder.skipped
    elif name == "digits":
        splits, classes = _load_digits()
    else:
        splits, classes = _download(name, Path(data_dir))
    train, held_out = splits if len(splits) == 2 else _hold_out(*splits[0])
    if image_size is not None:
        train, held_out = ((_resize(images, image_size), labels) for images, labels in (train, held_out))
    return ImageData(name, *train, *held_out, tuple(classes), name in MIRRORED, skipped)


def _hold_out(images: Tensor, labels: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    if len(images) < 2:
        raise UserError(f"--data-dir: needs at least 2 images to hold one out, found {len(images)}")
    held = torch.zeros(len(images), dtype=torch.bool)
    held[HELD_OUT_STRIDE // 2 :: HELD_OUT_STRIDE] = True
    if not held.any():
        held[-1] = True
    return (images[~held], labels[~held]), (images[held], labels[held])


def _download(name: str, data_dir: Path):
    from torchvision import datasets

    class_name, archive = DOWNLOADS[name]
    dataset, wanted = getattr(datasets, class_name), data_dir / archive
    try:
        return _load_cifar10(dataset, data_dir) if name == "cifar10" else _load_mnist(dataset, data_dir)
    except Exception as error:  # torchvision raises nearly anything, by the way in which the host or the file fails
        found = "is cut short or damaged" if wanted.is_file() else "not found"
        raise UserError(
            f"{wanted}: {found} and not downloadable ({_one_line(error)}); place it there or use --dataset digits"
        ) from error


def _load_mnist(dataset: type, data_dir: Path):
    splits = [dataset(data_dir, train=train, download=True) for train in (True, False)]
    return [(split.data[:, None].contiguous(), torch.as_tensor(split.targets)) for split in splits], splits[0].classes


class _PlainPickle(pickle.Unpickler):
    """Reads plain values and NumPy arrays. Whatever else a pickle may name, and so run, is refused."""

    ALLOWED: ClassVar = {"_reconstruct": np.empty(0).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype}

    def find_class(self, module: str, name: str) -> object:
        if module.split(".")[0] != "numpy" or name not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not data")
        return self.ALLOWED[name]


def _load_cifar10(cifar10: type, data_dir: Path):
    """torchvision downloads and verifies; its own reader would let the pickles of the set run code."""
    from torchvision.datasets.utils import check_integrity, download_and_extract_archive

    files = [*cifar10.train_list, *cifar10.test_list, [cifar10.meta["filename"], cifar10.meta["md5"]]]
    paths = {file: data_dir / cifar10.base_folder / file for file, _ in files}
    if not all(check_integrity(paths[file], md5) for file, md5 in files):
        download_and_extract_archive(cifar10.url, data_dir, filename=cifar10.filename, md5=cifar10.tgz_md5)
        wrong = [str(paths[file]) for file, md5 in files if not check_integrity(paths[file], md5)]
        if wrong:
            raise ValueError(f"{wrong[0]} is damaged")

    def read(file: str) -> dict:
        with open(paths[file], "rb") as stream:
            return _PlainPickle(stream, encoding="latin1").load()

    splits = []
    for split in (cifar10.train_list, cifar10.test_list):
        batches = [read(file) for file, _ in split]
        images = torch.from_numpy(np.concatenate([batch["data"] for batch in batches])).view(-1, 3, 32, 32)
        splits.append((images, torch.tensor([label for batch in batches for label in batch["labels"]])))
    return splits, read(cifar10.meta["filename"])[cifar10.meta["key"]]


def _load_digits():
    """The 1,797 8x8 grey digits that scikit-learn ships, all of them for training but the held-out fiftieth."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images / 16 * 255).round().to(torch.uint8)[:, None]  # values are 0..16
    return [(images, torch.from_numpy(digits.target).long())], [str(i) for i in range(10)]


def _resize(images: Tensor, size: int) -> Tensor:
    if images.shape[-1] == size:
        return images
    from torchvision.transforms.functional import InterpolationMode, resize

    chunks = images.split(4096)
    return torch.cat([resize(chunk, [size, size], InterpolationMode.BICUBIC, antialias=True) for chunk in chunks])


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@dataclass(frozen=True)
class Batch:
    """x_0 (B, C, H, W) in [-1, 1], t (B,), eps like x_0, and labels (B,), where the class behind the last is none."""

    x_0: Tensor
    t: Tensor
    eps: Tensor
    labels: Tensor


def to_float(images: Tensor) -> Tensor:
    """uint8 images to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


@lru_cache(maxsize=2)  # the epoch at hand and, in the batch that straddles two, the next
def _epoch_order(seed: int, epoch: int, size: int, device: torch.device) -> Tensor:
    return torch.randperm(size, generator=random_generator("cpu", seed, epoch, stream=0)).to(device)


def _shuffled(seed: int, first: int, last: int, size: int, device: torch.device) -> Tensor:
    """Entries first..last of the endless sequence in which every epoch visits each of `size` images once."""
    parts = []
    while first < last:
        epoch, offset = divmod(first, size)
        parts.append(_epoch_order(seed, epoch, size, device)[offset : offset + last - first])
        first += len(parts[-1])
    return torch.cat(parts)


def random_generator(device: torch.device | str, seed: int, number: int, stream: int) -> torch.Generator:
    """A generator for one (seed, number) of one stream; the numbers are mixed into one well-spread 64-bit seed."""
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
    """Batch `number` (from 0) on `device`, a pure function of the arguments; or the share of one process in it.

    draw_timesteps: from numbers (B,), evenly distributed in [0, 1), to timesteps (B,). Those of a batch are stratified:
    one random offset, evenly spaced (Kingma et al. 2021, appendix I.1), which lowers the variance of the loss. Every
    epoch visits each image once, in an order of its own. Each device type has its own stream of random numbers.
    """
    size = len(data.train)
    share = slice(batch_size * rank // world_size, batch_size * (rank + 1) // world_size)
    first, last = number * batch_size + share.start, number * batch_size + share.stop
    index = _shuffled(seed, first, last, size, data.train.device)  # where the images are: copying it would wait

    random = random_generator(device, seed, number, stream=1)
    mirrored, dropped = torch.rand(2, batch_size, generator=random, device=device)
    offset = torch.rand(1, generator=random, device=device)
    eps = torch.randn(batch_size, *data.shape, generator=random, device=device)[share]

    x_0 = to_float(data.train[index].to(device))
    if data.mirror:
        x_0 = torch.where(mirrored[share, None, None, None] < 0.5, x_0.flip(3), x_0)
    strata = (offset + torch.arange(batch_size, device=device)[share] / batch_size) % 1
    labels = data.train_labels[index].to(device)
    labels = torch.where(dropped[share] < NO_LABEL_SHARE, len(data.classes), labels)
    return Batch(x_0, draw_timesteps(strata), eps, labels)


def memory_noise(
    shape: tuple[int, int, int], *, seed: int, number: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> Tensor:
    """Noise for the noisier images that a model with memory sees before those of batch `number`: (K, B, C, H, W).

    K is 0, 1 or 2, at random for each batch. On the CPU, so that it is the same for every device.
    """
    random = random_generator("cpu", seed, number, stream=2)
    passes = int(torch.randint(3, (), generator=random))
    share = slice(batch_size * rank // world_size, batch_size * (rank + 1) // world_size)
    return torch.randn(passes, batch_size, *shape, generator=random)[:, share]


def held_out_bank(data: ImageData, num_timesteps: int, size: int = BANK_SIZE) -> Batch:
    """The frozen bank that every model is measured on: held-out images, t stratified over all T steps, fixed eps.

    It holds `size` entries whatever the set's size: where there are more held-out images, a fixed random choice of
    them, where there are fewer, each several times with other t and eps. Independent of any run's seed.
    """
    random = torch.Generator().manual_seed(0)
    index = torch.randperm(len(data.held_out), generator=random).repeat(-(-size // len(data.held_out)))[:size]
    t = (torch.arange(size) * num_timesteps // size)[torch.randperm(size, generator=random)]
    x_0 = to_float(data.held_out[index])
    return Batch(x_0, t, torch.randn(x_0.shape, generator=random), data.held_out_labels[index])
