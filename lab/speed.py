"""How fast models train on this machine: real training steps of several models, timed in turn.

    training_rates({"true": TrainConfig(...), "inspired": TrainConfig(...)}, data, torch.device("cpu"))

Nothing else should run on the machine meanwhile. The models take turns for several rounds, so that a machine that slows
down slows all of them.
"""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import TypeVar

import torch

from images.datasets import ImageData
from runtime.hardware import make_reproducible, synchronize
from runtime.processes import Processes
from training.config import TrainConfig
from training.state import untrained
from training.step import TrainStep

ROUNDS = 5
RATE_ROUNDS = 17  # of `training_rates`: a budget of seconds turns an error of the speed into one of the images
SECONDS = 1.0  # per model and round; a round has at least one step
SLOW, SLOW_ROUNDS = 10, 3  # a call that takes more than ten times as long as a round has only three rounds

Name = TypeVar("Name", bound=Hashable)


def training_rates(configs: dict[str, TrainConfig], data: ImageData, device: torch.device) -> dict[str, float]:
    """Training images per second of each config, timed over whole steps: the median of RATE_ROUNDS rounds.

    A config with `coarse_first` is timed in both parts of its run, and the seconds of a step are the mean over the run.
    """
    data, steps = data.to(device), {}
    for name, config in configs.items():
        step = train_step(config, data, device).func
        # where the parts begin; without a coarse one both are the start
        steps |= {(name, progress): partial(step, progress) for progress in (0, config.coarse_first)}
    seconds = {part: statistics.median(rounds) for part, rounds in in_turn(steps, device, rounds=RATE_ROUNDS).items()}
    rates = {}
    for name, config in configs.items():
        coarse = config.coarse_first
        rates[name] = config.batch_size / (coarse * seconds[name, 0] + (1 - coarse) * seconds[name, coarse])
    return rates


def in_turn(
    calls: Mapping[Name, Callable[[], object]],
    device: torch.device,
    seconds: float | None = None,
    *,
    rounds: int | None = None,
    warmed_up: bool = False,
) -> dict[Name, list[float]]:
    """Seconds per call, one value for each round (default: ROUNDS of them), in which the calls take turns.

    seconds: the length of a round of one call (default: SECONDS). A call that takes more than SLOW times as long has
    SLOW_ROUNDS rounds. A round ends when the device has finished its work. warmed_up: each was called before.
    """
    seconds = SECONDS if seconds is None else seconds
    for call in [] if warmed_up else calls.values():
        call()  # the first call compiles, allocates and chooses kernels
    synchronize(device)
    measured: dict[Name, list[float]] = {name: [] for name in calls}
    for turn in range(rounds or ROUNDS):
        for name, call in calls.items():
            if turn >= SLOW_ROUNDS and measured[name][0] > SLOW * seconds:
                continue
            count, elapsed, started = 0, 0.0, time.perf_counter()
            while elapsed < seconds:
                call()
                count += 1
                elapsed = time.perf_counter() - started
            synchronize(device)
            measured[name].append((time.perf_counter() - started) / count)
    return measured


def train_step(
    config: TrainConfig,
    data: ImageData,
    device: torch.device,
    *,
    processes: Processes | None = None,
    change: Callable[..., object] | None = None,
) -> partial[float]:
    """A function that trains a new model by one step, as the training loop does; a GPU may still be busy afterwards.

    It takes all ODE steps of the model, as at the end of a run. change: applied to the model before its first step.
    """
    make_reproducible(device)
    scheduler, state = untrained(config, data, device)
    if change is not None:
        change(state.model)
    step = TrainStep(config, data, scheduler, state, processes or Processes(device))
    return partial(step, config.coarse_first)  # where a coarse part has just ended
