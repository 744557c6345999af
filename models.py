"""Every architecture by its name: the only place that knows them all."""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from checkpoint import read_model
from diffusion import DDPMScheduler, carries_state
from errors import UserError
from liquid_ablations import ABLATIONS
from liquid_diffusion import ODE_STEP_SHARES, TrueLiquidDiffusionModel, scaled_steps
from liquid_diffusion_inspired import InspiredDiffusionModel
from unet_reference import LADDER, UNetReference

MODELS = {"true": TrueLiquidDiffusionModel, "inspired": InspiredDiffusionModel, "unet": UNetReference}

# what compare.py compares: name -> (model, its config)
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "true": ("true", {}),
    "inspired": ("inspired", {}),
    **{f"unet:{rung}": ("unet", shape) for rung, shape in LADDER.items()},
    "true:steps=1": ("true", {"ode_steps": (1, 1, 1)}),
    "true:steps=random": ("true", {"random_steps": True}),
    "true:solver=exponential": ("true", {"solver": "exponential"}),
    **{f"true:{name}": (f"true:{name}", {}) for name in ABLATIONS},
}


def build_model(name: str, **config) -> nn.Module:
    """The network `name`, built with its own keyword arguments; all are called as model(x, t, state, labels=...).

    Raises UserError for an unknown name or a keyword argument that the architecture does not have.
    """
    known = MODELS | {f"true:{name}": model for name, model in ABLATIONS.items()}
    if name not in known:
        raise UserError(f"model: must be one of {', '.join(known)}, got {name!r}")
    try:
        return known[name](**config)
    except TypeError as error:
        raise UserError(f"model {name!r} cannot be built from {config}: {error}") from error


def complete_config(name: str, **config) -> dict[str, Any]:
    """`config` with the defaults that `build_model` would fill in, so that a file stays readable if they change."""
    own = [base.__init__ for base in type(build_model(name, **config)).__mro__ if "__init__" in vars(base)]
    parameters = [p for init in reversed(own) for p in inspect.signature(init).parameters.values()]
    return {p.name: p.default for p in parameters if p.default is not p.empty} | config


def load_model(path: Path) -> tuple[nn.Module, DDPMScheduler, dict[str, Any]]:
    """(model, its scheduler, its config) of a run folder or `model.safetensors`, from the file's own metadata.

    The config has `model`, `model_config`, `timesteps`, `schedule`, `prediction_type`, `dataset`, `shape` and
    `classes`. Raises UserError, naming the file, if it is unreadable or its weights do not fit its config.
    """
    tensors, config = read_model(path)
    try:
        model = build_model(config["model"], **config["model_config"])
        model.load_state_dict(tensors)
        scheduler = DDPMScheduler(config["timesteps"], config["schedule"], config["prediction_type"])
        channels, height, width = config["shape"]  # what the commands draw by
        if channels != config["model_config"]["in_channels"] or not all(isinstance(n, int) for n in (height, width)):
            raise ValueError(f"images of shape {config['shape']}")
        if len(config["classes"]) < model.num_classes:
            raise ValueError(f"{len(config['classes'])} names for {model.num_classes} classes")
    except Exception as error:  # a config that another program wrote may be anything
        reason = str(error).split("\n")[0]
        raise UserError(f"{path}: its weights do not fit its config ({reason})") from error
    return model.eval(), scheduler, config


def count_parameters(model: nn.Module) -> int:
    """Trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def multiply_adds(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """Multiply-adds of one forward pass for one image of shape (C, H, W), every ODE step counted."""
    device = next(model.parameters()).device
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *shape, device=device), torch.zeros(1, dtype=torch.long, device=device))
    return counter.get_total_flops() // 2


def training_multiply_adds(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """Multiply-adds of training on one image of shape (C, H, W), on average; a backward pass costs two forward ones."""
    # a model that carries its state sees another image before, on average
    passes = 4 if carries_state(model) else 3
    if not getattr(model, "random_steps", False):
        return passes * multiply_adds(model, shape)
    forward = 0.0
    for share, chance in ODE_STEP_SHARES.items():
        model.set_solver(ode_steps=scaled_steps(model.ode_steps, share))
        forward += chance * multiply_adds(model, shape)
    model.set_solver(ode_steps=model.ode_steps)
    return round(passes * forward)
