"""What a user of `sample.py` and `evaluate.py` may ask of the predictions that a drawing follows: flags and meaning."""

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from choices import EPS_SCALE, GUIDANCE, GUIDED_SHARE
from runtime.command_line import integer, number
from runtime.errors import UserError, user_errors

if TYPE_CHECKING:
    from diffusion.sampling import Guidance
    from diffusion.scheduler import DDPMScheduler, Denoiser
    from liquid_diffusion import TrueLiquidDiffusionModel

NOISY = 0.25  # from this fraction of the timesteps on, half the ODE steps drew as well as all (LOG.md)


WEIGHT = number(0, 100, "more saturates every pixel")


def add_guidance_flags(add: Callable[..., argparse.Action]) -> None:
    """Add those flags that suit every model, by `ArgumentParser.add_argument`."""
    # fmt: off
    add("--guidance", type=WEIGHT,
        help="how strongly a class-conditional model follows the class: 1 is the model itself, more shows the class "
        f"more clearly, with less variety (default: {GUIDANCE:g})")
    add("--guided-share", type=number(0, 1, "1 is all of them"),
        help="the share of the timesteps in which guidance acts, counted from the clean image; where noise is higher, "
        f"it would make all images of a class alike (default: {GUIDED_SHARE:g})")
    add("--eps-scale", type=number(0.5, 2, "the images would be noise"), default=EPS_SCALE,
        help="divide the predicted noise by this number: a little above 1 gives crisper images, 1 is the model itself")
    # fmt: on


def add_prediction_flags(add: Callable[..., argparse.Action]) -> None:
    """Add all flags, by `ArgumentParser.add_argument`."""
    steps = integer(1, 1000, "more change nothing but the time")
    cells = ("GLOBAL", "LOCAL", "DETAIL")
    add_guidance_flags(add)
    # fmt: off
    add("--autoguidance", type=WEIGHT,
        help="let a true liquid model guide itself, in place of --guidance: away from what it predicts with fewer ODE "
        "steps and without the class; 1 is the model itself; acts at all timesteps unless --guided-share is given")
    add("--coarse-steps", type=steps, nargs=3, metavar=cells,
        help="ODE steps of the three cells for --autoguidance (default: half of those of the model, rounded up)")
    add("--noisy-ode-steps", type=steps, nargs=3, metavar=cells,
        help="ODE steps of the three cells in the noisier three quarters of the timesteps, where fewer lose little "
        "(default: as in the others)")
    # fmt: on


def guidance_asked(args: argparse.Namespace, model: "Denoiser") -> "Guidance":
    """What the flags say for this model. Raises UserError for what it does not have."""
    from diffusion.sampling import Guidance

    if args.coarse_steps is not None and args.autoguidance is None:
        raise UserError("--coarse-steps: are those of --autoguidance, which is not given")
    if args.autoguidance is not None:
        if args.guidance is not None:
            raise UserError("--autoguidance: takes the place of --guidance; give one of the two")
        coarse = with_steps("--autoguidance", model, args.coarse_steps)
        return Guidance(args.autoguidance, coarse, (0.0, 1.0 if args.guided_share is None else args.guided_share))
    if not model.num_classes:
        refuse_guidance(args, "this model has no classes; train.py --class-conditional learns them")
    usual = Guidance.usual(model)
    weight = usual.weight if args.guidance is None else args.guidance
    return Guidance(weight, between=usual.between if args.guided_share is None else (0.0, args.guided_share))


def refuse_guidance(args: argparse.Namespace, why: str) -> None:
    """Raise UserError, naming the flag, if guidance by classes is asked for where there is none."""
    asked = {"--guidance": args.guidance not in (None, 1), "--guided-share": args.guided_share is not None}
    flag = next((flag for flag, given in asked.items() if given), None)
    if flag is not None:
        raise UserError(f"{flag}: {why}")


def denoiser_asked(args: argparse.Namespace, model: "Denoiser", scheduler: "DDPMScheduler") -> "Denoiser":
    """The model, or, with --noisy-ode-steps, one that takes these ODE steps where noise is high."""
    from diffusion.sampling import ByNoise

    if args.noisy_ode_steps is None:
        return model
    noisy = with_steps("--noisy-ode-steps", model, args.noisy_ode_steps)
    return ByNoise(noisy, model, round(NOISY * scheduler.num_timesteps))


def with_steps(flag: str, model: "Denoiser", ode_steps: Sequence[int] | None) -> "TrueLiquidDiffusionModel":
    """The model with other ODE steps, by default half of its own. Raises UserError if they cannot be chosen."""
    from diffusion.scheduler import carries_state
    from liquid_diffusion import TrueLiquidDiffusionModel, scaled_steps

    if not isinstance(model, TrueLiquidDiffusionModel):
        raise UserError(f"{flag}: only a true liquid model has an ODE that can take fewer steps")
    if carries_state(model):
        raise UserError(f"{flag}: this model keeps its state from call to call, which another cannot share")
    with user_errors(flag):
        return model.with_steps(ode_steps or scaled_steps(model.ode_steps, 0.5))
