"""Draw images from trained models into a PNG, their denoising into a GIF, and a liquid model's time constants.

python sample.py                                                 # from the published weights
python sample.py --checkpoint runs/00003-true-cifar10 --num-images 64 --steps 50
python sample.py --checkpoint RUN --classes horse,ship --guidance 2
python sample.py --checkpoint TRUE_RUN INSPIRED_RUN --gif beside.gif     # side by side, from the same noise
python sample.py --output grid.png images.npz singles/           # the single images, too
python sample.py --tau-maps tau.png                                      # where the liquid is slow and where it is fast
"""

from runtime import interrupted_import  # noqa: F401  # isort: skip

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion import SAMPLERS, DDPMScheduler, Denoiser, sample_images
from images.pictures import save_gif, save_grid
from images.single import save_folder, save_npz
from lab.evaluation.tau_maps import record, save_tau_maps
from liquid_diffusion import SOLVERS, TrueLiquidDiffusionModel
from runtime.command_line import Parser, file_or_folder, integer, number, run
from runtime.errors import RunFailed, UserError, reason, user_errors
from runtime.files import check_distinct, check_writable, make_folder, output_file
from runtime.hardware import DEVICES, choose_device, keep_freed_memory, out_of_memory_named, stay_within_memory
from runtime.names import chosen
from runtime.progress import progress_bar
from training.checkpoint import load_model
from training.run_folder import check_not_own

SHOWN = 3  # images in the maps of time constants
PUBLISHED = Path(__file__).parent / "pretrained" / "true-cifar10.safetensors"


@dataclass(frozen=True)
class Drawn:
    """A model to draw from, its scheduler, and the config that its file names."""

    model: Denoiser
    scheduler: DDPMScheduler
    config: dict


def parser() -> Parser:
    """All flags."""
    fraction = number(0, 1, "at 1 all noise is fresh")
    weight = number(0, 100, "more saturates every pixel")
    p = Parser(prog="sample.py", description="Draw images from trained models.")
    add = p.add_argument
    # fmt: off
    add("--checkpoint", nargs="+", type=file_or_folder, metavar="RUN",
        help="a run folder or a model.safetensors (default: the published weights); several are drawn side by side, "
        "from the same noise")
    add("--num-images", type=integer(1, 10**6, "few programs open a larger picture"), default=64,
        help="how many images to draw")
    add("--output", type=file_or_folder, nargs="+", default=["samples.png"], metavar="PATH",
        help="where the images are written, to one or several of: PNG (the grid), NPZ (arr_0, seeds and labels, as "
        "other programs read them), FOLDER/ (a PNG for each image, by class, and images.csv)")
    add("--gif", type=file_or_folder, metavar="GIF", help="also write an animation of the denoising to this file")
    add("--tau-maps", type=file_or_folder, metavar="PNG",
        help="also write maps of the time constants of the first true liquid model while it draws")
    add("--sampler", choices=SAMPLERS, default="dpmpp", help="how to get from noise to an image")
    add("--steps", type=integer(1, 10**5, "no model has more timesteps"),
        help="network calls per image (default: 50, or all timesteps of a model that has fewer)")
    add("--eta", type=fraction, default=0.0, help="with --sampler ddim: fresh noise per step, 0 (none) to 1 (ddpm)")
    add("--seed", type=integer(0, 10**12, "larger ones give nothing new"), default=0,
        help="image i is drawn from the noise of seed + i")
    add("--batch-size", type=integer(1, 2**16, "more need more memory and are drawn no faster"), default=64,
        help="images drawn at once; does not change the images")
    add("--classes",
        help="names or numbers of classes, separated by commas; the images take turns (default: all classes in turn); "
        "name:1 or index:1 where a number is a name, too")
    add("--guidance", type=weight, default=1.0,
        help="classifier-free guidance of a class-conditional model; 1 is none, more shows the class more clearly")
    add("--solver", choices=SOLVERS, help="ODE solver of a true liquid model (default: as trained)")
    add("--ode-steps", type=integer(1, 1000, "more change nothing but the time"), nargs=3,
        metavar=("GLOBAL", "LOCAL", "DETAIL"),
        help="ODE steps of the three cells of a true liquid model (default: as trained)")
    add("--device", choices=DEVICES, default="auto", help="auto: cuda if there is one, else mps, else cpu")
    # fmt: on
    return p


def main() -> None:
    """Parse, check, draw."""
    args = parser().parse_args()
    if args.eta and args.sampler != "ddim":
        raise UserError(f"--eta: only --sampler ddim has it, got --sampler {args.sampler}")
    outputs = [*(("--output", name) for name in args.output), ("--gif", args.gif), ("--tau-maps", args.tau_maps)]
    check_distinct(outputs)
    for flag, name in outputs:
        check_not_own(name, flag, args.checkpoint or [])
    keep_freed_memory()
    device = choose_device(args.device)
    stay_within_memory(device)
    if args.checkpoint is None and not PUBLISHED.exists():
        raise UserError("--checkpoint: name a run folder; there are no published weights beside sample.py")
    drawn = load_all(args.checkpoint or [str(PUBLISHED)])
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
    labels = {
        name: chosen_labels(args.classes, one.config["classes"], one.model.num_classes, args.num_images)
        for name, one in drawn.items()
    }
    if args.guidance != 1 and None in labels.values():
        raise UserError("--guidance: this model has no classes; train.py --class-conditional learns them")
    written = [image_output(name) for name in args.output]
    if len(drawn) > 1 and any(path.suffix.lower() != ".png" for path in written):
        raise UserError("--output: single images are of one model; name one --checkpoint, or a PNG")
    gif = output_file(args.gif, "--gif", ".gif") if args.gif else None
    maps = output_file(args.tau_maps, "--tau-maps", ".png") if args.tau_maps else None
    for one in drawn.values():
        one.model.to(device).to(memory_format=torch.channels_last)

    with out_of_memory_named(min(args.batch_size, args.num_images), "a smaller model"):
        images, frames = draw(args, drawn, labels)
        for path in written:
            write(path, partial(save_as, path, images, labels, drawn, args.seed))
        if gif is not None:
            write(gif, lambda: save_gif(frames, gif))
        if maps is not None:
            name, model = next(iter(liquid.items()))
            options: dict[str, Any] = sampling_options(args) | {"labels": labels[name]}
            shape = drawn[name].config["shape"]
            found = record(model, drawn[name].scheduler, shape, min(args.num_images, SHOWN), **options)
            write(maps, lambda: save_tau_maps(found, maps))


def image_output(name: str) -> Path:
    """The path of one --output, whose folder is made: a PNG, an NPZ, or a folder, which its name or a slash tells."""
    path = Path(name)
    suffix = path.suffix.lower()
    if name.endswith(("/", os.sep)) or path.is_dir() or (not suffix and not path.exists()):
        check_writable(path, "--output")
        make_folder(path, "--output")
        return path
    if suffix not in (".png", ".npz"):
        raise UserError(f"--output: must end in .png, in .npz, or in / for a folder, got {name}")
    return output_file(path, "--output", suffix)


def save_as(
    path: Path, images: dict[str, Tensor], labels: dict[str, Tensor | None], drawn: dict[str, Drawn], seed: int
) -> None:
    """Write what was drawn as the path says: a grid of all, or the single images of the only model."""
    if path.suffix.lower() == ".png":
        save_grid(images, path)
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
    return {name: getattr(args, name) for name in ("sampler", "steps", "eta", "seed", "guidance")}


def draw(
    args: argparse.Namespace, drawn: dict[str, Drawn], labels: dict[str, Tensor | None]
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
                on_step=on_step,
                **sampling_options(args),
            )
    steps = range(args.steps if args.gif else 0)
    return images, [{name: torch.cat(x_0[name][step]) for name in drawn} for step in steps]


def chosen_labels(classes: str | None, names: list[str], num_classes: int, num_images: int) -> Tensor | None:
    """(num_images,) labels that take turns over the named classes, or over all of a class-conditional model's.

    Raises UserError for a class that the model does not have, and for what may be two of its classes.
    """
    if not num_classes:
        if classes is not None:
            raise UserError("--classes: this model has no classes; train.py --class-conditional learns them")
        return None
    turns = list(range(num_classes))
    if classes is not None:
        with user_errors("--classes"):
            turns = chosen(classes, names[:num_classes])
    return torch.tensor(turns)[torch.arange(num_images) % len(turns)]


def write(path: Path, save: Callable[[], None]) -> None:
    """Save a picture and print where it is."""
    try:
        save()
    except OSError as error:
        raise RunFailed(f"cannot write {path} ({reason(error)}); nothing was changed") from error
    print(path)


if __name__ == "__main__":
    run("sample.py", main)
