"""Any folder of images as one uint8 array: found recursively, turned upright, resized by the short side, cropped.

The class of an image is the name of the folder that it is in. Images that cannot be read are named and counted.
"""

import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from runtime.errors import RunFailed, UserError, reason

IN_MEMORY_BYTES = 4 << 30  # larger sets go to a memory-mapped temporary file
IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class ImageFolder:
    """One entry per split, training first: images (N, 3, H, W) uint8 with labels (N,) int64.

    skipped: for each image that could not be read, a line with its path and the reason.
    """

    splits: list[tuple[Tensor, Tensor]]
    classes: tuple[str, ...]
    skipped: tuple[str, ...]


def load_image_folder(root: Path, size: int, *, skip_bad_images: bool = False) -> ImageFolder:
    """Read a folder of images as squares of `size` pixels; if it has `train/` and `test/`, these are the splits.

    Raises UserError if there are no images, or if some cannot be read and are not to be skipped: a damaged or foreign
    file, one without read permission, a dangling link, or one with more pixels than Pillow's limit against bombs.
    """
    try:
        if not root.is_dir():
            raise UserError(f"--data-dir: {root} is not a folder")
        has_test = (root / "train").is_dir() and (root / "test").is_dir()
        roots = [root / "train", root / "test"] if has_test else [root]
        paths = [sorted(_image_paths(folder)) for folder in roots]
    except OSError as error:
        raise UserError(f"--data-dir: cannot read {error.filename or root}: {error.strerror or error}") from error
    read, bad = [], []
    for folder, split in zip(roots, paths, strict=True):
        if not split:
            raise UserError(f"--data-dir: no images in {folder}")
        images, good, failures = _read_images(split, size)
        read.append((images, good))
        bad += failures
    if bad and not skip_bad_images:
        count = sum(map(len, paths))
        raise UserError(f"--data-dir: {bad[0]}; {len(bad)} of {count} images are bad, --skip-bad-images skips them")
    for folder, (_, good) in zip(roots, read, strict=True):
        if not good:
            raise UserError(f"--data-dir: no readable images in {folder}; {bad[0]}")
    # the class of an image that is in no subfolder is the name of the data set's folder, in both splits
    names = [[(path.parent if path.parent not in roots else root.resolve()).name for path in good] for _, good in read]
    classes = tuple(sorted({name for split in names for name in split}))
    number = {name: i for i, name in enumerate(classes)}
    labels = [torch.tensor([number[name] for name in split]) for split in names]
    return ImageFolder([(images, label) for (images, _), label in zip(read, labels, strict=True)], classes, tuple(bad))


def _image_paths(root: Path) -> Iterator[Path]:
    """Every file below `root` that is named like an image. Links are followed; each folder is entered once."""

    def refuse(error: OSError) -> None:
        raise error

    seen = set()
    for folder, subfolders, names in os.walk(root, onerror=refuse, followlinks=True):
        identity = os.path.realpath(folder)
        if identity in seen:  # a link to a folder above would never end
            subfolders.clear()
            continue
        seen.add(identity)
        subfolders.sort()
        for name in names:
            path = Path(folder, name)
            # no pipe or socket, since reading one might never return; a link to nothing counts as a bad image
            if path.suffix.lower() in IMAGE_SUFFIXES and (path.is_file() or not path.exists()):
                yield path


def _read_images(paths: Sequence[Path], size: int) -> tuple[Tensor, list[Path], list[str]]:
    """(images, their paths, a line for each image that could not be read)."""
    images, good, bad = _room(len(paths), size), [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # a huge image is refused, not decoded
        for path in tqdm(paths, "reading images", unit="image", delay=2, leave=False):
            try:
                images[len(good)] = _read_image(path, size)
                good.append(path)
            except Exception as error:  # Pillow's decoders raise nearly anything for a damaged file
                bad.append(f"cannot read {path}: {reason(error)}")
    return torch.from_numpy(images[: len(good)]), good, bad


def _room(count: int, size: int) -> np.ndarray:
    """An array for `count` images, in memory or in a temporary file that vanishes when it is closed."""
    shape = (count, 3, size, size)
    bytes_needed = int(np.prod(shape, dtype=np.int64))
    if bytes_needed <= IN_MEMORY_BYTES:
        return np.empty(shape, np.uint8)
    file = tempfile.TemporaryFile()  # noqa: SIM115 - the map keeps it open
    try:
        if hasattr(os, "posix_fallocate"):  # so that a full disk is an error now, and not a SIGBUS at some image
            os.posix_fallocate(file.fileno(), 0, bytes_needed)
    except OSError as error:
        raise RunFailed(
            f"no room for {bytes_needed / 2**30:.1f} GiB of images in {tempfile.gettempdir()} ({error.strerror}); "
            "set TMPDIR to a larger disk or use a smaller --image-size"
        ) from error
    return np.memmap(file, np.uint8, "w+", shape=shape)


def _read_image(path: Path, size: int) -> np.ndarray:
    """One image as uint8 (3, size, size): upright, short side resized, centre crop."""
    with Image.open(path) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):  # 16-bit grey, which `convert` would clip
            image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
        if image.mode == "F":
            raise ValueError("floating-point pixels; which values are black and white is not known")
        square = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    return np.asarray(square).transpose(2, 0, 1)
