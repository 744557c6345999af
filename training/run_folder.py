"""Run folders: how they are numbered, claimed and locked, and the names of the files in them.

runs/00003-true-cifar10/
  config.json, metrics.csv, model.safetensors, checkpoint.pt, samples/, loss.png
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runtime.errors import UserError, reason

PUBLISHED = Path(__file__).parent.parent / "pretrained" / "true-cifar10.safetensors"  # where no run is named
MODEL_FILE, RESUME_FILE, CONFIG_FILE = "model.safetensors", "checkpoint.pt", "config.json"
# what other commands may not write over: by the file that tells whose folder it is
OWN_FILES = {
    CONFIG_FILE: (CONFIG_FILE, MODEL_FILE, RESUME_FILE, "metrics.csv", "loss.png"),
    "comparison.json": ("comparison.json", "grid.png", "curves.png"),
}


def _numbered(output_dir: Path) -> list[tuple[int, Path]]:
    """Every folder in `output_dir` that has an id, by id; a folder that is only an id is a run about to start."""
    try:
        folders = [path for path in output_dir.iterdir() if path.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"--output-dir: {output_dir}: {reason(error)}") from error
    matches = [(re.match(r"(\d{5,})(-|$)", path.name), path) for path in folders]
    return sorted((int(match[1]), path) for match, path in matches if match)


def run_folders(output_dir: Path) -> list[Path]:
    """The run folders in `output_dir`, oldest first; an empty list if there is no such folder."""
    return [path for _, path in _numbered(output_dir) if "-" in path.name]


def next_run_folder(output_dir: Path, name: str) -> Path:
    """The path of the next run: `<largest id + 1>-<name>`."""
    existing = _numbered(output_dir)
    return output_dir / f"{existing[-1][0] + 1 if existing else 0:05d}-{name}"


def make_run_folder(output_dir: Path, name: str) -> Path:
    """Make the folder of the next run. Two processes that ask at once get two ids, and a killed one blocks nobody."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        while True:
            folder = next_run_folder(output_dir, name)
            claim = output_dir / folder.name.split("-")[0]  # the id alone, which only one process can make
            try:
                claim.mkdir()
            except FileExistsError:
                continue
            if sum(number == int(claim.name) for number, _ in _numbered(output_dir)) == 1:
                return claim.rename(folder)
            claim.rmdir()  # another process has made and renamed the same id since we looked
    except OSError as error:
        raise UserError(f"--output-dir: cannot make a run folder in {output_dir}: {reason(error)}") from error


@contextmanager
def only_writer(run: Path) -> Iterator[None]:
    """Lock a run folder during the block, or until this process ends, so that no other process trains in it.

    Raises UserError if another process holds the lock. On file systems without locks nothing is locked.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    folder = os.open(run, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{run}: another process is training it; wait for its end, or interrupt it") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(folder)


def read_config(run: Path) -> dict[str, Any]:
    """The `config.json` of a run folder. Raises UserError if it is missing or not that of a run."""
    path = run / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file; {instead_of(run) or f'is {run} a run folder?'}") from None
    except (OSError, RecursionError, ValueError) as error:
        raise UserError(f"{path}: not readable ({reason(error)})") from error
    train = config.get("train") if isinstance(config, dict) else None
    if not isinstance(train, dict) or not isinstance(train.get("data_dir", ""), str):
        raise UserError(f"{path}: not the config of a run; name another folder, or move the file away")
    return config


def weights_file(path: str | Path) -> Path:
    """The `model.safetensors` that is meant by a path: itself, or the one in a run folder.

    Raises UserError, which says what to name instead, if there is no such file.
    """
    named = path = Path(path)
    try:
        path = path / MODEL_FILE if path.is_dir() else path
        path.stat()
    except OSError as error:
        nothing = "nothing was saved yet" if (named / CONFIG_FILE).is_file() else "name a run folder or its weights"
        raise UserError(f"{path}: {reason(error)}; {instead_of(named) or nothing}") from error
    if path.name == RESUME_FILE:
        advice = instead_of(path) or f"name the {MODEL_FILE} of its run"
        raise UserError(f"{path}: holds what training needs to go on; {advice}")
    return path


def instead_of(path: Path) -> str:
    """What to name instead of a path that is no run and no weights; empty if none are near."""
    try:
        beside = path.parent / MODEL_FILE
        if path.is_file() and path.name != MODEL_FILE and beside.is_file():
            return f"name {beside}"
        folder = path if path.is_dir() else path.parent
        runs = [run for run in run_folders(folder) if (run / MODEL_FILE).is_file()]
        if not runs:  # the folder of a comparison, or one above
            runs = sorted(file.parent for file in folder.glob(f"runs/**/{MODEL_FILE}") if file.is_file())
        started = [run for run in runs if run.name.startswith(path.name)]
        return f"name one of the runs in {folder}, such as {(started or runs)[-1]}" if runs else ""
    except (OSError, UserError):
        return ""


def check_not_own(path: str | Path | None, flag: str, checkpoints: Sequence[str | Path] = ()) -> None:
    """Raise UserError, naming the flag, if a file to write is a run's or comparison's own or one of the checkpoints."""
    if path is None:
        return
    real = os.path.realpath(path)
    folder, name = os.path.split(real)
    if real in {os.path.realpath(checkpoint) for checkpoint in checkpoints}:
        raise UserError(f"{flag}: {path} is the checkpoint itself; name another file")
    for owner, names in OWN_FILES.items():
        if os.path.isfile(os.path.join(real, owner)):
            raise UserError(f"{flag}: {path} is the folder of a run or comparison; name another")
        if name.casefold() in names and os.path.isfile(os.path.join(folder, owner)):
            raise UserError(f"{flag}: {path} is a file that the run or comparison needs; name another file")
    run, samples = os.path.split(folder)
    if samples == "samples" and os.path.isfile(os.path.join(run, CONFIG_FILE)):
        raise UserError(f"{flag}: {path} is among the run's own grids; name a file in another folder")


def what_is_safe(run: Path) -> str:
    """What a run that ends badly tells about its files."""
    if not (run / RESUME_FILE).exists():
        return "nothing was saved yet"
    return f"the files in {run} are those of the last save, --resume goes on from there"
