"""The experiment: several models at equal budgets, in one table with curves and drawings.

python compare.py --arms true inspired unet:38k --budget images --amount 150000 --seeds 3
python compare.py --arms true unet:38k unet:150k --budget seconds --amount 600 --output-dir comparisons/seconds

Every arm sees the same images, timesteps and noise, has the same batch size, precision, averaging of weights and
prediction type, and the peak learning rate that is best for it in the same sweep. Seconds are images over the speed
that was measured for each arm, in turn, before anything trained (costs.csv): a machine that is busy later, or another
one, changes nothing. The same command goes on where an interrupted one stopped, and one with more arms or seeds adds
to what costs.csv, comparison.csv, sweep.csv and curves.csv hold.
"""

import interrupted_import  # noqa: F401  # isort: skip

import argparse
import json
from dataclasses import astuple, replace
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import atomic_path, check_writable, make_folder, run_folders, save_json
from command_line import Parser, integer, number, run
from comparison import Cost, Point, Result, markdown, read_rows, save_curves, save_rows
from diffusion import PREDICTION_TYPES, SCHEDULES, DDPMScheduler, sample_images
from errors import UserError
from experiment import Experiment, Training, arm_config
from hardware import DEVICES, Processes, choose_device, keep_freed_memory
from image_data import DATASETS, ImageData, held_out_bank, load_images
from models import ARMS, build_model, count_parameters, load_model, multiply_adds, training_multiply_adds
from optimizer import OPTIMIZERS
from pictures import save_labelled_rows
from side_by_side import run_all
from speed import machine_name, training_rates
from train_config import BEFORE_THE_FLAG, TrainConfig
from training import failures_named
from training_step import WARM_UP_STEPS
from validation import held_out_loss
from wiener import fit_wiener

BUDGETS = ("images", "flops", "seconds")
DRAWN = 10  # images of each arm in grid.png
TOLERANCE = 0.01  # of the budget, within which every training has to end
# flags that a repeated command may change
OWN = {"arms", "seeds", "reference", "jobs", "device", "data_dir", "output_dir"}
WARM_UPS = 10  # a sweep's steps over those of the warm-up, at least
LARGEST_WIENER = 4096  # values an image, for which an eigendecomposition is a matter of a minute


def parser() -> Parser:
    """All flags."""
    default = TrainConfig()
    p = Parser(prog="compare.py", description="Train several models at equal budgets and compare them.")
    p.add_argument(
        "--arms", nargs="+", choices=list(ARMS), default=["true", "inspired", "unet:38k"], metavar="ARM",
        help=f"what to compare: {', '.join(ARMS)}",
    )  # fmt: skip
    p.add_argument("--reference", choices=list(ARMS), default="true", metavar="ARM", help="what differences are to")
    p.add_argument(
        "--budget", choices=BUDGETS, default="images",
        help="what is equal; flops: multiply-adds of training; seconds: images over the speed measured at the start",
    )  # fmt: skip
    p.add_argument(
        "--amount", type=number("greater than 0", lambda v: v > 0), default=150_000, help="of the budget, a training"
    )
    p.add_argument("--seeds", type=integer(1, 1000), default=3, help="trainings of each arm, with seeds 0, 1, ...")
    p.add_argument("--optimizer", choices=OPTIMIZERS, default=default.optimizer, help="of all arms")
    p.add_argument(
        "--lrs", nargs="+", type=number("greater than 0", lambda v: v > 0), default=[4e-3, 8e-3, 16e-3],
        metavar="LR", help="peak learning rates of the sweep; one alone is taken without a sweep",
    )  # fmt: skip
    p.add_argument(
        "--sweep-share", type=number("from 0 to 1", lambda v: 0 < v <= 1), default=1.0,
        help="of the amount, a rate of the sweep; short sweeps prefer rates that are too high for the whole amount",
    )  # fmt: skip
    p.add_argument(
        "--jobs", type=integer(1, 1000), default=1,
        help="trainings side by side, each with its part of the threads; small models train more images a second so",
    )  # fmt: skip
    p.add_argument("--dataset", choices=DATASETS, default=default.dataset, help="what to learn")
    p.add_argument("--data-dir", default=default.data_dir, help="where data sets are kept; the images of `folder`")
    p.add_argument("--image-size", type=integer(4, 4096), help="resize to this side")
    p.add_argument("--output-dir", default="comparisons/images", help="where everything is written")
    p.add_argument("--batch-size", type=integer(1, 10**6), default=default.batch_size, help="images a step")
    p.add_argument("--timesteps", type=integer(2, 10**5), default=default.timesteps, help="diffusion steps T")
    p.add_argument("--schedule", choices=SCHEDULES, default=default.schedule, help="noise schedule")
    p.add_argument("--prediction-type", choices=PREDICTION_TYPES, default=default.prediction_type, help="of all arms")
    p.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of all arms")
    p.add_argument("--compile", action="store_true", help="torch.compile every arm")
    p.add_argument("--device", choices=DEVICES, default="auto", help="auto: cuda, else mps, else cpu")
    return p


def arm_costs(s: argparse.Namespace, data: ImageData, folder: Path) -> dict[str, Cost]:
    """What each arm costs, those of earlier commands among them: read from costs.csv, or measured now and kept there.

    costs.csv says whose seconds they are; the trainings may run elsewhere. An arm that it lacks, on another machine,
    makes all be measured again, save for a budget of seconds, which are one machine's own: that raises UserError.
    """
    device, path = choose_device(s.device), folder / "costs.csv"
    here, costs = machine_name(device), {cost.arm: cost for cost in read_rows(Cost, path)}
    earlier = [row.arm for name in ("sweep.csv", "comparison.csv") for row in read_rows(Result, folder / name)]
    arms = dict.fromkeys(s.arms + earlier)
    if all(arm in costs for arm in arms):
        return costs
    elsewhere = {cost.machine for cost in costs.values()} - {here}
    if elsewhere and s.budget == "seconds":
        raise UserError(f"{path}: its seconds are those of {elsewhere.pop()}, this is {here}; use another --output-dir")
    missing = {arm: arm_config(s, arm) for arm in arms if elsewhere or arm not in costs}
    print(f"measuring the speed of {', '.join(missing)}; leave the machine alone meanwhile", flush=True)
    with failures_named(folder, Processes(device), f"--batch-size {max(1, s.batch_size // 2)}"):
        rates = training_rates(missing, data, device)
    for arm, config in missing.items():
        network = build_model(config.model, **{"in_channels": data.shape[0], **config.model_config})
        forward, training = multiply_adds(network, data.shape), training_multiply_adds(network, data.shape)
        costs[arm] = Cost(arm, count_parameters(network), forward, training, rates[arm], here)
    save_rows(list(costs.values()), path)
    return costs


def main() -> None:
    """Parse, check, sweep, train, tell."""
    s = parser().parse_args()
    folder = Path(s.output_dir)
    check_writable(folder, "--output-dir")
    keep_freed_memory()
    choose_device(s.device)
    s.arms, s.lrs = list(dict.fromkeys(s.arms)), sorted(set(s.lrs))
    settings = shared_settings(s, folder)
    data = load_images(s.dataset, s.data_dir, s.image_size)
    make_folder(folder, "--output-dir")
    save_json(folder / "comparison.json", settings)
    experiment = Experiment(s, data, folder, arm_costs(s, data, folder))
    try:
        results, points = train_all(experiment)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on from here") from None

    wiener = None
    if data.train[0].numel() <= LARGEST_WIENER:
        scheduler = DDPMScheduler(s.timesteps, s.schedule, s.prediction_type)
        wiener = held_out_loss(*fit_wiener(data, scheduler), held_out_bank(data, s.timesteps))
    table = markdown(results, wiener, s.reference)
    with atomic_path(folder / "comparison.md") as temporary:
        temporary.write_text(table, encoding="utf-8")
    save_curves(results, points, folder / "curves.png")
    drawings = drawn(experiment, results)
    if drawings:
        save_labelled_rows(drawings, folder / "grid.png")
    print(table)
    for name in ("costs.csv", "comparison.csv", "sweep.csv", "curves.csv", "comparison.md", "curves.png", "grid.png"):
        if (folder / name).exists():
            print(folder / name)


def drawn(experiment: Experiment, results: list[Result]) -> dict[str, torch.Tensor]:
    """Images of every arm whose weights of seed 0 are there, all from the same noise."""
    images = {}
    for result in results:
        folders = run_folders(experiment.folder_of(Training(result.arm, result.lr, 0, 1)))
        if result.seed == 0 and folders:
            model, scheduler, about = load_model(folders[-1])
            model.to(choose_device(experiment.settings.device))
            steps = min(50, scheduler.num_timesteps)
            images[result.arm] = sample_images(model, scheduler, about["shape"], DRAWN, steps=steps)
    return images


def shared_settings(s: argparse.Namespace, folder: Path) -> dict:
    """What every training of the comparison shares. Raises UserError if the folder holds another comparison."""
    settings = {name: value for name, value in vars(s).items() if name not in OWN}
    path = folder / "comparison.json"
    if path.exists():
        try:
            before = BEFORE_THE_FLAG | json.loads(path.read_text(encoding="utf-8"))
        except (OSError, TypeError, ValueError) as error:
            raise UserError(f"{path}: not readable ({error})") from error
        for name, value in settings.items():
            if before.get(name, parser().get_default(name)) != value:  # a comparison may be from before the flag
                flag = name.replace("_", "-")
                raise UserError(f"--{flag}: {value} contradicts {path}: {before.get(name)}; use another --output-dir")
    return settings


def train_all(experiment: Experiment) -> tuple[list[Result], list[Point]]:
    """Sweep and train every arm; all results and curves of the folder, those of earlier commands among them."""
    s, folder = experiment.settings, experiment.folder
    results, sweep, points = (
        [replace(row, seconds=row.images / experiment.costs[row.arm].images_per_second) for row in rows]
        for rows in (
            read_rows(Result, folder / "comparison.csv"),
            read_rows(Result, folder / "sweep.csv"),
            read_rows(Point, folder / "curves.csv"),
        )
    )
    arms = list(dict.fromkeys([row.arm for row in (*results, *sweep)] + s.arms))

    def save(rows: list, name: str) -> None:
        if rows:
            rows.sort(key=lambda row: (arms.index(row.arm), *astuple(row)[1:]))
            save_rows(rows, folder / name)

    lrs = s.lrs if len(s.lrs) > 1 else []
    swept, trained = {(row.arm, row.lr) for row in sweep}, {(row.arm, row.seed) for row in results}
    to_sweep = [(arm, lr) for arm in s.arms for lr in lrs if (arm, lr) not in swept]
    # seed by seed, so that an interrupted comparison has as much of every arm
    to_train = [(arm, seed) for seed in range(s.seeds) for arm in s.arms if (arm, seed) not in trained]
    warn_of_short_sweeps(experiment, list(dict.fromkeys(arm for arm, _ in to_sweep)))
    total = sum(experiment.seconds(arm, s.sweep_share) for arm, _ in to_sweep)
    total += sum(experiment.seconds(arm, 1) for arm, _ in to_train)
    form = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with tqdm(total=total, bar_format=form, mininterval=1) as bar:
        trainings = [Training(arm, lr, 0, s.sweep_share) for arm, lr in to_sweep]
        for _, result, _ in run_all(experiment, trainings, bar, s.jobs):
            sweep.append(result)
            save(sweep, "sweep.csv")
        best_last = sorted(sweep, key=lambda row: row.eps_mse, reverse=True)  # of an arm's rates the last one stands
        rates = {row.arm: row.lr for row in best_last} if lrs else dict.fromkeys(s.arms, s.lrs[0])
        trainings = [Training(arm, rates[arm], seed, 1) for arm, seed in to_train]
        for training, result, curve in run_all(experiment, trainings, bar, s.jobs):
            results.append(result)
            points += curve
            save(points, "curves.csv")
            save(results, "comparison.csv")  # the last: what it has is finished
            off = result.images / experiment.images(training.arm, 1) - 1
            if abs(off) > TOLERANCE:
                bar.write(f"{training}: ended {off:+.1%} off its budget: a step is too large a part of it")
    for rows, name in ((sweep, "sweep.csv"), (points, "curves.csv"), (results, "comparison.csv")):
        save(rows, name)  # their seconds may be another machine's
    return results, points


def warn_of_short_sweeps(experiment: Experiment, arms: list[str]) -> None:
    """Say which arms' sweeps are so short that their rates are not those of the whole trainings.

    The warm-up holds a short run below its peak rate: `unet:2.4m` was best at 4e-3 in a sweep of 441 steps and learned
    nothing at that rate in 2,205.
    """
    share = experiment.settings.sweep_share
    short = [arm for arm in arms if share < 1 and experiment.steps(arm, share) < WARM_UPS * WARM_UP_STEPS]
    if short:
        print(
            f"{', '.join(short)}: over a tenth of the sweep's steps are warm-up, which hides rates that are too high "
            "for the whole; a larger --sweep-share is surer",
            flush=True,
        )


if __name__ == "__main__":
    run("compare.py", main)
