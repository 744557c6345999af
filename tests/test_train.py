"""`train.py` as a user meets it: what a run leaves on the disk, resume, several processes, and each refusal."""

import json
import re
import time

import numpy as np
import pytest
import torch
from conftest import TINY, call, refused, rows, run_command, train_tiny, trained
from PIL import Image

import sample
import train
from images.batches import held_out_bank
from images.datasets import load_images
from models import build_model
from training.checkpoint import load_model, read_model, read_resume
from training.config import TrainConfig
from training.validation import held_out_loss


def refusal(arguments: list) -> str:
    """The one line with which `train.py` refuses its arguments."""
    code, out, err = call(train, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1), (code, out, err)
    assert err.startswith("train.py: error: ")
    return err


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


def test_the_same_command_gives_the_same_bytes_and_the_next_id(light, whole_run):
    again = train_tiny(whole_run.parent, "--steps", 60, "--sample-every", 40, "--save-every", 7)
    assert again.name == "00001-true-digits"
    assert (again / "model.safetensors").read_bytes() == (whole_run / "model.safetensors").read_bytes()
    assert (again / "samples/step_0000060.png").read_bytes() == (whole_run / "samples/step_0000060.png").read_bytes()
    other = trained(whole_run.parent, "--steps", 60, "--sample-every", 40, "--save-every", 7, "--seed", 1)
    assert (other / "model.safetensors").read_bytes() != (whole_run / "model.safetensors").read_bytes()


def test_resume_takes_another_budget_and_refuses_another_run(light, tmp_path):
    run = trained(tmp_path, "--steps", 10)
    code, _, err = call(train, "--resume", run, "--steps", 15)
    assert code == 0, err
    assert read_resume(run / "checkpoint.pt")["step"] == 15
    for flag, value in (("--model", "inspired"), ("--seed", "7"), ("--batch-size", "4"), ("--solver", "exponential")):
        error = refusal(["--resume", run, flag, value])
        assert flag in error and value in error
    assert "--resume" in refusal(["--resume", "--output-dir", tmp_path / "none"])


def test_minutes_bound_a_run(light, tmp_path, monkeypatch):
    monkeypatch.setattr("training.step.WARM_UP_STEPS", 1)  # however few steps fit into the time
    started = time.monotonic()
    run = trained(tmp_path, "--minutes", 0.03, "--log-every", 1)
    assert 1.8 <= float(rows(run)[-1]["seconds"]) < time.monotonic() - started
    assert float(rows(run)[-1]["lr"]) < 0.1 * max(float(row["lr"]) for row in rows(run))  # the schedule came to its end
    assert (run / "model.safetensors").exists()


def test_a_dry_run_says_what_would_run_and_writes_nothing(tmp_path):
    code, out, err = call(train, *TINY, "--steps", 1234, "--dry-run", "--output_dir", tmp_path / "runs")
    assert code == 0, err
    for word in ("cpu", "parameters", "multiply-adds", "digits", "1,234 steps", "00000-true-digits"):
        assert word in out
    assert not (tmp_path / "runs").exists()


VARIANTS = [
    ["--schedule", "cosine"],
    ["--prediction-type", "v"],
    ["--prediction-type", "eps", "--schedule", "cosine"],
    ["--model", "inspired"],
    ["--model", "unet", "--no-class-conditional"],
    ["--solver", "exponential", "--image-size", 12],
]


@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: " ".join(map(str, options)))
def test_the_file_alone_gives_back_the_model_that_was_measured(options, light, tmp_path):
    """Model, schedule, prediction type, classes and solver are in the metadata: without one, the loss would differ."""
    run = trained(tmp_path, "--steps", 12, "--lr", 0.02, *options)
    model, scheduler, config = load_model(run / "model.safetensors")
    bank = held_out_bank(load_images("digits", "unused", config["shape"][-1]), config["timesteps"], size=50)
    assert held_out_loss(model, scheduler, bank) == pytest.approx(float(rows(run)[-1]["held_out_loss"]), rel=1e-5)
    flags = dict(zip(*[iter(option for option in options if option != "--no-class-conditional")] * 2, strict=True))
    for flag in flags.keys() & {"--schedule", "--prediction-type", "--model"}:
        assert config[flag[2:].replace("-", "_")] == flags[flag]
    assert model.num_classes == (0 if "--no-class-conditional" in options else 10)


def test_the_shape_of_the_liquid_is_chosen_and_kept(light, tmp_path):
    shape = ["--channels", 8, 16, 24, "--ode-steps", 4, 3, 2]
    run = trained(tmp_path, "--steps", 2, *shape)
    code, _, err = call(train, "--resume", run, "--steps", 3, *shape)
    assert code == 0, err
    model = load_model(run)[0]
    sides = [cell.recurrent.weight.shape[0] for cell in model.processor.cells.values()]  # of global, local and detail
    assert sides == [24, 16, 8] and model.current_steps() == (4, 3, 2)
    for flag, values in (("--channels", (8, 16, 16)), ("--ode-steps", (4, 3, 3))):
        assert flag in refusal(["--resume", run, flag, *values])
        assert flag in refusal(["--model", "inspired", flag, *values])


def test_the_command_that_a_run_prints_draws_from_it(light, tmp_path, monkeypatch):
    code, out, _ = call(train, *TINY, "--steps", 2, "--output-dir", tmp_path / "runs")
    assert code == 0
    printed = re.search(r"python sample.py (--checkpoint .+)", out)[1].split()
    monkeypatch.chdir(tmp_path)
    code, _, err = call(sample, *printed)
    assert code == 0, err
    assert (tmp_path / "samples.png").exists()


@pytest.mark.parametrize("count, learned", [(0, False), (1, False), (2, True), (100, True), (101, False)])
def test_classes_are_learned_where_there_are_some_and_not_too_many(count, learned):
    assert TrainConfig().for_classes(count).class_conditional is learned
    assert TrainConfig(class_conditional=not learned).for_classes(count).class_conditional is not learned


def test_class_vectors_learn(light, tmp_path):
    run = trained(tmp_path, "--steps", 30, "--lr", 0.02, "--class-conditional")
    _, config = read_model(run)
    torch.manual_seed(0)
    start = build_model("true", **config["model_config"]).embedding.classes.weight.detach()
    ratios = read_resume(run / "checkpoint.pt")["model"]["embedding.classes.weight"] / start
    assert ratios.std() > 0.01  # weight decay alone would scale all values by one factor


def test_held_out_losses_and_grids_come_at_their_steps_and_saves_at_theirs(light, tmp_path):
    run = trained(tmp_path, "--steps", 10, "--log-every", 3, "--sample-every", 4, "--batch_size", 4)
    assert (run / "metrics.csv").read_text().splitlines()[0] == "step,images,seconds,loss,lr,held_out_loss"
    assert [row["step"] for row in rows(run)] == ["3", "4", "6", "8", "9", "10"]
    assert [row["step"] for row in rows(run) if row["held_out_loss"]] == ["4", "8", "10"]
    assert [row["images"] for row in rows(run)] == ["12", "16", "24", "32", "36", "40"]
    assert sorted(path.name for path in (run / "samples").iterdir()) == [f"step_{step:07d}.png" for step in (4, 8, 10)]
    seconds = [float(row["seconds"]) for row in rows(run)]
    assert seconds == sorted(seconds) and seconds[0] > 0


def test_a_logged_loss_is_the_mean_of_the_steps_since_the_last(light, tmp_path):
    every = trained(tmp_path / "every", "--steps", 9, "--log-every", 1)
    third = trained(tmp_path / "third", "--steps", 9, "--log-every", 3)
    losses = np.array([float(row["loss"]) for row in rows(every)])
    assert np.allclose(losses.reshape(3, 3).mean(1), [float(row["loss"]) for row in rows(third)], rtol=1e-5)


def test_precision_auto_is_recorded_as_what_it_became_and_may_be_repeated(light, tmp_path):
    run = trained(tmp_path, "--steps", 2, "--precision", "auto")
    assert json.loads((run / "config.json").read_text())["train"]["precision"] in ("fp32", "bf16")
    code, _, err = call(train, "--resume", run, "--precision", "auto", "--steps", 3)
    assert code == 0, err
    assert read_resume(run / "checkpoint.pt")["step"] == 3


def test_a_finished_run_resumed_ends_at_once_and_changes_no_weight(light, tmp_path):
    run = trained(tmp_path, "--steps", 4)
    before = (run / "model.safetensors").read_bytes(), (run / "metrics.csv").read_bytes()
    code, out, err = call(train, "--resume", "--output-dir", tmp_path)
    assert code == 0 and f"done: {run}" in out, err
    assert ((run / "model.safetensors").read_bytes(), (run / "metrics.csv").read_bytes()) == before
    assert len(list(tmp_path.iterdir())) == 1


def test_tensorboard_has_the_rows_of_metrics_csv(light, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = trained(tmp_path, "--steps", 10, "--tensorboard")
    events = reader.EventAccumulator(str(run)).Reload()
    for name in ("loss", "lr", "held_out_loss"):
        logged = {event.step: event.value for event in events.Scalars(name)}
        assert logged == pytest.approx({int(row["step"]): float(row[name]) for row in rows(run) if row[name]})


def test_the_models_file_may_be_read_by_whom_the_other_files_may(tmp_path):
    run = trained(tmp_path, "--steps", 1)
    modes = {path.name: oct(path.stat().st_mode) for path in run.iterdir() if path.is_file()}
    assert len(set(modes.values())) == 1, modes


def test_help_names_every_flag_with_its_default():
    code, out, _ = call(train, "--help")
    out = " ".join(out.split())
    assert code == 0
    flags = "model dataset data-dir output-dir epochs steps minutes batch-size lr timesteps schedule prediction-type"
    flags += " ema-decay seed device precision compile log-every sample-every save-every resume dry-run"
    for flag in flags.split():
        assert f"--{flag}" in out
    for flag, default in (
        ("epochs", "3"),
        ("batch-size", "8"),
        ("timesteps", "400"),
        ("seed", "0"),
        ("dataset", "cifar10"),
    ):
        assert re.search(rf"--{flag} (?:(?! --).)*\(default: {default}\)", out.split("options:")[1]), flag


BAD_FLAGS = [
    ("--batch-size", "0"),
    ("--batch-size", "-1"),
    ("--batch-size", "x"),
    ("--batch-size", "nan"),
    ("--batch-size", "1e400"),
    ("--lr", "0"),
    ("--lr", "nan"),
    ("--lr", "inf"),
    ("--epochs", "-1"),
    ("--epochs", "1e308"),
    ("--steps", "0"),
    ("--minutes", "0"),
    ("--minutes", "1e308"),
    ("--timesteps", "1"),
    ("--timesteps", "100000000000"),
    ("--ema-decay", "1"),
    ("--seed", "-3"),
    ("--model", "transformer"),
    ("--dataset", "imagenet"),
    ("--image-size", "2"),
    ("--image-size", "10"),
    ("--image-size", "1000000"),
    ("--prediction-type", "x0"),
    ("--schedule", "sigmoid"),
    ("--precision", "fp16"),
    ("--device", "tpu"),
    ("--batch", "4"),
    ("--save-every", "0"),
    ("--no-such-flag", "1"),
]


@pytest.mark.parametrize("flag, value", BAD_FLAGS)
def test_a_bad_value_is_refused_by_its_flag_before_any_data_are_read(flag, value, monkeypatch):
    monkeypatch.setattr("images.datasets._load_digits", lambda: pytest.fail("the data were read"))
    error = refusal(["--dataset", "digits", flag, value])
    assert flag in error and value in error


def test_contradictions_and_bad_places_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for split in ("train", "test"):  # no class of their own: these folders are the split
        (tmp_path / "split" / split).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "split" / split / "0.png")
    folder = ["--dataset", "folder", "--data-dir"]
    cases = [
        (["--epochs", 1, "--steps", 1], ["--steps", "--epochs"]),
        ([*folder, tmp_path / "missing"], ["--data-dir", "missing"]),
        ([*folder, tmp_path / "empty"], ["--data-dir", "no images"]),
        ([*folder, tmp_path / "split", "--class-conditional"], ["--class-conditional"]),
        (["--dataset", "digits", "--output-dir", tmp_path / "file"], ["--output-dir", "file"]),
        (["--model", "inspired", "--solver", "exponential"], ["--solver", "inspired"]),
    ]
    if not torch.cuda.is_available():
        cases.append((["--device", "cuda"], ["--device", "cuda"]))
    for arguments, words in cases:
        error = refusal(arguments)
        assert all(word in error for word in words), error


def test_a_refusal_leaves_the_shell_with_2_and_one_line():
    refused(run_command("train.py", "--batch-size", 0), "train.py: error: --batch-size: must be", "0")


def test_without_the_data_sets_host_the_file_to_place_is_named(tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    error = refusal(["--data-dir", tmp_path])
    assert f"{tmp_path}/cifar-10-python.tar.gz" in error and "--dataset digits" in error
