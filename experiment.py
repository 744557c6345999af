"""The trainings of a comparison: what they share, and each by its (arm, rate, seed, share)."""

import argparse
import csv
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from checkpoint import RESUME_FILE, run_folders
from comparison import Cost, Point, Result
from image_data import ImageData
from models import ARMS
from train_config import TrainConfig
from training import train

MEASUREMENTS = 10  # held-out losses along a training, for the curves
IMAGES_A_MEASUREMENT = 2500  # at least; measuring costs as much as training on 700 images


@dataclass(frozen=True)
class Training:
    """One training of a comparison, over a share of the budget's amount."""

    arm: str
    lr: float
    seed: int
    share: float

    def __str__(self) -> str:
        return f"{self.arm} lr {self.lr:g} seed {self.seed}"


def arm_config(s: argparse.Namespace, arm: str) -> TrainConfig:
    """What every training of an arm shares; how long, at which rate and with which seed is left open."""
    model, model_config = ARMS[arm]
    own = (
        "dataset",
        "data_dir",
        "image_size",
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
    )


@dataclass(frozen=True)
class Experiment:
    """What all trainings of a comparison share."""

    settings: argparse.Namespace
    data: ImageData
    folder: Path
    costs: dict[str, Cost]

    def images(self, arm: str, share: float) -> float:
        """How many images an arm may train on with a share of the budget."""
        budget, amount = self.settings.budget, share * self.settings.amount
        if budget == "seconds":
            return amount * self.costs[arm].images_per_second
        return amount / self.costs[arm].training_multiply_adds if budget == "flops" else amount

    def seconds(self, arm: str, share: float) -> float:
        """How long that lasts at the arm's speed."""
        return self.images(arm, share) / self.costs[arm].images_per_second

    def steps(self, arm: str, share: float) -> int:
        """How many steps that is."""
        return max(1, round(self.images(arm, share) / self.settings.batch_size))

    def config(self, training: Training) -> TrainConfig:
        """How it trains."""
        steps = self.steps(training.arm, training.share)
        images = steps * self.settings.batch_size
        measurements = min(MEASUREMENTS, max(2, images // IMAGES_A_MEASUREMENT))
        return replace(
            arm_config(self.settings, training.arm),
            steps=steps,
            lr=training.lr,
            seed=training.seed,
            output_dir=str(self.folder_of(training)),
            # of a short run its end alone counts
            sample_every=math.ceil(steps / measurements) if training.share == 1 else steps,
            save_every=math.ceil(steps / MEASUREMENTS),
        )

    def folder_of(self, training: Training) -> Path:
        """Where its run folder is made."""
        arm = training.arm.replace(":", "-").replace("=", "-")
        return self.folder / "runs" / f"{arm}-lr{training.lr:g}-seed{training.seed}-share{training.share:g}"

    def run(self, training: Training, advance: Callable[[float], object]) -> tuple[Result, list[Point]]:
        """Run a training, or go on with it; (its result, its curve). advance: told the seconds that it got further."""
        arm, seed, cost, done = training.arm, training.seed, self.costs[training.arm], 0.0
        seconds = self.seconds(arm, training.share)
        started = [path for path in run_folders(self.folder_of(training)) if (path / RESUME_FILE).exists()]

        def pass_on(progress: float) -> None:
            nonlocal done
            advance(seconds * (min(progress, 1) - done))
            done = min(progress, 1)

        resume = started[-1] if started else None
        finished = train(self.config(training), resume=resume, data=self.data, on_progress=pass_on)
        pass_on(1)
        with open(finished / "metrics.csv", newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["held_out_loss"]]
        measured = [(int(row["images"]), float(row["held_out_loss"])) for row in rows]
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
