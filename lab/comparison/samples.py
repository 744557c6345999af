"""What the arms of a comparison draw: a picture of all arms, and how far many samples are from held-out images.

All arms draw from the same noise, by DPM-Solver++, with the averaged weights that a training run ends with.
"""

import argparse
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from diffusion.sampling import Guidance, sample_images
from diffusion.scheduler import DDPMScheduler
from images.batches import to_uint8
from images.datasets import ImageData
from lab.classifier.network import Classifier
from lab.comparison.experiment import Experiment, Training
from lab.comparison.jobs import bar_of_seconds, run_all
from lab.comparison.verdict import Result, read_rows, save_rows, with_figure
from lab.evaluation.by_classifier import classifier_or_reason, distances
from lab.evaluation.report import finite
from runtime.command_line import spelled
from runtime.errors import UserError
from runtime.hardware import choose_device, make_reproducible, out_of_memory_named
from training.checkpoint import load_model
from training.run_folder import MODEL_FILE, run_folders

MOST_STEPS = 50  # timesteps that an image is drawn in
FORMER = {"guided_share": 1.0, "eps_scale": 1.0}  # how a comparison drew that does not say it
IN_PICTURE = 10  # images of each arm in grid.png
HOW = ("guidance", "guided_share", "eps_scale")  # the flags that say how an arm draws


def classifier_and_conditions(
    s: argparse.Namespace, data: ImageData, table: Path, before: dict
) -> tuple[Classifier | str, dict]:
    """(the classifier in whose features samples are measured, all that their FD depends on beside the weights).

    table: comparison.csv. before: the conditions under which FDs in it were measured. (the reason, before) if no more
    are to be measured. Raises UserError if the conditions are others than those of the FDs in the table, which can only
    be compared under the same.
    """
    before = before and FORMER | before
    if s.num_images == 0:
        return "not asked for (--num-images 0)", before
    classifier, path = classifier_or_reason(s.classifier, data)
    if isinstance(classifier, str) or path is None:
        return classifier, before
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    now = {name: getattr(s, name) for name in ("num_images", *HOW)} | {"classifier": digest}
    for name, value in now.items() if with_figure(read_rows(Result, table), "fd") else ():
        if before.get(name, value) != value:
            others = f"FD and KID in {table} were measured with another"
            raise UserError(f"{spelled(name)}: {others}; use another --output-dir, or --num-images 0")
    return classifier, now


def explanation(results: Sequence[Result], s: argparse.Namespace, conditions: dict) -> str:
    """A paragraph on what the FD in a table is; nothing if there is none."""
    if not conditions or not with_figure(results, "fd"):
        return ""
    count = conditions["num_images"]
    text = (
        f"FD: squared Frechet distance of {count:,} samples of each training run from held-out images, in the features "
        "of our classifier; it is not FID. KID is in comparison.csv. The samples are drawn by DPM-Solver++ in "
        f"{min(MOST_STEPS, s.timesteps)} steps, from the noise of seeds 0 to {count - 1:,}"
    )
    if s.class_conditional:
        where = f"the cleaner {100 * conditions['guided_share']:g} % of the timesteps"
        text += f", of all classes in turns, with guidance {conditions['guidance']:g} in {where}; `recognised` is the "
        text += "share that the classifier reads as the class asked for"
    return f"\n{text}. Each predicted eps is divided by {conditions['eps_scale']:g}.\n"


def weights(experiment: Experiment, training: Training) -> Path | None:
    """The run folder with the weights of a finished training run; None if they are gone."""
    folders = run_folders(experiment.folder_of(training))
    return next((path for path in reversed(folders) if (path / MODEL_FILE).exists()), None)


def draw(
    experiment: Experiment, run: Path, count: int, on_step: Callable[[int, Tensor], object] | None = None
) -> tuple[Tensor, Tensor | None]:
    """(images in [-1, 1] from the noise of seeds 0 to count - 1, the classes asked for, which take turns, or None)."""
    model, scheduler, config = load_model(run)
    model.to(choose_device(experiment.settings.device)).to(memory_format=torch.channels_last)
    asked = torch.arange(count) % model.num_classes if model.num_classes else None
    s = experiment.settings
    how = {"steps": min(MOST_STEPS, scheduler.num_timesteps), "guidance": guidance(s), "eps_scale": s.eps_scale}
    return sample_images(model, scheduler, config["shape"], count, labels=asked, on_step=on_step, **how), asked


def guidance(s: argparse.Namespace) -> Guidance:
    """What the flags say."""
    return Guidance(s.guidance, between=(0.0, s.guided_share))


def picture(experiment: Experiment, results: Sequence[Result]) -> dict[str, Tensor]:
    """Images of every arm whose weights of seed 0 are in the folder."""
    runs = {
        result.arm: weights(experiment, Training(result.arm, result.lr, 0, 1)) for result in results if not result.seed
    }
    return {arm: draw(experiment, run, IN_PICTURE)[0] for arm, run in runs.items() if run is not None}


def seconds(experiment: Experiment, arm: str) -> float:
    """About how long it takes to draw the samples of a training run; a forward pass is a third of a training step."""
    s = experiment.settings
    timesteps = DDPMScheduler(s.timesteps).timesteps(min(MOST_STEPS, s.timesteps))
    calls = s.num_images * guidance(s).calls(timesteps, s.timesteps)
    return calls / (3 * experiment.costs[arm].images_per_second)


def measure(experiment: Experiment, training: Training, advance: Callable[[float], object]) -> dict[str, float]:
    """The `fd`, `kid` and, with classes, `recognised` of a finished training run, whose weights are in the folder.

    advance(seconds) is called as in `Experiment.run`.
    """
    run, s = weights(experiment, training), experiment.settings
    assert run is not None and isinstance(experiment.classifier, Classifier)  # as the caller has seen
    device = choose_device(s.device)
    make_reproducible(device)
    each = seconds(experiment, training.arm) / (s.num_images * min(MOST_STEPS, s.timesteps))
    with out_of_memory_named(0, "--num-images 0, which measures no samples"):
        images, asked = draw(experiment, run, s.num_images, lambda _, x_0: advance(each * len(x_0)))
        finite(images.sum().item(), f"the sum of the samples of {training}")
        return distances(to_uint8(images), asked, experiment.data, experiment.classifier.to(device))


def measure_all(experiment: Experiment, results: list[Result]) -> None:
    """Measure the samples of all runs that are not measured yet and whose weights are there; `results` are changed."""
    s, places = experiment.settings, {}
    for i, row in enumerate(results if isinstance(experiment.classifier, Classifier) else []):
        training = Training(row.arm, row.lr, row.seed, 1)
        if math.isnan(row.fd) and weights(experiment, training) is not None:
            places[training] = i
    if not places:
        return
    print(f"drawing {s.num_images:,} images with the weights of each training run", flush=True)
    trainings = sorted(places, key=lambda training: training.seed)
    total = sum(seconds(experiment, training.arm) for training in trainings)
    with bar_of_seconds(total) as bar:
        for training, found in run_all(measure, experiment, trainings, bar, s.jobs):
            results[places[training]] = replace(results[places[training]], **found)
            save_rows(results, experiment.folder / "comparison.csv")
