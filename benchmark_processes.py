"""What is measured in processes of its own: peak memory, one process against two, and the start of a command."""

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

from errors import RunFailed
from hardware import Processes, is_out_of_memory, join_processes, keep_freed_memory
from image_data import ImageData
from speed import train_step
from train_config import TrainConfig
from train_state import untrained

ROUNDS = 3
ROOT = Path(__file__).parent


@lru_cache(maxsize=4)
def synthetic_images(side: int, count: int = 2**14) -> ImageData:
    """Random uint8 images (count, 3, side, side): a step costs the same whatever is on them.

    So many that an epoch's order, which is drawn on the CPU, is as rare as in a training on real images.
    """
    images = torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(count, dtype=torch.long)
    return ImageData("synthetic", images, labels, images[:1], labels[:1], ("none",), mirror=True)


def peak_memory(config: TrainConfig, side: int, threads: int) -> dict:
    """Peak memory of training in a fresh process: {"peak_bytes", "step_bytes"} or {"reason"}.

    The first is the whole process's on a CPU and the tensors' on a GPU. The second is by how much it is above that of
    a small model of the kind on one image, which has loaded the same libraries.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        try:
            return pool.submit(_peak_memory, config, side, threads).result()
        except BrokenProcessPool:
            return {"reason": "the process was killed, as happens where memory runs out"}


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
    step = train_step(config, data, Processes(device), *untrained(config, data, device))
    for _ in range(2):  # in the second, the optimizer has its state from the start
        step()


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, ru_maxrss of a process is at least what the one that started it had
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line)
    import resource  # Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def one_against_two(config: TrainConfig, side: int, threads: int, steps: int) -> dict:
    """Images a second of one process and of two that divide the batch (DistributedDataParallel), in turn.

    On a CPU they divide the threads too. steps: of a round. {"reason": ...} where there are no two GPUs.
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
    """One of `world_size` processes, as torchrun would have started it; the main one reports."""
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
    with join_processes(config.device) as here:
        data = synthetic_images(side).to(here.device)
        scheduler, state = untrained(config, data, here.device)
        step = train_step(config, data, here, scheduler, state)
        for _ in range(2):
            step()
        started = time.perf_counter()
        for _ in range(steps):
            step()
        seconds = (time.perf_counter() - started) / steps
        if here.is_main:
            gradients = sum(p.numel() * p.element_size() for p in state.model.parameters() if p.requires_grad)
            queue.put((seconds, gradients))


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def sampling_command(device: str) -> dict:
    """Seconds of `sample.py` with the published weights, from the start of the process to its end, PNG written.

    Raises RunFailed, with what the command said, if it fails.
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
