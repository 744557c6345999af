"""What a user of `sample.py` and `evaluate.py` may ask of the predictions that a drawing follows: flags and meaning."""

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from choices import GUIDANCE
from runtime.command_line import integer, number
from runtime.errors import UserError, user_errors

if TYPE_CHECKING:
    from diffusion import DDPMScheduler, Denoiser, Guidance
    from liquid_diffusion import TrueLiquidDiffusionModel

NOISY = 0.25  # from this fraction of the timesteps on, half the ODE steps drew as well as all (LOG.md)


def add_prediction_flags(add: Callable[..., argparse.Action]) -> None:
    """Add the flags by `ArgumentParser.add_argument`."""
    weight = number(0, 100, "more saturates every pixel")
    steps = integer(1, 1000, "more change nothing but the time")
    cells = ("GLOBAL", "LOCAL", "DETAIL")
    # fmt: off
    add("--guidance", type=weight,
        help="how strongly a class-conditional model follows the class: 1 is the model itself, more shows the class "
        f"more clearly, with less variety (default: {GUIDANCE:g})")
    add("--autoguidance", type=weight,
        help="let a true liquid model guide itself, in place of --guidance: away from what it predicts with fewer ODE "
        "steps and without the class; 1 is the model itself")
    add("--coarse-steps", type=steps, nargs=3, metavar=cells,
        help="ODE steps of the three cells for --autoguidance (default: half of those of the model, rounded up)")
    add("--noisy-ode-steps", type=steps, nargs=3, metavar=cells,
        help="ODE steps of the three cells in the noisier three quarters of the timesteps, where fewer lose little "
        "(default: as in the others)")
    # fmt: on


def guidance_asked(args: argparse.Namespace, model: "Denoiser") -> "Guidance":
    """What the flags say for this model. Raises UserError for what it does not have."""
    from diffusion import Guidance

    if args.coarse_steps is not None and args.autoguidance is None:
        raise UserError("--coarse-steps: are those of --autoguidance, which is not given")
    if args.autoguidance is not None:
        if args.guidance is not None:
            raise UserError("--autoguidance: takes the place of --guidance; give one of the two")
        coarse = with_steps("--autoguidance", model, args.coarse_steps)
        return Guidance(args.autoguidance, coarse)
    if args.guidance not in (None, 1) and not model.num_classes:
        raise UserError("--guidance: this model has no classes; train.py --class-conditional learns them")
    return Guidance((GUIDANCE if model.num_classes else 1.0) if args.guidance is None else args.guidance)


def denoiser_asked(args: argparse.Namespace, model: "Denoiser", scheduler: "DDPMScheduler") -> "Denoiser":
    """The model, or, with --noisy-ode-steps, one that takes these ODE steps where noise is high."""
    from diffusion import ByNoise

    if args.noisy_ode_steps is None:
        return model
    noisy = with_steps("--noisy-ode-steps", model, args.noisy_ode_steps)
    return ByNoise(noisy, model, round(NOISY * scheduler.num_timesteps))


def with_steps(flag: str, model: "Denoiser", ode_steps: Sequence[int] | None) -> "TrueLiquidDiffusionModel":
    """The model with other ODE steps, by default half of its own. Raises UserError if they cannot be chosen."""
    from diffusion import carries_state
    from liquid_diffusion import TrueLiquidDiffusionModel, scaled_steps

    if not isinstance(model, TrueLiquidDiffusionModel):
        raise UserError(f"{flag}: only a true liquid model has an ODE that can take fewer steps")
    if carries_state(model):
        raise UserError(f"{flag}: this model keeps its state from call to call, which another cannot share")
    with user_errors(flag):
        return model.with_steps(ode_steps or scaled_steps(model.ode_steps, 0.5))
