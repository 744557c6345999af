"""Data sets, each as one uint8 tensor: downloaded, shipped with scikit-learn, or any folder of images.

    data = load_images("cifar10", "data")

torchvision is imported only where it is used: the import takes seconds, and a run that neither downloads nor resizes
does not need it.
"""

import hashlib
import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from choices import DATASETS
from images.folder import load_image_folder
from images.sides import sides
from runtime.errors import UserError, reason, user_errors

HELD_OUT_STRIDE = 50  # every fiftieth image is held out of a set that has no test split of its own

# name -> its class in torchvision.datasets, and the file that a user without a network has to place in --data-dir
DOWNLOADS = {
    "cifar10": ("CIFAR10", "cifar-10-python.tar.gz"),
    "fashion-mnist": ("FashionMNIST", "FashionMNIST/raw/*-ubyte.gz (four files)"),
    "mnist": ("MNIST", "MNIST/raw/*-ubyte.gz (four files)"),
}
MIRRORED = ("cifar10", "folder")  # sets whose images keep their meaning in a mirror


@dataclass(frozen=True)
class ImageData:
    """Images as uint8 (N, C, H, W) and labels as int64 (N,), for training and held out."""

    name: str
    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor
    classes: tuple[str, ...]
    mirror: bool  # whether training flips images at random
    skipped: tuple[str, ...] = ()  # the images of a folder that could not be read, each with the reason
    notes: tuple[str, ...] = ()  # what of a folder was passed over, not read, or assumed

    @property
    def shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self.train.shape
        return channels, height, width

    def images_per_class(self) -> dict[str, int]:
        """How many training images each class has."""
        counts = self.train_labels.bincount(minlength=len(self.classes)).tolist()
        return dict(zip(self.classes, counts, strict=True))

    def fingerprint(self) -> str:
        """A hash of all pixels and labels."""
        digest = hashlib.sha256()
        for tensor in (self.train, self.train_labels, self.held_out, self.held_out_labels):
            digest.update(np.ascontiguousarray(tensor.cpu().numpy()).data)
        return digest.hexdigest()

    def to(self, device: torch.device) -> "ImageData":
        """A copy whose training images and labels are on `device`, if they take at most half of its free memory."""
        if device.type != "cuda" or self.train.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
            return self
        return replace(self, train=self.train.to(device), train_labels=self.train_labels.to(device))


def load_images(
    name: str,
    data_dir: str | Path,
    size: int | str | None = None,
    *,
    skip_bad_images: bool = False,
    otherwise: str = "use --dataset digits",
) -> ImageData:
    """Load a data set; one of `DOWNLOADS` is downloaded into `data_dir` if it is not there.

    size: resize to squares with this side in pixels, or to "HEIGHTxWIDTH"; None keeps the set's own size (32 for a
    folder). skip_bad_images: leave out the images of a folder that cannot be read, instead of refusing the folder.
    otherwise: what to advise if a set can be neither found nor downloaded.
    Raises UserError for an unknown name, a size that is not a multiple of 4, and data that is missing or unreadable.
    """
    if name not in DATASETS:
        raise UserError(f"--dataset: must be one of {', '.join(DATASETS)}, got {name!r}")
    with user_errors("--image-size"):
        height, width = sides(size or 32)
    skipped, notes = (), ()
    if name == "folder":
        folder = load_image_folder(Path(data_dir), height, width, skip_bad_images=skip_bad_images)
        splits, classes, skipped, notes = folder.splits, folder.classes, folder.skipped, folder.notes
    elif name == "digits":
        splits, classes = _load_digits()
    else:
        splits, classes = _download(name, Path(data_dir), otherwise)
    train, held_out = splits if len(splits) == 2 else _hold_out(*splits[0])
    if size is not None:
        train, held_out = ((_resize(images, height, width), labels) for images, labels in (train, held_out))
    return ImageData(name, *train, *held_out, tuple(classes), name in MIRRORED, skipped, notes)


def _hold_out(images: Tensor, labels: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    if len(images) < 2:
        raise UserError(f"--data-dir: needs at least 2 images to hold one out, found {len(images)}")
    held = torch.zeros(len(images), dtype=torch.bool)
    held[HELD_OUT_STRIDE // 2 :: HELD_OUT_STRIDE] = True
    held &= labels[~held].bincount(minlength=int(labels.max()) + 1)[labels] > 0  # no class loses all of its images
    if not held.any():
        several = (labels.bincount()[labels] > 1).nonzero()
        if not len(several):
            raise UserError("--data-dir: each class has a single image, so that none can be held out; use one folder")
        held[several[-1]] = True
    return (images[~held], labels[~held]), (images[held], labels[held])


def _download(name: str, data_dir: Path, otherwise: str):
    from torchvision import datasets

    class_name, archive = DOWNLOADS[name]
    dataset, wanted = getattr(datasets, class_name), data_dir / archive
    try:
        return _load_cifar10(dataset, data_dir) if name == "cifar10" else _load_mnist(dataset, data_dir)
    except Exception as error:  # depending on how host or file fail, torchvision raises nearly anything
        found = "is cut short or damaged" if wanted.is_file() else "not found"
        raise UserError(
            f"{wanted}: {found} and not downloadable ({reason(error)}); place it there or {otherwise}"
        ) from error


def _load_mnist(dataset: type, data_dir: Path):
    splits = [dataset(data_dir, train=train, download=True) for train in (True, False)]
    return [(split.data[:, None].contiguous(), torch.as_tensor(split.targets)) for split in splits], splits[0].classes


class _PlainPickle(pickle.Unpickler):
    """Reads plain values and NumPy arrays, and refuses everything else that a pickle could name and so run."""

    ALLOWED: ClassVar = {"_reconstruct": np.empty(0).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype}

    def find_class(self, module: str, name: str) -> object:
        if module.split(".")[0] != "numpy" or name not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not data")
        return self.ALLOWED[name]


def _load_cifar10(cifar10: type, data_dir: Path):
    """Let torchvision download and verify; its own reader would let the pickles of the set run code."""
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
    """The 1,797 grey 8x8 digits that scikit-learn ships, as one split."""
    from sklearn.datasets import load_digits

    pixels, target = load_digits(return_X_y=True)  # (1797, 64), values are 0..16
    images = torch.from_numpy(pixels.reshape(-1, 1, 8, 8) / 16 * 255).round().to(torch.uint8)
    return [(images, torch.from_numpy(target).long())], [str(i) for i in range(10)]


def _resize(images: Tensor, height: int, width: int) -> Tensor:
    if images.shape[-2:] == (height, width):
        return images
    from torchvision.transforms.functional import InterpolationMode, resize

    chunks = images.split(4096)
    return torch.cat([resize(chunk, [height, width], InterpolationMode.BICUBIC, antialias=True) for chunk in chunks])
