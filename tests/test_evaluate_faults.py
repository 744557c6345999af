"""`evaluate.py` at fault: each refusal and failure is one line, and no file is left half-written."""

import importlib.util
import os

import pytest
import torch
from conftest import FEW_DRAWN, call
from PIL import Image

import evaluate
from images.batches import held_out_bank
from lab.evaluation import measures, procedure
from training.checkpoint import read_model, save_model

QUICK = ["--bound-images", 2]  # what is measured before the fault


def test_fid_without_the_library_is_refused_before_anything_else(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, out, err = call(evaluate, "--checkpoint", "missing", "--fid")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "--fid" in err and "requirements-compare.txt" in err


def line_of_refusal(*arguments) -> str:
    """The one line with which the command refuses its arguments, before it measures anything."""
    code, out, err = call(evaluate, *FEW_DRAWN, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1), (code, out, err)
    assert err.startswith("evaluate.py: error: ")
    return err


BAD_VALUES = [
    ("--num-images", 15),
    ("--bound-images", 1),
    ("--steps", 0),
    ("--steps", 21),
    ("--seed", -1),
    ("--batch-size", 0),
    ("--sampler", "euler"),
    ("--dataset", "imagenet"),
    ("--device", "tpu"),
    ("--output", "figures.txt"),
    ("--no-such-flag", 1),
]


@pytest.mark.parametrize("flag, value", BAD_VALUES)
def test_a_bad_value_is_refused_by_its_flag_before_data_are_read(flag, value, short_digits_run, monkeypatch):
    monkeypatch.setattr(procedure, "load_images", lambda *_, **__: pytest.fail("data were read"))
    assert flag in line_of_refusal("--checkpoint", short_digits_run, flag, value)


def test_outputs_that_cannot_be_are_refused_before_data_are_read(short_digits_run, tmp_path, monkeypatch):
    monkeypatch.setattr(procedure, "load_images", lambda *_, **__: pytest.fail("data were read"))
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder.json").mkdir()
    for path in (tmp_path / "folder.json", tmp_path / "file" / "a.json"):
        line = line_of_refusal("--checkpoint", short_digits_run, "--output", path)
        assert "--output" in line and str(tmp_path) in line
    if os.geteuid():  # root writes anywhere
        tmp_path.chmod(0o500)
        assert "--output" in line_of_refusal("--checkpoint", short_digits_run, "--output", tmp_path / "a.json")
        tmp_path.chmod(0o700)


def test_a_checkpoint_is_asked_for_and_has_to_be_one(tmp_path):
    assert "--checkpoint" in line_of_refusal()
    (tmp_path / "text").write_text("hello")
    for name in ("missing", "text"):
        assert name in line_of_refusal("--checkpoint", tmp_path / name)


def test_data_that_are_not_the_models_are_refused_naming_both(
    short_class_run, short_digits_run, class_images, tmp_path
):
    line = line_of_refusal("--checkpoint", short_class_run, "--dataset", "digits")
    assert "(1, 8, 8)" in line and "(3, 16, 16)" in line
    birds = tmp_path / "images" / "birds"
    birds.mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(birds / f"{i}.png")
    line = line_of_refusal("--checkpoint", short_class_run, "--data-dir", birds.parent)
    assert "(birds)" in line and "(cats, dogs)" in line
    bare = tmp_path / "bare.safetensors"
    save_model(bare, *read_model(short_class_run))
    assert "--data-dir" in line_of_refusal("--checkpoint", bare)
    assert "--data-dir" in line_of_refusal("--checkpoint", bare, "--data-dir", tmp_path / "nowhere")
    save_model(
        bare,
        read_model(short_digits_run)[0],
        {k: v for k, v in read_model(short_digits_run)[1].items() if k != "dataset"},
    )
    assert "--dataset" in line_of_refusal("--checkpoint", bare)


def test_weights_that_are_not_finite_fail_and_leave_the_file_as_it_was(short_digits_run, tmp_path):
    tensors, config = read_model(short_digits_run)
    broken, output = tmp_path / "broken.safetensors", tmp_path / "out.json"
    save_model(broken, {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}, config)
    output.write_text("before")
    code, _, err = call(evaluate, *FEW_DRAWN, "--checkpoint", broken, "--output", output)
    assert code == 1 and "Traceback" not in err
    assert err.splitlines()[-1].startswith("evaluate.py: failed: ") and "nan" in err
    assert output.read_text() == "before"


def test_running_out_of_memory_is_one_line(short_digits_run, tmp_path, monkeypatch):
    monkeypatch.setattr(held_out_bank, "__defaults__", (50,))

    def too_much(*_, **__):
        raise MemoryError

    monkeypatch.setattr(measures, "sample_images", too_much)
    code, _, err = call(
        evaluate, *FEW_DRAWN, *QUICK, "--checkpoint", short_digits_run, "--output", tmp_path / "out.json"
    )
    assert code == 1 and "--batch-size" in err.splitlines()[-1] and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_an_interruption_leaves_with_130_and_writes_nothing(short_digits_run, tmp_path, monkeypatch):
    monkeypatch.setattr(held_out_bank, "__defaults__", (50,))

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(measures, "sample_images", interrupted)
    output = tmp_path / "out.json"
    code, _, err = call(evaluate, *FEW_DRAWN, *QUICK, "--checkpoint", short_digits_run, "--output", output)
    assert code == 130 and "nothing was written" in err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_out_of_memory_names_a_batch_size_to_try(short_digits_run, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(procedure, "evaluate", full)
    code, _, err = call(evaluate, "--checkpoint", short_digits_run, *FEW_DRAWN, "--batch-size", 12)
    assert (code, err) == (1, "evaluate.py: failed: out of memory; try --batch-size 6\n")
