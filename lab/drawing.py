"""What `sample.py` does: load the models, draw from all of them the same way, and write the pictures."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.sampling import Guidance, sample_images
from diffusion.scheduler import DDPMScheduler, Denoiser
from images.pictures import class_columns, save_gif, save_grid
from images.single import save_folder, save_npz
from kernels import native
from lab.evaluation.tau_maps import record, save_tau_maps
from lab.predictions import denoiser_asked, guidance_asked
from liquid_diffusion import TrueLiquidDiffusionModel
from runtime.errors import RunFailed, UserError, reason, user_errors
from runtime.files import make_folder
from runtime.hardware import choose_device, keep_freed_memory, out_of_memory_named, stay_within_memory
from runtime.names import chosen
from runtime.progress import progress_bar
from training.checkpoint import load_model

SHOWN = 3  # images in the maps of time constants
ROWS = 8  # of a grid, and columns of one without classes, unless the number of images is given


@dataclass(frozen=True)
class Drawn:
    """A model to draw from, its scheduler, and the config that its file names."""

    model: Denoiser
    scheduler: DDPMScheduler
    config: dict


def draw_and_write(args: argparse.Namespace, written: Sequence[Path], gif: Path | None, maps: Path | None) -> None:
    """Draw as the flags of `sample.py` say, and write each output. Raises UserError for what the models do not have.

    written: where the images go: grids (.png), archives (.npz) or folders. gif, maps: where these go, if wanted.
    """
    keep_freed_memory()
    device = choose_device(args.device)
    stay_within_memory(device)
    if device.type == "cpu" and not native.available(native.FP32):
        print(native.NOT_COMPILED, file=sys.stderr)
    drawn = load_all(args.checkpoint)
    timesteps = min(one.scheduler.num_timesteps for one in drawn.values())
    args.steps = args.steps or min(50, timesteps)
    if args.steps > timesteps:
        raise UserError(f"--steps: must be at most the model's {timesteps} timesteps, got {args.steps}")
    liquid = {name: one.model for name, one in drawn.items() if isinstance(one.model, TrueLiquidDiffusionModel)}
    for flag, wanted in (("--solver", args.solver), ("--ode-steps", args.ode_steps), ("--tau-maps", args.tau_maps)):
        if wanted and not liquid:
            raise UserError(f"{flag}: only a true liquid model has an ODE, this model is {', '.join(drawn)}")
    with user_errors("--solver"):
        for model in liquid.values():
            model.set_solver(args.solver, args.ode_steps)
    turns = {name: chosen_turns(args.classes, one) for name, one in drawn.items()}
    asked = [[drawn[name].config["classes"][label] for label in each] for name, each in turns.items()]
    columns = class_columns(asked[0], args.num_images) if all(each == asked[0] for each in asked) else []
    args.num_images = args.num_images or ROWS * (len(columns) or ROWS)
    labels = {name: in_turns(each, args.num_images) for name, each in turns.items()}
    for one in drawn.values():
        one.model.to(device).to(memory_format=torch.channels_last)
    guidance = {name: guidance_asked(args, one.model) for name, one in drawn.items()}
    drawn = {name: replace(one, model=denoiser_asked(args, one.model, one.scheduler)) for name, one in drawn.items()}
    if args.noisy_ode_steps is not None and maps is not None:
        raise UserError("--tau-maps: are drawn with the same ODE steps throughout; leave out --noisy-ode-steps")
    if len(drawn) > 1 and any(path.suffix.lower() != ".png" for path in written):
        raise UserError("--output: single images are of one model; name one --checkpoint, or a PNG")
    for path in written:
        make_folder(path.parent if path.suffix.lower() in (".png", ".npz") else path, "--output")
    for flag, path in (("--gif", gif), ("--tau-maps", maps)):
        if path is not None:
            make_folder(path.parent, flag)
    with out_of_memory_named(min(args.batch_size, args.num_images), "a smaller model"):
        images, frames = draw(args, drawn, labels, guidance)
        for path in written:
            write(path, partial(save_as, path, images, labels, drawn, args.seed, columns))
        if gif is not None:
            write(gif, lambda: save_gif(frames, gif, columns))
        if maps is not None:
            name, model = next(iter(liquid.items()))
            options: dict[str, Any] = sampling_options(args) | {"labels": labels[name], "guidance": guidance[name]}
            shape = drawn[name].config["shape"]
            found = record(model, drawn[name].scheduler, shape, min(args.num_images, SHOWN), **options)
            write(maps, lambda: save_tau_maps(found, maps))


def save_as(
    path: Path,
    images: dict[str, Tensor],
    labels: dict[str, Tensor | None],
    drawn: dict[str, Drawn],
    seed: int,
    columns: Sequence[str],
) -> None:
    """Write what was drawn as the path says: a grid of all with these columns, or single images of the only model."""
    if path.suffix.lower() == ".png":
        save_grid(images, path, columns)
        return
    name, one = next(iter(drawn.items()))
    save = save_npz if path.suffix.lower() == ".npz" else save_folder
    save(images[name], labels[name], list(one.config["classes"]), seed, path)


def load_all(checkpoints: list[str]) -> dict[str, Drawn]:
    """The models by name; where two are of one kind, by their files' names. Raises UserError if their images differ."""
    loaded = [Drawn(*load_model(Path(checkpoint))) for checkpoint in checkpoints]
    names = [one.config["model"] for one in loaded]
    if len(set(names)) < len(names):
        names = checkpoints
    if len(set(names)) < len(names):
        raise UserError(f"--checkpoint: {', '.join(checkpoints)}: the same one twice")
    for checkpoint, one in zip(checkpoints, loaded, strict=True):
        if one.config["shape"] != loaded[0].config["shape"]:
            shapes = "x".join(map(str, one.config["shape"])), "x".join(map(str, loaded[0].config["shape"]))
            raise UserError(f"--checkpoint: {checkpoint} draws {shapes[0]}, {checkpoints[0]} {shapes[1]}")
    return dict(zip(names, loaded, strict=True))


def sampling_options(args: argparse.Namespace) -> dict:
    """What the flags say of how to go from noise to image, as `sample_images` takes it."""
    return {name: getattr(args, name) for name in ("sampler", "steps", "eta", "seed", "eps_scale")}


def draw(
    args: argparse.Namespace, drawn: dict[str, Drawn], labels: dict[str, Tensor | None], guidance: dict[str, Guidance]
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """(images, frames): what each model drew, and, if a GIF is wanted, each step's x_0; all (N, C, H, W)."""
    x_0: dict[str, list[list[Tensor]]] = {name: [[] for _ in range(args.steps)] for name in drawn}  # by step, batches
    images = {}
    total = args.num_images * args.steps * len(drawn)
    with progress_bar(total=total, unit="call", unit_scale=True) as bar:
        for name, one in drawn.items():

            def on_step(step: int, predicted: Tensor, name: str = name) -> None:
                if args.gif:
                    x_0[name][step].append(predicted.cpu())
                bar.update(len(predicted))

            images[name] = sample_images(
                one.model,
                one.scheduler,
                one.config["shape"],
                args.num_images,
                batch_size=args.batch_size,
                labels=labels[name],
                guidance=guidance[name],
                on_step=on_step,
                **sampling_options(args),
            )
    steps = range(args.steps if args.gif else 0)
    return images, [{name: torch.cat(x_0[name][step]) for name in drawn} for step in steps]


def chosen_turns(classes: str | None, one: Drawn) -> list[int]:
    """The labels that the images take turns over: of the named classes, else of all; none of a model without classes.

    Raises UserError for a class that the model does not have, and for what may be two of its classes.
    """
    count = one.model.num_classes
    if classes is None:
        return list(range(count))
    if not count:
        raise UserError("--classes: this model has no classes; train.py --class-conditional learns them")
    with user_errors("--classes"):
        return chosen(classes, one.config["classes"][:count])


def in_turns(turns: Sequence[int], num_images: int) -> Tensor | None:
    """(num_images,) labels that take turns; None if there are none."""
    return torch.tensor(turns)[torch.arange(num_images) % len(turns)] if turns else None


def write(path: Path, save: Callable[[], None]) -> None:
    """Save a picture and print where it is."""
    try:
        save()
    except OSError as error:
        raise RunFailed(f"cannot write {path} ({reason(error)}); nothing was changed") from error
    print(path)
