"""Runs that are killed or told to stop: at most the work since the last save is lost."""

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import (
    EVERY,
    TINY,
    ForkedCommand,
    call,
    light_records,
    refused,
    rows,
    run_forked,
    same,
    start_command,
    temporary_files,
    trained,
    wait_for,
)

import train
from training.checkpoint import read_model, read_resume

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the faults are made with Linux's means")


def same_run(whole: Path, part: Path) -> None:
    """Check that two runs ended with the same bits: weights, average, optimizer, and every figure but the seconds."""
    a, b = read_resume(whole / "checkpoint.pt"), read_resume(part / "checkpoint.pt")
    for name in ("model", "ema", "optimizer", "step"):
        assert same(a[name], b[name]), name
    assert (whole / "model.safetensors").read_bytes() == (part / "model.safetensors").read_bytes()
    columns = ("step", "images", "loss", "lr", "held_out_loss")
    assert [[row[c] for c in columns] for row in rows(whole)] == [[row[c] for c in columns] for row in rows(part)]


# a log line every 7 steps, so that an interruption falls between two of them but for one time in seven
STEPS = 150  # of 16 images, past the first epoch's end at step 110
OPTIONS = [*TINY, "--steps", STEPS, "--log-every", 7, "--sample-every", 1000]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    """A run with these options from its start to its end."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = run_forked("train.py", *OPTIONS, "--output-dir", folder, prepare=light_records)
    assert done.returncode == 0, done.stderr
    return folder / "00000-true-digits"


def test_killed_at_twenty_moments_a_run_ends_with_the_bits_of_one_that_was_not(uninterrupted, tmp_path):
    moments = random.Random(0)
    arguments, saved_at, steps = [*OPTIONS, "--save-every", 1, "--output-dir", tmp_path], 0, []
    checkpoint = tmp_path / "00000-true-digits/checkpoint.pt"
    for _ in range(20):
        process = ForkedCommand("train.py", *arguments)
        wait_for(lambda: checkpoint.exists() and checkpoint.stat().st_mtime_ns > saved_at, process)  # noqa: B023
        time.sleep(moments.uniform(0, 0.08))  # a few steps, half of whose time goes into saving
        process.kill()
        process.communicate(timeout=60)
        saved_at = checkpoint.stat().st_mtime_ns
        read_model(checkpoint.parent)
        steps.append(read_resume(checkpoint)["step"])
        arguments = ["--resume", checkpoint.parent]
    assert steps == sorted(set(steps)) and steps[-1] < STEPS, steps  # each run went on, and none had come to its end
    done = run_forked("train.py", *arguments, prepare=light_records)
    assert done.returncode == 0, done.stderr
    same_run(uninterrupted, checkpoint.parent)
    assert not temporary_files(tmp_path)


def test_a_run_killed_between_its_two_files_goes_on_from_the_older(light, tmp_path):
    whole = trained(tmp_path / "whole", *EVERY, "--steps", 6)
    part = shutil.copytree(whole, tmp_path / "part")
    before = (part / "checkpoint.pt").read_bytes()
    code, _, err = call(train, "--resume", part, "--steps", 8)
    assert code == 0, err
    (part / "checkpoint.pt").write_bytes(before)  # step 6 beside the weights of step 8
    for run in (whole, part):
        code, _, err = call(train, "--resume", run, "--steps", 9)
        assert code == 0, err
    same_run(whole, part)


def test_a_run_stopped_by_each_signal_saves_and_goes_on_bit_for_bit(uninterrupted, tmp_path):
    arguments, run = [*OPTIONS, "--output-dir", tmp_path], tmp_path / "00000-true-digits"
    metrics, wanted = run / "metrics.csv", 0
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        wanted += 3  # lines of figures
        process = ForkedCommand("train.py", *arguments, prepare=light_records)
        wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > wanted, process)  # noqa: B023
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 130, (number, errors)
        step = read_resume(run / "checkpoint.pt")["step"]
        assert 7 * wanted <= step < STEPS
        said = errors.strip().splitlines()[-1]
        assert said == f"train.py: interrupted: step {step} is saved; go on with --resume {run}", number
        arguments = ["--resume", run]
    done = run_forked("train.py", *arguments, prepare=light_records)
    assert done.returncode == 0, done.stderr
    same_run(uninterrupted, run)


def as_under_nohup() -> None:
    light_records()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def test_a_signal_that_was_ignored_from_the_start_stays_ignored(tmp_path):
    """As under nohup: closing the terminal does not stop the run."""
    process = ForkedCommand("train.py", *TINY, *EVERY, "--steps", 25, "--output-dir", tmp_path, prepare=as_under_nohup)
    wait_for(lambda: list(tmp_path.glob("*/checkpoint.pt")), process)
    process.send_signal(signal.SIGHUP)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


def test_a_run_that_another_process_trains_is_left_to_it(tmp_path):
    process = ForkedCommand("train.py", *TINY, "--save-every", 5, "--steps", 100_000, "--output-dir", tmp_path)
    run = tmp_path / "00000-true-digits"
    wait_for((run / "checkpoint.pt").exists, process)
    refused(run_forked("train.py", "--resume", run), f"{run}: another process is training it")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    step = read_resume(run / "checkpoint.pt")["step"] + 1
    done = run_forked("train.py", "--resume", run, "--steps", step, prepare=light_records)  # now it may
    assert done.returncode == 0, done.stderr
    assert [int(row["step"]) for row in rows(run)] == sorted({int(row["step"]) for row in rows(run)})


def test_a_second_signal_stops_at_once_and_leaves_whole_files(tmp_path):
    process = ForkedCommand("train.py", *TINY, *EVERY, "--steps", 100_000, "--output-dir", tmp_path)
    run = tmp_path / "00000-true-digits"
    wait_for((run / "checkpoint.pt").exists, process)
    process.send_signal(signal.SIGSTOP)  # so that both signals are there before the process can act on either
    step = read_resume(run / "checkpoint.pt")["step"]
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=120)
    done = subprocess.CompletedProcess([], process.returncode, "", errors)
    refused(done, f"interrupted: the files in {run} are those of the last save", code=130)
    assert step <= read_resume(run / "checkpoint.pt")["step"] <= step + 1  # one more if it was being renamed
    read_model(run)
    assert not temporary_files(run)


@pytest.mark.parametrize("command", [["train.py", "--dry-run"], ["sample.py", "--steps", 1]])
def test_ctrl_c_while_torch_is_imported_ends_in_one_line(command, tmp_path):
    process = start_command(*command, cwd=tmp_path)
    wait_for(lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text(), process)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, out, errors) == (130, "", "interrupted\n")
