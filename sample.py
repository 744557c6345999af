"""Draw images from trained models into a PNG, their denoising into a GIF, and a liquid model's time constants.

python sample.py                                                 # from the published weights
python sample.py --checkpoint runs/00003-true-cifar10 --num-images 64 --steps 50
python sample.py --checkpoint RUN --classes horse,ship --guidance 2
python sample.py --checkpoint TRUE_RUN INSPIRED_RUN --gif beside.gif     # side by side, from the same noise
python sample.py --output grid.png images.npz singles/           # the single images, too
python sample.py --tau-maps tau.png                                      # where the liquid is slow and where it is fast
"""

from runtime import interrupted_import  # noqa: F401  # isort: skip

import os
from pathlib import Path

from choices import DEVICES, SAMPLERS, SOLVERS
from lab.predictions import add_prediction_flags
from runtime.command_line import Parser, file_or_folder, integer, number, run, slow_imports
from runtime.errors import UserError
from runtime.files import check_distinct, check_writable, output_file
from training.run_folder import PUBLISHED, check_not_own, weights_file


def parser() -> Parser:
    """All flags."""
    fraction = number(0, 1, "at 1 all noise is fresh")
    p = Parser(prog="sample.py", description="Draw images from trained models.")
    add = p.add_argument
    # fmt: off
    add("--checkpoint", nargs="+", type=file_or_folder, metavar="RUN",
        help="a run folder or a model.safetensors (default: the published weights); several are drawn side by side, "
        "from the same noise")
    add("--num-images", type=integer(1, 10**6, "few programs open a larger picture"),
        help="how many images to draw (default: eight rows: of a column for each class, or of eight columns)")
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
    add_prediction_flags(add)
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
    written = [image_output(name) for name in args.output]
    gif = output_file(args.gif, "--gif", ".gif") if args.gif else None
    maps = output_file(args.tau_maps, "--tau-maps", ".png") if args.tau_maps else None
    if args.checkpoint is None and not PUBLISHED.exists():
        raise UserError("--checkpoint: name a run folder; there are no published weights beside sample.py")
    args.checkpoint = args.checkpoint or [str(PUBLISHED)]
    for checkpoint in args.checkpoint:
        weights_file(checkpoint)

    with slow_imports():
        from lab.drawing import draw_and_write
    draw_and_write(args, written, gif, maps)


def image_output(name: str) -> Path:
    """The path of one --output: a PNG, an NPZ, or a folder, which its name or a slash tells. Raises UserError."""
    path = Path(name)
    suffix = path.suffix.lower()
    if name.endswith(("/", os.sep)) or path.is_dir() or (not suffix and not path.exists()):
        check_writable(path, "--output")
        return path
    if suffix not in (".png", ".npz"):
        raise UserError(f"--output: must end in .png, in .npz, or in / for a folder, got {name}")
    return output_file(path, "--output", suffix)


if __name__ == "__main__":
    run("sample.py", main)
