"""Work for the training runs of a comparison: one after the other, or several at a time, each in its own process."""

import multiprocessing
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from lab.comparison.experiment import Experiment, Training
from runtime.command_line import STOP_SIGNALS, stop_signals
from runtime.errors import RunFailed, UserError
from runtime.hardware import choose_device, keep_freed_memory, stay_within_memory
from runtime.progress import progress_bar

# A terminal sends these signals to all processes of a command. The others ignore them; the first sends them SIGTERM.
FROM_A_TERMINAL = [number for number in STOP_SIGNALS if number != signal.SIGTERM]
REPORT_EVERY = 0.5  # seconds between two progress reports of a process

Ended = TypeVar("Ended")  # anything but a float or an exception
Work = Callable[[Experiment, Training, Callable[[float], object]], Ended]  # a function of a module or class


def run_all(
    work: Work[Ended], experiment: Experiment, trainings: Sequence[Training], bar: tqdm, jobs: int
) -> Iterator[tuple[Training, Ended]]:
    """Do the work for each training run, `jobs` at a time, and yield (training, what it returns) as soon as each ends.

    work: `Experiment.run`, or what else takes (experiment, training, advance). With more than one job, each training
    run has a process of its own with its part of the threads. A signal that stops this process stops all of them, and
    each saves first. The bar advances by seconds at the speeds of the arms. Raises what the work raises, and RunFailed
    if a process is killed.
    """

    def advance(seconds: float) -> None:
        bar.update(min(seconds, bar.total - bar.n))  # rounding must not move it past the end

    if jobs == 1:
        for training in trainings:
            bar.set_description(str(training))
            yield training, work(experiment, training, advance)
        return
    # pickled here, since torch would send the tensors through shared memory, of which containers have little
    pickled = pickle.dumps(experiment)
    threads = max(1, torch.get_num_threads() // jobs)
    waiting = list(trainings)
    running: dict[Any, tuple[Training, Any]] = {}  # by the connection to the process
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                training = waiting.pop(0)
                with stop_signals() as received:  # a process that is only half started could not be stopped
                    process, connection = _start(work, training, threads)
                running[connection] = training, process
                if received:
                    raise KeyboardInterrupt
            # without a refresh, which would be a line in a log for every report
            bar.set_description(" + ".join(str(training) for training, _ in running.values()), refresh=False)
            ready: list[Any] = wait(list(running))
            for connection in ready:
                training, process = running[connection]
                try:
                    message = connection.recv()
                    if message is None:
                        connection.send_bytes(pickled)
                        continue
                except (EOFError, OSError):
                    raise RunFailed(f"{training}: its process was ended; the same command goes on from here") from None
                if isinstance(message, float):
                    advance(message)
                    continue
                process.join()
                del running[connection]
                if isinstance(message, Exception):
                    raise message
                yield training, message
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.join()


def bar_of_seconds(total: float) -> tqdm:
    """A progress bar for `run_all`, of so many seconds at the speeds of the arms."""
    return progress_bar(total=total, bar_format="{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}", mininterval=1)


def _start(work: Work, training: Training, threads: int) -> tuple[BaseProcess, Any]:
    """Start a process that does the work for a training run: (the process, the connection to it)."""
    context = multiprocessing.get_context("spawn")  # the fork of a process with threads may hang
    resource_tracker.ensure_running()  # otherwise start() does it, and that unblocks SIGINT
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(work, training, threads, theirs))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, FROM_A_TERMINAL)  # inherited: blocked until `_run` ignores them
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()  # now only the process has this end, so that recv() raises EOFError when it dies
    return process, ours


def _run(work: Work, training: Training, threads: int, connection: Any) -> None:
    """Do the work for one training run, in a process of its own.

    It sends None when it is ready for the Experiment, then its progress in seconds, and last its result or exception.
    """
    for number in FROM_A_TERMINAL:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FROM_A_TERMINAL)
    torch.set_num_threads(threads)
    tqdm.set_lock(threading.RLock())  # tqdm's own lock is a semaphore, which a killed process would leave behind
    unsent, sent = 0.0, time.monotonic()

    def advance(seconds: float) -> None:
        nonlocal unsent, sent
        unsent += seconds
        if time.monotonic() - sent >= REPORT_EVERY:
            try:
                connection.send(unsent)
            except BrokenPipeError:  # the first process is gone: save and stop, as after a signal
                signal.raise_signal(signal.SIGTERM)
            unsent, sent = 0.0, time.monotonic()

    try:
        connection.send(None)
        experiment = pickle.loads(connection.recv_bytes())  # noqa: S301  # from the process that started this one
        keep_freed_memory()
        stay_within_memory(choose_device(experiment.settings.device), experiment.settings.jobs)
        ended = work(experiment, training, advance)
    except (UserError, RunFailed) as error:
        ended = error
    except (KeyboardInterrupt, EOFError, BrokenPipeError):
        return
    connection.send(unsent)
    connection.send(ended)
