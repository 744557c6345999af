"""The two files of a run: `model.safetensors`, to use the model, and `checkpoint.pt`, to resume the run.

    model, scheduler, config = load_model("runs/00003-true-cifar10")

A flipped bit is found by a checksum. Nothing is unpickled: safetensors holds no code, and `torch.load` reads with
`weights_only=True`.
"""

import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from diffusion.scheduler import DDPMScheduler, Denoiser
from models import build_model
from runtime.command_line import stop_signals
from runtime.errors import UserError, reason
from runtime.files import atomic_path
from training.run_folder import MODEL_FILE, RESUME_FILE, instead_of, weights_file

FORMAT = "liquid-diffusion"
FORMAT_VERSION = 4
# format 2 kept the liquid cells in a ModuleDict, whose key "global" is a Python keyword and stops torch.export
RENAMED_SINCE_2 = {f"processor.cells.{name}.": f"processor.{name}_cell." for name in ("global", "local", "detail")}
# what the liquid and its imitation were built with up to format 3, when they did not have the argument
BEFORE_FORMAT_4 = {"input_kernel": 3}


def save_model(path: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write weights and, in the file's metadata, the config from which their model is rebuilt."""
    with atomic_path(path) as temporary:
        _write_model(temporary, tensors, config)


def save_run(run: Path, tensors: dict[str, Tensor], config: dict[str, Any], state: dict[str, Any]) -> None:
    """Write both files of a run or, if the disk is full, neither.

    tensors, config: as for `save_model`. state: what the run needs to go on, tensors and plain values only.
    `checkpoint.pt` is renamed last, so `model.safetensors` always has the weights of the step that it has reached.
    """
    with atomic_path(run / RESUME_FILE) as resume:
        # torch.save into a file on a full disk raises an error that does not say so
        buffer = io.BytesIO()
        torch.save({"format": FORMAT, "format_version": FORMAT_VERSION, **state}, buffer)
        resume.write_bytes(buffer.getbuffer())
        with atomic_path(run / MODEL_FILE) as model:
            _write_model(model, tensors, config)


def _write_model(path: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # a single entry: safetensors writes several in an order that differs from process to process
    about = {"format_version": FORMAT_VERSION, "config": config, "sha256": _checksum(tensors, config)}
    path.write_bytes(safetensors.torch.save(tensors, {FORMAT: json.dumps(about, sort_keys=True)}))


def _checksum(tensors: dict[str, Tensor], config: dict[str, Any]) -> str:
    """SHA-256 of the config and of each tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_model(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(weights, config) of a `model.safetensors`, or of the one in a run folder.

    Raises UserError, naming the file, if it is missing, damaged, of another program or of an unknown format version.
    """
    path = weights_file(path)
    advice = f"; {instead_of(path)}" if instead_of(path) else ""
    with stop_signals() as received:  # torch takes a KeyboardInterrupt in a storage for a storage without a shape
        try:
            with safetensors.safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except Exception as error:  # a damaged file raises nearly anything
            if not received:
                raise UserError(f"{path}: not a readable safetensors file ({reason(error)}){advice}") from error
    if received:
        raise KeyboardInterrupt
    if FORMAT not in metadata:
        raise UserError(f"{path}: not a model of this project (its metadata lacks {FORMAT!r}){advice}")
    try:
        about = json.loads(metadata[FORMAT])
        version, config, checksum = about["format_version"], about.get("config"), about.get("sha256")
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"{path}: its metadata is not readable ({reason(error)})") from error
    _check_version(path, version)
    if not isinstance(config, dict) or checksum != _checksum(tensors, config):
        raise UserError(f"{path}: damaged (its content does not have the checksum that was saved with it)")
    return (renamed(tensors) if version == 2 else tensors), (in_full(config) if version < 4 else config)


def in_full(about: dict[str, Any]) -> dict[str, Any]:
    """What a model of format 2 or 3 says of itself, completed with what its network was built with."""
    config = about.get("model_config")
    if str(about.get("model")).partition(":")[0] not in ("true", "inspired") or not isinstance(config, dict):
        return about
    return about | {"model_config": BEFORE_FORMAT_4 | config}


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of format 2 under the names that they have now."""
    for old, new in RENAMED_SINCE_2.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    return tensors


def read_resume(path: Path) -> dict[str, Any]:
    """The state that `save_run` wrote, on the CPU. Raises UserError, naming the file, as `read_model` does."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load ignores the CRC that each part has
        if damaged is not None:
            raise ValueError(f"{damaged} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; nothing was saved yet, start again without --resume") from None
    except Exception as error:  # a damaged file raises nearly anything
        raise UserError(f"{path}: not a readable checkpoint ({reason(error)})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path}: not a checkpoint of this project")
    _check_version(path, state.get("format_version"))
    if state["format_version"] == 2:
        state |= {part: renamed(state[part]) for part in ("model", "ema") if isinstance(state.get(part), dict)}
    return state


def _check_version(path: Path, version: object) -> None:
    if version not in range(2, FORMAT_VERSION + 1):
        raise UserError(f"{path}: format version {version}, this program reads versions 2 to {FORMAT_VERSION}")


def load_model(path: str | Path) -> tuple[Denoiser, DDPMScheduler, dict[str, Any]]:
    """(model, its scheduler, its config) of a run folder or `model.safetensors`, from the file's own metadata.

    The config has `model`, `model_config`, `timesteps`, `schedule`, `prediction_type`, `dataset`, `shape` and
    `classes`. Raises UserError, naming the file, if it is unreadable or its weights do not fit its config.
    """
    path = Path(path)
    tensors, config = read_model(path)
    try:
        model = build_model(config["model"], **config["model_config"])
        model.load_state_dict(tensors)
        scheduler = DDPMScheduler(config["timesteps"], config["schedule"], config["prediction_type"])
        channels, height, width = config["shape"]  # the commands draw images of this shape
        if channels != config["model_config"]["in_channels"] or not all(isinstance(n, int) for n in (height, width)):
            raise ValueError(f"images of shape {config['shape']}")
        if len(config["classes"]) < model.num_classes:
            raise ValueError(f"{len(config['classes'])} names for {model.num_classes} classes")
    except Exception as error:  # a config that another program wrote may be anything
        raise UserError(f"{path}: its weights do not fit its config ({reason(error)})") from error
    return model.eval(), scheduler, config
