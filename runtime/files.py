"""Writing files whole or not at all, and checking output paths before the work starts.

Every file is written under a temporary name in its own folder, flushed to the disk, then renamed. A reader sees the old
file or the new one and never a part of one.
"""

import glob
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runtime.errors import UserError, reason

PRODUCER = "liquid-diffusion"  # what the pictures name as their software, so that none is taken for an image of a set


@contextmanager
def errors_named(path: Path) -> Iterator[None]:
    """Add the path to an OSError of the block: by itself a failed write knows only that the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = error.filename or str(path)
        raise


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` for the block to write; renamed to `path` at the end, removed if the block raises.

    Temporary files that a killed process left for the same path are removed first.
    """
    path = Path(path)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        owner = left.name.split(".")[-2]
        if owner.isdigit() and not _is_running(int(owner)):
            left.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with errors_named(path):
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())  # some disks report only now that they are full
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    if os.name != "posix":  # where signal 0 would not be a question
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # the process belongs to somebody else
        pass
    return True


def save_text(path: str | Path, text: str) -> None:
    """Write text as UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_json(path: str | Path, value: dict[str, Any]) -> None:
    """Write readable JSON."""
    save_text(path, json.dumps(value, indent=2) + "\n")


def save_figure(path: str | Path, figure, **options) -> None:
    """Write a matplotlib figure as PNG."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": PRODUCER}, **options)


def check_folder(path: str | Path, flag: str) -> None:
    """Raise UserError, naming the flag, unless there is such a folder."""
    try:
        if not Path(path).is_dir():
            raise UserError(f"{flag}: {path} is not a folder")
    except OSError as error:  # no permission to look, or the name is too long
        raise UserError(f"{flag}: cannot read {path}: {reason(error)}") from error


def check_writable(folder: Path, flag: str) -> None:
    """Raise UserError, naming the flag, unless files can be made in `folder`, or `folder` itself can be made."""
    try:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        if not existing.is_dir():
            raise UserError(f"{flag}: {existing} is not a folder")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise UserError(f"{flag}: no permission to write in {existing}")
    except OSError as error:
        raise UserError(f"{flag}: {folder}: {reason(error)}") from error


def make_folder(folder: Path, flag: str) -> None:
    """Make a folder and its parents if they are missing. Raises UserError, naming the flag, if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag}: cannot make {folder}: {reason(error)}") from error


def output_file(path: str | Path, flag: str, suffix: str) -> Path:
    """The path of a file to write. Raises UserError, naming the flag, if it cannot be written."""
    path = Path(path)
    if path.suffix.lower() != suffix:
        raise UserError(f"{flag}: the file's name must end in {suffix}, got {path}")
    check_writable(path.parent, flag)
    try:
        if path.is_dir():
            raise UserError(f"{flag}: {path} is a folder; name a file in it")
    except OSError as error:  # the name is too long
        raise UserError(f"{flag}: cannot write {path} ({reason(error)})") from error
    return path


def check_distinct(paths: Sequence[tuple[str, str | Path | None]]) -> None:
    """Raise UserError if two paths to write are one file, in whatever spelling. paths: (flag, path or None)."""
    seen: dict[str, str] = {}
    for flag, path in paths:
        if path is not None:
            real = os.path.realpath(path)
            if real in seen:
                raise UserError(f"{flag}: {path} is also what {seen[real]} names; give each a file of its own")
            seen[real] = flag
