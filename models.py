"""Every network by its name, and what each of them costs; the only module that knows them all."""

import inspect
from typing import Any

import torch
from torch import nn

from baselines import ABLATIONS, UNetReference
from diffusion.scheduler import Denoiser, carries_state
from kernels.native import plain_torch
from liquid_diffusion import COARSE, STEP_MULTIPLES, TrueLiquidDiffusionModel, scaled_steps
from liquid_diffusion_inspired import InspiredDiffusionModel

NETWORKS: dict[str, type[Denoiser]] = {
    "true": TrueLiquidDiffusionModel,
    "inspired": InspiredDiffusionModel,
    "unet": UNetReference,
    **{f"true:{name}": model for name, model in ABLATIONS.items()},
}


def build_model(name: str, **config) -> Denoiser:
    """The network `name`, built with its own keyword arguments. All are called as model(x, t, state, labels=...).

    Raises ValueError for an unknown name or a keyword argument that the network does not have, and ImportError if the
    network needs a package that is not installed.
    """
    if name not in NETWORKS:
        raise ValueError(f"model: must be one of {', '.join(NETWORKS)}, got {name!r}")
    try:
        return NETWORKS[name](**config)
    except TypeError as error:
        raise ValueError(f"model {name!r} cannot be built from {config}: {error}") from error


def complete_config(name: str, **config) -> dict[str, Any]:
    """`config` with the defaults that `build_model` would fill in, so that a saved file outlives a change of them."""
    own = [base.__init__ for base in type(build_model(name, **config)).__mro__ if "__init__" in vars(base)]
    parameters = [p for init in reversed(own) for p in inspect.signature(init).parameters.values()]
    return {p.name: p.default for p in parameters if p.default is not p.empty} | config


def count_parameters(model: nn.Module) -> int:
    """Trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def multiply_adds(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """Multiply-adds of one forward pass on one image of shape (C, H, W); every ODE step is counted."""
    from torch.utils.flop_counter import FlopCounterMode  # imports triton, which drawing does not need

    device = next(model.parameters()).device
    with plain_torch(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *shape, device=device), torch.zeros(1, dtype=torch.long, device=device))
    return counter.get_total_flops() // 2


def training_multiply_adds(model: Denoiser, shape: tuple[int, int, int], coarse_first: float = 0) -> int:
    """Average multiply-adds of training on one image of shape (C, H, W); a backward pass costs two forward ones.

    coarse_first: the share of the images for which a true liquid takes half of its ODE steps.
    """
    # a model that carries its state sees one earlier image, on average
    passes = 4 if carries_state(model) else 3
    if not isinstance(model, TrueLiquidDiffusionModel):
        return passes * multiply_adds(model, shape)
    forward = 0.0
    for multiple, probability in (STEP_MULTIPLES if model.random_steps else {1: 1.0}).items():
        for part, share in ((COARSE, coarse_first), (1, 1 - coarse_first)):
            if share > 0:
                model.set_solver(ode_steps=scaled_steps(model.ode_steps, part * multiple))
                forward += share * probability * multiply_adds(model, shape)
    model.set_solver(ode_steps=model.ode_steps)
    return round(passes * forward)
