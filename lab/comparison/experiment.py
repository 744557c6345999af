"""The training runs of a comparison: what they have in common, and what identifies each one."""

import argparse
import csv
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from choices import ARM_TRAINING, ARMS
from images.datasets import ImageData
from lab.classifier.network import Classifier
from lab.comparison.verdict import Cost, Point, Result
from runtime.errors import RunFailed, UserError
from training.config import TrainConfig
from training.loop import train
from training.run_folder import RESUME_FILE, run_folders

MEASUREMENTS = 10  # held-out losses per training run, for the curves
IMAGES_PER_MEASUREMENT = 2500  # or more; a measurement costs as much as training on 700 images


# what the advice of a training run is called in compare.py
ADVICE = {
    "try a lower --lr": "try lower --lrs",
    "use --compile off": "leave out --compile",
    "--resume goes on from there": "the same command goes on from there",
    "--resume: ": "--output-dir: ",
    "--model: ": "--arms: ",
}


@contextmanager
def advice_fits() -> Iterator[None]:
    """Let the errors of a training run advise what compare.py has."""
    try:
        yield
    except (UserError, RunFailed) as error:
        message = str(error)
        for advice, ours in ADVICE.items():
            message = message.replace(advice, ours)
        raise type(error)(message) from error


@dataclass(frozen=True)
class Training:
    """One training run of a comparison. share: the fraction of the budget that it may use."""

    arm: str
    lr: float
    seed: int
    share: float

    def __str__(self) -> str:
        return f"{self.arm} lr {self.lr:g} seed {self.seed}"


def arm_config(s: argparse.Namespace, arm: str) -> TrainConfig:
    """The configuration that all runs of an arm share; `Experiment.config` adds the length, rate and seed."""
    model, model_config = ARMS[arm]
    own = (
        "dataset",
        "data_dir",
        "image_size",
        "skip_bad_images",
        "class_conditional",
        "batch_size",
        "timesteps",
        "schedule",
        "prediction_type",
        "optimizer",
        "precision",
    )
    return TrainConfig(
        model=model,
        model_config=model_config,
        **{name: getattr(s, name) for name in (*own, "device")},
        compile="on" if s.compile else "off",
        epochs=None,
        draw_grids=False,
        **ARM_TRAINING.get(arm, {}),
    )


def metrics(run: Path) -> list[dict[str, str]]:
    """The lines of a run's metrics.csv; none if it has no such file yet."""
    try:
        with open(run / "metrics.csv", newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        return []


@dataclass(frozen=True)
class Experiment:
    """What all training runs of a comparison have in common."""

    settings: argparse.Namespace
    data: ImageData
    folder: Path
    costs: dict[str, Cost]
    classifier: Classifier | str = ""  # by which samples are measured, or why none are

    def images(self, arm: str, share: float) -> float:
        """How many images an arm may train on with this share of the budget."""
        budget, amount = self.settings.budget, share * self.settings.amount
        if budget == "seconds":
            return amount * self.costs[arm].images_per_second
        return amount / self.costs[arm].training_multiply_adds if budget == "flops" else amount

    def seconds(self, arm: str, share: float) -> float:
        """How many seconds this share of the budget lasts at the speed of the arm."""
        return self.images(arm, share) / self.costs[arm].images_per_second

    def done(self, training: Training) -> float:
        """The fraction of a training run that earlier commands have done, by the last line of its metrics.csv."""
        started = self._started(training)
        rows = metrics(started[-1]) if started else []
        return min(1.0, int(rows[-1]["step"]) / self.steps(training.arm, training.share)) if rows else 0.0

    def steps(self, arm: str, share: float) -> int:
        """How many training steps this share of the budget allows, at least 1."""
        return max(1, round(self.images(arm, share) / self.settings.batch_size))

    def config(self, training: Training) -> TrainConfig:
        """The whole configuration of a training run."""
        steps = self.steps(training.arm, training.share)
        images = steps * self.settings.batch_size
        measurements = min(MEASUREMENTS, max(2, images // IMAGES_PER_MEASUREMENT))
        return replace(
            arm_config(self.settings, training.arm),
            steps=steps,
            lr=training.lr,
            seed=training.seed,
            output_dir=str(self.folder_of(training)),
            # a run on a part of the budget is measured only at its end
            sample_every=math.ceil(steps / measurements) if training.share == 1 else steps,
            save_every=math.ceil(steps / MEASUREMENTS),
        )

    def folder_of(self, training: Training) -> Path:
        """The folder in which the run folder of a training run is made."""
        arm = training.arm.replace(":", "-").replace("=", "-")
        return self.folder / "runs" / f"{arm}-lr{training.lr:g}-seed{training.seed}-share{training.share:g}"

    def _started(self, training: Training) -> list[Path]:
        """The run folders of a training run that can be resumed, oldest first."""
        return [path for path in run_folders(self.folder_of(training)) if (path / RESUME_FILE).exists()]

    def run(self, training: Training, advance: Callable[[float], object]) -> tuple[Result, list[Point]]:
        """Run or resume a training run: (its result, its curve).

        advance(seconds) is called with its progress since the last call, in seconds at the speed of the arm.
        """
        arm, seed, cost, done = training.arm, training.seed, self.costs[training.arm], self.done(training)
        seconds, started = self.seconds(arm, training.share), self._started(training)

        def pass_on(progress: float) -> None:
            nonlocal done
            progress = max(done, min(progress, 1))
            advance(seconds * (progress - done))
            done = progress

        resume = started[-1] if started else None
        with advice_fits():
            finished = train(self.config(training), resume=resume, data=self.data, on_progress=pass_on)
        assert finished is not None  # as after a dry run
        pass_on(1)
        rows = metrics(finished)
        measured = [(int(row["images"]), float(row["held_out_loss"])) for row in rows if row["held_out_loss"]]
        curve = [Point(arm, seed, images, images / cost.images_per_second, loss) for images, loss in measured]
        images, loss = measured[-1]
        result = Result(
            arm=arm,
            seed=seed,
            parameters=cost.parameters,
            multiply_adds=cost.multiply_adds,
            lr=training.lr,
            images=images,
            training_multiply_adds=float(images * cost.training_multiply_adds),
            seconds=images / cost.images_per_second,
            eps_mse=loss,
        )
        return result, curve
