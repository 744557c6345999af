"""The training loop: `train(config)` trains one model into a run folder and returns the folder.

A step takes batch number `step`, noises it, predicts, and moves the weights along the gradient of the loss. Batches,
noise and learning rate are pure functions of the config and the step, so a resumed run ends with the same weights.
"""

import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from diffusion.scheduler import DDPMScheduler
from images.batches import held_out_bank
from images.datasets import ImageData, load_images
from kernels.compilation import is_compiler_failure
from runtime.command_line import stop_signals
from runtime.errors import RunFailed, UserError, reason, user_errors
from runtime.files import check_writable, save_json
from runtime.hardware import is_out_of_memory, keep_freed_memory, make_reproducible
from runtime.processes import Processes, is_lost_process, join_processes
from runtime.progress import progress_bar
from training.compute import resolved
from training.config import TrainConfig
from training.run_folder import (
    CONFIG_FILE,
    RESUME_FILE,
    make_run_folder,
    next_run_folder,
    only_writer,
    what_is_safe,
)
from training.run_log import RunLog, tensorboard_writer
from training.start import shaped_like_source, start_from
from training.state import TrainState, untrained
from training.step import TrainStep
from training.summary import changes_since, description, rate_jump
from training.validation import held_out_loss, sample_grid


def train(
    config: TrainConfig,
    *,
    resume: str | Path | None = None,
    dry_run: bool = False,
    data: ImageData | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> Path | None:
    """Train one model; returns its run folder, or None after a dry run, which does everything but train.

    resume: the run folder to go on with; `config` is then that run's own, apart from budget, device and the like.
    data: the data set of the config, if the caller has it in memory already.
    on_progress: called after each step with the fraction of the run that is done; nothing is printed then.
    Raises UserError for what the user can mend, RunFailed if the run fails, KeyboardInterrupt once it is saved.
    """
    if config.tensorboard:
        tensorboard_writer()  # if it is missing, fail before the data is read
    resume = None if resume is None else Path(resume)
    if resume is not None:
        check_writable(resume, "--resume")
    elif not dry_run:
        check_writable(Path(config.output_dir), "--output-dir")
    if resume is None and config.init is not None:
        config = shaped_like_source(config)  # likewise, if it cannot be read
    keep_freed_memory()
    with join_processes(config.device) as processes, ExitStack() as held:
        if resume is not None and processes.is_main and not dry_run:
            held.enter_context(only_writer(resume))
        if config.batch_size < processes.world_size:
            needed = f"at least {processes.world_size}, the number of processes"
            raise UserError(f"--batch-size: must be {needed}, got {config.batch_size}")
        make_reproducible(processes.device)
        run = resume or next_run_folder(Path(config.output_dir), f"{config.model}-{config.dataset}")
        with failures_named(run, processes, "a smaller --image-size or fewer images"), processes.main_first():
            data = data or load_images(
                config.dataset, config.data_dir, config.image_size, skip_bad_images=config.skip_bad_images
            )
            if resume is not None and config.dataset == "folder":
                data = replace(data, notes=(*data.notes, *changes_since(resume, data)))
            data = replace(data.to(processes.device), mirror=data.mirror and config.mirror)
        if config.class_conditional and len(data.classes) < 2:
            raise UserError(f"--class-conditional: {config.data_dir} has no classes to tell apart")
        config = config.for_classes(len(data.classes))

        smaller = f"--batch-size {config.batch_size // 2}" if config.batch_size > 1 else "a smaller --image-size"
        with failures_named(run, processes, smaller):
            with user_errors("--model"):
                scheduler, state = untrained(config, data, processes.device)
            if resume is not None:
                state.restore(run, processes)
            elif config.init is not None:
                started = start_from(config.init, state)
            config = resolved(config, state.model, data, processes)
        if processes.is_main and resume is None and not dry_run:
            run = make_run_folder(run.parent, f"{config.model}-{config.dataset}")
            held.enter_context(only_writer(run))
        with failures_named(run, processes, smaller):
            if processes.is_main and on_progress is None:
                print(description(config, data, state.model, processes, run), flush=True)
                if resume is None and config.init is not None:
                    print(f"start    {started}", flush=True)
                if resume is not None:
                    print(rate_jump(run, config, state, len(data.train)), end="", flush=True)
            if dry_run:
                return None
            if processes.is_main:
                versions = {"python": platform.python_version(), "torch": torch.__version__}
                record = {"train": asdict(config), "model": state.about, "versions": versions, "command": sys.argv}
                record |= {"skipped_images": data.skipped} if data.skipped else {}
                if config.dataset == "folder":
                    about = {"classes": data.images_per_class(), "pixels": data.fingerprint(), "notes": data.notes}
                    record["folder"] = about
                save_json(run / CONFIG_FILE, record)
            finished = loop(config, data, scheduler, state, processes, run, on_progress)
        if not finished:
            if not processes.is_main:
                sys.exit(130)  # the main process speaks for all
            saved = (run / RESUME_FILE).exists()
            raise KeyboardInterrupt(f"step {state.step} is saved; go on with --resume {run}" if saved else "at step 0")
        return run


@contextmanager
def failures_named(run: Path, processes: Processes, smaller: str) -> Iterator[None]:
    """Turn whatever goes wrong in the block into one line that says what is safe on disk and what to try."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(what_is_safe(run)) from None
    except OSError as error:
        raise RunFailed(f"cannot write ({error}); {what_is_safe(run)}") from error
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise RunFailed(f"out of memory; try {smaller}; {what_is_safe(run)}") from error
        if processes.world_size > 1 and is_lost_process(error):
            raise RunFailed(f"another process ended; {what_is_safe(run)}") from error
        if is_compiler_failure(error):
            raise UserError(f"--compile: does not work here ({reason(error)}); use --compile off") from error
        raise


def loop(
    config: TrainConfig,
    data: ImageData,
    scheduler: DDPMScheduler,
    state: TrainState,
    processes: Processes,
    run: Path,
    on_progress: Callable[[float], None] | None = None,
) -> bool:
    """Train `state` until its budget is spent (True) or a stop signal comes (False).

    The run's seconds are seconds of training: the clock stands still while the run is measured, drawn and saved.
    """
    step = TrainStep(config, data, scheduler, state, processes)
    first_step, started, lr = state.step, time.monotonic() - state.seconds, 0.0
    with (
        stop_signals() as received,
        Records(step, run) as records,
        bar_of_run(config, data, state.step, shown=processes.is_main and on_progress is None) as bar,
    ):
        while True:
            stop, state.seconds = processes.agree(float(bool(received)), time.monotonic() - started)
            progress = config.progress(state.step, state.seconds, len(data.train))
            done = progress >= 1
            if state.step > first_step:
                started += records.keep(bar, lr, progress, stop=bool(stop))
            if done or stop:
                records.close_run()
                return done
            lr = step(progress)
            bar.update(config.batch_size)
            if on_progress is not None and processes.is_main:
                on_progress(progress)


class Records:
    """What a run keeps of itself: log lines, held-out losses, grids and checkpoints, each when it is due.

    All processes of a run call it alike, but only the main one writes.
    """

    def __init__(self, step: TrainStep, run: Path):
        self.config, self.data, self.scheduler, self.state = step.config, step.data, step.scheduler, step.state
        self.processes, self.run = step.processes, run
        self.bank = held_out_bank(step.data, step.config.timesteps)
        tensorboard = step.config.tensorboard
        self.log = RunLog(run, step=step.state.step, tensorboard=tensorboard) if step.processes.is_main else None

    def keep(self, bar: tqdm, lr: float, progress: float, *, stop: bool) -> float:
        """Log, measure, draw and save what is due after this step; returns the seconds that measuring and saving took.

        At the end of the run everything is due; `stop` makes the checkpoint due.
        """
        config, state, paused = self.config, self.state, time.monotonic()
        log_due, sample_due, save_due = (
            progress >= 1 or state.step % every == 0
            for every in (config.log_every, config.sample_every, config.save_every)
        )
        if log_due or sample_due or save_due or stop:
            mean_loss = state.mean_loss(self.processes, self.run)
        if log_due or sample_due:
            state.reset_loss()
            if self.log is not None:
                row = {"images": state.step * config.batch_size, "seconds": state.seconds, "loss": mean_loss, "lr": lr}
                if sample_due:
                    row["held_out_loss"] = self.measure_and_draw(self.log, mean_loss)
                self.log.row(state.step, **row)
                bar.total = round(row["images"] / progress)  # a run of so many minutes learns its length on the way
                bar.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)
        if save_due or stop:
            if self.log is not None:
                self.log.flush()  # before the checkpoint, so that the rows of all its steps are on the disk
            state.save(self.run, self.processes)
        return self.processes.agree(time.monotonic() - paused)[0] if sample_due or save_due else 0.0

    def measure_and_draw(self, log: RunLog, mean_loss: float) -> float:
        """The held-out loss of the averaged weights; draws their grid. Raises RunFailed if either is not finite."""
        average = self.state.averaged
        held_out = held_out_loss(average, self.scheduler, self.bank)
        self.state.check(math.isfinite(held_out), f"the held-out loss is {held_out}", self.run)
        if self.config.draw_grids:
            images, columns = sample_grid(average, self.scheduler, self.data)
            finite = bool(images.isfinite().all())
            self.state.check(finite, f"the loss is {mean_loss:.4g} but a sample is not finite", self.run)
            log.grid(self.state.step, images, columns)
        return held_out

    def close_run(self) -> None:
        """Plot the curves of a run that ends here, if it has taken a step."""
        if self.log is not None and self.state.step > 0:
            self.log.curves()

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *_) -> None:
        if self.log is not None:
            self.log.close()


def bar_of_run(config: TrainConfig, data: ImageData, step: int, *, shown: bool) -> tqdm:
    """Images seen, images per second, time left and, after the first log line, the loss."""
    total_steps = config.total_steps(len(data.train))
    total = total_steps and total_steps * config.batch_size
    name = config.model if total else f"{config.model}, {config.minutes:g} min"
    return progress_bar(desc=name, total=total, initial=step * config.batch_size, unit="img", disable=not shown)
