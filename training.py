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
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import checkpoint
import liquid_kernel
from command_line import stop_signals
from diffusion import DDPMScheduler
from errors import RunFailed, UserError
from fastest import faster
from hardware import (
    Processes,
    is_compiler_failure,
    is_lost_process,
    is_out_of_memory,
    join_processes,
    keep_freed_memory,
    make_reproducible,
)
from image_data import ImageData, held_out_bank, load_images
from models import count_parameters, multiply_adds
from run_log import RunLog, tensorboard_writer
from train_config import TrainConfig
from train_state import TrainState, untrained
from training_step import gradient_function, take_step
from validation import held_out_loss, sample_grid

SKIPPED_SHOWN = 3


def train(
    config: TrainConfig,
    *,
    resume: Path | None = None,
    dry_run: bool = False,
    data: ImageData | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> Path | None:
    """Train one model; returns its run folder, or None after a dry run, which does all but the training.

    resume: the run folder to go on with; `config` is then that run's own, save for budget, device and the like.
    data: the data set of the config, if the caller has it in memory already.
    on_progress: called after each step with the share of the run that is done, instead of what is printed otherwise.
    Raises UserError for what the user can mend, RunFailed if the run fails, KeyboardInterrupt once it is saved.
    """
    if config.tensorboard:
        tensorboard_writer()  # fail before the data is read, not after
    if resume is not None:
        checkpoint.check_writable(resume, "--resume")
    elif not dry_run:
        checkpoint.check_writable(Path(config.output_dir), "--output-dir")
    keep_freed_memory()
    with join_processes(config.device) as here, ExitStack() as held:
        if resume is not None and here.is_main and not dry_run:
            held.enter_context(checkpoint.only_writer(resume))
        if config.batch_size < here.world_size:
            raise UserError(f"--batch-size: must be at least the {here.world_size} processes, got {config.batch_size}")
        make_reproducible(here.device)
        run = resume or checkpoint.next_run_folder(Path(config.output_dir), f"{config.model}-{config.dataset}")
        with failures_named(run, here, "a smaller --image-size or fewer images"), here.main_first():
            data = data or load_images(
                config.dataset, config.data_dir, config.image_size, skip_bad_images=config.skip_bad_images
            )
            data = data.to(here.device)
        if config.class_conditional and len(data.classes) < 2:
            raise UserError(f"--class-conditional: {config.data_dir} has no classes to tell apart")

        smaller = f"--batch-size {config.batch_size // 2}" if config.batch_size > 1 else "a smaller --image-size"
        with failures_named(run, here, smaller):
            scheduler, state = untrained(config, data, here.device)
            if resume is not None:
                state.restore(run, here)
            config = faster(config, state, scheduler, data, here)
        if here.is_main and resume is None and not dry_run:
            run = checkpoint.make_run_folder(run.parent, f"{config.model}-{config.dataset}")
            held.enter_context(checkpoint.only_writer(run))
        with failures_named(run, here, smaller):
            if here.is_main and on_progress is None:
                print(description(config, data, state.model, here, run), flush=True)
            if dry_run:
                return None
            if here.is_main:
                versions = {"python": platform.python_version(), "torch": torch.__version__}
                record = {"train": asdict(config), "model": state.about, "versions": versions, "command": sys.argv}
                record |= {"skipped_images": data.skipped} if data.skipped else {}
                checkpoint.save_json(run / checkpoint.CONFIG_FILE, record)
            finished = loop(config, data, scheduler, state, here, run, on_progress)
        if not finished:
            if not here.is_main:
                sys.exit(130)  # the main process speaks for all
            saved = (run / checkpoint.RESUME_FILE).exists()
            raise KeyboardInterrupt(f"step {state.step} is saved; go on with --resume {run}" if saved else "at step 0")
        return run


@contextmanager
def failures_named(run: Path, here: Processes, smaller: str) -> Iterator[None]:
    """Raise what can go wrong in the block as one line that says what is safe on disk and what to try."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(checkpoint.what_is_safe(run)) from None
    except OSError as error:
        raise RunFailed(f"cannot write ({error}); {checkpoint.what_is_safe(run)}") from error
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise RunFailed(f"out of memory; try {smaller}; {checkpoint.what_is_safe(run)}") from error
        if here.world_size > 1 and is_lost_process(error):
            raise RunFailed(f"another process ended; {checkpoint.what_is_safe(run)}") from error
        if is_compiler_failure(error):
            reason = str(error).split("\n")[0]
            raise UserError(f"--compile: does not work here ({reason}); leave it out") from error
        raise


def loop(
    config: TrainConfig,
    data: ImageData,
    scheduler: DDPMScheduler,
    state: TrainState,
    here: Processes,
    run: Path,
    on_progress: Callable[[float], None] | None = None,
) -> bool:
    """Train `state` until its budget is spent (True) or a signal comes (False). Only the main process writes.

    The run's seconds are those of training: the clock stands still while the run measures, draws and saves.
    """
    gradient = gradient_function(state, scheduler, config, here)
    bank = held_out_bank(data, config.timesteps)
    total_steps = config.total_steps(len(data.train))
    first_step, started, lr = state.step, time.monotonic() - state.seconds, 0.0
    with stop_signals() as received, ExitStack() as stack:
        if here.is_main:
            log = stack.enter_context(RunLog(run, step=state.step, tensorboard=config.tensorboard))
            bar = stack.enter_context(progress_bar(config, total_steps, state.step, shown=on_progress is None))
        while True:
            stop, state.seconds = here.agree(float(bool(received)), time.monotonic() - started)
            progress = state.step / total_steps if total_steps else state.seconds / (60 * config.minutes)
            done = progress >= 1
            paused = time.monotonic()
            if state.step > first_step:
                log_due, sample_due, save_due = (
                    done or state.step % every == 0
                    for every in (config.log_every, config.sample_every, config.save_every)
                )
                if log_due or sample_due or save_due or stop:
                    mean_loss = state.mean_loss(here, run)
                if log_due or sample_due:
                    state.reset_loss()
                    if here.is_main:
                        images = state.step * config.batch_size
                        row = {"images": images, "seconds": state.seconds, "loss": mean_loss, "lr": lr}
                        if sample_due:
                            held_out = row["held_out_loss"] = held_out_loss(state.ema.module, scheduler, bank)
                            state.check(math.isfinite(held_out), f"the held-out loss is {held_out}", run)
                            if config.draw_grids:
                                grid = sample_grid(state.ema.module, scheduler, data)
                                finite = grid.isfinite().all()
                                state.check(finite, f"the loss is {mean_loss:.4g} but a sample is not finite", run)
                                log.grid(state.step, grid)
                        log.row(state.step, **row)
                        bar.total = round(images / progress)  # a run of so many minutes learns its length as it goes
                        bar.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)
                if save_due or stop:
                    if here.is_main:
                        log.flush()  # before the checkpoint: the rows of the steps that it has are on disk
                    state.save(run, here)
                if sample_due or save_due:
                    started += here.agree(time.monotonic() - paused)[0]
            if done or stop:
                if here.is_main and state.step > 0:
                    log.curves()
                return done

            lr = take_step(gradient, state, scheduler, data, config, here, progress)
            if here.is_main:
                bar.update(config.batch_size)
                if on_progress is not None:
                    on_progress(progress)


def description(config: TrainConfig, data: ImageData, model: nn.Module, here: Processes, run: Path) -> str:
    """What is about to run, a line each."""
    where = here.device.type if here.world_size == 1 else f"{here.world_size} x {here.device.type}"
    if here.device.type == "cpu":
        where += f", {torch.get_num_threads()} threads"
    shape = "x".join(map(str, data.shape))
    steps = config.total_steps(len(data.train))
    budget = f"{config.minutes:g} minutes" if steps is None else f"{steps:,} steps"
    macs = multiply_adds(model, data.shape)
    how = [config.precision] + ["compiled"] * (config.compile == "on")
    if config.model == "true" and config.precision == "bf16" and here.device.type == "cpu":
        how += ["liquid kernel"] * liquid_kernel.available()
    lines = [
        f"device   {where}, {', '.join(how)}",
        f"model    {config.model}: {count_parameters(model):,} parameters, {macs:,} multiply-adds a forward pass",
        f"data     {config.dataset}: {len(data.train):,} images {shape}, {len(data.held_out):,} held out",
        *(f"skipped  {line}" for line in data.skipped[:SKIPPED_SHOWN]),
        f"budget   {budget} of {config.batch_size} images, seed {config.seed}",
        f"output   {run}",
    ]
    if len(data.skipped) > SKIPPED_SHOWN:
        lines.insert(-2, f"         {len(data.skipped):,} images in all; {checkpoint.CONFIG_FILE} names each")
    return "\n".join(lines)


def progress_bar(config: TrainConfig, total_steps: int | None, step: int, *, shown: bool) -> tqdm:
    """Images seen, images a second, time left and, after the first log line, the loss."""
    total = total_steps and total_steps * config.batch_size
    name = config.model if total else f"{config.model}, {config.minutes:g} min"
    return tqdm(
        desc=name, total=total, initial=step * config.batch_size, unit="img", mininterval=0.5, disable=not shown
    )
