"""The experiment: several models at equal budgets, in one table with curves and drawings.

python compare.py --arms true inspired unet:38k --budget images --amount 150000 --seeds 3
python compare.py --arms true unet:38k unet:150k --budget seconds --amount 600 --output-dir comparisons/seconds

Beside the held-out error, each training run has the FD and KID of its samples, in the features of our own classifier.

All arms see the same images, timesteps and noise, and share batch size, precision, averaging of weights and prediction
type. Each has the peak learning rate that was best for it in the same sweep. Seconds are images divided by the speed of
the arm, which was measured in turn before anything was trained (costs.csv), so a machine that is busy later changes
nothing. To go on after an interruption, run the same command again; with more arms or seeds it adds to the tables.
"""

from runtime import interrupted_import  # noqa: F401  # isort: skip

import argparse
import json
from pathlib import Path

from choices import ARMS, DATASETS, DEVICES, GUIDANCE, GUIDED_SHARE, OPTIMIZERS, PREDICTION_TYPES, SCHEDULES, SHOWN
from images.sides import image_size
from lab.predictions import add_guidance_flags, refuse_guidance
from runtime.command_line import Parser, file_or_folder, integer, number, parsed_by, run, slow_imports, spelled
from runtime.errors import UserError, reason
from runtime.files import check_folder, check_writable
from training.config import BEFORE_THE_FLAG, TrainConfig

BUDGETS = ("images", "flops", "seconds")
# flags that a repeated command may change; the second line only while no FD was measured with others
CHANGEABLE = {"arms", "seeds", "reference", "jobs", "device", "data_dir", "output_dir"}
CHANGEABLE |= {"num_images", "guidance", "guided_share", "eps_scale", "classifier"}


def parser() -> Parser:
    """All flags."""
    default = TrainConfig()
    amount = number(0, 1e15, "a larger budget is never spent", without=(0,))
    rate = number(0, 1, "a larger one diverges", without=(0,))
    fraction = number(0, 1, "1 is all of --amount", without=(0,))
    p = Parser(prog="compare.py", description="Train several models at equal budgets and compare them.")
    add = p.add_argument
    # fmt: off
    add("--arms", nargs="+", choices=list(ARMS), default=["true", "inspired", "unet:38k"], metavar="ARM",
        help=f"the models to compare: {', '.join(ARMS)}")
    add("--reference", choices=list(ARMS), default="true", metavar="ARM",
        help="the arm that the others are compared with")
    add("--budget", choices=BUDGETS, default="images",
        help="what is equal for all arms: training images, multiply-adds of training (flops), or seconds of training "
        "at the speeds measured at the start")
    add("--amount", type=amount, default=150_000, help="budget per training run, in the unit of --budget")
    add("--seeds", type=integer(1, 1000, "no interval gets narrower with more"), default=3,
        help="training runs of each arm, with seeds 0, 1, ...")
    add("--optimizer", choices=OPTIMIZERS, default=default.optimizer, help="optimizer of all arms")
    add("--lrs", nargs="+", type=rate, default=[4e-3, 8e-3, 16e-3], metavar="LR",
        help="peak learning rates to try for each arm; a single one is used without a sweep")
    add("--sweep-share", type=fraction, default=1.0,
        help="fraction of --amount spent on each learning rate of the sweep; short ones favour rates that are too high")
    add("--jobs", type=integer(1, 256, "each is a process of its own"), default=1,
        help="training runs at the same time, each with its part of the threads; small models train more images per "
        "second this way")
    add("--dataset", choices=DATASETS, default=default.dataset, help="what to learn")
    add("--data-dir", type=file_or_folder, default=default.data_dir,
        help="where data sets are kept; with --dataset folder, the folder of your images")
    add("--image-size", metavar="SIDE|HxW", type=parsed_by(image_size),
        help="resize images to this side in pixels, or to HEIGHTxWIDTH such as 32x48, both multiples of 4 "
        "(default: the set's own size; folder: 32)")
    add("--skip-bad-images", action="store_true",
        help="with --dataset folder: leave out images that cannot be read")
    add("--class-conditional", action="store_true",
        help="train all arms with the classes of the images; the held-out error is then measured with them, and the "
        "samples are of all classes in turns")
    add("--output-dir", type=file_or_folder, default="comparisons/images",
        help="where tables, curves and run folders are written")
    add("--batch-size", type=integer(1, 2**16, "more need more memory and learn no faster"), default=default.batch_size,
        help="images per step")
    add("--timesteps", type=integer(2, 10**5, "finer steps drown in rounding"), default=default.timesteps,
        help="number of diffusion steps T")
    add("--schedule", choices=SCHEDULES, default=default.schedule, help="noise schedule")
    add("--prediction-type", choices=PREDICTION_TYPES, default=default.prediction_type,
        help="what all arms predict: eps, v, or the edm mixture")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="precision of all arms")
    add("--compile", action="store_true", help="use torch.compile for every arm")
    add("--num-images", type=integer(0, 10**6, "no figure gets better with more"), default=2000,
        help="how many images to draw with the final weights of each training run, for FD and KID in the features of a "
        "classifier; DPM-Solver++ draws them in 50 steps, or fewer if there are fewer timesteps; 0 draws none")
    add_guidance_flags(add)
    add("--classifier", type=file_or_folder, metavar="FILE",
        help="the classifier, which python -m lab.classifier trains (default: the published one of these classes, if "
        "there is one)")
    add("--device", choices=DEVICES, default="auto", help="auto: cuda if there is one, else mps, else cpu")
    # fmt: on
    return p


def main() -> None:
    """Parse, check, sweep, train, tell."""
    s = parser().parse_args()
    folder = Path(s.output_dir)
    check_writable(folder, "--output-dir")
    if 0 < s.num_images < SHOWN:
        raise UserError(f"--num-images: must be 0 or at least {SHOWN}, got {s.num_images}")
    if not s.class_conditional:
        refuse_guidance(s, "models without classes have no guidance; add --class-conditional")
    if s.guidance is None:
        s.guidance = GUIDANCE if s.class_conditional else 1.0
    if s.guided_share is None:
        s.guided_share = GUIDED_SHARE if s.class_conditional else 1.0
    if s.classifier is not None and not Path(s.classifier).is_file():
        raise UserError(f"--classifier: {s.classifier}: no such file")
    s.arms, s.lrs = list(dict.fromkeys(s.arms)), sorted(set(s.lrs))
    settings = shared_settings(s, folder)
    if s.dataset == "folder":
        check_folder(s.data_dir, "--data-dir")

    with slow_imports():
        from lab.comparison.procedure import compare
    compare(s, settings, folder)


def shared_settings(s: argparse.Namespace, folder: Path) -> dict:
    """The settings that all training runs share. Raises UserError if the folder holds a comparison with others."""
    settings = {name: value for name, value in vars(s).items() if name not in CHANGEABLE}
    file = folder / "comparison.json"
    if file.exists():
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, RecursionError, ValueError) as error:
            raise UserError(f"{file}: not readable ({reason(error)}); use another --output-dir") from error
        if not isinstance(before, dict) or "budget" not in before:
            raise UserError(f"{file}: not the settings of a comparison; use another --output-dir")
        before = BEFORE_THE_FLAG | before
        for name, value in settings.items():
            if before.get(name, parser().get_default(name)) != value:  # a comparison may be older than the flag
                contradiction = f"{value} contradicts {file}: {before.get(name)}"
                raise UserError(f"{spelled(name)}: {contradiction}; use another --output-dir")
        if isinstance(before.get("distances"), dict):  # what FD and KID were measured with
            settings["distances"] = before["distances"]
    return settings


if __name__ == "__main__":
    run("compare.py", main)
