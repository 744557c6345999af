"""What may befall a run, injected into the real commands from outside: at most the work since the last save is lost."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    TINY,
    call,
    refused,
    rows,
    run_command,
    same,
    start_command,
    start_forked,
    start_torchrun,
    trained,
    wait_for,
)
from PIL import Image

import train
from checkpoint import read_model, read_resume

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the faults are made with Linux's means")

FILES = ("config.json", "metrics.csv", "model.safetensors", "checkpoint.pt")
EVERY = ["--log-every", 1, "--save-every", 1, "--sample-every", 1000]


def temporary_files(folder: Path) -> list[Path]:
    return list(folder.rglob(".*.tmp"))


def same_run(whole: Path, part: Path) -> None:
    """Check that two runs ended with the same bits: weights, average, optimizer, and every figure but the seconds."""
    a, b = read_resume(whole / "checkpoint.pt"), read_resume(part / "checkpoint.pt")
    for name in ("model", "ema", "optimizer", "step"):
        assert same(a[name], b[name]), name
    assert (whole / "model.safetensors").read_bytes() == (part / "model.safetensors").read_bytes()
    columns = ("step", "images", "loss", "lr", "held_out_loss")
    assert [[row[c] for c in columns] for row in rows(whole)] == [[row[c] for c in columns] for row in rows(part)]


# ---- stopped from outside


def test_killed_at_twenty_moments_a_run_ends_with_the_bits_of_one_that_was_not(tmp_path):
    options = [*TINY, "--batch-size", 4, *EVERY, "--steps", 400]
    whole = trained(tmp_path / "whole", "--batch-size", 4, "--log-every", 1, "--sample-every", 1000, "--steps", 400)
    moments = random.Random(0)
    arguments, saved_at, steps = [*options, "--output-dir", tmp_path / "part"], 0, []
    for _ in range(20):
        process = start_forked("train.py", *arguments, output=tmp_path / "output")
        checkpoint = tmp_path / "part/00000-true-digits/checkpoint.pt"
        wait_for(lambda: checkpoint.exists() and checkpoint.stat().st_mtime_ns > saved_at, process)  # noqa: B023
        time.sleep(moments.uniform(0, 0.08))  # a few steps, half of whose time goes into saving
        process.kill()
        process.join()
        saved_at = checkpoint.stat().st_mtime_ns
        read_model(checkpoint.parent)
        steps.append(read_resume(checkpoint)["step"])
        arguments = ["--resume", checkpoint.parent]
    assert steps == sorted(set(steps)) and steps[-1] < 400, steps  # each run went on, and none had come to its end
    done = run_command("train.py", *arguments)
    assert done.returncode == 0, done.stderr
    same_run(whole, checkpoint.parent)
    assert not temporary_files(tmp_path)


def test_a_run_killed_between_its_two_files_goes_on_from_the_older(tmp_path, monkeypatch):
    whole = trained(tmp_path / "whole", *EVERY, "--steps", 6)
    part = trained(tmp_path / "part", *EVERY, "--steps", 6)
    before = (part / "checkpoint.pt").read_bytes()
    code, _, err = call(train, "--resume", part, "--steps", 8)
    assert code == 0, err
    (part / "checkpoint.pt").write_bytes(before)  # step 6 beside the weights of step 8
    for run in (whole, part):
        code, _, err = call(train, "--resume", run, "--steps", 9)
        assert code == 0, err
    same_run(whole, part)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[Path, list]:
    """A run and its options: 300 steps of 16 images, past the first epoch's end at step 110."""
    # a log line every 7 steps, so that an interruption falls between two of them but for one time in seven
    options = ["--steps", 300, "--log-every", 7, "--save-every", 1000, "--sample-every", 1000]
    return trained(tmp_path_factory.mktemp("uninterrupted"), *options), options


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_stopped_run_saves_and_goes_on_bit_for_bit(number, uninterrupted, tmp_path):
    whole, options = uninterrupted
    process = start_command("train.py", *TINY, *options, "--output-dir", tmp_path)
    metrics = tmp_path / "00000-true-digits/metrics.csv"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 3, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    part = metrics.parent
    step = read_resume(part / "checkpoint.pt")["step"]
    assert 21 <= step < 300
    said = errors.strip().splitlines()[-1]
    assert said == f"train.py: interrupted: step {step} is saved; go on with --resume {part}"
    code, _, err = call(train, "--resume", part)
    assert code == 0, err
    same_run(whole, part)


def test_a_signal_that_was_ignored_from_the_start_stays_ignored(tmp_path):
    """As under nohup: closing the terminal does not stop the run."""
    process = start_command(
        "train.py", *TINY, *EVERY, "--steps", 40, "--output-dir", tmp_path,
        prepare=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )  # fmt: skip
    wait_for(lambda: list(tmp_path.glob("*/checkpoint.pt")), process)
    process.send_signal(signal.SIGHUP)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


def test_a_second_signal_stops_at_once_and_leaves_whole_files(tmp_path):
    process = start_command("train.py", *TINY, *EVERY, "--steps", 100_000, "--output-dir", tmp_path)
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


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_ctrl_c_while_torch_is_imported_ends_in_one_line(script):
    process = start_command(script, "--help")
    wait_for(lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text(), process)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, out, errors) == (130, "", "interrupted\n")


# ---- a full disk


def limited(size: int):
    """A limit on the size of files, which a process meets as a full disk: a write fails."""
    return partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize(
    "size, options",
    [
        (200, []),
        (4_000, ["--save-every", 10_000]),
        (5_000, ["--save-every", 10_000, "--sample-every", 5]),
        (300_000, ["--save-every", 1]),
    ],
    ids=["config.json", "metrics.csv", "samples", "checkpoint.pt"],
)
def test_a_disk_that_fills_keeps_what_was_there(size, options, tmp_path, request):
    run = trained(tmp_path, "--log-every", 1, "--steps", 2, "--sample-every", 1000)
    before = {name: (run / name).read_bytes() for name in FILES}
    options = ["--resume", run, "--log-every", 1, "--steps", 200, *options]
    done = run_command("train.py", *options, prepare=limited(size))
    refused(done, "train.py: failed: cannot write", request.node.callspec.id, "--resume", code=1)
    after = {name: (run / name).read_bytes() for name in FILES}
    assert after["checkpoint.pt"] == before["checkpoint.pt"]
    assert after["model.safetensors"] == before["model.safetensors"]
    assert "train" in json.loads(after["config.json"])
    assert after["metrics.csv"].startswith(before["metrics.csv"][:200])
    assert not temporary_files(run)
    if size == 4_000:  # the last line that fitted may have been cut
        assert len(after["metrics.csv"]) == size
        code, _, err = call(train, "--resume", run, "--steps", 4)
        assert code == 0, err
        assert [int(row["step"]) for row in rows(run)] == [1, 2, 3, 4]


def test_a_picture_that_does_not_fit_leaves_the_older_one(whole_run, tmp_path):
    picture = tmp_path / "samples.png"
    picture.write_bytes(b"older")
    options = ["--checkpoint", whole_run, "--steps", 2, "--output", picture]
    refused(run_command("sample.py", *options, prepare=limited(2_000)), "sample.py: failed: ", str(picture), code=1)
    assert picture.read_bytes() == b"older"
    assert not temporary_files(tmp_path)


def test_output_that_cannot_be_printed_is_a_failure_in_one_line(tmp_path):
    with open("/dev/full", "w") as full:
        process = start_command("train.py", *TINY, "--steps", 1, "--output-dir", tmp_path, stdout=full)
        _, errors = process.communicate(timeout=120)
    refused(subprocess.CompletedProcess([], process.returncode, "", errors), "No space left", code=1)


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path):
    run = trained(tmp_path, "--steps", 2)
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    for name in ("checkpoint.pt", "model.safetensors", "metrics.csv"):
        (run / f".{name}.{gone.stdout.strip()}.tmp").write_bytes(b"part")
    living = run / f".checkpoint.pt.{os.getppid()}.tmp"  # of a process that may be about to rename it
    living.write_bytes(b"part")
    code, _, err = call(train, "--resume", run, "--steps", 3)
    assert code == 0, err
    assert temporary_files(run) == [living]


# ---- a run that fails of itself


# at 1e6 the last finite loss has a gradient that overflows: the weights that it leaves are not finite
@pytest.mark.parametrize("rate", [1e4, 1e6, 1e30])
def test_a_diverging_run_keeps_its_last_good_checkpoint_and_draws_nothing_black(rate, tmp_path):
    options = ["--steps", 40, "--lr", rate, "--log-every", 1, "--save-every", 1, "--sample-every", 1]
    code, _, err = call(train, *TINY, "--output-dir", tmp_path, *options)
    (run,) = tmp_path.iterdir()
    line = err.strip().splitlines()[-1]
    assert code == 1 and "Traceback" not in err
    assert re.match(
        r"train.py: failed: the (held-out )?loss is \S+( but a (weight|sample) is not finite)? at step \d+; ", line
    )
    if rate == 1e30:  # the first step has undone it
        assert "at step 1; nothing was saved yet" in line and not (run / "checkpoint.pt").exists()
    else:
        assert f"the files in {run} are those of the last save" in line
        assert all(tensor.isfinite().all() for tensor in read_model(run)[0].values())
        assert all(tensor.isfinite().all() for tensor in read_resume(run / "checkpoint.pt")["model"].values())
    assert all(len(np.unique(np.asarray(Image.open(path)))) > 1 for path in run.glob("samples/*.png"))


def test_out_of_memory_names_a_batch_size_to_try(tmp_path):
    run = trained(tmp_path, "--steps", 1, "--image-size", 32)

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (5 << 30, 5 << 30))

    options = [*TINY, "--image-size", 32, "--batch-size", 10_000, "--output-dir", tmp_path / "runs"]
    refused(run_command("train.py", *options, prepare=limit), "out of memory", "--batch-size 5000", code=1)
    options = ["--checkpoint", run, "--num-images", 10_000, "--batch-size", 30_000, "--output", tmp_path / "a.png"]
    refused(run_command("sample.py", *options, prepare=limit), "out of memory", "--batch-size 5000", code=1)


def test_without_a_gpu_cuda_is_refused_and_auto_is_not(tmp_path):
    options = [*TINY, "--output-dir", tmp_path, "--dry-run", "--device"]
    refused(run_command("train.py", *options, "cuda", CUDA_VISIBLE_DEVICES=""), "--device", "cuda")
    done = run_command("train.py", *options, "auto", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0 and "device   cpu" in done.stdout, done.stderr


def test_where_there_is_no_compiler_the_flag_is_named(tmp_path):
    options = [*TINY, "--steps", 1, "--compile", "--output-dir", tmp_path / "runs"]
    nothing = {"CXX": str(tmp_path / "no-compiler"), "PATH": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    refused(run_command("train.py", *options, **nothing), "--compile", "compiler")


# ---- several processes


def ranks(parent: int) -> dict[int, int]:
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


@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_processes_killed_the_other_ends_and_the_run_goes_on(victim, tmp_path):
    process = start_torchrun(2, *TINY, *EVERY, "--steps", 100_000, "--output-dir", tmp_path)
    run = tmp_path / "00000-true-digits"
    wait_for((run / "checkpoint.pt").exists, process)
    workers = ranks(process.pid)
    os.kill(workers[victim], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "another process ended" in errors and f"{run} are those of the last save" in errors, errors
    assert not Path(f"/proc/{workers[1 - victim]}").exists()
    step = read_resume(run / "checkpoint.pt")["step"]
    read_model(run)
    if victim == 1:
        return
    copy = shutil.copytree(run, tmp_path / "copy" / run.name)
    code, _, err = call(train, "--resume", run, "--steps", step + 5)  # in one process
    assert code == 0, err
    three = start_torchrun(3, "--resume", copy, "--steps", step + 5)
    _, errors = three.communicate(timeout=120)
    assert three.returncode == 0, errors
    losses = [[float(row["loss"]) for row in rows(folder)[-5:]] for folder in (run, copy)]
    assert [row["step"] for row in rows(copy)][-1] == str(step + 5)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_several_processes_interrupted_save_and_say_so_once(tmp_path):
    process = start_torchrun(2, *TINY, "--steps", 100_000, "--output-dir", tmp_path)
    run = tmp_path / "00000-true-digits"
    wait_for(lambda: (run / "metrics.csv").exists() and len((run / "metrics.csv").read_text()) > 80, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    step = read_resume(run / "checkpoint.pt")["step"]
    said = {line for line in errors.splitlines() if line.startswith("train.py: ")}
    assert said == {f"train.py: interrupted: step {step} is saved; go on with --resume {run}"}


def test_two_runs_started_together_get_two_folders(tmp_path):
    pair = [start_command("train.py", *TINY, "--steps", 2, "--output-dir", tmp_path / "runs") for _ in range(2)]
    for process in pair:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    folders = sorted((tmp_path / "runs").iterdir())
    assert [folder.name for folder in folders] == ["00000-true-digits", "00001-true-digits"]
    assert (folders[0] / "model.safetensors").read_bytes() == (folders[1] / "model.safetensors").read_bytes()
