"""What `compare.py` does: measure costs, sweep the learning rates, train with each seed, measure samples, and tell."""

import argparse
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

from diffusion.scheduler import DDPMScheduler
from images.batches import held_out_bank
from images.datasets import ImageData, load_images
from images.pictures import save_labelled_rows
from kernels.native import FP32, available, plain_torch
from lab.comparison.experiment import Experiment, Training, advice_fits, arm_config
from lab.comparison.jobs import bar_of_seconds, run_all
from lab.comparison.samples import classifier_and_conditions, explanation, measure_all, picture
from lab.comparison.verdict import Cost, Point, Result, markdown, read_rows, save_curves, save_rows, speeds
from lab.comparison.wiener import fit_wiener
from lab.speed import training_rates
from models import build_model, count_parameters, multiply_adds, training_multiply_adds
from runtime.errors import UserError, user_errors
from runtime.files import make_folder, save_json, save_text
from runtime.hardware import choose_device, free_memory, keep_freed_memory, machine_name, stay_within_memory
from runtime.processes import Processes
from training.loop import failures_named
from training.state import model_metadata
from training.step import WARM_UP_STEPS
from training.validation import held_out_loss

MOST_STEPS = 10**9
JOB_BYTES = 400 * 2**20  # of a process with torch, before it trains
TOLERANCE = 0.01  # the fraction of the budget by which a training may miss it without a warning
SHORTEST_SWEEP = 10 * WARM_UP_STEPS  # steps; a shorter sweep favours learning rates that are too high
LARGEST_WIENER = 4096  # values per image; up to here the eigendecomposition takes about a minute


def compare(s: argparse.Namespace, settings: dict, folder: Path) -> None:
    """Run the whole experiment, or go on with it. settings: what all its commands share, for comparison.json."""
    keep_freed_memory()
    free = free_memory()
    if s.jobs > 1 and free is not None and s.jobs * JOB_BYTES > free:
        has = f"{free / 2**30:.1f} GiB of memory are free"
        raise UserError(f"--jobs: {s.jobs} processes take {s.jobs * JOB_BYTES / 2**30:.1f} GiB and more, and {has}")
    stay_within_memory(choose_device(s.device))
    data = load_images(s.dataset, s.data_dir, s.image_size, skip_bad_images=s.skip_bad_images)
    make_folder(folder, "--output-dir")
    before = settings.get("distances", {})
    classifier, conditions = classifier_and_conditions(s, data, folder / "comparison.csv", before)
    settings |= {"distances": conditions} if conditions else {}
    save_json(folder / "comparison.json", settings)
    experiment = Experiment(s, data, folder, arm_costs(s, data, folder), classifier)
    check_length(experiment)
    if isinstance(classifier, str):
        print(f"FD and KID are not measured: {classifier}", flush=True)
    try:
        results, points = train_all(experiment)
        measure_all(experiment, results)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on from here") from None

    wiener = None
    if data.train[0].numel() <= LARGEST_WIENER:
        scheduler = DDPMScheduler(s.timesteps, s.schedule, s.prediction_type)
        wiener = held_out_loss(*fit_wiener(data, scheduler), held_out_bank(data, s.timesteps))
    table = markdown(results, wiener, s.reference) + explanation(results, s, conditions)
    table += speeds(experiment.costs, dict.fromkeys(r.arm for r in results))
    save_text(folder / "comparison.md", table)
    save_curves(results, points, folder / "curves.png")
    drawings = picture(experiment, results)
    if drawings:
        save_labelled_rows(drawings, folder / "grid.png")
    print(table)
    for name in ("costs.csv", "comparison.csv", "sweep.csv", "curves.csv", "comparison.md", "curves.png", "grid.png"):
        if (folder / name).exists():
            print(folder / name)


def arm_costs(s: argparse.Namespace, data: ImageData, folder: Path) -> dict[str, Cost]:
    """What each arm of this and earlier commands costs: read from costs.csv, or measured now and added to it.

    costs.csv names the machine whose speeds it has; the training runs may be elsewhere. If an arm is missing and this
    is another machine, all arms are measured again. With a budget of seconds that raises UserError instead, since
    seconds belong to one machine.
    """
    device, table = choose_device(s.device), folder / "costs.csv"
    machine, costs = machine_name(device), {cost.arm: cost for cost in read_rows(Cost, table)}
    earlier = [row.arm for name in ("sweep.csv", "comparison.csv") for row in read_rows(Result, folder / name)]
    arms = dict.fromkeys(s.arms + earlier)
    if all(arm in costs for arm in arms):
        return costs
    elsewhere = {cost.machine for cost in costs.values()} - {machine}
    if elsewhere and s.budget == "seconds":
        measured = f"its speeds were measured on {elsewhere.pop()}, and this is {machine}"
        raise UserError(f"{table}: {measured}; use another --output-dir")
    missing = {arm: arm_config(s, arm) for arm in arms if elsewhere or arm not in costs}
    print(f"measuring the speed of {', '.join(missing)}; leave the machine alone meanwhile", flush=True)
    smaller = f"--batch-size {s.batch_size // 2}" if s.batch_size > 1 else "a smaller --image-size"
    with advice_fits(), failures_named(folder, Processes(device), smaller), user_errors("--arms"):
        rates = plain = training_rates(missing, data, device)
        if device.type == "cpu" and s.precision == "fp32" and available(FP32):
            with plain_torch():
                plain = training_rates(missing, data, device)
    for arm, config in missing.items():
        network = build_model(config.model, **model_metadata(config, data)["model_config"])
        forward = multiply_adds(network, data.shape)
        training = training_multiply_adds(network, data.shape, config.coarse_first)
        costs[arm] = Cost(arm, count_parameters(network), forward, training, rates[arm], machine, plain[arm])
    save_rows(list(costs.values()), table)
    return costs


def train_all(experiment: Experiment) -> tuple[list[Result], list[Point]]:
    """Sweep and train every arm; returns all results and curves of the folder, also those of earlier commands."""
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
    # seed by seed, so that an interrupted comparison has got equally far with every arm
    to_train = [(arm, seed) for seed in range(s.seeds) for arm in s.arms if (arm, seed) not in trained]
    warn_of_short_sweeps(experiment, list(dict.fromkeys(arm for arm, _ in to_sweep)))
    # where the sweep has the whole amount, its best run is that of the first seed
    swept_whole = lrs and s.sweep_share == 1
    left = [Training(arm, lr, 0, s.sweep_share) for arm, lr in to_sweep]
    left += [
        max((Training(arm, lr, seed, 1) for lr in s.lrs), key=experiment.done)  # one of them may have begun
        for arm, seed in to_train
        if seed or not swept_whole
    ]
    total = sum(experiment.seconds(one.arm, one.share) * (1 - experiment.done(one)) for one in left)
    with bar_of_seconds(total) as bar:
        trainings = [Training(arm, lr, 0, s.sweep_share) for arm, lr in to_sweep]
        for _, (result, _) in run_all(Experiment.run, experiment, trainings, bar, s.jobs):
            sweep.append(result)
            save(sweep, "sweep.csv")
        rates: dict[str, Any] = dict.fromkeys(s.arms, s.lrs[0])
        if lrs:  # of the rows of one arm the last, which is its best, is kept
            rates = {row.arm: row.lr for row in sorted(sweep, key=lambda row: row.eps_mse, reverse=True)}
        trainings = [Training(arm, rates[arm], seed, 1) for arm, seed in to_train]
        for training, (result, curve) in run_all(Experiment.run, experiment, trainings, bar, s.jobs):
            results.append(result)
            points += curve
            save(points, "curves.csv")
            save(results, "comparison.csv")  # last, since what it lists counts as finished
            off = result.images / experiment.images(training.arm, 1) - 1
            if abs(off) > TOLERANCE:
                bar.write(f"{training}: missed its budget by {off:+.1%}, because one step is a large part of it")
    for rows, name in ((sweep, "sweep.csv"), (points, "curves.csv"), (results, "comparison.csv")):
        save(rows, name)  # the speeds may have been measured again
    return results, points


def check_length(experiment: Experiment) -> None:
    """Raise UserError if a training run of the budget would have more steps than train.py takes."""
    s = experiment.settings
    for arm in s.arms:
        steps = experiment.steps(arm, 1)
        if steps > MOST_STEPS:
            raise UserError(f"--amount: {s.amount:g} {s.budget} are {steps:,} steps of {arm}; at most {MOST_STEPS:,}")


def warn_of_short_sweeps(experiment: Experiment, arms: list[str]) -> None:
    """Say which arms' sweeps are so short that they may choose learning rates that are too high for the whole run.

    The warm-up keeps a short run below its peak rate: `unet:2.4m` was best at 4e-3 in a sweep of 441 steps, and learned
    nothing at that rate in 2,205 steps.
    """
    fraction = experiment.settings.sweep_share
    short = [arm for arm in arms if fraction < 1 and experiment.steps(arm, fraction) < SHORTEST_SWEEP]
    if short:
        print(
            f"{', '.join(short)}: over a tenth of the sweep's steps are warm-up, which hides learning rates that are "
            "too high for the whole run; a larger --sweep-share is safer",
            flush=True,
        )
