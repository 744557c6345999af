"""How `sample.py` and `evaluate.py` let a user guide what is drawn: their flags, and what these mean for a model."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from choices import GUIDANCE
from runtime.command_line import integer, number
from runtime.errors import UserError

if TYPE_CHECKING:
    from diffusion import Denoiser, Guidance


def add_guidance(add: Callable[..., argparse.Action]) -> None:
    """Add the flags by `ArgumentParser.add_argument`."""
    weight = number(0, 100, "more saturates every pixel")
    add(
        "--guidance",
        type=weight,
        help="how strongly a class-conditional model follows the class: 1 is the model itself, more shows the class "
        f"more clearly, with less variety (default: {GUIDANCE:g})",
    )
    add(
        "--autoguidance",
        type=weight,
        help="let a true liquid model guide itself, in place of --guidance: away from what it predicts with fewer ODE "
        "steps and without the class; 1 is the model itself",
    )
    add(
        "--coarse-steps",
        type=integer(1, 1000, "more change nothing but the time"),
        nargs=3,
        metavar=("GLOBAL", "LOCAL", "DETAIL"),
        help="ODE steps of the three cells for --autoguidance (default: half of those of the model, rounded up)",
    )


def chosen_guidance(args: argparse.Namespace, model: "Denoiser") -> "Guidance":
    """What the flags say for this model. Raises UserError for what it does not have."""
    from diffusion import Guidance
    from liquid_diffusion import TrueLiquidDiffusionModel, scaled_steps

    if args.coarse_steps is not None and args.autoguidance is None:
        raise UserError("--coarse-steps: are those of --autoguidance, which is not given")
    if args.autoguidance is not None:
        if args.guidance is not None:
            raise UserError("--autoguidance: takes the place of --guidance; give one of the two")
        if not isinstance(model, TrueLiquidDiffusionModel):
            raise UserError("--autoguidance: only a true liquid model has an ODE that can take fewer steps")
        return Guidance(args.autoguidance, model.with_steps(args.coarse_steps or scaled_steps(model.ode_steps, 0.5)))
    if args.guidance not in (None, 1) and not model.num_classes:
        raise UserError("--guidance: this model has no classes; train.py --class-conditional learns them")
    return Guidance((GUIDANCE if model.num_classes else 1.0) if args.guidance is None else args.guidance)
