"""The trainings of a comparison one after the other, or several side by side, each in a process of its own."""

import multiprocessing
import pickle
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait

import torch
from tqdm import tqdm

from command_line import STOP_SIGNALS, stop_signals
from comparison import Point, Result
from errors import RunFailed, UserError
from experiment import Experiment, Training

# a terminal sends these to all processes of a command; the first one passes them on to the others as SIGTERM
FROM_A_TERMINAL = [number for number in STOP_SIGNALS if number != signal.SIGTERM]
REPORT_EVERY = 0.5  # seconds between two reports of a process on how far it is


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
            while waiting and len(running) < jobs:
                training = waiting.pop(0)
                with stop_signals() as received:  # half started, it could not be ended
                    process, connection = _start(training, threads)
                running[connection] = training, process
                if received:
                    raise KeyboardInterrupt
            bar.set_description(" + ".join(str(training) for training, _ in running.values()))
            for connection in wait(list(running)):
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
                yield training, *message
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.join()


def _start(training: Training, threads: int) -> tuple[multiprocessing.process.BaseProcess, Connection]:
    """A process for a training, and the connection to it."""
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
    """One training in a process of its own.

    It sends None when it is ready for the Experiment, the seconds that it gets further, and what it ends with.
    """
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
        connection.send(None)
        experiment = pickle.loads(connection.recv_bytes())  # noqa: S301  # of the process that started this
        ended = experiment.run(training, advance)
    except (UserError, RunFailed) as error:
        ended = error
    except (KeyboardInterrupt, EOFError, BrokenPipeError):
        return
    connection.send(unsent)
    connection.send(ended)
