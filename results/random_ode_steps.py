"""What random numbers of ODE steps in training give: the same weights, measured with other steps and solvers.

python results/random_ode_steps.py --data-dir data/cifar10-images

Two trainings of the true model on CIFAR-10 (JPEG), 60,000 images each: with its own 3/5/7 steps, and with one of
CHOICES drawn at each training step. Prints the held-out eps-MSE of both with every solver and number of steps that
`ode_work.py` has.
"""

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import models
from command_line import run
from hardware import keep_freed_memory
from image_data import held_out_bank, load_images
from liquid_diffusion import TrueLiquidDiffusionModel
from models import load_model
from ode_work import ode_work
from train_config import TrainConfig
from training import train

CHOICES = {(2, 3, 4): 0.25, (3, 5, 7): 0.5, (6, 10, 14): 0.25}
IMAGES = 60_000


class Remembered(TrueLiquidDiffusionModel):
    """The true model, which the training loop builds and keeps to itself: its steps are changed from outside."""

    last: "Remembered"

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        Remembered.last = self


def main() -> None:
    """Train both, measure both, print a line a solver."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data-dir", required=True)
    p.add_argument("--output-dir", default="runs/random-ode-steps")
    s = p.parse_args()
    keep_freed_memory()
    data = load_images("folder", s.data_dir)
    models.MODELS["true"] = Remembered
    draws = random.Random(0)  # noqa: S311
    config = TrainConfig(
        dataset="folder", data_dir=s.data_dir, output_dir=s.output_dir, device="cpu", precision="bf16", compile="on",
        epochs=None, steps=IMAGES // 8, sample_every=IMAGES // 8, save_every=IMAGES // 8, draw_grids=False,
    )  # fmt: skip
    for name, choices in (("3/5/7", {(3, 5, 7): 1.0}), ("random", CHOICES)):

        def choose(_: float, choices: dict[tuple, float] = choices) -> None:
            (steps,) = draws.choices(list(choices), list(choices.values()))
            Remembered.last.set_solver(ode_steps=steps)

        model, scheduler, _ = load_model(train(config, data=data, on_progress=choose))
        for point in ode_work(model, scheduler, held_out_bank(data, config.timesteps)):
            print(name, point["solver"], point["ode_steps"], f"{point['value']:.5f}", flush=True)


if __name__ == "__main__":
    run("random_ode_steps.py", main)
