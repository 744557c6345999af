"""Draw images from a trained model into one PNG, and their denoising into a GIF.

python sample.py                                                 # from the published weights
python sample.py --checkpoint runs/00003-true-cifar10 --num-images 64 --steps 50
python sample.py --checkpoint RUN --classes horse,ship --guidance 2
"""

import interrupted_import  # noqa: F401  # isort: skip

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import check_writable
from command_line import Parser, integer, number, run
from diffusion import SAMPLERS, DDPMScheduler, sample_images
from errors import RunFailed, UserError
from hardware import DEVICES, choose_device, keep_freed_memory, out_of_memory_named
from liquid_diffusion import SOLVERS, TrueLiquidDiffusionModel
from models import load_model
from pictures import save_gif, save_grid

PUBLISHED = Path(__file__).parent / "pretrained" / "true-cifar10.safetensors"


def parser() -> Parser:
    """All flags."""
    p = Parser(prog="sample.py", description="Draw images from a trained model.")
    p.add_argument("--checkpoint", default=str(PUBLISHED), help="a run folder or a model.safetensors")
    p.add_argument("--num-images", type=integer(1, 10**6), default=64, help="how many to draw")
    p.add_argument("--output", default="samples.png", metavar="PNG", help="the grid")
    p.add_argument("--gif", metavar="GIF", help="an animation of the denoising")
    p.add_argument("--sampler", choices=SAMPLERS, default="dpmpp", help="how to go from noise to image")
    p.add_argument(
        "--steps", type=integer(1), help="network calls an image (default: 50, or all timesteps of a model with fewer)"
    )
    p.add_argument(
        "--eta", type=number("from 0 to 1", lambda v: 0 <= v <= 1), default=0.0, help="noise of ddim: 0 none, 1 as ddpm"
    )
    p.add_argument("--seed", type=integer(0), default=0, help="image i follows from seed + i")
    p.add_argument("--batch-size", type=integer(1, 10**6), default=64, help="images at once; does not change them")
    p.add_argument("--classes", help="names or numbers, comma-separated, taken in turns; for a class-conditional model")
    p.add_argument(
        "--guidance",
        type=number("of at least 0", lambda v: v >= 0),
        default=1.0,
        help="classifier-free guidance; 1 is none",
    )
    p.add_argument("--solver", choices=SOLVERS, help="ODE solver of a true liquid model (default: as trained)")
    p.add_argument(
        "--ode-steps",
        type=integer(1),
        nargs=3,
        metavar=("GLOBAL", "LOCAL", "DETAIL"),
        help="its steps (default: as trained)",
    )
    p.add_argument("--device", choices=DEVICES, default="auto", help="auto: cuda, else mps, else cpu")
    return p


def main() -> None:
    """Parse, check, draw."""
    p = parser()
    args = p.parse_args()
    given = p.given()
    if args.eta and args.sampler != "ddim":
        raise UserError(f"--eta: only --sampler ddim has it, got --sampler {args.sampler}")
    keep_freed_memory()
    device = choose_device(args.device)
    if "checkpoint" not in given and not PUBLISHED.exists():
        raise UserError("--checkpoint: name a run folder; there are no published weights beside sample.py")
    model, scheduler, config = load_model(Path(args.checkpoint))
    args.steps = args.steps or min(50, scheduler.num_timesteps)
    if args.steps > scheduler.num_timesteps:
        raise UserError(f"--steps: must be at most the model's {scheduler.num_timesteps} timesteps, got {args.steps}")
    if args.solver or args.ode_steps:
        if not isinstance(model, TrueLiquidDiffusionModel):
            raise UserError(
                f"--solver and --ode-steps: only a true liquid model has an ODE, this one is {config['model']}"
            )
        model.set_solver(args.solver, args.ode_steps)
    labels = chosen_labels(args.classes, config["classes"], model.num_classes, args.num_images)
    if args.guidance != 1 and labels is None:
        raise UserError("--guidance: this model was trained without --class-conditional")
    output = picture_path("--output", args.output, ".png")
    gif = picture_path("--gif", args.gif, ".gif") if args.gif else None
    model.to(device, memory_format=torch.channels_last)

    with out_of_memory_named(min(args.batch_size, args.num_images), "a smaller model"):
        images, frames = draw(args, model, scheduler, config["shape"], labels)
        write(output, lambda: save_grid(images, output))
        if gif is not None:
            write(gif, lambda: save_gif(frames, gif))


def draw(
    args: argparse.Namespace, model: nn.Module, scheduler: DDPMScheduler, shape: list[int], labels: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """(images, frames): what was drawn, and, if a GIF is wanted, each step's x_0; all (N, C, H, W)."""
    frames: list[list[Tensor]] = [[] for _ in range(args.steps)]  # by step, the batches' x_0
    with tqdm(total=args.num_images * args.steps, unit="call", unit_scale=True, mininterval=0.5) as bar:

        def on_step(step: int, x_0: Tensor) -> None:
            if args.gif:
                frames[step].append(x_0.cpu())
            bar.update(len(x_0))

        images = sample_images(
            model,
            scheduler,
            shape,
            args.num_images,
            sampler=args.sampler,
            steps=args.steps,
            eta=args.eta,
            seed=args.seed,
            batch_size=args.batch_size,
            labels=labels,
            guidance=args.guidance,
            on_step=on_step,
        )
    return images, [torch.cat(batches) for batches in frames] if args.gif else []


def chosen_labels(classes: str | None, names: list[str], num_classes: int, num_images: int) -> Tensor | None:
    """(num_images,) labels that take turns over the named classes, or over all of a class-conditional model's.

    Raises UserError for a class that the model does not have.
    """
    if not num_classes:
        if classes is not None:
            raise UserError("--classes: this model was trained without --class-conditional")
        return None
    chosen = list(range(num_classes))
    if classes is not None:
        numbers = {str(i): i for i in chosen} | {name: i for i, name in enumerate(names)}
        wanted = [name.strip() for name in classes.split(",")]
        unknown = [name for name in wanted if name not in numbers]
        if unknown:
            raise UserError(f"--classes: no class {unknown[0]!r}; the model has {', '.join(names)}")
        chosen = [numbers[name] for name in wanted]
    return torch.tensor(chosen)[torch.arange(num_images) % len(chosen)]


def picture_path(flag: str, name: str, suffix: str) -> Path:
    """Where a picture will be written, its folder made if need be. Raises UserError, naming the flag, if it cannot."""
    path = Path(name)
    if path.suffix.lower() != suffix:
        raise UserError(f"{flag}: the file's name must end in {suffix}, got {name}")
    check_writable(path.parent, flag)
    try:
        if path.is_dir():
            raise UserError(f"{flag}: {path} is a folder; name a file in it")
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag}: cannot write {path} ({error.strerror})") from error
    return path


def write(path: Path, save: Callable[[], None]) -> None:
    """Save a picture and print where it is."""
    try:
        save()
    except OSError as error:
        raise RunFailed(f"cannot write {path} ({error.strerror or error}); nothing was changed") from error
    print(path)


if __name__ == "__main__":
    run("sample.py", main)
