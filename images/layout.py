"""What is in a folder of images: which files are images, which folders are splits, and what is passed over.

Hidden files, other programs' litter and this program's own run folders are passed over and counted. Whatever has the
name of an image but is of a format that Pillow does not read here is counted by its ending.
"""

import mimetypes
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

from images.decode import readable_suffixes
from runtime.errors import UserError

SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "val": ("val", "valid", "validation", "dev"),
}
LITTER = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "__pycache__"}
# picture formats whose endings not every machine's table of media types has
PICTURES = {".heic", ".heif", ".avif", ".jxl", ".jp2", ".webp", ".svg", ".psd", ".xcf", ".exr", ".hdr", ".eps", ".raw"}
PICTURES |= {".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".tga", ".qoi", ".fits", ".emf", ".wmf"}
RUN_FOLDER = re.compile(r"\d{5,}-.+")
EXPECTED = "expected is CLASS/IMAGE, or train/CLASS/IMAGE beside test/CLASS/IMAGE (or val/)"


@dataclass
class Layout:
    """The images of each split, training first, and how many of what was left out.

    splits: (folder, the paths of its images), all as strings: pathlib takes seconds for so many.
    """

    splits: list[tuple[str, list[str]]]
    passed_over: Counter[str] = field(default_factory=Counter)  # what -> how many
    not_read: Counter[str] = field(default_factory=Counter)  # ending -> how many files


def find_images(root: str) -> Layout:
    """Look through a folder. Raises UserError if its layout is ambiguous.

    A folder with `train/` and `test/` (or `val/`), in any case and under their usual names, is taken as these splits;
    if it has all three, `val/` is passed over. Any other folder is one set.
    """
    found = Layout([])
    paths = sorted(_image_paths(root, readable_suffixes(), found), key=lambda path: path.split(os.sep))
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    kinds = {kind: [name for name in folders if name.lower() in names] for kind, names in SPLITS.items()}
    named = [name for names in kinds.values() for name in names]
    if not named:
        found.splits = [(root, paths)]
        return found
    twice = next((names for names in kinds.values() if len(names) > 1), None)
    if twice:
        raise UserError(f"--data-dir: {root} has {' and '.join(twice)}, which mean the same split; {EXPECTED}")
    start = len(os.path.join(root, ""))
    by_folder: dict[str, list[str]] = {}
    for path in paths:
        first, deeper, _ = path[start:].partition(os.sep)
        by_folder.setdefault(first if deeper else "", []).append(path)
    beside = [f"{name}/" if name else "images" for name in by_folder if name not in named]
    if beside or not kinds["train"]:
        what = f"{', '.join(beside[:3])} beside " if beside else ""
        raise UserError(
            f"--data-dir: {root} has {what}{', '.join(f'{name}/' for name in named)}, a split or a class; {EXPECTED}; "
            "rename a class that has the name of a split"
        )
    if kinds["test"] and kinds["val"]:
        passed = by_folder.get(kinds["val"][0], [])
        found.passed_over[f"images in {kinds['val'][0]}/, since {kinds['test'][0]}/ is held out,"] += len(passed)
    chosen = [kinds["train"][0], *(kinds["test"] or kinds["val"])]
    found.splits = [(os.path.join(root, name), by_folder.get(name, [])) for name in chosen]
    return found


def _image_paths(root: str, suffixes: set[str], found: Layout) -> Iterator[str]:
    """Every file below `root` that is named like an image. Links are followed; each folder is entered once."""
    seen, waiting = set(), [root]
    while waiting:
        folder = waiting.pop()
        identity = os.path.realpath(folder)
        if identity in seen:  # a link to a folder above would never end
            continue
        seen.add(identity)
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir():
                    litter = _litter(entry.name, "folders")
                    if RUN_FOLDER.fullmatch(entry.name) and os.path.isfile(os.path.join(entry.path, "config.json")):
                        litter = "run folders"
                    if litter:
                        found.passed_over[litter] += 1
                    else:
                        waiting.append(entry.path)
                    continue
                suffix = os.path.splitext(entry.name)[1].lower()
                if suffix in suffixes or _looks_like_a_picture(suffix):
                    litter = _litter(entry.name, "files")
                    if litter:
                        found.passed_over[litter] += 1
                    elif suffix not in suffixes:
                        found.not_read[suffix] += 1
                    # no pipe or socket, since reading one might never return; a link to nothing is a bad image
                    elif entry.is_file() or not os.path.exists(entry.path):
                        yield entry.path


def _litter(name: str, kind: str) -> str | None:
    if name.startswith("."):
        return f"hidden {kind}"
    return f"{kind} of other programs" if name.lower() in LITTER else None


@cache
def _looks_like_a_picture(suffix: str) -> bool:
    return suffix in PICTURES or (mimetypes.guess_type(f"x{suffix}")[0] or "").startswith("image/")
