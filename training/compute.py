"""How a run computes: `auto` precision and compilation, decided by what the processor can do and how long the run is.

The decision uses no stopwatch, so the same command on the same machine gives the same bytes. LOG.md compares it with
what a stopwatch would have chosen.
"""

from dataclasses import replace

import torch

from diffusion.scheduler import Denoiser
from images.datasets import ImageData
from kernels import native
from kernels.compilation import compiler_failure
from models import training_multiply_adds
from runtime.errors import reason
from runtime.hardware import has_bf16
from runtime.processes import Processes
from training.config import TrainConfig

# Compiling takes about half a minute on two CPU cores and up to a minute for a GPU. These lengths win it back.
LONG_WORK = 1e13  # multiply-adds of training on a CPU: about five minutes of two cores
LONG_STEPS = 6000  # steps on a GPU, where a step that is not compiled waits for its launches
LONG_MINUTES = {"cpu": 5.0, "cuda": 2.0}
LONGER_WITH_KERNELS = 6  # times: what our kernels compute is no faster when the rest is compiled (LOG.md: 0 to 7 %)


def resolved(config: TrainConfig, model: Denoiser, data: ImageData, processes: Processes) -> TrainConfig:
    """`config` with every `auto` replaced.

    Precision is bf16 where that is faster. A long run is compiled if there is a compiler. Processes that differ take
    the choice that suits them all.
    """
    precision, compile_ = config.precision, config.compile
    if precision == "auto":
        missing = processes.agree(float(not bf16_is_faster(processes.device)))[0]
        precision = "fp32" if missing else "bf16"
    if compile_ == "auto":
        worthwhile = is_long(replace(config, precision=precision), model, data, processes.device.type)
        worthwhile = not processes.agree(float(not worthwhile))[0]
        failure = compiler_failure(processes.device) if worthwhile else None
        if failure is not None and processes.is_main:
            print(f"the network is not compiled: no compiler works here ({reason(failure)})", flush=True)
        compile_ = "on" if worthwhile and not processes.agree(float(failure is not None))[0] else "off"
    return replace(config, precision=precision, compile=compile_)


def bf16_is_faster(device: torch.device) -> bool:
    """Whether to train in bf16: on a GPU or a CPU that multiplies in bf16, unless our kernels do better in fp32.

    Without a matrix unit (AMX) a processor multiplies at most twice as fast in bf16, and our convolutions need four
    times fewer products.
    """
    if device.type == "cpu" and native.available(native.FP32) and not native.available(native.AMX):
        return False
    return has_bf16(device)


def is_long(config: TrainConfig, model: Denoiser, data: ImageData, device: str) -> bool:
    """Whether the run is long enough for compiling to pay. config: with its precision decided."""
    if device not in LONG_MINUTES:
        return False
    kernels = device == "cpu" and config.precision == "fp32" and native.available(native.FP32)
    times = LONGER_WITH_KERNELS if kernels else 1
    steps = config.total_steps(len(data.train))
    if steps is None:
        return (config.minutes or 0) >= times * LONG_MINUTES[device]
    if device == "cuda":
        return steps >= LONG_STEPS
    per_image = training_multiply_adds(model, data.shape, config.coarse_first)
    return steps * config.batch_size * per_image >= times * LONG_WORK
