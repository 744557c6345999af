"""Full disks, too little memory, rates that diverge, machines that lack something: one line, and whole files."""

import importlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    TINY,
    call,
    light_records,
    refused,
    rows,
    run_forked,
    start_command,
    temporary_files,
    trained,
)
from PIL import Image

import train
from kernels.compilation import compiler_failure, is_compiler_failure
from training.checkpoint import read_model, read_resume
from training.step import learning_rate

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the faults are made with Linux's means")

FILES = ("config.json", "metrics.csv", "model.safetensors", "checkpoint.pt")


def limited(size: int):
    """A limit on the size of files, which a process meets as a full disk: a write fails."""
    return partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    """A run of two steps."""
    with pytest.MonkeyPatch.context() as patch:
        light_records(patch.setattr)
        return trained(tmp_path_factory.mktemp("run"), "--log-every", 1, "--steps", 2, "--sample-every", 1000)


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
def test_a_disk_that_fills_keeps_what_was_there(size, options, light, two_steps, tmp_path, request):
    run = shutil.copytree(two_steps, tmp_path / "run")
    before = {name: (run / name).read_bytes() for name in FILES}
    options = ["--resume", run, "--log-every", 1, "--steps", 200, *options]
    done = run_forked("train.py", *options, prepare=limited(size))
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
    refused(run_forked("sample.py", *options, prepare=limited(2_000)), "sample.py: failed: ", str(picture), code=1)
    assert picture.read_bytes() == b"older"
    assert not temporary_files(tmp_path)


def test_output_that_cannot_be_printed_is_a_failure_in_one_line(tmp_path):
    with open("/dev/full", "w") as full:
        process = start_command("train.py", *TINY, "--steps", 1, "--output-dir", tmp_path, stdout=full)
        _, errors = process.communicate(timeout=120)
    refused(subprocess.CompletedProcess([], process.returncode, "", errors), "No space left", code=1)


def test_what_a_killed_run_left_is_removed_by_the_next(light, two_steps, tmp_path):
    run = shutil.copytree(two_steps, tmp_path / "run")
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    for name in ("checkpoint.pt", "model.safetensors", "metrics.csv"):
        (run / f".{name}.{gone.stdout.strip()}.tmp").write_bytes(b"part")
    living = run / f".checkpoint.pt.{os.getppid()}.tmp"  # of a process that may be about to rename it
    living.write_bytes(b"part")
    code, _, err = call(train, "--resume", run, "--steps", 3)
    assert code == 0, err
    assert temporary_files(run) == [living]


# at 1e6 the last finite loss has a gradient that overflows: the weights that it leaves are not finite
@pytest.mark.parametrize("rate", [1e4, 1e6, 1e30])
def test_a_diverging_run_keeps_its_last_good_checkpoint_and_draws_nothing_black(rate, light, tmp_path, monkeypatch):
    monkeypatch.setattr("training.step.learning_rate", lambda _, *when: learning_rate(rate, *when))  # no flag takes it
    options = ["--steps", 40, "--log-every", 1, "--save-every", 1, "--sample-every", 1]
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


def little_memory() -> None:
    """A limit of 256 MiB of addresses beyond what the process has."""
    importlib.import_module("torch.utils.flop_counter")  # imports triton, and warns where memory is too short for it
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (256 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def test_out_of_memory_names_a_batch_size_to_try(two_steps, tmp_path):
    options = [*TINY, "--batch-size", 40_000, "--output-dir", tmp_path / "runs"]
    refused(run_forked("train.py", *options, prepare=little_memory), "out of memory", "--batch-size 20000", code=1)
    options = ["--checkpoint", two_steps, "--num-images", 40_000, "--batch-size", 60_000]
    done = run_forked("sample.py", *options, "--output", tmp_path / "a.png", prepare=little_memory)
    refused(done, "out of memory", "--batch-size 20000", code=1)


def test_without_a_gpu_cuda_is_refused_and_auto_is_not(tmp_path):
    options = [*TINY, "--output-dir", tmp_path, "--dry-run", "--device"]
    refused(run_forked("train.py", *options, "cuda", CUDA_VISIBLE_DEVICES=""), "--device", "cuda")
    done = run_forked("train.py", *options, "auto", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0 and "device   cpu" in done.stdout, done.stderr


def compiler_is_missed() -> None:
    """Check that a compilation on trial, with which `--compile auto` begins, fails as the one of the run will."""
    failure = compiler_failure(torch.device("cpu"))
    assert is_compiler_failure(failure) and "compiler" in str(failure), failure


def test_where_there_is_no_compiler_that_is_found_out_and_the_flag_is_named(tmp_path):
    options = [*TINY, "--model", "inspired", "--steps", 1, "--compile", "--output-dir", tmp_path / "runs"]
    nothing = {"PATH": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    refused(run_forked("train.py", *options, prepare=compiler_is_missed, **nothing), "--compile", "compiler")
