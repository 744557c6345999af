"""Train one diffusion model into a run folder.

python train.py                                        # CIFAR-10, the true liquid model, 3 epochs
python train.py --model inspired                       # the same run with the plain CNN
python train.py --dataset digits --minutes 2 --batch-size 64
python train.py --resume                               # go on with the latest run
torchrun --nproc-per-node=2 train.py                   # the same run in two processes
"""

import interrupted_import  # noqa: F401  # isort: skip

from dataclasses import fields
from pathlib import Path

from checkpoint import CONFIG_FILE, read_config, run_folders
from command_line import Parser, integer, number, run
from diffusion import PREDICTION_TYPES, SCHEDULES
from errors import UserError
from hardware import COMPILE, DEVICES, PRECISIONS
from image_data import DATASETS
from liquid_diffusion import STEP_SHARE
from models import MODELS, build_model
from optimizer import OPTIMIZERS
from train_config import BEFORE_THE_FLAG, TrainConfig
from training import train

# what a resumed run may change: how long, where and how loudly, not what is learned from what
CHANGEABLE = {
    *("epochs", "steps", "minutes", "device", "compile", "log_every", "sample_every", "save_every", "tensorboard"),
    *("data_dir", "output_dir"),
}
BUDGET = {"epochs", "steps", "minutes"}
LENGTH = number("greater than 0 and at most a million", lambda v: 0 < v <= 1e6)


def parser() -> Parser:
    """All flags, with the defaults of TrainConfig."""
    default = {f.name: f.default for f in fields(TrainConfig)}
    p = Parser(prog="train.py", description="Train one diffusion model into a run folder.")
    p.add_argument("--model", choices=list(MODELS), default=default["model"], help="the denoiser")
    p.add_argument("--solver", choices=list(STEP_SHARE), default="euler", help="ODE steps of the true liquid model")
    p.add_argument(
        "--random-ode-steps", action="store_true",
        help="train the true model with half to four times its ODE steps, so that sample.py may choose them",
    )  # fmt: skip
    p.add_argument("--dataset", choices=DATASETS, default=default["dataset"], help="what to learn")
    p.add_argument("--data-dir", default=default["data_dir"], help="where data sets are kept; the images of `folder`")
    p.add_argument(
        "--image-size", type=integer(4, 4096), help="resize to this side (default: the set's own; folder: 32)"
    )
    p.add_argument("--output-dir", default=default["output_dir"], help="where the run's new folder is made")
    budget = p.add_mutually_exclusive_group()
    budget.add_argument("--epochs", type=LENGTH, default=default["epochs"], help="length, in passes over the set")
    budget.add_argument("--steps", type=integer(1), help="length, in optimizer steps")
    budget.add_argument("--minutes", type=LENGTH, help="length, in minutes of training")
    p.add_argument(
        "--batch-size", type=integer(1, 10**6), default=default["batch_size"], help="images a step, all processes"
    )
    p.add_argument(
        "--optimizer", choices=OPTIMIZERS, default=default["optimizer"],
        help="muon for the matrices and adamw for the rest, or adamw for all",
    )  # fmt: skip
    p.add_argument(
        "--lr", type=number("greater than 0", lambda v: v > 0), default=default["lr"], help="peak learning rate"
    )
    p.add_argument("--timesteps", type=integer(2, 10**5), default=default["timesteps"], help="diffusion steps T")
    p.add_argument("--schedule", choices=SCHEDULES, default=default["schedule"], help="noise schedule")
    p.add_argument(
        "--prediction-type", choices=PREDICTION_TYPES, default=default["prediction_type"], help="what the network gives"
    )
    p.add_argument("--class-conditional", action="store_true", help="learn classes, to draw with `sample.py --classes`")
    p.add_argument(
        "--ema-decay",
        type=number("from 0 to less than 1", lambda v: 0 <= v < 1),
        default=default["ema_decay"],
        help="moving average of weights",
    )
    p.add_argument("--seed", type=integer(0), default=default["seed"], help="of weights, batches and noise")
    p.add_argument("--device", choices=DEVICES, default=default["device"], help="auto: cuda, else mps, else cpu")
    p.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=default["precision"],
        help="auto: bf16 where it is measured to be faster",
    )
    p.add_argument(
        "--compile",
        nargs="?",
        choices=COMPILE,
        const="on",
        default=default["compile"],
        help="torch.compile, on CUDA into CUDA graphs; auto: if the run is long and it is measured to be faster",
    )
    p.add_argument("--log-every", type=integer(1), default=default["log_every"], help="steps between log lines")
    p.add_argument(
        "--sample-every",
        type=integer(1),
        default=default["sample_every"],
        help="steps between grids and held-out losses",
    )
    p.add_argument("--save-every", type=integer(1), default=default["save_every"], help="steps between saves")
    p.add_argument(
        "--skip-bad-images", action="store_true", help="leave out images of `folder` that cannot be read, and say which"
    )
    p.add_argument("--tensorboard", action="store_true", help="write TensorBoard events beside metrics.csv")
    p.add_argument(
        "--resume", nargs="?", const="latest", metavar="RUN", help="go on with a run folder (default: the latest)"
    )
    p.add_argument("--dry-run", action="store_true", help="load the data, print what would run, and write nothing")
    return p


def main() -> None:
    """Parse, check, train."""
    p = parser()
    values = vars(p.parse_args())
    given = p.given()
    resume, dry_run = values.pop("resume"), values.pop("dry_run")
    for flag in ("solver", "random_ode_steps"):
        if flag in given and values["model"] != "true" and resume is None:
            name = flag.replace("_", "-")
            raise UserError(f"--{name}: only the true model has an ODE, got --model {values['model']}")
    ode = {"solver": values.pop("solver"), "random_steps": values.pop("random_ode_steps")}
    if resume is None:
        if BUDGET & given.keys() - {"epochs"}:
            values["epochs"] = None
        if values["model"] == "true":
            values["model_config"] = ode
        config, folder = TrainConfig(**values), None
    else:
        config, folder = resumed(given, Path(values["output_dir"]))
    finished = train(config, resume=folder, dry_run=dry_run)
    if finished is not None:
        print(f"done: {finished}\ndraw from it: python sample.py --checkpoint {finished}")


def resumed(given: dict, output_dir: Path) -> tuple[TrainConfig, Path]:
    """The config and folder of the run to go on with. Raises UserError for a flag that would make it another run."""
    if given["resume"] == "latest":
        folders = run_folders(output_dir)
        if not folders:
            raise UserError(f"--resume: no runs in {output_dir}")
        folder = folders[-1]
    else:
        folder = Path(given["resume"])
        folder = folder.parent if folder.is_file() else folder
    record = read_config(folder)
    try:
        saved = TrainConfig(**BEFORE_THE_FLAG | record["train"])
        ode = {name: saved.model_config.get(name) for name in ("solver", "random_steps")}
        before = vars(saved) | {"solver": ode["solver"], "random_ode_steps": bool(ode["random_steps"])}
        parser().check(before)
        build_model(saved.model, **{"in_channels": 3, **saved.model_config})
    except (AttributeError, KeyError, TypeError, UserError) as error:
        raise UserError(f"{folder / CONFIG_FILE}: not the config of a run ({error})") from None
    same = {"resume", "dry_run"} | ({"precision"} if given.get("precision") == "auto" else set())
    for name in given.keys() - CHANGEABLE - same:
        if given[name] != before[name]:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag}: {given[name]} contradicts --resume: {folder} was started with {before[name]}")
    changes = {name: value for name, value in given.items() if name in CHANGEABLE}
    if BUDGET & changes.keys():
        changes = dict.fromkeys(BUDGET) | changes
    return TrainConfig(**{**vars(saved), **changes}), folder


if __name__ == "__main__":
    run("train.py", main)
