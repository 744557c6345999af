"""What a run prints before it trains: device, model, data, length, and whatever has changed since it was started."""

import math
from dataclasses import replace
from pathlib import Path

import torch

from diffusion.scheduler import Denoiser
from images.datasets import ImageData
from kernels import native
from models import count_parameters, multiply_adds
from runtime.errors import UserError
from runtime.processes import Processes
from training.config import TrainConfig
from training.run_folder import CONFIG_FILE, read_config
from training.state import TrainState
from training.step import learning_rate

SKIPPED_SHOWN = 3
CLASSES_SHOWN = 12


def description(config: TrainConfig, data: ImageData, model: Denoiser, processes: Processes, run: Path) -> str:
    """What is about to run, in a few lines."""
    device = processes.device.type
    where = device if processes.world_size == 1 else f"{processes.world_size} x {device}"
    if device == "cpu":
        where += f", {torch.get_num_threads()} threads"
    shape = "x".join(map(str, data.shape))
    steps = config.total_steps(len(data.train))
    budget = f"{config.minutes:g} minutes" if steps is None else f"{steps:,} steps"
    macs = multiply_adds(model, data.shape)
    how = [config.precision] + ["compiled"] * (config.compile == "on")
    if device == "cpu":
        how += kernels_used(config)
    knows = f", {len(data.classes)} classes" if config.class_conditional else ""
    size = f"{count_parameters(model):,} parameters, {macs:,} multiply-adds per forward pass"
    coarse = f"ode      half of its steps in the first {100 * config.coarse_first:g} % of the run, then all of them"
    lines = [
        f"device   {where}, {', '.join(how)}",
        f"model    {config.model}{knows}: {size}",
        *([coarse] if config.coarse_first else []),
        f"data     {config.dataset}: {len(data.train):,} images {shape}, {len(data.held_out):,} held out",
        *([f"classes  {listed(data.images_per_class())}"] if config.dataset == "folder" else []),
        *(f"note     {note}" for note in data.notes),
        *(f"skipped  {line}" for line in data.skipped[:SKIPPED_SHOWN]),
        f"budget   {budget} of {config.batch_size} images, seed {config.seed}",
        f"output   {run}",
    ]
    if len(data.skipped) > SKIPPED_SHOWN:
        lines.insert(-2, f"         {len(data.skipped):,} images in all; {CONFIG_FILE} lists them")
    return "\n".join(lines)


def kernels_used(config: TrainConfig) -> list[str]:
    """Whether our C++ computes part of this model, or why it could but does not."""
    bf16 = config.precision == "bf16"
    if bf16 and config.model == "unet":  # our convolutions are for fp32
        return []
    if not native.available(native.FP32):
        return [native.NOT_COMPILED]
    amx = bf16 and config.model == "true" and native.available(native.AMX)
    return ["C++ kernels with AMX" if amx else "C++ kernels"]


def changes_since(run: Path, data: ImageData) -> list[str]:
    """A line that says so, if the images of a folder are not those that the run to resume has seen."""
    try:
        before = read_config(run)["folder"]["pixels"]
    except (KeyError, TypeError, UserError):  # a run from before this was recorded
        return []
    return [] if before == data.fingerprint() else [f"the images are not those that {run} was trained on until now"]


def listed(images_per_class: dict[str, int]) -> str:
    """The classes with their numbers of training images, as far as a line has room."""
    shown = [f"{name} {count:,}" for name, count in list(images_per_class.items())[:CLASSES_SHOWN]]
    more = len(images_per_class) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more; {CONFIG_FILE} lists them" if more else "")


def rate_jump(run: Path, config: TrainConfig, state: TrainState, num_images: int) -> str:
    """A line on the jump of the learning rate in a run that goes on with another length than it had; else nothing."""
    if not (run / CONFIG_FILE).exists():
        return ""
    saved = read_config(run)["train"]
    lengths = {name: saved.get(name) for name in ("epochs", "steps", "minutes")}
    before, after = (
        learning_rate(config.lr, state.step, min(1, each.progress(state.step, state.seconds, num_images)))
        for each in (replace(config, **lengths), config)
    )
    if math.isclose(before, after, rel_tol=0.01):
        return ""
    way, end = ("up again", "later") if after > before else ("down", "sooner")
    return f"rate     the learning rate goes {way}, from {before:.3g} to {after:.3g}: its schedule now ends {end}\n"
