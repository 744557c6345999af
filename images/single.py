"""Single images with seeds and classes, as other programs read them: an archive of arrays, or a folder of PNGs."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from images.batches import to_uint8
from runtime.files import atomic_path


def to_pixels(images: Tensor) -> np.ndarray:
    """Images (N, C, H, W) in [-1, 1] as uint8 (N, H, W, 3); grey ones have three equal channels."""
    levels = to_uint8(images.clamp(-1, 1))
    return levels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()


def save_npz(images: Tensor, labels: Tensor | None, classes: list[str], seed: int, path: str | Path) -> None:
    """Write an .npz archive: arr_0 uint8 (N, H, W, 3), seeds (N,) and, for a model with classes, labels (N,), classes.

    images: (N, C, H, W) in [-1, 1]; image i was drawn from seed + i. `arr_0` is what evaluation tools of diffusion
    models look for (Dhariwal & Nichol 2021, their published evaluator).
    """
    arrays = {"arr_0": to_pixels(images), "seeds": np.arange(seed, seed + len(images))}
    if labels is not None:
        arrays |= {"labels": labels.numpy(), "classes": np.array(classes)}
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def save_folder(images: Tensor, labels: Tensor | None, classes: list[str], seed: int, folder: str | Path) -> None:
    """Write a PNG for each image, named by its seed, in a folder for each class, and last `images.csv` with all.

    Arguments as for `save_npz`. A class whose name no folder can have is written under its number.
    """
    folder, rows = Path(folder), []
    for i, pixels in enumerate(to_pixels(images)):
        name = f"{seed + i:06d}.png"
        label = "" if labels is None else classes[int(labels[i])]
        if labels is not None:
            usable = label not in ("", ".", "..") and not set(label) & set("/\\\0")
            name = f"{label if usable else int(labels[i])}/{name}"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)
        rows.append((name, seed + i, label))
    with atomic_path(folder / "images.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("file", "seed", "class"))
        writer.writerows(rows)
