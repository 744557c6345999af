"""Run folders, atomic writes, and the two files of a run: `model.safetensors` to use, `checkpoint.pt` to resume.

Every file is written under a temporary name in its own folder, flushed to the disk, then renamed, so a reader sees
the old file or the new one and never a part. Nothing is unpickled: safetensors holds no code, and `torch.load` reads
with `weights_only=True`.
"""

import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from errors import UserError

FORMAT = "liquid-diffusion"
FORMAT_VERSION = 1
MODEL_FILE, RESUME_FILE, CONFIG_FILE = "model.safetensors", "checkpoint.pt", "config.json"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, for the block to write; renamed to `path` at its end, removed if it raises."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_model(path: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write weights and, in the file's metadata, the config to rebuild their model from."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # one entry: safetensors writes several in an order that changes from process to process
    metadata = json.dumps({"format_version": FORMAT_VERSION, "config": config}, sort_keys=True)
    with atomic_path(path) as temporary:
        temporary.write_bytes(safetensors.torch.save(tensors, {FORMAT: metadata}))


def read_model(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(weights, config) of a `model.safetensors`, or of the one in a run folder.

    Raises UserError, naming the file, if it is missing, damaged, foreign, or of a later format.
    """
    path = path / MODEL_FILE if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error
    if FORMAT not in metadata:
        raise UserError(f"{path}: not a model of this project (its metadata lacks {FORMAT!r})")
    try:
        about = json.loads(metadata[FORMAT])
        _check_version(path, about["format_version"])
        return tensors, about["config"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: its metadata is not readable ({error})") from error


def save_resume(path: Path, state: dict[str, Any]) -> None:
    """Write what a run needs to go on: tensors and plain values only."""
    buffer = io.BytesIO()  # torch.save into a file on a full disk raises what nobody would know for a full disk
    torch.save({"format": FORMAT, "format_version": FORMAT_VERSION, **state}, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def read_resume(path: Path) -> dict[str, Any]:
    """What `save_resume` wrote, on the CPU. Raises UserError, naming the file, as `read_model` does."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; nothing was saved yet, start again without --resume")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly anything for a damaged file
        reason = str(error).split("\n")[0]
        raise UserError(f"{path}: not a readable checkpoint ({reason})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path}: not a checkpoint of this project")
    _check_version(path, state.get("format_version"))
    return state


def _check_version(path: Path, version: object) -> None:
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format version {version}, this program reads version {FORMAT_VERSION}")


def save_json(path: Path, value: dict[str, Any]) -> None:
    """Write readable JSON."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_config(run: Path) -> dict[str, Any]:
    """The `config.json` of a run folder. Raises UserError if it is missing or not JSON."""
    path = run / CONFIG_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is {run} a run folder?") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable ({error})") from error


def _numbered(output_dir: Path) -> list[tuple[int, Path]]:
    """Everything in `output_dir` that has an id, by id; a folder without a name is a run that is about to start."""
    matches = [(re.match(r"(\d{5,})(-|$)", path.name), path) for path in output_dir.iterdir() if path.is_dir()]
    return sorted((int(match[1]), path) for match, path in matches if match)


def run_folders(output_dir: Path) -> list[Path]:
    """The run folders in `output_dir`, oldest first."""
    return [path for _, path in _numbered(output_dir) if "-" in path.name] if output_dir.is_dir() else []


def next_run_folder(output_dir: Path, name: str) -> Path:
    """The path of the next run: `<largest id + 1>-<name>`."""
    existing = _numbered(output_dir) if output_dir.is_dir() else []
    return output_dir / f"{existing[-1][0] + 1 if existing else 0:05d}-{name}"


def make_run_folder(output_dir: Path, name: str) -> Path:
    """Make the folder of the next run; two processes that ask at once get two ids, and a killed one blocks nobody."""
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
            claim.rmdir()  # somebody made and renamed the same id since we looked
    except OSError as error:
        raise UserError(f"--output-dir: cannot make a run folder in {output_dir}: {error.strerror}") from error
