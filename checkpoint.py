"""Run folders, atomic writes, and the two files of a run: `model.safetensors` to use, `checkpoint.pt` to resume.

Every file is written under a temporary name in its own folder, flushed to the disk, then renamed, so a reader sees
the old file or the new one and never a part. A flipped bit is found by a checksum. Nothing is unpickled: safetensors
holds no code, and `torch.load` reads with `weights_only=True`.
"""

import glob
import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from errors import UserError

FORMAT = "liquid-diffusion"
FORMAT_VERSION = 2  # 1 had no checksum
MODEL_FILE, RESUME_FILE, CONFIG_FILE = "model.safetensors", "checkpoint.pt", "config.json"


@contextmanager
def errors_named(path: Path) -> Iterator[None]:
    """Let the OSError of a write say which file it was: of itself it knows only that the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = error.filename or str(path)
        raise


@contextmanager
def only_writer(run: Path) -> Iterator[None]:
    """Hold a run folder during the block, or until this process ends, so that no other one trains in it.

    Raises UserError if another does. Where folders cannot be locked, nothing is held.
    """
    folder = os.open(run, os.O_RDONLY) if fcntl else None
    try:
        if folder is not None:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{run}: another process is training it; wait for its end, or interrupt it") from None
            except OSError:  # a file system without locks
                pass
        yield
    finally:
        if folder is not None:
            os.close(folder)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, for the block to write; renamed to `path` at its end, removed if it raises.

    What a killed process left of the same file is removed.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        owner = left.name.split(".")[-2]
        if owner.isdigit() and not _is_running(int(owner)):
            left.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with errors_named(path):
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    if os.name != "posix":  # where signal 0 is not a question
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # somebody else's
        pass
    return True


def save_model(path: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write weights and, in the file's metadata, the config to rebuild their model from."""
    with atomic_path(path) as temporary:
        _write_model(temporary, tensors, config)


def save_run(run: Path, tensors: dict[str, Tensor], config: dict[str, Any], state: dict[str, Any]) -> None:
    """Write both files of a run: both or, if the disk is full, neither.

    tensors, config: as for `save_model`; state: what the run needs to go on, tensors and plain values only.
    `checkpoint.pt` is renamed last: the step that it has reached has its weights in `model.safetensors`.
    """
    with atomic_path(run / RESUME_FILE) as resume:
        _write_resume(resume, state)
        with atomic_path(run / MODEL_FILE) as model:
            _write_model(model, tensors, config)


def _write_model(path: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # one entry: safetensors writes several in an order that changes from process to process
    about = {"format_version": FORMAT_VERSION, "config": config, "sha256": _checksum(tensors, config)}
    metadata = json.dumps(about, sort_keys=True)
    _write(path, safetensors.torch.save(tensors, {FORMAT: metadata}))


def _write_resume(path: Path, state: dict[str, Any]) -> None:
    buffer = io.BytesIO()  # torch.save into a file on a full disk raises what nobody would know for a full disk
    torch.save({"format": FORMAT, "format_version": FORMAT_VERSION, **state}, buffer)
    _write(path, buffer.getbuffer())


def _write(path: Path, content: bytes | memoryview) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # a disk may say only now that it is full


def _checksum(tensors: dict[str, Tensor], config: dict[str, Any]) -> str:
    """SHA-256 of the config and of each tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def read_model(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(weights, config) of a `model.safetensors`, or of the one in a run folder.

    Raises UserError, naming the file, if it is missing, damaged, foreign, or of another format version.
    """
    try:
        path = path / MODEL_FILE if path.is_dir() else path
        path.stat()
    except OSError as error:
        raise UserError(f"{path}: {_reason(error)}") from error
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except Exception as error:  # a damaged file raises nearly anything
        raise UserError(f"{path}: not a readable safetensors file ({_reason(error)})") from error
    if FORMAT not in metadata:
        raise UserError(f"{path}: not a model of this project (its metadata lacks {FORMAT!r})")
    try:
        about = json.loads(metadata[FORMAT])
        version, config, checksum = about["format_version"], about.get("config"), about.get("sha256")
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"{path}: its metadata is not readable ({_reason(error)})") from error
    _check_version(path, version)
    if not isinstance(config, dict) or checksum != _checksum(tensors, config):
        raise UserError(f"{path}: damaged (its content does not have the checksum that was saved with it)")
    return tensors, config


def read_resume(path: Path) -> dict[str, Any]:
    """The state that `save_run` wrote, on the CPU. Raises UserError, naming the file, as `read_model` does."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not look at the CRC that each part carries
        if damaged is not None:
            raise ValueError(f"{damaged} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; nothing was saved yet, start again without --resume") from None
    except Exception as error:  # a damaged file raises nearly anything
        raise UserError(f"{path}: not a readable checkpoint ({_reason(error)})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path}: not a checkpoint of this project")
    _check_version(path, state.get("format_version"))
    return state


def _reason(error: Exception) -> str:
    """One line; an OSError's message without the path, which the caller names."""
    return (getattr(error, "strerror", None) or str(error)).strip().split("\n")[0] or type(error).__name__


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
    except (OSError, RecursionError, ValueError) as error:
        raise UserError(f"{path}: not readable ({_reason(error)})") from error


def what_is_safe(run: Path) -> str:
    """What a run that ends badly says of its files."""
    if not (run / RESUME_FILE).exists():
        return "nothing was saved yet"
    return f"the files in {run} are those of the last save, --resume goes on from there"


def check_writable(folder: Path, flag: str) -> None:
    """Raises UserError, naming the flag, unless files can be made in `folder`, or it in the folder where it will be."""
    try:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        if not existing.is_dir():
            raise UserError(f"{flag}: {existing} is not a folder")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise UserError(f"{flag}: no permission to write in {existing}")
    except OSError as error:
        raise UserError(f"{flag}: {folder}: {_reason(error)}") from error


def make_folder(folder: Path, flag: str) -> None:
    """Make a folder and those around it unless they are there. Raises UserError, naming the flag, if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag}: cannot make {folder}: {_reason(error)}") from error


def output_file(path: str | Path, flag: str, suffix: str) -> Path:
    """The path of a file to be written, its folder made. Raises UserError, naming the flag, if it cannot be."""
    path = Path(path)
    if path.suffix.lower() != suffix:
        raise UserError(f"{flag}: the file's name must end in {suffix}, got {path}")
    check_writable(path.parent, flag)
    make_folder(path.parent, flag)
    try:
        if path.is_dir():
            raise UserError(f"{flag}: {path} is a folder; name a file in it")
    except OSError as error:  # a name that is too long
        raise UserError(f"{flag}: cannot write {path} ({_reason(error)})") from error
    return path


def _numbered(output_dir: Path) -> list[tuple[int, Path]]:
    """Everything in `output_dir` that has an id, by id; a folder without a name is a run that is about to start."""
    try:
        folders = [path for path in output_dir.iterdir() if path.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"--output-dir: {output_dir}: {_reason(error)}") from error
    matches = [(re.match(r"(\d{5,})(-|$)", path.name), path) for path in folders]
    return sorted((int(match[1]), path) for match, path in matches if match)


def run_folders(output_dir: Path) -> list[Path]:
    """The run folders in `output_dir`, oldest first; none if there is no such folder."""
    return [path for _, path in _numbered(output_dir) if "-" in path.name]


def next_run_folder(output_dir: Path, name: str) -> Path:
    """The path of the next run: `<largest id + 1>-<name>`."""
    existing = _numbered(output_dir)
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
        raise UserError(f"--output-dir: cannot make a run folder in {output_dir}: {_reason(error)}") from error
