"""How a run computes: precision and compilation, chosen by timing the run's own step on this machine."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from diffusion import DDPMScheduler
from hardware import Processes, has_bf16, is_compiler_failure, synchronize
from image_data import ImageData, training_batch
from train_config import TrainConfig
from train_state import TrainState
from training_step import gradient_function

WORTHWHILE = 0.9  # a faster way is taken if its step lasts at most this share of the plain one's
ROUNDS = 8
# seconds; compiling the true model takes 30 and has been measured to save a quarter on two cores, half and more on CUDA
LONG_RUN = {"cpu": 300.0, "cuda": 60.0}


def faster(
    config: TrainConfig, state: TrainState, scheduler: DDPMScheduler, data: ImageData, here: Processes
) -> TrainConfig:
    """`config` with `auto` replaced by what is faster here, as the main process measures it; the weights stay.

    Compiling is tried if the rest of the run would otherwise last LONG_RUN seconds, and kept if it is faster.
    Raises RuntimeError from the step, out of memory for instance.
    """
    if "auto" not in (config.precision, config.compile):
        return config
    if not here.is_main:
        bf16, compiles = here.agree(0, 0)
        return replace(config, precision="bf16" if bf16 else "fp32", compile="on" if compiles else "off")
    size = config.batch_size // here.world_size
    batch = training_batch(data, scheduler.draw_timesteps, seed=0, number=0, batch_size=size, device=here.device)

    def timed(precision: str, compile_: str) -> Callable[[], object]:
        way = replace(config, precision=precision, compile=compile_, batch_size=size)
        return partial(gradient_function(state, scheduler, way, Processes(here.device)), batch)

    precisions, compile_ = [config.precision], config.compile
    if config.precision == "auto":
        precisions = ["fp32", "bf16"] if has_bf16(here.device) else ["fp32"]
    seconds = best_seconds({name: timed(name, "off") for name in precisions}, here.device)
    precision = worthwhile(seconds, precisions[0])
    if compile_ == "auto":
        compile_ = "off"
        total = config.total_steps(len(data.train))
        rest = (total - state.step) * seconds[precision] if total else 60 * config.minutes - state.seconds
        if rest >= LONG_RUN.get(here.device.type, math.inf):
            print("compiling the network, to see whether that is faster: about half a minute", flush=True)
            try:
                both = {name: timed(precision, name) for name in ("off", "on")}
                compile_ = worthwhile(best_seconds(both, here.device), "off")
            except RuntimeError as error:
                if not is_compiler_failure(error):
                    raise
                print(f"it cannot be compiled here ({str(error).splitlines()[0]})", flush=True)
    state.optimizer.zero_grad()
    here.agree(float(precision == "bf16"), float(compile_ == "on"))
    return replace(config, precision=precision, compile=compile_)


def best_seconds(steps: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """The shortest time of each step, in seconds; in turn, so that a change of the machine's speed meets all."""
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(2 + ROUNDS):  # the first ones allocate, choose kernels and compile, and are never the shortest
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            synchronize(device)
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def worthwhile(seconds: dict[str, float], plain: str) -> str:
    """The quickest way if it is clearly quicker than the plain one, else that."""
    quickest = min(seconds, key=seconds.get)
    return quickest if seconds[quickest] <= WORTHWHILE * seconds[plain] else plain
