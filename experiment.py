"""The trainings of a comparison: what they share, each by its (arm, rate, seed, share), several side by side."""

import argparse
import csv
import math
import multiprocessing
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import RESUME_FILE, run_folders
from command_line import STOP_SIGNALS, stop_signals
from comparison import Cost, Point, Result
from errors import RunFailed, UserError
from image_data import ImageData
from models import ARMS
from train_config import TrainConfig
from training import train

MEASUREMENTS = 10  # held-out losses along a training, for the curves
IMAGES_A_MEASUREMENT = 2500  # at least; measuring costs as much as training on 700 images
# a terminal sends these to all processes of a command; the first one passes them on to the others as SIGTERM
FROM_A_TERMINAL = [number for number in STOP_SIGNALS if number != signal.SIGTERM]
REPORT_EVERY = 0.5  # seconds between two reports of a process on how far it is


@dataclass(frozen=True)
class Training:
    """One training of a comparison, over a share of the budget's amount."""

    arm: str
    lr: float
    seed: int
    share: float

    def __str__(self) -> str:
        return f"{self.arm} lr {self.lr:g} seed {self.seed}"


def arm_config(s: argparse.Namespace, arm: str) -> TrainConfig:
    """What every training of an arm shares; how long, at which rate and with which seed is left open."""
    model, model_config = ARMS[arm]
    own = ("dataset", "data_dir", "image_size", "batch_size", "timesteps", "schedule", "prediction_type", "precision")
    return TrainConfig(
        model=model,
        model_config=model_config,
        **{name: getattr(s, name) for name in (*own, "device")},
        compile="on" if s.compile else "off",
        epochs=None,
        draw_grids=False,
    )


@dataclass(frozen=True)
class Experiment:
    """What all trainings of a comparison share."""

    settings: argparse.Namespace
    data: ImageData
    folder: Path
    costs: dict[str, Cost]

    def images(self, arm: str, share: float) -> float:
        """How many images an arm may train on with a share of the budget."""
        budget, amount = self.settings.budget, share * self.settings.amount
        if budget == "seconds":
            return amount * self.costs[arm].images_per_second
        return amount / self.costs[arm].training_multiply_adds if budget == "flops" else amount

    def seconds(self, arm: str, share: float) -> float:
        """How long that lasts at the arm's speed."""
        return self.images(arm, share) / self.costs[arm].images_per_second

    def steps(self, arm: str, share: float) -> int:
        """How many steps that is."""
        return max(1, round(self.images(arm, share) / self.settings.batch_size))

    def config(self, training: Training) -> TrainConfig:
        """How it trains."""
        steps = self.steps(training.arm, training.share)
        images = steps * self.settings.batch_size
        measurements = min(MEASUREMENTS, max(2, images // IMAGES_A_MEASUREMENT))
        return replace(
            arm_config(self.settings, training.arm),
            steps=steps,
            lr=training.lr,
            seed=training.seed,
            output_dir=str(self.folder_of(training)),
            # of a short run its end alone counts
            sample_every=math.ceil(steps / measurements) if training.share == 1 else steps,
            save_every=math.ceil(steps / MEASUREMENTS),
        )

    def folder_of(self, training: Training) -> Path:
        """Where its run folder is made."""
        arm = training.arm.replace(":", "-").replace("=", "-")
        return self.folder / "runs" / f"{arm}-lr{training.lr:g}-seed{training.seed}-share{training.share:g}"

    def run(self, training: Training, advance: Callable[[float], object]) -> tuple[Result, list[Point]]:
        """Run a training, or go on with it; (its result, its curve). advance: told the seconds that it got further."""
        arm, seed, cost, done = training.arm, training.seed, self.costs[training.arm], 0.0
        seconds = self.seconds(arm, training.share)
        started = [path for path in run_folders(self.folder_of(training)) if (path / RESUME_FILE).exists()]

        def pass_on(progress: float) -> None:
            nonlocal done
            advance(seconds * (min(progress, 1) - done))
            done = min(progress, 1)

        resume = started[-1] if started else None
        finished = train(self.config(training), resume=resume, data=self.data, on_progress=pass_on)
        pass_on(1)
        with open(finished / "metrics.csv", newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["held_out_loss"]]
        measured = [(int(row["images"]), float(row["held_out_loss"])) for row in rows]
        curve = [Point(arm, seed, images, images / cost.images_per_second, loss) for images, loss in measured]
        images, loss = measured[-1]
        result = Result(
            arm=arm,
            seed=seed,
            parameters=cost.parameters,
            multiply_adds=cost.multiply_adds,
            lr=training.lr,
            images=images,
            training_multiply_adds=float(images * cost.training_multiply_adds),
            seconds=images / cost.images_per_second,
            eps_mse=loss,
        )
        return result, curve


def run_all(
    experiment: Experiment, trainings: Sequence[Training], bar: tqdm, jobs: int
) -> Iterator[tuple[Training, Result, list[Point]]]:
    """Run the trainings, `jobs` at a time, and yield (training, its result, its curve) as each ends.

    With more than one job each training is a process of its own with its part of the threads. What interrupts this
    process interrupts them, and each saves. The bar moves by seconds at the arms' speeds. Raises what a training
    raises, and RunFailed if its process is killed.
    """

    def advance(seconds: float) -> None:
        bar.update(min(seconds, bar.total - bar.n))  # never past the end by a rounding

    if jobs == 1:
        for training in trainings:
            bar.set_description(str(training))
            yield training, *experiment.run(training, advance)
        return
    # tensors would else go through shared memory, of which containers have little
    pickled = pickle.dumps(experiment)
    threads = max(1, torch.get_num_threads() // jobs)
    waiting, running = list(trainings), {}
    try:
        while waiting or running:
            started = []
            while waiting and len(running) < jobs:
                training = waiting.pop(0)
                with stop_signals() as received:  # half started, it could not be ended
                    process, connection = _start(training, threads)
                running[connection] = training, process
                started.append(connection)
                if received:
                    raise KeyboardInterrupt
            bar.set_description(" + ".join(str(training) for training, _ in running.values()))
            for connection in started or wait(list(running)):
                training, process = running[connection]
                try:
                    if connection in started:
                        connection.send_bytes(pickled)
                        continue
                    message = connection.recv()
                except (EOFError, OSError):
                    raise RunFailed(f"{training}: its process was ended; the same command goes on from here") from None
                if isinstance(message, float):
                    advance(message)
                    continue
                process.join()
                del running[connection]
                if isinstance(message, Exception):
                    raise message
                yield training, *message
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.join()


def _start(training: Training, threads: int) -> tuple[multiprocessing.process.BaseProcess, Connection]:
    """A process that waits for the Experiment, and what is sent to it and comes from it."""
    context = multiprocessing.get_context("spawn")  # a fork of a process that has used its threads may hang
    resource_tracker.ensure_running()  # start() would, and that unblocks SIGINT
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(training, threads, theirs))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, FROM_A_TERMINAL)  # the new process has it so till it ignores them
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()  # the process has the only other end, so its death is the end of the messages
    return process, ours


def _run(training: Training, threads: int, connection: Connection) -> None:
    """One training in a process of its own: sends the seconds that it gets further, then what it ends with."""
    for number in FROM_A_TERMINAL:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FROM_A_TERMINAL)
    torch.set_num_threads(threads)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a killed process would leave behind
    unsent, sent = 0.0, time.monotonic()

    def advance(seconds: float) -> None:
        nonlocal unsent, sent
        unsent += seconds
        if time.monotonic() - sent >= REPORT_EVERY:
            try:
                connection.send(unsent)
            except BrokenPipeError:  # nobody waits for this training any more: it saves, as when it is told to stop
                signal.raise_signal(signal.SIGTERM)
            unsent, sent = 0.0, time.monotonic()

    try:
        experiment = pickle.loads(connection.recv_bytes())  # noqa: S301  # of the process that started this
        ended = experiment.run(training, advance)
    except (UserError, RunFailed) as error:
        ended = error
    except (KeyboardInterrupt, EOFError):
        return
    connection.send(unsent)
    connection.send(ended)
