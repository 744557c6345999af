"""What `benchmark.py` measures: one function per section, which returns this section of the report.

Whatever a section compares is timed in turn (`speed.in_turn`). A time is the median over rounds, in seconds per call.
"""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from choices import ARMS
from diffusion.sampling import sample_images
from diffusion.scheduler import DDPMScheduler
from kernels.compilation import compiled, compiler_failure, is_compiler_failure
from kernels.native import AMX, FP32, available, plain_torch
from lab.benchmark import convolutions, kernels, peers
from lab.benchmark.processes import one_against_two, peak_memory, sampling_command, synthetic_images
from lab.speed import in_turn, train_step
from liquid_diffusion import TrueLiquidDiffusionModel
from models import build_model, count_parameters, multiply_adds
from runtime.errors import reason
from runtime.hardware import has_bf16, is_out_of_memory
from training.config import TrainConfig

GROWING = ("true", "inspired", "unet:38k")  # timed at each size, and compiled anew for it
SMALL = (*GROWING, "unet:150k")
LARGE = "unet:35.7m"  # the network of DDPM
BATCHES = (8, 32, 128, 512)
KERNEL_BATCHES = (8, 64)
SIDES = (16, 32, 64)
ODE_STEPS = ((1, 1, 1), (3, 5, 7), (6, 10, 14), (12, 20, 28))
SAMPLES, SAMPLING_STEPS = 64, 50
LONGEST_SAMPLING = 30.0  # seconds; slower models are timed over fewer of the equal steps, and the time is scaled


@dataclass(frozen=True)
class Variant:
    """A way to run a model on this machine."""

    precision: str
    compile: bool
    plain: bool = False  # by torch alone, without our C++ kernels

    def __str__(self) -> str:
        return self.precision + ", compiled" * self.compile + ", plain torch" * self.plain

    def run(self, call: Callable[[], object]) -> Callable[[], object]:
        """The call, which has this precision and compilation itself, with or without our kernels."""
        return plain_torch()(call) if self.plain else call


@dataclass
class Bench:
    """What all measurements of a run have in common, and the fastest variant found for training each arm."""

    device: torch.device
    batch_size: int
    side: int
    seconds: float
    variants: list[Variant]
    best: dict[str, Variant] = field(default_factory=dict)

    @property
    def readings(self) -> list[Variant]:
        """The variants, and again by plain torch those for which this machine has kernels of ours."""
        libraries = {"fp32": FP32, "bf16": AMX} if self.device.type == "cpu" else {}
        twice = [v for v in self.variants if v.precision in libraries and available(libraries[v.precision])]
        return self.variants + [replace(v, plain=True) for v in twice]

    def config(self, arm: str, variant: Variant, batch_size: int | None = None, **model_config) -> TrainConfig:
        """The configuration for training an arm on synthetic images."""
        name, own = ARMS[arm]
        return TrainConfig(
            model=name,
            model_config=own | model_config,
            dataset="synthetic",
            batch_size=batch_size or self.batch_size,
            device=self.device.type,
            precision=variant.precision,
            compile="on" if variant.compile else "off",
        )

    def step(self, config: TrainConfig, side: int | None = None, change: Callable[..., object] | None = None):
        """A function that trains a new model by one step; change: applied to the model before its first step."""
        return train_step(config, synthetic_images(side or self.side).to(self.device), self.device, change=change)


def measured(calls: dict, bench: Bench) -> dict:
    """Time calls in turn: for each {"seconds": the median, "rounds"}, or {"reason"} if it fails on this machine."""
    report, working = {}, {}
    for name, call in calls.items():
        try:
            call()
            working[name] = call
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) and not is_compiler_failure(error):
                raise
            what = "out of memory" if is_out_of_memory(error) else f"compiling: {reason(error)}"
            report[name] = {"reason": what}
    for name, rounds in in_turn(working, bench.device, bench.seconds, warmed_up=True).items():
        report[name] = {"seconds": statistics.median(rounds), "rounds": rounds}
    return report


def by_variant(calls: dict, bench: Bench) -> dict[str, dict]:
    """Time calls {(name, variant): call} in turn: for each name its fastest variant, the seconds, and all variants.

    Those by plain torch are no variants that a user runs: they have a fastest one of their own, under "plain".
    """
    found, report = measured({(name, v): v.run(call) for (name, v), call in calls.items()}, bench), {}
    for name in dict.fromkeys(name for name, _ in calls):
        variants = {variant: found[name, variant] for other, variant in calls if other == name}
        as_run = [v for v in variants if not v.plain]
        report[name] = fastest(variants, as_run)
        if len(as_run) < len(variants):
            # a variant for which there is no kernel is plain torch already
            without = [v for v in variants if replace(v, plain=True) == v or replace(v, plain=True) not in variants]
            report[name]["plain"] = fastest(variants, without)
        report[name]["variants"] = {str(variant): value for variant, value in variants.items()}
    return report


def fastest(times: dict[Variant, dict], among: list[Variant]) -> dict:
    """The name and the seconds of the fastest variant among these; None if none of them works here."""
    best = min((v for v in among if "seconds" in times[v]), key=lambda v: times[v]["seconds"], default=None)
    return {"best": best and str(best), "seconds": best and times[best]["seconds"]}


def measure_train(bench: Bench) -> dict:
    """Training steps of every arm, as everybody runs them and by plain torch."""
    report = {}
    calls = {(arm, v): bench.step(bench.config(arm, v)) for arm in (*SMALL, LARGE) for v in bench.readings}
    for arm, found in by_variant(calls, bench).items():
        model = build_model(ARMS[arm][0], **ARMS[arm][1])
        for part in both_readings(found):
            part["images_per_second"] = part["seconds"] and bench.batch_size / part["seconds"]
        report[arm] = {
            "parameters": count_parameters(model),
            "multiply_adds": multiply_adds(model, (3, bench.side, bench.side)),
            **found,
        }
        if found["best"]:
            bench.best[arm] = next(v for v in bench.variants if str(v) == found["best"])
    return report


def both_readings(found: dict) -> list[dict]:
    """Of what `by_variant` found for a name: as everybody runs it, and by plain torch if that was timed."""
    return [found, *([found["plain"]] if "plain" in found else [])]


def measure_sampling(bench: Bench) -> dict:
    """Sampling of SAMPLES images in SAMPLING_STEPS steps, by every arm, as everybody runs it and by plain torch."""
    scheduler, shape = DDPMScheduler(), (3, bench.side, bench.side)
    networks = {}
    for arm in (*SMALL, LARGE):
        model = build_model(ARMS[arm][0], **ARMS[arm][1]).to(bench.device).to(memory_format=torch.channels_last).eval()
        networks |= {(arm, v): compiled(model) if v.compile else model for v in bench.readings}

    def sampling(arm: str, variant: Variant, steps: int) -> Callable[[], None]:
        def draw() -> None:
            with torch.autocast(bench.device.type, torch.bfloat16, enabled=variant.precision == "bf16"):
                sample_images(networks[arm, variant], scheduler, shape, SAMPLES, steps=steps, batch_size=SAMPLES)

        return draw

    steps = {}
    for arm in (*SMALL, LARGE):
        trial = sampling(arm, bench.variants[0], 2)
        trial()
        started = time.perf_counter()
        trial()
        whole = SAMPLING_STEPS / 2 * (time.perf_counter() - started)
        steps[arm] = max(2, min(SAMPLING_STEPS, int(SAMPLING_STEPS * LONGEST_SAMPLING / whole)))
    report = by_variant({(arm, v): sampling(arm, v, steps[arm]) for arm, v in networks}, bench)
    for arm, found in report.items():
        found["steps_timed"] = steps[arm]
        for part in both_readings(found):
            part["seconds"] = part["seconds"] and SAMPLING_STEPS / steps[arm] * part["seconds"]
            part["images_per_second"] = part["seconds"] and SAMPLES / part["seconds"]
    return {"images": SAMPLES, "steps": SAMPLING_STEPS, "sampler": "dpmpp", "arms": report}


def measure_peers(bench: Bench) -> dict:
    """Forward and backward pass of the detail cell, and training steps of the whole model, beside the alternatives."""
    torch.manual_seed(0)
    model = TrueLiquidDiffusionModel()
    ours = peers.detail_cell(model.to(bench.device).to(memory_format=torch.channels_last))
    theirs = peers.detail_cell(peers.drive_by_torchdiffeq(copy.deepcopy(model)))
    inputs = peers.cell_inputs(ours, bench.batch_size, bench.side, bench.device)
    units, width = ours.recurrent.out_channels, inputs[0].shape[1]
    cells: dict[str, tuple[nn.Module, tuple]] = {"ours": (ours, inputs), "torchdiffeq": (theirs, inputs)}
    for kind in peers.PIXELS:
        pixels = (peers.as_pixels(inputs[0], kind),)
        cells[f"ncps {kind}"] = peers.PixelCell(kind, width, units, ours.num_steps).to(bench.device), pixels
    calls = {
        (name, v): peers.forward_backward(compiled(cell) if v.compile else cell, x, v.precision)
        for name, (cell, x) in cells.items()
        for v in bench.variants
    }
    report = by_variant(calls, bench)
    all_pixels = bench.batch_size * bench.side**2
    for name, part in report.items():
        timed = len(cells[name][1][0]) if name.startswith("ncps") else all_pixels
        part |= {"pixels_timed": timed, "seconds": part["seconds"] and part["seconds"] * all_pixels / timed}
    steps = {
        (name, v): bench.step(bench.config("true", v), change=change)
        for name, change in (("ours", None), ("torchdiffeq", peers.drive_by_torchdiffeq))
        for v in bench.variants
    }
    return {
        "cell": {"inputs": width, "units": units, "ode_steps": ours.num_steps, "pixels": all_pixels, "peers": report},
        "train_step": by_variant(steps, bench),
        "torchdiffeq_largest_difference": peers.largest_difference(ours, theirs, inputs),
    }


def measure_convolutions(bench: Bench) -> dict:
    """Training steps over three measures: their convolutions alone, the matrix rate, and the copy bandwidth."""
    precision = "bf16" if has_bf16(bench.device) else "fp32"
    rates = {p: convolutions.matrix_rate(bench.device, p, bench.seconds) for p in dict.fromkeys(("fp32", precision))}
    bandwidth = convolutions.copy_bandwidth(bench.device, bench.seconds)
    report = {"matrix_multiply_adds_per_second": rates, "copy_bytes_per_second": bandwidth, "arms": {}}
    for arm in (arm for arm in (*SMALL, LARGE) if arm in bench.best):
        model, shape = build_model(ARMS[arm][0], **ARMS[arm][1]), (3, bench.side, bench.side)
        counts = convolutions.convolutions(model, shape, bench.batch_size)
        step = {"": bench.step(bench.config(arm, bench.best[arm]))}
        rounds = in_turn(step, bench.device, bench.seconds)[""]
        alone, table = convolutions.seconds_alone(counts, bench.device, bench.seconds / 10)
        rounds += in_turn(step, bench.device, bench.seconds)[""]  # again, in case the machine has slowed down
        # the rest are linear layers and attention, whose backward pass costs two forward passes
        rest = bench.batch_size * multiply_adds(model, shape) - sum(n * c.multiply_adds for c, n in counts.items())
        work = 3 * rest + sum(n * c.training_multiply_adds for c, n in counts.items())
        moved = sum(n * c.training_bytes(precision) for c, n in counts.items())
        seconds = statistics.median(rounds)
        report["arms"][arm] = {
            "variant": str(bench.best[arm]),
            "seconds_a_step": seconds,
            "rounds": rounds,
            "convolutions_seconds": alone,
            "step_over_convolutions": seconds / alone,
            "multiply_adds_a_step": work,
            "step_over_matrix_rate": seconds * max(rates.values()) / work,
            "convolution_bytes_a_step": moved,
            "step_over_copy_bandwidth": seconds * bandwidth / moved,
            "convolutions": table,
        }
    return report


def measure_kernels(bench: Bench) -> dict:
    """Our C++ kernels against torch on a CPU in fp32: the liquid cells, their inputs, and the plain convolutions."""
    if bench.device.type != "cpu":
        return {"reason": "they are written for CPUs"}
    if not available(FP32):
        return {"reason": "no C++ compiler works here"}
    compile_ = any(v.compile for v in bench.variants) and compiler_failure(bench.device) is None
    seconds = bench.seconds / 10  # there are many calls
    return {
        "cells": kernels.cells(bench.side, KERNEL_BATCHES, seconds, compile_),
        "largest_errors": kernels.largest_errors(bench.side),
        "arms": kernels.layers([arm for arm in SMALL if arm != "true"], bench.side, bench.batch_size, seconds),
    }


def measure_growth(bench: Bench) -> dict:
    """Training speed by batch size, image size and number of ODE steps, with each arm in its fastest variant."""
    arms = [arm for arm in GROWING if arm in bench.best]

    def rates(batch_size: int, side: int) -> dict:
        torch._dynamo.reset()  # compile every size by itself, and keep nothing of the last one
        found = measured({arm: bench.step(bench.config(arm, bench.best[arm], batch_size), side) for arm in arms}, bench)
        for part in found.values():
            if "seconds" in part:
                part["images_per_second"] = batch_size / part["seconds"]
        return found

    report = {
        "variants": {arm: str(bench.best[arm]) for arm in arms},
        "batch_size": {str(batch_size): rates(batch_size, bench.side) for batch_size in BATCHES},
        "image_side": {str(side): rates(bench.batch_size, side) for side in SIDES},
    }
    torch._dynamo.reset()
    if "true" in bench.best:
        steps = {n: bench.step(bench.config("true", bench.best["true"], ode_steps=n)) for n in ODE_STEPS}
        report["ode_steps"] = {" ".join(map(str, n)): part for n, part in measured(steps, bench).items()}
    return report


def measure_memory(bench: Bench) -> dict:
    """Peak memory of a training step of every arm, each in a process of its own."""
    precisions = dict.fromkeys(variant.precision for variant in bench.variants)
    return {
        arm: {
            p: peak_memory(bench.config(arm, Variant(p, False)), bench.side, torch.get_num_threads())
            for p in precisions
        }
        for arm in (*SMALL, LARGE)
    }


def measure_processes(bench: Bench) -> dict:
    """Training of the true model by one process against two."""
    if bench.batch_size < 2:
        return {"reason": "a batch of one image cannot be divided"}
    if "true" not in bench.best:
        return {"reason": "the true model does not train here"}
    variant = Variant(bench.best["true"].precision, False)
    seconds = measured({"": bench.step(bench.config("true", variant))}, bench)[""]["seconds"]
    steps = max(1, round(5 * bench.seconds / seconds))
    return one_against_two(bench.config("true", variant), bench.side, torch.get_num_threads(), steps)


def measure_start(bench: Bench) -> dict:
    """The whole command `sample.py`."""
    return sampling_command(bench.device.type)


SECTIONS: dict[str, Callable[[Bench], dict]] = {
    "train": measure_train,
    "sampling": measure_sampling,
    "peers": measure_peers,
    "convolutions": measure_convolutions,
    "kernels": measure_kernels,
    "growth": measure_growth,
    "memory": measure_memory,
    "processes": measure_processes,
    "start": measure_start,
}
