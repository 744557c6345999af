"""`compare.py` interrupted or killed, with trainings one after the other and side by side: it goes on from there."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
from comparing import GOES_ON, TINY, compared, table
from conftest import ForkedCommand, start_command, wait_for

from images.batches import BANK_SIZE
from lab.comparison import jobs
from training import run_log
from training.checkpoint import read_resume
from training.step import TrainStep


def begun(experiment, folder: Path) -> tuple[list, list[dict[str, str]]]:
    """Make a folder that goes on after the sweep of the experiment: (options to train one arm there, its rows)."""
    source, options, rows = experiment
    for name in ("costs.csv", "comparison.json", "sweep.csv"):
        shutil.copy(source / name, folder / name)
    options = [option for option in options if option != "unet:38k"]
    return [*TINY, *options, "--output-dir", folder], [row for row in rows if row["arm"] == "inspired"]


def slowly() -> None:
    """Let training runs of a few steps last long enough to be stopped. A sleep costs no work, and plots would."""
    run_log.save_loss_curves = mock.Mock()
    step = TrainStep.__call__
    TrainStep.__call__ = lambda self, progress: (time.sleep(0.1), step(self, progress))[1]


def slowly_and_forked() -> None:
    """Let training runs side by side also be forks, which need no import; a test below has them spawned."""
    slowly()
    fork = multiprocessing.get_context("fork")

    def pipe():
        ours, theirs = fork.Pipe()
        os.register_at_fork(after_in_child=ours.close)  # a spawned process does not have this end either
        return ours, theirs

    context = mock.Mock(Process=fork.Process, Pipe=pipe)
    jobs.multiprocessing = mock.Mock(get_context=lambda _: context)


def test_an_interrupted_comparison_ends_with_the_same_figures(experiment, tmp_path):
    options, rows = begun(experiment, tmp_path)
    process = ForkedCommand("compare.py", *options, prepare=slowly)
    wait_for(lambda: list(tmp_path.glob("runs/*seed1*/*/checkpoint.pt")), process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip().splitlines()[-1] == GOES_ON
    assert [row["seed"] for row in table(tmp_path / "comparison.csv")] == ["0"]
    assert compared(tmp_path, *options, bank=BANK_SIZE) == rows


def processes_that_train(parent: int) -> set[int]:
    """The ids of those that a comparison has started."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            started_by = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if started_by == parent and b"resource_tracker" not in (folder / "cmdline").read_bytes():
                found.add(int(folder.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_trainings_side_by_side_end_with_the_figures_of_one_after_the_other_also_when_interrupted(experiment, tmp_path):
    options, rows = begun(experiment, tmp_path)
    options += ["--jobs", 2]
    process = ForkedCommand("compare.py", *options, prepare=slowly_and_forked)
    wait_for(lambda: len(list(tmp_path.glob("runs/*share1/*/checkpoint.pt"))) > 1, process)
    below = processes_that_train(process.pid)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.strip().splitlines()[-1] == GOES_ON
    assert len(below) == 2 and not any(Path(f"/proc/{child}").exists() for child in below)
    saved = {path.parent: read_resume(path)["step"] for path in tmp_path.glob("runs/*share1/*/checkpoint.pt")}
    assert compared(tmp_path, *options) == rows  # by spawned processes, which measure with the whole bank
    assert all(read_resume(run / "checkpoint.pt")["step"] >= step for run, step in saved.items())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ctrl_c_while_a_process_starts_ends_in_one_line(experiment, tmp_path):
    """In a fresh interpreter, from the shell."""
    process = start_command("compare.py", *begun(experiment, tmp_path)[0], "--jobs", 2, start_new_session=True)
    wait_for(lambda: processes_that_train(process.pid), process)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all processes of a command
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    *bars, said = errors.strip().split("\n")
    assert said == GOES_ON
    assert all("|" in bar for bar in bars), errors  # none, if the first process was still being started


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("victim", ["training", "comparison"])
def test_when_a_process_is_killed_the_trainings_that_are_left_save_and_end(victim, experiment, tmp_path):
    shutil.copy(experiment[0] / "costs.csv", tmp_path)
    options = [*TINY, "--arms", "inspired", "--lrs", 4e-3, "--amount", 80_000, "--seeds", 2, "--jobs", 2]
    process = ForkedCommand("compare.py", *options, "--output-dir", tmp_path, prepare=slowly_and_forked)
    wait_for(lambda: len(list(tmp_path.glob("runs/*/*/metrics.csv"))) > 1, process)
    pair = processes_that_train(process.pid)
    os.kill(min(pair) if victim == "training" else process.pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)  # reads until all that could write have ended
    assert "Traceback" not in errors
    assert len(list(tmp_path.glob("runs/*/*/checkpoint.pt"))) == (1 if victim == "training" else 2)
    if victim == "training":
        last = errors.strip().splitlines()[-1]
        assert process.returncode == 1 and last.startswith("compare.py: failed: inspired lr 0.004 seed "), errors
        assert last.endswith(": its process was ended; the same command goes on from here")
