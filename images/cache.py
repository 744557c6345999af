"""Decoded folders of images, kept so that the next start need not decode them again.

A cache entry belongs to a folder and a size of images. It holds for the very names, sizes and dates of the files that
it was made of, and for the version of Pillow. When one of these changes, it is dropped and made anew.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import PIL
import torch

from runtime.files import atomic_path, save_json

VERSION = 1  # of how images are decoded
LARGEST_TOTAL = 8 << 30  # bytes; the entries that were used least recently leave first


@dataclass
class Decoded:
    """What became of the files of a folder, by their numbers. `good` are those whose pixels are there, in order."""

    good: list[int]
    bad: list[str]  # a line for each file that cannot be read
    own: int  # pictures that this program wrote
    notes: list[str]  # what was assumed


def cache_folder() -> Path:
    """Where entries are kept: beside torch's own caches, which follow XDG_CACHE_HOME."""
    return Path(torch.hub.get_dir()).parent / "liquid_diffusion"


def signature(paths: Sequence[str], shape: tuple[int, ...]) -> str:
    """A hash of the names, sizes and dates of the files, of the shape of the pixels, and of what decodes them."""
    digest = hashlib.sha256(f"{VERSION} {PIL.__version__} {shape}\n".encode())
    for path in paths:
        try:
            about = os.stat(path)
            digest.update(os.fsencode(path) + f"\0{about.st_size} {about.st_mtime_ns}\n".encode())
        except OSError:  # a link to nothing
            digest.update(os.fsencode(path) + b"\0-\n")
    return digest.hexdigest()


def entry(root: str, shape: tuple[int, ...]) -> Path:
    """The path of the pixels of a folder at a size; what is known of them lies beside it, as JSON."""
    name = hashlib.sha256(os.fsencode(os.path.realpath(root)) + str(shape[1:]).encode()).hexdigest()[:20]
    return cache_folder() / f"{name}.pixels"


def load(path: Path, signed: str, shape: tuple[int, ...], in_memory: int) -> tuple[np.ndarray, Decoded] | None:
    """(pixels of the good files, what became of all), or None if the entry does not hold for this signature."""
    try:
        about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        decoded = Decoded(**about["decoded"])
        if about["signature"] != signed:
            return None
        wanted = (len(decoded.good), *shape[1:])
        if path.stat().st_size <= in_memory:
            pixels = np.fromfile(path, np.uint8).reshape(wanted)
        else:
            pixels = np.memmap(path, np.uint8, "c", shape=wanted)
        if path.stat().st_size != pixels.nbytes or about["sha256"] != hashlib.sha256(pixels.data).hexdigest():
            return None
        os.utime(path)  # used now
        return pixels, decoded
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def save(path: Path, signed: str, pixels: np.ndarray, decoded: Decoded) -> None:
    """Keep an entry. Where the cache cannot be written, nothing is kept: the next start decodes again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            pixels.tofile(temporary)
        digest = hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()
        save_json(path.with_suffix(".json"), {"signature": signed, "sha256": digest, "decoded": asdict(decoded)})
        _make_room(path)
    except OSError:
        return


def _make_room(kept: Path) -> None:
    entries = sorted(kept.parent.glob("*.pixels"), key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for path in [kept, *(other for other in entries if other != kept)]:
        total += path.stat().st_size
        if total > LARGEST_TOTAL and path != kept:
            path.unlink(missing_ok=True)
            path.with_suffix(".json").unlink(missing_ok=True)
