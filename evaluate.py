"""Measure one trained model: print a table, and write `evaluation.json`, with units, into the run's folder.

python evaluate.py --checkpoint runs/00003-true-cifar10
python evaluate.py --checkpoint RUN --num-images 2000 --fid
python evaluate.py --checkpoint model.safetensors --dataset folder --data-dir IMAGES --output figures.json

It measures the held-out eps-MSE on the frozen bank, overall and by noise level; the variational bound in bits/dim; the
sliced Wasserstein distance of samples from held-out images, beside that of training images; their distance, precision
and recall in the features of our own classifier, and how many it recognises; the training images nearest to 16 samples,
as a picture; speed; and, on request, FID and KID, and the held-out eps-MSE of a liquid model with every ODE solver. A
figure that could not be measured is null in the file, with the reason. Each measure has a file in lab/evaluation.
"""

from runtime import interrupted_import  # noqa: F401  # isort: skip

import importlib.util
from pathlib import Path

from choices import DATASETS, DEVICES, SAMPLERS, SHOWN
from lab.predictions import add_prediction_flags
from runtime.command_line import Parser, file_or_folder, integer, run, slow_imports
from runtime.errors import UserError
from runtime.files import output_file
from training.run_folder import CONFIG_FILE, MODEL_FILE, check_not_own, weights_file


def parser() -> Parser:
    """All flags."""
    p = Parser(prog="evaluate.py", description="Measure one trained model.")
    add = p.add_argument
    # fmt: off
    add("--checkpoint", required=True, type=file_or_folder, help="a run folder or a model.safetensors")
    add("--dataset", choices=DATASETS, help="what to measure on (default: what the model was trained on)")
    add("--data-dir", type=file_or_folder,
        help="where the data set is (default: where the run's config.json says, else data)")
    add("--skip-bad-images", action="store_true",
        help="with --dataset folder: leave out images that cannot be read (default: as the run was trained)")
    many = "no figure gets better with more"
    add("--num-images", type=integer(SHOWN, 10**6, many), default=2000, help="how many images to draw")
    add("--bound-images", type=integer(2, 10**6, many), default=256,
        help="how many held-out images the variational bound is computed for")
    add("--sampler", choices=SAMPLERS, default="dpmpp", help="how to get from noise to an image")
    add("--steps", type=integer(1, 10**5, "no model has more timesteps"),
        help="network calls per image (default: 50, or all timesteps of a model that has fewer)")
    add_prediction_flags(add)
    add("--seed", type=integer(0, 10**12, "larger ones give nothing new"), default=0,
        help="image i is drawn from the noise of seed + i; also seeds the rest")
    add("--batch-size", type=integer(1, 2**16, "more need more memory and are measured no faster"), default=64,
        help="images per network call")
    add("--device", choices=DEVICES, default="auto", help="auto: cuda if there is one, else mps, else cpu")
    add("--classifier", type=file_or_folder, metavar="FILE",
        help="of python -m lab.classifier, for FD, KID, precision and recall in its features (default: the published "
        "one of these classes, if there is one)")
    add("--fid", action="store_true", help="also compute FID and KID against all training images: hours on a CPU")
    add("--ode-work", action="store_true",
        help="also measure the eps-MSE of a true liquid model for every ODE solver and number of steps, with a plot")
    add("--output", type=file_or_folder, metavar="JSON",
        help="where the figures are written (default: evaluation.json in the run folder, or beside the file)")
    # fmt: on
    return p


def main() -> None:
    """Parse, check, measure."""
    args = parser().parse_args()
    if args.fid and importlib.util.find_spec("torch_fidelity") is None:
        raise UserError("--fid: needs torch-fidelity; pip install -r requirements-compare.txt")
    check_not_own(args.output, "--output", [args.checkpoint])
    weights_file(args.checkpoint)
    run_folder = folder_of_run(Path(args.checkpoint))
    output, picture = output_paths(args.output, Path(args.checkpoint), run_folder)

    with slow_imports():
        from lab.evaluation.procedure import measure_and_write
    measure_and_write(args, run_folder, output, picture)


def folder_of_run(checkpoint: Path) -> Path | None:
    """The run folder that the checkpoint is, or whose model.safetensors it is; None for any other file."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    known = checkpoint.is_dir() or (checkpoint.name == MODEL_FILE and (folder / CONFIG_FILE).exists())
    return folder if known else None


def output_paths(output: str | None, checkpoint: Path, run_folder: Path | None) -> tuple[Path, Path]:
    """Where the JSON and the picture will be written. Raises UserError, naming --output, if they cannot be."""
    beside = checkpoint.with_name(f"{checkpoint.stem}-evaluation.json")
    path = output_file(output or (run_folder / "evaluation.json" if run_folder else beside), "--output", ".json")
    return path, path.with_name(f"{path.stem}-neighbours.png")


if __name__ == "__main__":
    run("evaluate.py", main)
