"""Where a command runs: permissions, locale, current folder, home, clock, and neighbours that start when it does."""

import ctypes
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, call, forked, refused, rows, run_command, run_forked, trained
from PIL import Image

import train
from runtime import hardware
from runtime.progress import progress_bar
from training.checkpoint import read_model
from training.run_folder import make_run_folder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the faults are made with Linux's means")


def without_privileges() -> None:
    """Before a command: permissions hold for root as for anybody, in this process and what it executes."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, taken from what is executed
            if libc.prctl(24, capability, 0, 0, 0):  # PR_CAPBSET_DROP
                raise OSError(ctypes.get_errno(), "prctl")
        version_3, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        if libc.capset(version_3, none):
            raise OSError(ctypes.get_errno(), "capset")


@pytest.fixture
def unprivileged():
    """What `prepare` takes to run a command for which permissions hold."""
    try:
        subprocess.run(["true"], preexec_fn=without_privileges, check=True)
    except subprocess.SubprocessError:
        pytest.skip("root here may not give up its privileges")
    return without_privileges


IN_TURN = """
import runpy, sys
words = sys.argv[1:] + ["then"]
while words:
    end = words.index("then")
    sys.argv, words = words[:end], words[end + 1 :]
    sys.path[0] = sys.argv[0].rpartition("/")[0]
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as left:
        code = left.code
    for stream in (sys.stdout, sys.stderr):
        print("left with", code, file=stream)
"""


def run_in_turn(script: Path, *arguments, **options) -> list[subprocess.CompletedProcess]:
    """As `run_command`, for the commands between the words "then", one after the other in one fresh interpreter.

    script: where to put the program that does it.
    """
    script.write_text(IN_TURN)
    done = run_command(script, *arguments, **options)
    assert done.returncode == 0, done.stderr
    outs, errs = (re.split(r"left with (\d+)\n", text) for text in (done.stdout, done.stderr))
    parts = zip(map(int, outs[1::2]), outs[::2], errs[::2], strict=False)
    return [subprocess.CompletedProcess([], *part) for part in parts]


def test_an_output_folder_that_cannot_be_written_is_refused_before_the_data_are_read(unprivileged, whole_run, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    missing = ["--dataset", "folder", "--data-dir", tmp_path / "missing"]
    done = run_forked("train.py", *missing, "--output-dir", closed / "runs", prepare=unprivileged)
    refused(done, "--output-dir", str(closed))
    options = ["--checkpoint", whole_run, "--steps", 1, "--num-images", 1]
    done = run_forked("sample.py", *options, "--output", closed / "a.png", prepare=unprivileged)
    refused(done, "--output", str(closed))
    unreadable = tmp_path / "unreadable"
    unreadable.mkdir(mode=0o000)
    done = run_forked("train.py", *missing, "--output-dir", unreadable, prepare=unprivileged)
    refused(done, "--output-dir", str(unreadable))


def test_images_without_read_permission_are_named_and_counted(unprivileged, tmp_path):
    for i in range(4):
        Image.new("RGB", (32, 32), (i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").chmod(0)
    options = ["--dataset", "folder", "--data-dir", tmp_path, "--dry-run"]
    done = run_forked("train.py", *options, prepare=unprivileged)
    refused(done, str(tmp_path / "2.png"), "Permission denied", "1 of 4 images", "--skip-bad-images")
    done = run_forked("train.py", *options, "--skip-bad-images", prepare=unprivileged)
    assert done.returncode == 0, done.stderr
    assert "2 images 3x32x32, 1 held out" in done.stdout and f"skipped  cannot read {tmp_path}/2.png" in done.stdout
    (tmp_path / "closed").mkdir(mode=0o000)
    refused(run_forked("train.py", *options, prepare=unprivileged), str(tmp_path / "closed"))


def test_an_output_folder_is_made_and_a_file_in_its_way_is_named(light, tmp_path):
    assert trained(tmp_path / "a/b/c", "--steps", 1).parent == tmp_path / "a/b/c"
    (tmp_path / "file").write_text("kept")
    for place in (tmp_path / "file", tmp_path / "file/runs", tmp_path / ("x" * 5000)):
        code, _, err = call(train, *TINY, "--output-dir", place)
        assert code == 2 and err.count("\n") == 1 and "--output-dir" in err, err
    assert (tmp_path / "file").read_text() == "kept"


def as_ascii() -> None:
    """As with PYTHONIOENCODING=ascii."""
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w"), encoding="ascii")
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w"), encoding="ascii", errors="backslashreplace", write_through=True)


def test_any_locale_and_any_script_will_do(tmp_path):
    folder = tmp_path / "фото"
    for name in ("犬/один.png", "犬/zwei ä.png", "ネコ/three\n.png", "ネコ/四.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(folder / name)
    Image.new("RGB", (32, 32)).save(os.fsencode(folder) + b"/\xff\xfe.png")  # not UTF-8
    (folder / "сломан.png").write_bytes(b"broken")
    command = [ROOT / "train.py", "--dataset", "folder", "--data-dir", folder, "--output-dir", tmp_path / "выход"]
    command += ["--class-conditional", "--image-size", 8, "--steps", 1, "--batch-size", 2, "--timesteps", 2]
    command += ["--precision", "fp32"]
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    with_bad, done = run_in_turn(tmp_path / "a.py", *command, "then", *command, "--skip-bad-images", **plain)
    refused(with_bad, "--skip-bad-images", "1 of 6 images")
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "выход").iterdir()
    # such a process knows bytes, not letters; it keeps them
    assert {os.fsencode(name) for name in read_model(run)[1]["classes"]} == {
        "фото".encode(),
        "犬".encode(),
        "ネコ".encode(),
    }
    (skipped,) = json.loads((run / "config.json").read_text())["skipped_images"]
    assert os.fsencode(skipped.split(": ")[0]).endswith("сломан.png".encode())
    options = ["--checkpoint", run, "--output", tmp_path / "снимок.png"]
    done = run_forked("sample.py", *options, prepare=as_ascii)
    assert done.returncode == 0 and (tmp_path / "снимок.png").exists(), done.stderr


def test_no_home_a_read_only_source_tree_and_another_current_folder_will_do(unprivileged, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, source)
    for name in ("diffusion", "images", "kernels", "lab", "pretrained", "runtime", "training"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for folder, _, _ in os.walk(source):
        os.chmod(folder, 0o555)
    (tmp_path / "elsewhere").mkdir()
    there = {"cwd": tmp_path / "elsewhere", "prepare": unprivileged, "HOME": "/nonexistent", "TZ": "Nowhere/No"}
    training = [source / "train.py", *TINY, "--steps", 1]
    drawing = [source / "sample.py", "--num-images", 1, "--steps", 2]
    for done in run_in_turn(tmp_path / "a.py", *training, "then", *drawing, **there):
        assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == {"runs", "samples.png"}


def backwards() -> None:
    """The clock goes back by an hour whenever somebody looks at it."""
    past = itertools.count()
    time.time = lambda: 1e9 - 3600 * next(past)


def test_a_clock_that_runs_backwards_changes_nothing(light, whole_run, tmp_path):
    options = ["--steps", 60, "--sample-every", 40, "--save-every", 7, "--output-dir", tmp_path / "runs"]
    done = run_forked("train.py", *TINY, *options, prepare=backwards)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "model.safetensors").read_bytes() == (whole_run / "model.safetensors").read_bytes()
    assert 0 < float(rows(run)[-1]["seconds"]) < 300
    for name in ("00001-true-digits", "00002-true-digits"):
        os.utime(shutil.copytree(run, run.parent / name), (0, 0))  # the latest run by number, the oldest by date
    code, out, _ = call(train, "--resume", "--output-dir", run.parent)
    assert code == 0 and "done: " in out and "00002-true-digits" in out


def test_runs_that_claim_a_folder_at_the_same_moment_get_different_ones(tmp_path):
    """Many processes at once, each claiming again and again."""
    children = []
    for _ in range(8):
        child = os.fork()
        if child == 0:
            for _ in range(12):
                make_run_folder(tmp_path, "run")
            os._exit(0)
        children.append(child)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{i:05d}-run" for i in range(96)]


@pytest.mark.parametrize("numbers", ["0", "1", "2", "0,1,2"])
def test_closed_streams_change_nothing_but_what_is_seen(numbers, whole_run, tmp_path):
    """`>&-`: nothing is printed, and no file that the command opens gets what would have been printed."""
    code = "import os, sys\nfor n in sys.argv[1].split(','): os.close(int(n))\nos.execv(sys.executable, sys.argv[2:])"
    words = ["--checkpoint", whole_run, "--steps", 1, "--num-images", 1, "--output", tmp_path / "a.png"]
    command = [sys.executable, ROOT / "sample.py", *words]
    done = subprocess.run([sys.executable, "-c", code, numbers, *map(str, command)], capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (done.stdout == b"") == ("1" in numbers) and (done.stderr == b"") == ("2" in numbers)
    assert Image.open(tmp_path / "a.png").size[0] >= 8


def test_an_error_to_a_closed_stream_is_an_exit_code(tmp_path):
    for module_stream in ("stdout", "stderr"):
        code = (
            f"import sys; sys.{module_stream} = None; sys.argv = ['train.py', '--lr', '5']; sys.path.insert(0, '.')\n"
        )
        code += "import runpy; runpy.run_path('train.py', run_name='__main__')"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 2 and "Traceback" not in done.stderr


def test_one_variable_of_torchrun_alone_means_nothing_and_wrong_ones_are_refused(light, tmp_path, monkeypatch):
    alone = [*TINY, "--steps", 1, "--output-dir", tmp_path]
    for name, value in (("LOCAL_RANK", "0"), ("RANK", "3"), ("WORLD_SIZE", "8"), ("MASTER_ADDR", "nowhere")):
        with monkeypatch.context() as environment:
            environment.setenv(name, value)
            code, _, err = call(train, *alone)
        assert code == 0, err
    right = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in (("RANK", "x"), ("RANK", "1"), ("WORLD_SIZE", "0"), ("MASTER_PORT", "abc")):
        with monkeypatch.context() as environment:
            for variable, good in (right | {name: value}).items():
                environment.setenv(variable, good)
            code, _, err = call(train, *alone)
        assert code == 2 and err.count("\n") == 1 and name in err, err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_file_gets_a_line_of_progress_every_half_minute(monkeypatch):
    clock = itertools.count(1e9, 1)  # each look at the clock is a second later
    monkeypatch.setattr("tqdm.std.time", lambda: next(clock))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_bar(total=200, desc="drawing") as bar:
        for _ in range(200):
            bar.update()
    *lines, end = sys.stderr.getvalue().split("\n")
    assert 4 <= len(lines) <= 9 and end == "" and "\r" not in "".join(lines)
    assert all(line.startswith("drawing") and len(line) < 100 for line in lines) and "200/200" in lines[-1]
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    progress_bar(total=2, leave=False).close()
    assert sys.stderr.getvalue() == ""


def test_a_terminal_gets_one_line_that_moves(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress_bar(total=3, mininterval=0) as bar:
        for _ in range(3):
            bar.update()
    assert sys.stderr.getvalue().count("\r") >= 3 and sys.stderr.getvalue().count("\n") == 1


def little_is_free(free: int = 1 << 28) -> None:
    """From now on this process believes that so many bytes are free."""
    hardware.free_memory = lambda: free


def limited_memory(free: int) -> list:
    """Whether too large a tensor is refused as such, and a smaller one's size."""
    little_is_free(free)
    hardware.stay_within_memory(torch.device("cpu"))
    try:
        torch.empty(2 * free, dtype=torch.uint8)
    except RuntimeError as error:
        return [hardware.is_out_of_memory(error), torch.empty(free // 4, dtype=torch.uint8).numel()]
    return []


def test_what_does_not_fit_the_memory_fails_and_the_process_is_not_killed(tmp_path):
    assert forked(limited_memory, 1 << 28) == [True, 1 << 26]
    options = [*TINY, "--batch-size", 60_000, "--output-dir", tmp_path]
    done = run_forked("train.py", *options, prepare=little_is_free)
    refused(done, "out of memory", "--batch-size 30000", code=1)


def test_the_free_memory_is_that_of_the_container(tmp_path, monkeypatch):
    whole = hardware.free_memory()
    assert whole is not None and whole > 1 << 27
    monkeypatch.setattr(hardware, "CONTROL_GROUP", tmp_path)
    (tmp_path / "memory.max").write_text("300\n")
    (tmp_path / "memory.current").write_text("100\n")
    assert hardware.free_memory() == 200
    (tmp_path / "memory.max").write_text("max\n")
    assert hardware.free_memory() > 1 << 27
