"""Any folder of images as one uint8 array: found recursively, decoded by all cores, and kept for the next start.

The class of an image is the name of the folder that it is in. What is left out is counted and said.
"""

import json
import os
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from images import cache
from images.cache import Decoded
from images.decode import outcome, strictly
from images.layout import find_images
from runtime.errors import RunFailed, UserError, reason
from runtime.files import check_folder
from runtime.progress import progress_bar

IN_MEMORY_BYTES = 4 << 30  # larger sets stay in a memory-mapped file
MANY = 1000  # images; fewer are decoded here and now, sooner than a process starts, and are not kept
DEPTHS = (8, 10, 12, 14, 16, 24, 32)  # bits of grey images that are assumed where a file declares no range
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class ImageFolder:
    """One entry per split, training first: images (N, 3, H, W) uint8 with labels (N,) int64.

    skipped: for each image that could not be read, a line with its path and the reason. notes: lines that say what was
    passed over, not read, or assumed.
    """

    splits: list[tuple[Tensor, Tensor]]
    classes: tuple[str, ...]
    skipped: tuple[str, ...]
    notes: tuple[str, ...]


def load_image_folder(root: Path, height: int, width: int, *, skip_bad_images: bool = False) -> ImageFolder:
    """Read a folder of images, each resized and cropped to height x width pixels.

    Raises UserError if the layout is ambiguous, if there are no images, or if some cannot be read and are not to be
    skipped: a damaged or foreign file, one without read permission, a dangling link, or one with more pixels than
    Pillow's limit against bombs.
    """
    check_folder(root, "--data-dir")
    try:
        layout = find_images(str(root))
    except OSError as error:
        raise UserError(f"--data-dir: cannot read {error.filename or root}: {reason(error)}") from error
    for folder, paths in layout.splits:
        if not paths:
            unread = f"; not read: {counted(layout.not_read)}" if layout.not_read else ""
            raise UserError(f"--data-dir: no images in {folder}{unread}")
    read = [decoded(folder, paths, height, width) for folder, paths in layout.splits]
    bad = [line for _, found in read for line in found.bad]
    own = sum(found.own for _, found in read)
    if bad and not skip_bad_images:
        count = sum(len(paths) for _, paths in layout.splits)
        raise UserError(f"--data-dir: {bad[0]}; {len(bad)} of {count} images are bad, --skip-bad-images skips them")
    for (folder, _), (_, found) in zip(layout.splits, read, strict=True):
        if not found.good:
            why = bad[0] if bad else "all are pictures that these commands wrote"
            raise UserError(f"--data-dir: no readable images in {folder}; {why}")

    # the class of an image that is in no subfolder is the name of the data set's folder, in both splits
    names = []
    for (folder, paths), (_, found) in zip(layout.splits, read, strict=True):
        parents = [os.path.dirname(paths[i]) for i in found.good]
        names.append([root.resolve().name if parent == folder else os.path.basename(parent) for parent in parents])
    classes = tuple(sorted({name for split in names for name in split}))
    untrained = sorted(set(classes) - set(names[0]))
    if untrained:
        raise UserError(f"--data-dir: {layout.splits[0][0]} has no image of {', '.join(map(repr, untrained[:3]))}")
    number = {name: i for i, name in enumerate(classes)}
    labels = [torch.tensor([number[name] for name in split]) for split in names]
    if own:
        layout.passed_over["pictures that these commands wrote"] = own
    notes = [f"passed over: {counted(layout.passed_over)}"] if layout.passed_over else []
    notes += [f"not read, for want of a reader: {counted(layout.not_read)}"] if layout.not_read else []
    notes += dict.fromkeys(note for _, found in read for note in found.notes)
    splits = [(torch.from_numpy(pixels), label) for (pixels, _), label in zip(read, labels, strict=True)]
    return ImageFolder(splits, classes, tuple(bad), tuple(notes))


def counted(things: Counter[str]) -> str:
    """What, and how many, the most frequent first."""
    return ", ".join(f"{what} {count:,}" for what, count in things.most_common())


def decoded(folder: str, paths: Sequence[str], height: int, width: int) -> tuple[np.ndarray, Decoded]:
    """(pixels of the good files (N, 3, H, W), what became of all), from the cache or from the files."""
    shape = (len(paths), 3, height, width)
    signed, kept = cache.signature(paths, shape), cache.entry(folder, shape)
    found = cache.load(kept, signed, shape, IN_MEMORY_BYTES) if len(paths) >= MANY else None
    if found is not None:
        return found
    pixels, notes = _room(shape), []
    with progress_bar(total=len(paths), desc="reading images", unit="image", delay=2, leave=False) as bar:
        failures = _decode_all(range(len(paths)), paths, pixels, None, bar)
        deep = [row for row, known in failures.items() if "largest" in known]
        if deep:
            largest = max(failures.pop(row)["largest"] for row in deep)
            bits = next((bits for bits in DEPTHS if largest < 1 << bits), 64)
            notes = [f"{len(deep):,} deep grey images declare no range: assumed {bits} bits, the largest is {largest}"]
            failures |= _decode_all(deep, paths, pixels, (1 << bits) - 1, bar)
    good = [row for row in range(len(paths)) if row not in failures]
    for place, row in enumerate(good):
        if place != row:
            pixels[place] = pixels[row]
    bad = [failures[row]["bad"] for row in sorted(failures) if "bad" in failures[row]]
    result = Decoded(good, bad, sum("own" in known for known in failures.values()), notes)
    if len(paths) >= MANY:
        cache.save(kept, signed, pixels[: len(good)], result)
    return pixels[: len(good)], result


def _room(shape: tuple[int, ...]) -> np.ndarray:
    """An array for the pixels, in memory or in a temporary file that vanishes when it is closed."""
    bytes_needed = int(np.prod(shape, dtype=np.int64))
    if bytes_needed <= IN_MEMORY_BYTES:
        return np.empty(shape, np.uint8)
    file = tempfile.TemporaryFile()  # noqa: SIM115 - the map keeps it open
    try:
        if hasattr(os, "posix_fallocate"):  # so that a full disk is an error now, and not a SIGBUS at some image
            os.posix_fallocate(file.fileno(), 0, bytes_needed)
    except OSError as error:
        raise RunFailed(
            f"no room for {bytes_needed / 2**30:.1f} GiB of images in {tempfile.gettempdir()} ({reason(error)}); "
            "set TMPDIR to a larger disk"
        ) from error
    return np.memmap(file, np.uint8, "w+", shape=shape)


def _decode_all(
    rows: Sequence[int], paths: Sequence[str], pixels: np.ndarray, white: int | None, bar: tqdm
) -> dict[int, dict[str, Any]]:
    """Fill these rows of `pixels`, here or, if there are many, by a process per core; returns those that failed."""
    failures: dict[int, dict[str, Any]] = {}
    filled: set[int] = set()

    def take(row: int, found: np.ndarray | dict[str, Any]) -> None:
        if isinstance(found, dict):
            failures[row] = found
        else:
            pixels[row] = found
        filled.add(row)
        bar.update()

    processes = min(os.cpu_count() or 1, len(rows) // MANY)
    if processes > 1:
        _decode_in_processes([rows[i::processes] for i in range(processes)], paths, pixels.shape, white, take)
    height, width = pixels.shape[2:]
    with strictly():  # all, or what a process that was killed has left
        for row in rows:
            if row not in filled:
                take(row, outcome(paths[row], height, width, white))
    return failures


def _decode_in_processes(
    parts: Sequence[Sequence[int]], paths: Sequence[str], shape: tuple[int, ...], white: int | None, take: Callable
) -> None:
    """Decode each part of the rows in a process of its own, which knows neither torch nor this module."""
    running: list[Any] = []
    size = int(np.prod(shape[1:]))

    def decode_part(part: Sequence[int]) -> None:
        command = [sys.executable, "-m", "images.decode", *map(str, (*shape[2:], white or 0))]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        worker: Any
        with subprocess.Popen(command, cwd=ROOT, bufsize=1 << 20, **pipes) as worker:  # noqa: S603
            running.append(worker)
            with suppress(BrokenPipeError):
                worker.stdin.write(b"".join(os.fsencode(os.path.abspath(paths[row])) + b"\0" for row in part))
                worker.stdin.close()
            for row in part:
                head = worker.stdout.read(4)
                length = struct.unpack(">I", head)[0] if len(head) == 4 else size
                content = worker.stdout.read(length or size)
                if len(head) < 4 or len(content) < (length or size):
                    return  # the process was ended
                take(row, json.loads(content) if length else np.frombuffer(content, np.uint8).reshape(shape[1:]))

    with ThreadPoolExecutor(len(parts)) as pool:
        try:
            list(pool.map(decode_part, parts))
        finally:  # an interruption ends them at once
            for worker in running:
                worker.kill()
