"""Several processes of a run follow one process and leave whole files when one is lost; runs beside each other."""

import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
from conftest import (
    EVERY,
    TINY,
    ForkedCommand,
    call,
    rows,
    start_ranks,
    start_torchrun,
    trained,
    wait_for,
)

import train
from training.checkpoint import read_model, read_resume

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the faults are made with Linux's means")


# the last of two flags holds; three processes divide ten images unevenly
TEN_STEPS = [*TINY, "--steps", 10, "--log-every", 1, "--batch-size", 10]


@pytest.fixture(scope="module")
def run_of_one(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("one"), *TEN_STEPS)


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_follow_one(processes, run_of_one, tmp_path):
    a = run_of_one
    for process in start_ranks(processes, *TEN_STEPS, "--output-dir", tmp_path / "many"):
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert "Warning" not in errors  # of torch, where gradients are not laid out as their weights are
    (b,) = (tmp_path / "many").iterdir()
    losses = [[float(row["loss"]) for row in rows(run)] for run in (a, b)]
    assert len(losses[0]) == 10
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert abs(float(rows(a)[-1]["held_out_loss"]) - float(rows(b)[-1]["held_out_loss"])) < 1e-5


def ranks_of_torchrun(parent: int) -> dict[int, int]:
    """rank -> process id of the children of a torchrun."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status, environment = (folder / "stat").read_text(), (folder / "environ").read_bytes()
        except OSError:
            continue
        if int(status.rsplit(")", 1)[1].split()[1]) == parent:
            found |= {int(value): int(folder.name) for value in re.findall(rb"\0RANK=(\d+)", environment)}
    return found


def said_of_a_lost_process(errors: str, run: Path) -> bool:
    """Whether the process that is left says what happened and what is safe."""
    return "another process ended" in errors and f"{run} are those of the last save" in errors


def test_the_first_of_two_processes_killed_the_other_ends_and_the_run_goes_on(tmp_path):
    process = start_torchrun(2, *TINY, *EVERY, "--steps", 100_000, "--output-dir", tmp_path)
    run = tmp_path / "00000-true-digits"
    wait_for((run / "checkpoint.pt").exists, process)
    workers = ranks_of_torchrun(process.pid)
    os.kill(workers[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert said_of_a_lost_process(errors, run), errors
    assert not Path(f"/proc/{workers[1]}").exists()
    step = read_resume(run / "checkpoint.pt")["step"]
    read_model(run)
    copy = shutil.copytree(run, tmp_path / "copy" / run.name)
    code, _, err = call(train, "--resume", run, "--steps", step + 5)  # in one process
    assert code == 0, err
    for process in start_ranks(3, "--resume", copy, "--steps", step + 5):
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    losses = [[float(row["loss"]) for row in rows(folder)[-5:]] for folder in (run, copy)]
    assert [row["step"] for row in rows(copy)][-1] == str(step + 5)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_the_second_of_two_processes_killed_the_first_ends(tmp_path):
    first, second = start_ranks(2, *TINY, *EVERY, "--steps", 100_000, "--output-dir", tmp_path)
    run = tmp_path / "00000-true-digits"
    wait_for((run / "checkpoint.pt").exists, first)
    second.kill()
    _, errors = first.communicate(timeout=60)
    assert first.returncode != 0
    assert said_of_a_lost_process(errors, run), errors
    read_resume(run / "checkpoint.pt")
    read_model(run)


def test_several_processes_interrupted_save_and_say_so_once(tmp_path):
    """As by torchrun, which passes a SIGTERM on to all of them."""
    processes = start_ranks(2, *TINY, "--steps", 100_000, "--output-dir", tmp_path)
    run = tmp_path / "00000-true-digits"
    wait_for(lambda: (run / "metrics.csv").exists() and len((run / "metrics.csv").read_text()) > 80, processes[0])
    for process in processes:
        process.send_signal(signal.SIGTERM)
    errors = [process.communicate(timeout=120)[1] for process in processes]
    step = read_resume(run / "checkpoint.pt")["step"]
    said = [line for line in "\n".join(errors).splitlines() if line.startswith("train.py: ")]
    assert said == [f"train.py: interrupted: step {step} is saved; go on with --resume {run}"]


def test_two_runs_started_together_get_two_folders(tmp_path):
    pair = [ForkedCommand("train.py", *TINY, "--steps", 2, "--output-dir", tmp_path / "runs") for _ in range(2)]
    for process in pair:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    folders = sorted((tmp_path / "runs").iterdir())
    assert [folder.name for folder in folders] == ["00000-true-digits", "00001-true-digits"]
    assert (folders[0] / "model.safetensors").read_bytes() == (folders[1] / "model.safetensors").read_bytes()
