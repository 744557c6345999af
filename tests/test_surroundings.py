"""Where a command runs: permissions, locale, current folder, home, clock, and neighbours that start when it does."""

import ctypes
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, call, refused, rows, run_command, run_forked, trained
from PIL import Image

import train
from checkpoint import make_run_folder, read_model

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


def test_an_output_folder_is_made_and_a_file_in_its_way_is_named(tmp_path):
    assert trained(tmp_path / "a/b/c", "--steps", 1).parent == tmp_path / "a/b/c"
    (tmp_path / "file").write_text("kept")
    for place in (tmp_path / "file", tmp_path / "file/runs", tmp_path / ("x" * 5000)):
        code, _, err = call(train, *TINY, "--output-dir", place)
        assert code == 2 and err.count("\n") == 1 and "--output-dir" in err, err
    assert (tmp_path / "file").read_text() == "kept"


def test_any_locale_and_any_script_will_do(tmp_path):
    folder = tmp_path / "фото"
    for name in ("犬/один.png", "犬/zwei ä.png", "ネコ/three\n.png", "ネコ/四.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(folder / name)
    Image.new("RGB", (32, 32)).save(os.fsencode(folder) + b"/\xff\xfe.png")  # not UTF-8
    (folder / "сломан.png").write_bytes(b"broken")
    options = ["--dataset", "folder", "--data-dir", folder, "--output-dir", tmp_path / "выход", "--class-conditional"]
    options += ["--steps", 1, "--batch-size", 2, "--timesteps", 2, "--precision", "fp32"]
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    refused(run_command("train.py", *options, **plain), "--skip-bad-images", "1 of 6 images")
    done = run_command("train.py", *options, "--skip-bad-images", **plain)
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
    done = run_command("sample.py", "--checkpoint", run, "--output", tmp_path / "снимок.png", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and (tmp_path / "снимок.png").exists(), done.stderr


def test_no_home_a_read_only_source_tree_and_another_current_folder_will_do(unprivileged, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, source)
    shutil.copytree(ROOT / "pretrained", source / "pretrained")
    for folder in (source, source / "pretrained"):
        folder.chmod(0o555)
    (tmp_path / "elsewhere").mkdir()
    there = {"cwd": tmp_path / "elsewhere", "prepare": unprivileged, "HOME": "/nonexistent", "TZ": "Nowhere/No"}
    done = run_command(source / "train.py", *TINY, "--steps", 1, **there)
    assert done.returncode == 0, done.stderr
    done = run_command(source / "sample.py", "--num-images", 1, "--steps", 2, **there)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == {"runs", "samples.png"}


def test_a_clock_that_runs_backwards_changes_nothing(whole_run, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import itertools, time\nc = itertools.count()\n"
                                               "time.time = lambda: 1e9 - 3600 * next(c)\n")  # fmt: skip
    options = [*TINY, "--steps", 60, "--sample-every", 40, "--save-every", 7, "--output-dir", tmp_path / "runs"]
    done = run_command("train.py", *options, PYTHONPATH=str(tmp_path))
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
