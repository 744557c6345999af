"""What tests of `compare.py` share: tiny comparisons of digits."""

import contextlib
import csv
from pathlib import Path
from unittest import mock

from conftest import call

import compare
from images.batches import BANK_SIZE, held_out_bank
from lab import speed
from lab.comparison import procedure
from training import run_log

TINY = ["--dataset", "digits", "--timesteps", 8, "--batch-size", 8, "--device", "cpu"]
GOES_ON = "compare.py: interrupted: the same command goes on from here"


def compared(folder, *options, bank=50, pictures=False) -> list[dict[str, str]]:
    """The rows of comparison.csv of a tiny comparison, with few measurements on the way and quick ones of speed.

    bank: the number of held-out images; a process of its own measures BANK_SIZE.
    """
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch("lab.comparison.experiment.MEASUREMENTS", 2))
        patches.enter_context(mock.patch.multiple(speed, SECONDS=0.01, RATE_ROUNDS=5))
        patches.enter_context(mock.patch.object(run_log, "save_loss_curves"))  # a training run's own plot
        patches.enter_context(mock.patch.object(held_out_bank, "__defaults__", (bank,)))
        for picture in () if pictures else ("save_curves", "save_labelled_rows"):
            patches.enter_context(mock.patch.object(procedure, picture))
        code, _, err = call(compare, *TINY, "--output-dir", folder, *options)
    assert code == 0, err
    return table(folder / "comparison.csv")


def table(path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def small_experiment(folder: Path) -> tuple[Path, list, list[dict[str, str]]]:
    """Two arms, two seeds, two rates: (the folder, the options, the rows of comparison.csv)."""
    options = ["--arms", "inspired", "unet:38k", "--seeds", 2, "--lrs", 1e-3, 1e-2, "--amount", 160]
    options += ["--sweep-share", 0.5, "--reference", "inspired"]
    return folder, options, compared(folder, *options, bank=BANK_SIZE, pictures=True)
