"""Data sets as one uint8 tensor each, and batches as a pure function of (seed, batch number).

    data = load_images("cifar10", "data")
    batch = training_batch(data, seed=0, number=41, batch_size=8, num_timesteps=400)

There is no loader state: batch `number` is the same after a resume, in any number of processes, and for every model.
"""

import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from errors import UserError

HELD_OUT_STRIDE = 50  # without a test split of its own, every fiftieth image of a set is held out
IN_MEMORY_BYTES = 4 << 30  # a larger folder of images goes to a memory-mapped temporary file
IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
BANK_SIZE = 2000
NO_LABEL_SHARE = 0.1  # labels dropped in training, for classifier-free guidance (Ho & Salimans 2022, table 1)

# name -> the torchvision class, and what a user without a network has to place below --data-dir
DOWNLOADS = {
    "cifar10": (torchvision.datasets.CIFAR10, "cifar-10-python.tar.gz"),
    "fashion-mnist": (torchvision.datasets.FashionMNIST, "FashionMNIST/raw/*-ubyte.gz (four files)"),
    "mnist": (torchvision.datasets.MNIST, "MNIST/raw/*-ubyte.gz (four files)"),
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

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.train.shape[1:])

    def to(self, device: torch.device) -> "ImageData":
        """The training images on `device`, if they take at most half of its free memory."""
        if device.type != "cuda" or self.train.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
            return self
        return ImageData(**{**self.__dict__, "train": self.train.to(device)})


def load_images(name: str, data_dir: str | Path, image_size: int | None = None) -> ImageData:
    """Load a data set, downloading it into `data_dir` if it is one of `DOWNLOADS` and not there.

    image_size: resize to squares of that many pixels; None keeps the set's own size (32 for a folder).
    Raises UserError for an unknown name, a size that 4 does not divide, and data that is missing or unreadable.
    """
    if name not in DATASETS:
        raise UserError(f"--dataset: must be one of {', '.join(DATASETS)}, got {name!r}")
    if image_size is not None and (image_size < 4 or image_size % 4):
        raise UserError(f"--image-size: must be a positive multiple of 4, got {image_size}")
    if name == "folder":
        train, held_out, classes = _load_folder(Path(data_dir), image_size or 32)
    elif name == "digits":
        train, held_out, classes = _load_digits()
    else:
        train, held_out, classes = _download(name, Path(data_dir))
    if held_out is None:
        train, held_out = _hold_out(*train)
    if image_size is not None:
        train, held_out = ((_resize(images, image_size), labels) for images, labels in (train, held_out))
    return ImageData(name, *train, *held_out, tuple(classes), mirror=name in MIRRORED)


def _hold_out(images: Tensor, labels: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    if len(images) < 2:
        raise UserError(f"--data-dir: needs at least 2 images to hold one out, found {len(images)}")
    held = torch.zeros(len(images), dtype=torch.bool)
    held[HELD_OUT_STRIDE // 2 :: HELD_OUT_STRIDE] = True
    if not held.any():
        held[-1] = True
    return (images[~held], labels[~held]), (images[held], labels[held])


def _download(name: str, data_dir: Path):
    dataset, archive = DOWNLOADS[name]
    try:
        splits = [dataset(data_dir, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:  # torchvision raises either, by the way in which the host fails
        raise UserError(
            f"{data_dir / archive}: not found and not downloadable ({_one_line(error)}); "
            "place it there or use --dataset digits"
        ) from error
    pairs = []
    for split in splits:
        images = torch.from_numpy(np.asarray(split.data))  # (N, H, W, C) or (N, H, W)
        images = images.permute(0, 3, 1, 2) if images.ndim == 4 else images[:, None]
        pairs.append((images.contiguous(), torch.as_tensor(split.targets)))
    return *pairs, splits[0].classes


def _load_digits():
    """The 1,797 8x8 grey digits that scikit-learn ships, all of them for training but the held-out fiftieth."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images / 16 * 255).round().to(torch.uint8)[:, None]  # values are 0..16
    return (images, torch.from_numpy(digits.target).long()), None, [str(i) for i in range(10)]


def _resize(images: Tensor, size: int) -> Tensor:
    if images.shape[-1] == size:
        return images
    resize = torchvision.transforms.functional.resize
    bicubic = torchvision.transforms.InterpolationMode.BICUBIC
    return torch.cat([resize(chunk, [size, size], bicubic, antialias=True) for chunk in images.split(4096)])


def _load_folder(root: Path, size: int):
    """A folder of images, searched recursively, or one that holds `train/` and `test/`; classes are folder names."""
    if not root.is_dir():
        raise UserError(f"--data-dir: {root} is not a folder")
    has_test = (root / "train").is_dir() and (root / "test").is_dir()
    roots = [root / "train", root / "test"] if has_test else [root]
    paths = [_image_paths(folder) for folder in roots]
    # an image that lies in no folder of its own takes the name of the data set's, in both splits
    names = [[(path.parent if path.parent not in roots else root.resolve()).name for path in split] for split in paths]
    classes = sorted({name for split in names for name in split})
    splits = [
        (_read_images(split, size), torch.tensor([classes.index(name) for name in split_names]))
        for split, split_names in zip(paths, names, strict=True)
    ]
    return splits[0], splits[1] if has_test else None, classes


def _image_paths(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not paths:
        raise UserError(f"--data-dir: no images in {folder}")
    return paths


def _read_images(paths: Sequence[Path], size: int) -> Tensor:
    shape = (len(paths), 3, size, size)
    if np.prod(shape) > IN_MEMORY_BYTES:
        images = np.memmap(tempfile.TemporaryFile(), np.uint8, "w+", shape=shape)  # noqa: SIM115 - the map holds it
    else:
        images = np.empty(shape, np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # a huge image is refused, not decoded
        for i, path in enumerate(tqdm(paths, "reading images", unit="image", delay=2, leave=False)):
            images[i] = _read_image(path, size)
    return torch.from_numpy(images)


def _read_image(path: Path, size: int) -> np.ndarray:
    """One image as uint8 (3, size, size): upright, short side resized, centre crop."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16-bit grey, which `convert` would clip
                image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
            ImageOps.exif_transpose(image, in_place=True)
            square = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UserError(f"--data-dir: cannot read {path}: {_one_line(error)}") from error
    return np.asarray(square).transpose(2, 0, 1)


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
def _epoch_order(seed: int, epoch: int, size: int) -> Tensor:
    return torch.randperm(size, generator=_generator("cpu", seed, epoch, stream=0))


def _shuffled(seed: int, first: int, last: int, size: int) -> Tensor:
    """Entries first..last of the endless sequence in which every epoch visits each of `size` images once."""
    parts = []
    while first < last:
        epoch, offset = divmod(first, size)
        parts.append(_epoch_order(seed, epoch, size)[offset : offset + last - first])
        first += len(parts[-1])
    return torch.cat(parts)


def _generator(device: torch.device | str, seed: int, number: int, stream: int) -> torch.Generator:
    """A generator for one (seed, number) of one stream; the numbers are mixed into one well-spread 64-bit seed."""
    mixed = np.random.SeedSequence([seed, number, stream]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(mixed >> np.uint64(1)))


def training_batch(
    data: ImageData,
    *,
    seed: int,
    number: int,
    batch_size: int,
    num_timesteps: int,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
) -> Batch:
    """Batch `number` (from 0) on `device`, a pure function of the arguments; or the share of one process in it.

    Every epoch visits each image once, in an order of its own. The timesteps of a batch are stratified: one random
    offset, evenly spaced (Kingma et al. 2021, appendix I.1), which lowers the variance of the loss. Each device type
    has its own stream of random numbers.
    """
    size = len(data.train)
    share = slice(batch_size * rank // world_size, batch_size * (rank + 1) // world_size)
    index = _shuffled(seed, number * batch_size + share.start, number * batch_size + share.stop, size)

    random = _generator(device, seed, number, stream=1)
    mirrored, dropped = torch.rand(2, batch_size, generator=random, device=device)
    offset = torch.rand(1, generator=random, device=device)
    eps = torch.randn(batch_size, *data.shape, generator=random, device=device)[share]

    x_0 = to_float(data.train[index.to(data.train.device)].to(device))
    if data.mirror:
        x_0 = torch.where(mirrored[share, None, None, None] < 0.5, x_0.flip(3), x_0)
    strata = (offset + torch.arange(batch_size, device=device)[share] / batch_size) % 1
    t = (strata * num_timesteps).long().clamp(max=num_timesteps - 1)
    labels = data.train_labels[index].to(device)
    labels = torch.where(dropped[share] < NO_LABEL_SHARE, len(data.classes), labels)
    return Batch(x_0, t, eps, labels)


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
