"""Train one diffusion model into a run folder.

python train.py                                        # CIFAR-10, the true liquid model, 3 epochs
python train.py --model inspired                       # the same run with the plain CNN
python train.py --dataset digits --minutes 2 --batch-size 64
python train.py --resume                               # go on with the latest run
torchrun --nproc-per-node=2 train.py                   # the same run in two processes
"""

from runtime import interrupted_import  # noqa: F401  # isort: skip

from argparse import BooleanOptionalAction
from dataclasses import fields, replace
from pathlib import Path

from choices import (
    COMPILE,
    DATASETS,
    DEVICES,
    MODELS,
    OPTIMIZERS,
    PRECISIONS,
    PREDICTION_TYPES,
    SCHEDULES,
    STEP_SOLVERS,
)
from images.sides import image_size
from runtime.command_line import Parser, file_or_folder, integer, number, parsed_by, run, slow_imports, spelled
from runtime.errors import UserError
from runtime.files import check_folder, check_writable
from training.config import BEFORE_THE_FLAG, MOST_CLASSES, TrainConfig
from training.run_folder import CONFIG_FILE, read_config, run_folders, weights_file

# a resumed run may change how long it runs, where and how verbosely, but not what it learns from what
CHANGEABLE = {
    *("epochs", "steps", "minutes", "device", "compile", "log_every", "sample_every", "save_every", "tensorboard"),
    *("data_dir", "output_dir"),
}
BUDGET = {"epochs", "steps", "minutes"}


def parser() -> Parser:
    """All flags, with the defaults of TrainConfig."""
    length = number(0, 1e6, "a longer run would take years", without=(0,))
    rate = number(0, 1, "a larger one diverges", without=(0,))
    decay = number(0, 1, "at 1 the average never moves", without=(1,))
    every = integer(1, 10**9, "no run has more steps")
    p = Parser(prog="train.py", description="Train one diffusion model into a run folder.")
    add, one_of = p.add_argument, p.add_mutually_exclusive_group().add_argument
    # fmt: off
    add("--model", choices=MODELS, help="which network denoises")
    add("--solver", choices=STEP_SOLVERS, default="euler", help="how the true liquid model takes its ODE steps")
    add("--channels", type=integer(1, 4096, "none has been trained that wide"), nargs=3,
        metavar=("DETAIL", "LOCAL", "GLOBAL"), help="channels of the true model's three cells (default: 32 24 24)")
    add("--ode-steps", type=integer(1, 1000, "more change nothing but the time"), nargs=3,
        metavar=("GLOBAL", "LOCAL", "DETAIL"), help="ODE steps of the true model's three cells (default: 3 5 7)")
    add("--random-ode-steps", action="store_true",
        help="train the true model with 0.5 to 4 times its usual ODE steps, so that sample.py may choose them")
    add("--coarse-first", metavar="SHARE", type=number(0, 1, "a run ends with all of its ODE steps", without=(1,)),
        help="for the first part of the run, a share from 0 to below 1 of its steps or minutes, the true model takes "
        "half of its ODE steps, which is faster; the rest of the run takes all of them")
    add("--dataset", choices=DATASETS, help="what to learn")
    add("--data-dir", type=file_or_folder,
        help="where data sets are kept; with --dataset folder, the folder of your images")
    add("--image-size", metavar="SIDE|HxW", type=parsed_by(image_size),
        help="resize images to this side in pixels, or to HEIGHTxWIDTH such as 32x48, both multiples of 4 "
        "(default: the set's own size; folder: 32)")
    add("--mirror", action=BooleanOptionalAction,
        help="with --dataset cifar10 or folder: show half of the images mirrored; --no-mirror where left and right "
        "must not be exchanged, as in writing")
    add("--output-dir", type=file_or_folder, help="where the new run folder is made")
    one_of("--epochs", type=length, help="length of the run, in passes over the data set")
    one_of("--steps", type=integer(1, 10**9, "a longer run would take years"),
        help="length of the run, in optimizer steps")
    one_of("--minutes", type=length, help="length of the run, in minutes of training")
    add("--batch-size", type=integer(1, 2**16, "more need more memory and learn no faster"),
        help="images per step, over all processes together")
    add("--optimizer", choices=OPTIMIZERS, help="muon: Muon for matrices and AdamW for the rest; adamw: AdamW for all")
    add("--lr", type=rate, help="peak learning rate")
    add("--timesteps", type=integer(2, 10**5, "finer steps drown in rounding"),
        help="number of diffusion steps T")
    add("--schedule", choices=SCHEDULES, help="noise schedule")
    add("--prediction-type", choices=PREDICTION_TYPES, help="what the network predicts: eps, v, or the edm mixture")
    add("--class-conditional", action=BooleanOptionalAction,
        help="learn the classes, so that `sample.py` can draw one or the other (default: if there are from 2 to "
        f"{MOST_CLASSES} classes)")
    add("--ema-decay", type=decay, help="decay of the moving average of the weights, which is what gets saved")
    add("--seed", type=integer(0, 10**12, "larger ones give nothing new"),
        help="seed of the weights, the batches and the noise")
    add("--device", choices=DEVICES, help="auto: cuda if there is one, else mps, else cpu")
    add("--precision", choices=PRECISIONS,
        help="auto: bf16 on a GPU, and on a processor with a matrix unit for it (AMX); else fp32")
    add("--compile", nargs="?", choices=COMPILE, const="on",
        help="torch.compile, on a GPU with CUDA graphs; auto: compile long runs, if there is a compiler")
    add("--log-every", type=every, help="steps between two lines of metrics.csv")
    add("--sample-every", type=every, help="steps between two measurements of the held-out loss, each with a grid")
    add("--save-every", type=every, help="steps between two saves")
    add("--skip-bad-images", action="store_true",
        help="with --dataset folder: leave out images that cannot be read, and list them")
    add("--tensorboard", action="store_true", help="write TensorBoard events, too")
    add("--init", type=file_or_folder, metavar="RUN",
        help="start from the weights of this run folder or model.safetensors, with your own data; classes that it "
        "lacks start anew")
    add("--resume", nargs="?", const="latest", type=file_or_folder, metavar="RUN",
        help="go on with this run folder, or with the latest run")
    add("--dry-run", action="store_true", help="load the data, print what would run, and write nothing")
    # fmt: on
    p.take_defaults({f.name: f.default for f in fields(TrainConfig)})
    return p


def main() -> None:
    """Parse, check, train."""
    p = parser()
    values = vars(p.parse_args())
    given = p.given()
    resume, dry_run = values.pop("resume"), values.pop("dry_run")
    for flag in ("solver", "channels", "ode_steps", "random_ode_steps", "coarse_first"):
        if given.get(flag) and values["model"] != "true" and resume is None:
            raise UserError(f"{spelled(flag)}: only the true model has an ODE, got --model {values['model']}")
    liquid = {"solver": values.pop("solver"), "random_steps": values.pop("random_ode_steps")}
    liquid |= {name: value for name in ("channels", "ode_steps") if (value := values.pop(name)) is not None}
    if resume is None:
        if BUDGET & given.keys() - {"epochs"}:
            values["epochs"] = None
        if values["model"] == "true":
            values["model_config"] = liquid
        config, folder = TrainConfig(**values), None
    else:
        config, folder = resumed(given, Path(values["output_dir"]))
    check_paths(config, new=folder is None, dry_run=dry_run)

    with slow_imports():
        from runtime.hardware import choose_device, stay_within_memory
        from training.loop import train
    stay_within_memory(choose_device(config.device))
    finished = train(config, resume=folder, dry_run=dry_run)
    if finished is not None:
        print(f"done: {finished}\ndraw from it: python sample.py --checkpoint {finished}")


def check_paths(config: TrainConfig, *, new: bool, dry_run: bool) -> None:
    """Refuse paths that training would refuse, before seconds of imports. new: no run is resumed."""
    if new and not dry_run:
        check_writable(Path(config.output_dir), "--output-dir")
    if new and config.init is not None:
        weights_file(config.init)
    if config.dataset == "folder":
        check_folder(config.data_dir, "--data-dir")


def resumed(given: dict, output_dir: Path) -> tuple[TrainConfig, Path]:
    """The config and folder of the run to go on with. Raises UserError for a flag that contradicts it."""
    if given["resume"] == "latest":
        folders = run_folders(output_dir)
        if not folders:
            raise UserError(f"--resume: no runs in {output_dir}")
        folder = folders[-1]
    else:
        folder = Path(given["resume"])
        folder = folder.parent if folder.is_file() else folder
    record = read_config(folder)
    with slow_imports():
        from models import build_model
        from training.checkpoint import in_full
    try:
        saved = TrainConfig(**BEFORE_THE_FLAG | record["train"])
        if "model" in record:  # the network as it was built, which outlives a change of its defaults
            built = in_full(record["model"])["model_config"]
            own = {name: value for name, value in built.items() if name not in ("in_channels", "num_classes")}
            saved = replace(saved, model_config=own | saved.model_config)
        liquid = {name: saved.model_config.get(name) for name in ("solver", "random_steps", "channels", "ode_steps")}
        before = vars(saved) | {**liquid, "random_ode_steps": bool(liquid["random_steps"])}
        parser().check(before)
        build_model(saved.model, **{"in_channels": 3, **saved.model_config})
    except (AttributeError, ImportError, KeyError, TypeError, UserError, ValueError) as error:
        raise UserError(f"{folder / CONFIG_FILE}: not the config of a run ({error})") from None
    same = {"resume", "dry_run"} | ({"precision"} if given.get("precision") == "auto" else set())
    for name in given.keys() - CHANGEABLE - same:
        if given[name] != before[name]:
            started = f"{folder} was started with {before[name]}"
            raise UserError(f"{spelled(name)}: {given[name]} contradicts --resume: {started}")
    changes = {name: value for name, value in given.items() if name in CHANGEABLE}
    if BUDGET & changes.keys():
        changes = dict.fromkeys(BUDGET) | changes
    return TrainConfig(**{**vars(saved), **changes}), folder


if __name__ == "__main__":
    run("train.py", main)
