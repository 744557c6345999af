"""`sample.py` at fault: each refusal and failure is one line, and no picture is left half-written."""

import pytest
import safetensors.torch
import torch
from conftest import call, refused, run_forked, short_run

import sample
from baselines import MemoryLiquid, UntiedLiquid
from lab.predictions import with_steps
from runtime.errors import UserError
from training.checkpoint import read_model, save_model


@pytest.fixture(scope="module")
def inspired_run(tmp_path_factory):
    options = ["--dataset", "digits", "--steps", 2, "--model", "inspired", "--no-class-conditional"]
    return short_run(tmp_path_factory.mktemp("inspired"), *options)


def line_of_refusal(*arguments) -> str:
    """The one line with which the command refuses its arguments, before it draws anything."""
    code, out, err = call(sample, "--num-images", 1, "--device", "cpu", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1), (code, out, err)
    assert err.startswith("sample.py: error: ")
    return err


BAD_VALUES = [
    ("--num-images", 0),
    ("--num-images", "x"),
    ("--batch-size", 0),
    ("--steps", 0),
    ("--steps", 21),
    ("--seed", -1),
    ("--eta", 1),  # the sampler is not ddim
    ("--eta", 3),
    ("--eta", "nan"),
    ("--output", "grid.jpg"),
    ("--guidance", 2),
    ("--guidance", "inf"),
    ("--guided-share", 1.1),
    ("--guided-share", 0.5),
    ("--eps-scale", 0),
    ("--classes", 3),
    ("--sampler", "euler"),
    ("--solver", "heun"),
    ("--ode-steps", 1),
    ("--no-such-flag", 1),
]


@pytest.mark.parametrize("flag, value", BAD_VALUES)
def test_a_bad_value_is_refused_by_its_flag(flag, value, short_digits_run, tmp_path):
    line = line_of_refusal("--checkpoint", short_digits_run, "--output", tmp_path / "out.png", flag, value)
    assert flag in line
    assert not (tmp_path / "out.png").exists()


def test_what_a_model_lacks_or_flags_contradict_is_said(short_digits_run, inspired_run, short_class_run, tmp_path):
    steps = ["--noisy-ode-steps", 1, 1, 1]
    for run, words in (
        (inspired_run, steps),
        (short_digits_run, ["--tau-maps", tmp_path / "maps.png", *steps]),
        (inspired_run, ["--autoguidance", 2]),
        (short_digits_run, ["--coarse-steps", 1, 2, 3]),
        (short_class_run, ["--autoguidance", 2, "--guidance", 2]),
    ):
        assert words[0] in line_of_refusal("--checkpoint", run, *words)


@pytest.mark.parametrize("model", [UntiedLiquid, MemoryLiquid])
@pytest.mark.parametrize("flag", ["--autoguidance", "--noisy-ode-steps"])
def test_an_ablation_whose_steps_cannot_be_chosen_is_refused(model, flag):
    with pytest.raises(UserError, match=f"^{flag}: "):
        with_steps(flag, model(), (1, 2, 3))


def test_an_unknown_class_is_refused_with_those_there_are(short_class_run):
    line = line_of_refusal("--checkpoint", short_class_run, "--classes", "cats,birds")
    assert "--classes" in line and "birds" in line and "cats, dogs" in line
    assert "--classes" in line_of_refusal("--checkpoint", short_class_run, "--classes", "2")
    assert "--classes" in line_of_refusal("--checkpoint", short_class_run, "--classes", "")


def test_models_that_do_not_draw_the_same_images_are_refused(short_digits_run, short_class_run):
    line = line_of_refusal("--checkpoint", short_digits_run, short_class_run)
    assert "--checkpoint" in line and "1x8x8" in line and "3x16x16" in line
    assert "twice" in line_of_refusal("--checkpoint", short_digits_run, short_digits_run)


@pytest.mark.parametrize("options", [["--ode-steps", 1, 1, 1], ["--solver", "rk4"], ["--tau-maps", "tau.png"]])
def test_a_model_without_an_ode_refuses_ode_options(options, inspired_run):
    line = line_of_refusal("--checkpoint", inspired_run, *options)
    assert options[0] in line and "inspired" in line


@pytest.mark.parametrize("name", ["missing", "empty", "text", "cut", "foreign", "nothing", "checkpoint.pt"])
def test_what_is_no_model_is_refused_by_its_name(name, short_digits_run, tmp_path):
    whole = (short_digits_run / "model.safetensors").read_bytes()
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("hello\n" * 20)
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "nothing").write_bytes(b"")
    (tmp_path / "checkpoint.pt").write_bytes((short_digits_run / "checkpoint.pt").read_bytes())
    safetensors.torch.save_file({"w": torch.zeros(2)}, tmp_path / "foreign")
    assert str(tmp_path / name) in line_of_refusal("--checkpoint", tmp_path / name)


@pytest.mark.parametrize("key", ["shape", "classes", "timesteps", "model_config"])
def test_a_model_whose_config_lacks_a_key_is_refused_by_its_name(key, short_digits_run, tmp_path):
    tensors, config = read_model(short_digits_run)
    path = tmp_path / "lacking.safetensors"
    save_model(path, tensors, {name: value for name, value in config.items() if name != key})
    assert str(path) in line_of_refusal("--checkpoint", path)


def test_a_model_that_is_not_of_its_config_is_refused_by_its_name(short_digits_run, inspired_run, tmp_path):
    path = tmp_path / "swapped.safetensors"
    save_model(path, read_model(short_digits_run)[0], read_model(inspired_run)[1])
    assert str(path) in line_of_refusal("--checkpoint", path)


def test_outputs_that_cannot_be_are_refused_by_their_flag(short_digits_run, tmp_path):
    (tmp_path / "file").write_text("kept")
    options = ["--checkpoint", short_digits_run, "--steps", 2, "--num-images", 1, "--output", tmp_path / "fine.png"]
    for flag in ("--gif", "--tau-maps"):  # a folder; --output takes one
        code, _, err = call(sample, *options, flag, tmp_path)
        assert code == 2 and f"sample.py: error: {flag}: " in err and str(tmp_path) in err
    line = line_of_refusal("--checkpoint", short_digits_run, "--output", tmp_path / "file" / "a.png")
    assert "--output" in line and (tmp_path / "file").read_text() == "kept"


def test_weights_that_are_not_finite_fail_and_leave_the_picture_as_it_was(short_digits_run, tmp_path):
    tensors, config = read_model(short_digits_run)
    broken, picture = tmp_path / "broken.safetensors", tmp_path / "out.png"
    save_model(broken, {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}, config)
    picture.write_bytes(b"as it was")
    code, out, err = call(sample, "--checkpoint", broken, "--output", picture, "--steps", 2, "--num-images", 1)
    assert code == 1 and out == "" and "Traceback" not in err
    assert err.splitlines()[-1].startswith("sample.py: failed: ") and "not finite" in err
    assert picture.read_bytes() == b"as it was"


def test_without_published_weights_the_flag_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "PUBLISHED", tmp_path / "none.safetensors")
    assert "--checkpoint" in line_of_refusal()


def test_refusals_from_the_shell(tmp_path):
    refused(run_forked("sample.py", "--checkpoint", tmp_path / "none"), "sample.py: error: ", "none")
    refused(run_forked("sample.py", "--num-images", 0), "sample.py: error: --num-images: must be", "0")
