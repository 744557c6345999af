"""What may befall a run, injected into the real commands from outside: at most the work since the last save is lost."""

import ctypes
import io
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
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    call,
    refused,
    rows,
    run_command,
    start_command,
    start_forked,
    start_torchrun,
    trained,
    wait_for,
)
from PIL import Image

import sample
import train
from checkpoint import make_run_folder, read_model, read_resume, save_run
from errors import UserError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the faults are made with Linux's means")

FILES = ("config.json", "metrics.csv", "model.safetensors", "checkpoint.pt")
EVERY = ["--log-every", 1, "--save-every", 1, "--sample-every", 1000]


def same(a, b) -> bool:
    """Bit equality of nested dicts, lists and tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


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


# ---- damaged and foreign files


DAMAGE = {
    "empty": lambda content: b"",
    "cut short": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "text": lambda content: b"hello\n" * 9,
    "a bit flipped in a weight": lambda content: flip(content, len(content) // 2),
    "zeros, as after a crash": lambda content: bytes(len(content)),
}


def flip(content: bytes, place: int, bit: int = 0) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    return bytes(changed)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["model.safetensors", "checkpoint.pt"])
def test_a_damaged_file_is_refused_by_name(name, damage, whole_run, tmp_path):
    run = shutil.copytree(whole_run, tmp_path / "run")
    (run / name).write_bytes(DAMAGE[damage]((run / name).read_bytes()))
    module, flag = (sample, "--checkpoint") if name == "model.safetensors" else (train, "--resume")
    code, out, err = call(module, flag, run)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert str(run / name) in err


def test_no_flipped_bit_goes_unseen(whole_run, tmp_path):
    places = random.Random(0)
    model, resume = ((whole_run / name).read_bytes() for name in ("model.safetensors", "checkpoint.pt"))
    for _ in range(300):
        (tmp_path / "model.safetensors").write_bytes(flip(model, places.randrange(len(model)), places.randrange(8)))
        with pytest.raises(UserError, match=r"model\.safetensors"):
            read_model(tmp_path)
    saved = read_resume(whole_run / "checkpoint.pt")
    inside = [
        range(info.header_offset, info.header_offset + 256) for info in zipfile.ZipFile(io.BytesIO(resume)).filelist
    ]
    headers = [place for part in inside for place in part]  # of the parts, where some bytes mean nothing
    seen = 0
    for i in range(300):
        place = places.randrange(len(resume)) if i % 2 else places.choice(headers)
        (tmp_path / "checkpoint.pt").write_bytes(flip(resume, place, places.randrange(8)))
        try:
            assert same(read_resume(tmp_path / "checkpoint.pt"), saved)
        except UserError as error:
            assert "checkpoint.pt" in str(error)
            seen += 1
    assert seen > 150


def resumed_with_checkpoint_of(other: Path, run: Path) -> str:
    shutil.copy(other / "checkpoint.pt", run / "checkpoint.pt")
    code, _, err = call(train, "--resume", run)
    assert code == 2 and err.count("\n") == 1, err
    assert str(run / "checkpoint.pt") in err
    return err


def test_the_checkpoint_of_another_run_is_refused_with_what_differs(tmp_path):
    run = trained(tmp_path / "run", "--steps", 1)
    others = {
        "model was inspired, is true": ["--model", "inspired"],
        "shape was [1, 16, 16], is [1, 8, 8]": ["--image-size", 16],  # the weights would fit
        "prediction_type was v, is edm": ["--prediction-type", "v"],
    }
    for i, (words, options) in enumerate(others.items()):
        other = trained(tmp_path / str(i), "--steps", 1, *options)
        assert words in resumed_with_checkpoint_of(other, run)


def test_a_file_of_a_later_format_is_refused_with_its_version(whole_run, tmp_path, monkeypatch):
    run = shutil.copytree(whole_run, tmp_path / "run")
    tensors, config = read_model(run)
    state = read_resume(run / "checkpoint.pt")
    state.pop("format_version")
    with monkeypatch.context() as later:
        later.setattr("checkpoint.FORMAT_VERSION", 99)
        save_run(run, tensors, config, state)
    for module, flag, name in ((sample, "--checkpoint", "model.safetensors"), (train, "--resume", "checkpoint.pt")):
        code, _, err = call(module, flag, run)
        assert code == 2 and f"{run / name}: format version 99" in err, err


BAD_CONFIGS = [
    "[1]",
    "{",
    "null",
    "[" * 100_000,
    '{"train": {"model": "true", "wings": 2}}',
    '{"train": {"batch_size": "x"}}',
    '{"train": {"batch_size": -5}}',
    '{"train": {"lr": [1]}}',
    '{"train": {"epochs": {}}}',
    '{"train": {"model": "transformer"}}',
    '{"train": {"model_config": 3}}',
    '{"train": {"model_config": {"solver": 3}}}',
    '{"train": {"model_config": {"horses": 3}}}',
]


@pytest.mark.parametrize("content", BAD_CONFIGS, ids=lambda content: content[:50])
def test_a_config_that_no_run_wrote_is_refused_by_name(content, whole_run, tmp_path):
    run = shutil.copytree(whole_run, tmp_path / "run")
    (run / "config.json").write_text(content)
    code, _, err = call(train, "--resume", run)
    assert code == 2 and err.count("\n") == 1 and "config.json" in err, err


def test_metrics_that_no_run_wrote_are_refused_by_name(tmp_path):
    run = trained(tmp_path, "--steps", 1)
    for content in (b"a,b\n1,2\n", b"\xff\xfe\n", b"step,images,seconds,loss,lr,held_out_loss\nx,1,1,1,1,\n"):
        (run / "metrics.csv").write_bytes(content)
        code, _, err = call(train, "--resume", run, "--steps", 2)
        assert code == 2 and "metrics.csv" in err and "Traceback" not in err, err
        assert (run / "metrics.csv").read_bytes() == content


# ---- where it runs


def without_privileges() -> None:
    """Before a command: permissions hold for root as for anybody (Linux capabilities 1 and 2, taken for good)."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            if libc.prctl(24, capability, 0, 0, 0):  # PR_CAPBSET_DROP
                raise OSError(ctypes.get_errno(), "prctl")


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
    done = run_command("train.py", *missing, "--output-dir", closed / "runs", prepare=unprivileged)
    refused(done, "--output-dir", str(closed))
    options = ["--checkpoint", whole_run, "--steps", 1, "--num-images", 1]
    done = run_command("sample.py", *options, "--output", closed / "a.png", prepare=unprivileged)
    refused(done, "--output", str(closed))
    unreadable = tmp_path / "unreadable"
    unreadable.mkdir(mode=0o000)
    done = run_command("train.py", *missing, "--output-dir", unreadable, prepare=unprivileged)
    refused(done, "--output-dir", str(unreadable))


def test_images_without_read_permission_are_named_and_counted(unprivileged, tmp_path):
    for i in range(4):
        Image.new("RGB", (32, 32), (i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").chmod(0)
    options = ["--dataset", "folder", "--data-dir", tmp_path, "--dry-run"]
    done = run_command("train.py", *options, prepare=unprivileged)
    refused(done, str(tmp_path / "2.png"), "Permission denied", "1 of 4 images", "--skip-bad-images")
    done = run_command("train.py", *options, "--skip-bad-images", prepare=unprivileged)
    assert done.returncode == 0, done.stderr
    assert "2 images 3x32x32, 1 held out" in done.stdout and f"skipped  cannot read {tmp_path}/2.png" in done.stdout
    (tmp_path / "closed").mkdir(mode=0o000)
    refused(run_command("train.py", *options, prepare=unprivileged), str(tmp_path / "closed"))


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
