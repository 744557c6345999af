"""Measurements in processes of their own: peak memory, one process against two, and a whole command."""

import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
import torch.multiprocessing

from images.datasets import ImageData
from lab.speed import train_step
from runtime.errors import RunFailed
from runtime.hardware import is_out_of_memory, keep_freed_memory
from runtime.processes import join_processes
from training.config import TrainConfig

ROUNDS = 3
ROOT = Path(__file__).resolve().parents[2]


@lru_cache(maxsize=4)
def synthetic_images(side: int, count: int = 2**14) -> ImageData:
    """Random uint8 images (count, 3, side, side), since the cost of a step does not depend on what they show.

    There are so many that the order of an epoch, which is drawn on the CPU, is drawn about as rarely as on real data.
    """
    images = torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(count, dtype=torch.long)
    return ImageData("synthetic", images, labels, images[:1], labels[:1], ("none",), mirror=True)


def peak_memory(config: TrainConfig, side: int, threads: int) -> dict:
    """Peak memory of training in a new process: {"peak_bytes", "step_bytes"}, or {"reason"} if it does not fit.

    "peak_bytes" counts the whole process on a CPU, and the tensors on a GPU. "step_bytes" is how much more that is than
    the peak of a small model of the same kind on one image, for which the same libraries are loaded.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        try:
            return pool.submit(_peak_memory, config, side, threads).result()
        except BrokenProcessPool:
            return {"reason": "the process was killed, probably because memory ran out"}


def _peak_memory(config: TrainConfig, side: int, threads: int) -> dict:
    torch.set_num_threads(threads)
    keep_freed_memory()
    device, data = torch.device(config.device), synthetic_images(side, 1024)
    try:
        data = data.to(device)
        _two_steps(replace(config, batch_size=1, model_config={}), data, device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        before = _peak_bytes(device)
        _two_steps(config, data, device)
        peak = _peak_bytes(device)
        return {"peak_bytes": peak, "step_bytes": peak - before}
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return {"reason": "out of memory"}


def _two_steps(config: TrainConfig, data: ImageData, device: torch.device) -> None:
    step = train_step(config, data, device)
    for _ in range(2):  # in the second step the optimizer has its state from the beginning
        step()


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss would include the process that started this one
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line)
    import resource  # not available on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def one_against_two(config: TrainConfig, side: int, threads: int, steps: int) -> dict:
    """Images per second of one process, and of two that divide the batch (DistributedDataParallel), timed in turn.

    On a CPU the two divide the threads as well. steps: per round. Returns {"reason": ...} without two GPUs.
    """
    if config.device != "cpu" and torch.cuda.device_count() < 2:
        return {"reason": "needs two GPUs"}
    rounds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(ROUNDS):
        for world_size, found in rounds.items():
            queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
            share = max(1, threads // world_size) if config.device == "cpu" else threads
            arguments = (world_size, _free_port(), config, side, share, steps, queue)
            torch.multiprocessing.spawn(_train_together, arguments, nprocs=world_size)
            seconds, gradient_bytes = queue.get()
            found.append(config.batch_size / seconds)
    one, two = (statistics.median(found) for found in rounds.values())
    return {
        "one_process": {"images_per_second": one, "rounds": rounds[1], "threads": threads},
        "two_processes": {"images_per_second": two, "rounds": rounds[2], "threads_each": share},
        "two_over_one": two / one,
        "gradient_bytes_a_step": gradient_bytes,
        "backend": "gloo" if config.device == "cpu" else "nccl",
        "precision": config.precision,
    }


def _train_together(rank: int, world_size: int, port: int, config: TrainConfig, side: int, threads, steps, queue):
    """One of `world_size` processes, with the environment that torchrun would give it; the main one reports."""
    if world_size > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    torch.set_num_threads(threads)
    keep_freed_memory()
    with join_processes(config.device) as processes:
        data = synthetic_images(side).to(processes.device)
        step = train_step(config, data, processes.device, processes=processes)
        for _ in range(2):
            step()
        started = time.perf_counter()
        for _ in range(steps):
            step()
        seconds = (time.perf_counter() - started) / steps
        if processes.is_main:
            model = step.func.state.model
            gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
            queue.put((seconds, gradients))


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def sampling_command(device: str) -> dict:
    """Seconds that `sample.py` takes with the published weights, from the start of the process to its end.

    Raises RunFailed with the last line that the command printed if it fails.
    """
    arguments = ["sample.py", "--num-images", "64", "--steps", "50", "--device", device]
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(ROUNDS):
            started = time.perf_counter()
            done = subprocess.run(  # noqa: S603 - our own command
                [sys.executable, *arguments, "--output", f"{folder}/samples.png"],
                cwd=ROOT,
                capture_output=True,
                text=True,
            )
            rounds.append(time.perf_counter() - started)
            if done.returncode:
                raise RunFailed(f"sample.py: {done.stderr.strip().splitlines()[-1:]}")
    return {"seconds": statistics.median(rounds), "rounds": rounds, "command": " ".join(["python", *arguments])}
