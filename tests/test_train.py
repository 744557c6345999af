"""`train.py` as a user meets it: what a run leaves on the disk, resume, several processes, and each refusal."""

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, TINY, main_refuses, refused, run_command, train_tiny
from PIL import Image

import train
from checkpoint import read_model, read_resume


def rows(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def same(a, b) -> bool:
    """Bit equality of nested dicts, lists and tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def interrupted_run(folder: Path, number: signal.Signals, *arguments, after: int) -> tuple[Path, str]:
    """Start a run, send it a signal once `metrics.csv` has `after` rows; its folder and stderr's last line."""
    command = [sys.executable, str(ROOT / "train.py"), *TINY, "--output-dir", str(folder), *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        found = list(folder.glob("*/metrics.csv"))
        if found and len(found[0].read_text().splitlines()) > after:
            break
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    return found[0].parent, errors.strip().splitlines()[-1]


def test_a_run_leaves_its_files(whole_run):
    assert whole_run.name == "00000-true-digits"
    files = {str(path.relative_to(whole_run)) for path in whole_run.rglob("*") if path.is_file()}
    assert files == {
        *("config.json", "metrics.csv", "model.safetensors", "checkpoint.pt", "loss.png"),
        *("samples/step_0000040.png", "samples/step_0000060.png"),
    }
    config = json.loads((whole_run / "config.json").read_text())
    assert config["train"]["steps"] == 60 and config["versions"]["torch"] == torch.__version__
    table = rows(whole_run)
    assert [int(row["step"]) for row in table] == list(range(5, 65, 5))
    assert [row["step"] for row in table if row["held_out_loss"]] == ["40", "60"]
    assert all(int(row["images"]) == 16 * int(row["step"]) for row in table)
    assert float(table[-1]["held_out_loss"]) < float(table[0]["loss"])
    assert len(np.unique(np.asarray(Image.open(whole_run / "samples" / "step_0000060.png")))) > 50
    assert read_resume(whole_run / "checkpoint.pt")["step"] == 60


def test_the_same_command_gives_the_same_bytes_and_the_next_id(whole_run):
    again = train_tiny(whole_run.parent, "--steps", 60, "--sample-every", 40, "--save-every", 7)
    assert again.name == "00001-true-digits"
    assert (again / "model.safetensors").read_bytes() == (whole_run / "model.safetensors").read_bytes()
    assert (again / "samples/step_0000060.png").read_bytes() == (whole_run / "samples/step_0000060.png").read_bytes()
    other = train_tiny(whole_run.parent, "--steps", 60, "--sample-every", 40, "--save-every", 7, "--seed", 1)
    assert (other / "model.safetensors").read_bytes() != (whole_run / "model.safetensors").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_bit_for_bit(number, tmp_path):
    # 150 steps of 16 images pass the end of the first epoch at step 110; a log line every 7 steps, so that the
    # interruption falls between two of them but for one time in seven
    options = ["--steps", 150, "--log-every", 7, "--save-every", 1000, "--sample-every", 1000]
    whole = train_tiny(tmp_path / "whole", *options)
    part, message = interrupted_run(tmp_path / "part", number, *options, after=3)
    stopped = read_resume(part / "checkpoint.pt")["step"]
    assert 21 <= stopped < 150
    assert f"step {stopped} is saved" in message and str(part) in message
    done = run_command("train.py", "--resume", "--output-dir", tmp_path / "part")
    assert done.returncode == 0, done.stderr
    a, b = read_resume(whole / "checkpoint.pt"), read_resume(part / "checkpoint.pt")
    for name in ("model", "ema", "optimizer", "step"):
        assert same(a[name], b[name]), name
    assert (whole / "model.safetensors").read_bytes() == (part / "model.safetensors").read_bytes()
    columns = ("step", "images", "loss", "lr", "held_out_loss")
    assert [[row[c] for c in columns] for row in rows(whole)] == [[row[c] for c in columns] for row in rows(part)]


def test_resume_takes_another_budget_and_refuses_another_run(tmp_path, monkeypatch, capsys):
    run = train_tiny(tmp_path, "--steps", 10)
    done = run_command("train.py", "--resume", run, "--steps", 15)
    assert done.returncode == 0, done.stderr
    assert read_resume(run / "checkpoint.pt")["step"] == 15
    for flag, value in (("--model", "inspired"), ("--seed", "7"), ("--batch-size", "4"), ("--solver", "exponential")):
        error = main_refuses("train.py", train.main, ["--resume", run, flag, value], monkeypatch, capsys)
        assert flag in error and value in error
    assert "--resume" in main_refuses(
        "train.py", train.main, ["--resume", "--output-dir", tmp_path / "none"], monkeypatch, capsys
    )
    assert "config.json" in main_refuses("train.py", train.main, ["--resume", tmp_path], monkeypatch, capsys)


@pytest.mark.parametrize("processes, batch_size", [(2, 16), (3, 10)])
def test_several_processes_follow_one(processes, batch_size, tmp_path):
    options = [*TINY, "--steps", 20, "--log-every", 1, "--batch-size", batch_size]  # the last of two flags holds
    one = run_command("train.py", *options, "--output-dir", tmp_path / "one")
    assert one.returncode == 0, one.stderr
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", str(ROOT / "train.py")]
    command = [sys.executable, *launch, *map(str, options), "--output-dir", str(tmp_path / "many")]
    many = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert many.returncode == 0, many.stderr
    (a,), (b,) = ((tmp_path / name).iterdir() for name in ("one", "many"))
    losses = [torch.tensor([float(row["loss"]) for row in rows(run)]) for run in (a, b)]
    assert len(losses[0]) == 20
    assert (losses[0] - losses[1]).abs().max() < 1e-5
    assert abs(float(rows(a)[-1]["held_out_loss"]) - float(rows(b)[-1]["held_out_loss"])) < 1e-5


def test_minutes_bound_a_run(tmp_path):
    started = time.monotonic()
    run = train_tiny(tmp_path, "--minutes", 0.05)
    trained = float(rows(run)[-1]["seconds"])
    assert 3 <= trained < time.monotonic() - started
    assert float(rows(run)[-1]["lr"]) < 0.1 * max(float(row["lr"]) for row in rows(run))  # the schedule came to its end
    assert (run / "model.safetensors").exists()


def test_a_dry_run_says_what_would_run_and_writes_nothing(tmp_path):
    done = run_command("train.py", *TINY, "--steps", 1234, "--dry-run", "--output_dir", tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    for word in ("cpu", "parameters", "multiply-adds", "digits", "1,234 steps", "00000-true-digits"):
        assert word in done.stdout
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("options", [["--model", "inspired"], ["--model", "unet", "--class-conditional"]])
def test_other_models_train(options, tmp_path):
    run = train_tiny(tmp_path, "--steps", 80, *options)
    assert float(rows(run)[-1]["held_out_loss"]) < 0.9 * float(rows(run)[0]["loss"])


def test_choices_of_the_diffusion_are_in_the_models_file(tmp_path):
    choices = {"--schedule": "cosine", "--prediction-type": "v", "--timesteps": 50}
    run = train_tiny(tmp_path, "--steps", 10, "--tensorboard", *[word for pair in choices.items() for word in pair])
    _, config = read_model(run)
    assert (config["schedule"], config["prediction_type"], config["timesteps"]) == ("cosine", "v", 50)
    assert list(run.glob("events.out.tfevents.*"))


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_files(tmp_path):
    good = train_tiny(tmp_path, "--steps", 10)
    before = (good / "model.safetensors").read_bytes()
    config = json.loads((good / "config.json").read_text())
    config["train"]["lr"] = 1e30
    (good / "config.json").write_text(json.dumps(config))
    done = run_command("train.py", "--resume", good, "--steps", 400, "--save-every", 5)
    refused(done, "step", "loss is", str(good), code=1)
    assert (good / "model.safetensors").read_bytes() == before
    assert read_resume(good / "checkpoint.pt")["step"] == 10


BAD_FLAGS = [
    ("--batch-size", "0"),
    ("--batch-size", "-1"),
    ("--batch-size", "x"),
    ("--batch-size", "1e400"),
    ("--lr", "0"),
    ("--lr", "nan"),
    ("--lr", "inf"),
    ("--epochs", "-1"),
    ("--steps", "0"),
    ("--minutes", "0"),
    ("--timesteps", "1"),
    ("--ema-decay", "1"),
    ("--seed", "-3"),
    ("--model", "transformer"),
    ("--dataset", "imagenet"),
    ("--image-size", "10"),
    ("--save-every", "0"),
    ("--no-such-flag", "1"),
]


@pytest.mark.parametrize("flag, value", BAD_FLAGS)
def test_a_bad_value_is_refused_by_its_flag(flag, value, monkeypatch, capsys):
    error = main_refuses("train.py", train.main, ["--dataset", "digits", flag, value], monkeypatch, capsys)
    assert flag in error and value in error


def test_contradictions_and_bad_places_are_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for i in range(3):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{i}.png")
    folder = ["--dataset", "folder", "--data-dir"]
    cases = [
        (["--epochs", 1, "--steps", 1], ["--steps", "--epochs"]),
        ([*folder, tmp_path / "missing"], ["--data-dir", "missing"]),
        ([*folder, tmp_path / "empty"], ["--data-dir", "no images"]),
        ([*folder, tmp_path, "--class-conditional"], ["--class-conditional"]),
        (["--dataset", "digits", "--output-dir", tmp_path / "file"], ["--output-dir", "file"]),
        (["--model", "inspired", "--solver", "exponential"], ["--solver", "inspired"]),
    ]
    if not torch.cuda.is_available():
        cases.append((["--device", "cuda"], ["--device", "cuda"]))
    for arguments, words in cases:
        error = main_refuses("train.py", train.main, arguments, monkeypatch, capsys)
        assert all(word in error for word in words), error


def test_a_refusal_leaves_the_shell_with_2_and_one_line():
    refused(run_command("train.py", "--batch-size", 0), "train.py: error: --batch-size: must be", "0")


def test_without_the_data_sets_host_the_file_to_place_is_named(tmp_path):
    proxy = "http://127.0.0.1:9"  # nothing listens there
    done = run_command("train.py", "--data-dir", tmp_path, http_proxy=proxy, https_proxy=proxy)
    refused(done, f"{tmp_path}/cifar-10-python.tar.gz", "--dataset digits")
