"""How fast models train on this machine: the real training step, several models measured in turn.

    training_rates({"true": TrainConfig(...), "inspired": TrainConfig(...)}, data, torch.device("cpu"))

Nothing else may run meanwhile. In turn and several times, so that a machine that slows down meets every model.
"""

import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hardware import Processes
from image_data import ImageData
from train_config import TrainConfig
from train_state import untrained
from training_step import take_step

ROUNDS = 5
SECONDS = 1.0  # of each round, a model; a slow model's round is one step


def training_rates(configs: dict[str, TrainConfig], data: ImageData, device: torch.device) -> dict[str, float]:
    """Images a second that each config trains on, batches and moving average included: the median of ROUNDS rounds."""
    data, here = data.to(device), Processes(device)
    steps = {name: _step(config, data, here) for name, config in configs.items()}
    for step in steps.values():
        step()  # the first one compiles, allocates and chooses kernels
    rounds: dict[str, list[float]] = {name: [] for name in configs}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            count, elapsed, started = 0, 0.0, time.perf_counter()
            while elapsed < SECONDS:
                step()
                count += 1
                elapsed = time.perf_counter() - started
            rounds[name].append(count * configs[name].batch_size / elapsed)
    return {name: statistics.median(rates) for name, rates in rounds.items()}


def _step(config: TrainConfig, data: ImageData, here: Processes) -> Callable[[], None]:
    """A function that trains a new model by one step and returns when that is done."""
    scheduler, state = untrained(config, data, here.device)
    network = torch.compile(state.model) if config.compile == "on" else state.model

    def step() -> None:
        take_step(network, state, scheduler, data, config, here, progress=0.0)
        if here.device.type != "cpu":
            state.loss_sum.item()  # waits for the device

    return step


def machine_name(device: torch.device) -> str:
    """The processor and how much of it is used: `AMD EPYC 9R14, 2 threads`, `NVIDIA H100 80GB HBM3`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")  # platform.processor() is empty or "x86_64" on Linux
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    name = found.group(1) if found else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads" + (f", {device.type}" if device.type != "cpu" else "")
