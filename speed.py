"""How fast models train on this machine: the real training step, several models measured in turn.

    training_rates({"true": TrainConfig(...), "inspired": TrainConfig(...)}, data, torch.device("cpu"))

Nothing else may run meanwhile. In turn and several times, so that a machine that slows down meets every model.
"""

import platform
import re
import statistics
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TypeVar

import torch

from diffusion import DDPMScheduler
from hardware import Processes, make_reproducible, synchronize
from image_data import ImageData
from train_config import TrainConfig
from train_state import TrainState, untrained
from training_step import gradient_function, take_step

ROUNDS = 5
SECONDS = 1.0  # of each round, a model; a slow model's round is one step
SLOW, SLOW_ROUNDS = 10, 3  # a call that lasts ten rounds is measured in three

Name = TypeVar("Name", bound=Hashable)


def training_rates(configs: dict[str, TrainConfig], data: ImageData, device: torch.device) -> dict[str, float]:
    """Images a second that each config trains on, batches and moving average included: the median of ROUNDS rounds."""
    data, here = data.to(device), Processes(device)
    steps = {name: train_step(config, data, here, *untrained(config, data, device)) for name, config in configs.items()}
    rounds = in_turn(steps, device)
    return {name: configs[name].batch_size / statistics.median(rounds[name]) for name in configs}


def in_turn(
    calls: dict[Name, Callable[[], object]],
    device: torch.device,
    seconds: float | None = None,
    *,
    warmed_up: bool = False,
) -> dict[Name, list[float]]:
    """Seconds that each call takes, one value for each of ROUNDS rounds, in which the calls take turns.

    seconds: of a round, a call (default: SECONDS). A call that lasts SLOW rounds has SLOW_ROUNDS of them. A round ends
    when the device has done what its calls gave it. warmed_up: each has been called before.
    """
    seconds = SECONDS if seconds is None else seconds
    for call in [] if warmed_up else calls.values():
        call()  # the first one compiles, allocates and chooses kernels
    synchronize(device)
    rounds: dict[Name, list[float]] = {name: [] for name in calls}
    for turn in range(ROUNDS):
        for name, call in calls.items():
            if turn >= SLOW_ROUNDS and rounds[name][0] > SLOW * seconds:
                continue
            count, elapsed, started = 0, 0.0, time.perf_counter()
            while elapsed < seconds:
                call()
                count += 1
                elapsed = time.perf_counter() - started
            synchronize(device)
            rounds[name].append((time.perf_counter() - started) / count)
    return rounds


def train_step(
    config: TrainConfig, data: ImageData, here: Processes, scheduler: DDPMScheduler, state: TrainState
) -> Callable[[], None]:
    """A function that trains `state` by one step, as the training loop does; a GPU may still be at it."""
    make_reproducible(here.device)
    gradient = gradient_function(state, scheduler, config, here)
    return lambda: take_step(gradient, state, scheduler, data, config, here, progress=0.0)


def machine_name(device: torch.device) -> str:
    """The processor and how much of it is used: `AMD EPYC 9R14, 2 threads`, `NVIDIA H100 80GB HBM3`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")  # platform.processor() is empty or "x86_64" on Linux
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    name = found.group(1) if found else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads" + (f", {device.type}" if device.type != "cpu" else "")
