"""Every flag of every command: numbers have two bounds, `~` is home, outputs do not collide, advice exists."""

import argparse
import os

import pytest
from conftest import call, temporary_files
from PIL import Image

import benchmark
import compare
import evaluate
import sample
import train
from lab.classifier import __main__ as classifier
from lab.comparison.experiment import arm_config
from runtime.command_line import file_or_folder, integer, number
from runtime.errors import UserError
from runtime.files import check_distinct
from training.run_folder import check_not_own

COMMANDS = (train, sample, evaluate, compare, benchmark, classifier)
TEXTS = {"--classes"}
FLAGS = [
    pytest.param(module, action, id=f"{module.__name__} {action.option_strings[-1]}")
    for module in COMMANDS
    for action in module.parser()._actions
    if action.nargs != 0 and action.choices is None and action.option_strings[-1] not in TEXTS
]
HUGE = ("1e300", "-1e300", str(10**30), str(-(10**30)), "1e999", "nan", "9" * 6000)


@pytest.mark.parametrize("module, action", FLAGS)
def test_a_flag_is_a_path_in_which_a_tilde_is_home_or_a_number_with_two_bounds(module, action, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    flag, more = action.option_strings[-1], ["1"] * (action.nargs - 1 if isinstance(action.nargs, int) else 0)
    required = [] if module is not evaluate or flag == "--checkpoint" else ["--checkpoint", "a"]
    if action.type is file_or_folder:
        value = vars(module.parser().parse_args([*required, f"{flag}=~/a/b.png"]))[action.dest]
        assert value in ("/home/somebody/a/b.png", ["/home/somebody/a/b.png"])
        return
    assert action.type is not None, "a flag that is neither a path nor a number stands in TEXTS or has choices"
    for huge in HUGE:
        code, out, err = call(module, *required, *([flag, huge, *more] if more else [f"{flag}={huge}"]))
        assert (code, out) == (2, "") and err.count("\n") == 1, err
        assert err.startswith(f"{module.__name__}.py: error: {flag}: ") or huge.startswith("-"), err
        assert len(err) < 300, err


def test_what_is_too_large_is_refused_with_the_reason():
    for parse, text in ((integer(1, 9, "ten are many"), "10"), (number(0, 9, "ten are many"), "9.1")):
        with pytest.raises(argparse.ArgumentTypeError, match=r"at most 9 \(ten are many\), got"):
            parse(text)
    small = number(0, 1, "why", without=(0, 1))
    for text, words in (("0", "greater than 0 and less than 1"), ("1", "less than 1"), ("x", "a number")):
        with pytest.raises(argparse.ArgumentTypeError, match=words):
            small(text)
    assert small("0.5") == 0.5 and number(0, 1, "why")("1") == 1 and integer(0, 3, "why")(" 3 ") == 3


def test_a_path_that_names_nothing_and_a_home_that_is_none_are_refused(monkeypatch):
    for text in ("", "  "):
        with pytest.raises(argparse.ArgumentTypeError, match="nothing"):
            file_or_folder(text)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as without HOME, for a user whom nobody knows
    with pytest.raises(argparse.ArgumentTypeError, match="no home folder"):
        file_or_folder("~/runs")
    assert file_or_folder("a~b") == "a~b"


def test_a_budget_of_more_steps_than_a_run_can_have_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("lab.speed.SECONDS", 1e-3)
    options = ["--arms", "inspired", "--reference", "inspired", "--dataset", "digits", "--output-dir", tmp_path]
    code, _, err = call(compare, *options, "--amount", 1e15, "--device", "cpu")
    assert code == 2 and "--amount: 1e+15 images are " in err and "steps of inspired" in err
    code, _, err = call(compare, *options, "--jobs", 200, "--amount", 1e15, "--device", "cpu")
    assert code == 2 and "--jobs" in err


# ---- outputs


@pytest.mark.parametrize("other", ["{0}/a.png", "{0}/b/../a.png", "{0}/link/a.png"])
def test_two_flags_that_name_one_file_are_refused(other, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    other = other.format(tmp_path)
    code, _, err = call(sample, "--output", tmp_path / "a.png", "--tau-maps", other)
    assert code == 2 and f"--tau-maps: {other} is also what --output names" in err, err
    with pytest.raises(UserError, match="--b: "):
        check_distinct([("--a", "x.png"), ("--c", None), ("--b", "./x.png")])
    check_distinct([("--a", "x.png"), ("--b", "y.png")])


@pytest.mark.parametrize("name", ["config.json", "metrics.csv", "model.safetensors", "checkpoint.pt", "loss.png"])
def test_the_files_of_a_run_are_not_written_over(name, whole_run):
    for path in (whole_run / name, whole_run / "samples" / ".." / name):
        with pytest.raises(UserError, match=f"--output: .*{name}"):
            check_not_own(path, "--output")
    check_not_own(whole_run / "evaluation.json", "--output")


def test_commands_refuse_outputs_that_a_run_a_comparison_or_they_themselves_need(whole_run, tmp_path):
    before = {path: path.read_bytes() for path in whole_run.rglob("*") if path.is_file()}
    grid = next((whole_run / "samples").iterdir())
    drawing = ["--checkpoint", whole_run, "--steps", 1, "--num-images", 1]
    (tmp_path / "comparison.json").write_text("{}")
    for module, words in (
        (evaluate, ["--checkpoint", whole_run, "--output", whole_run / "config.json"]),
        (evaluate, ["--checkpoint", whole_run, "--output", tmp_path / "comparison.json"]),
        (sample, [*drawing, "--output", whole_run / "loss.png"]),
        (sample, [*drawing, "--tau-maps", grid]),
        (sample, [*drawing, "--output", tmp_path / "grid.png"]),
    ):
        code, out, err = call(module, *words)
        assert (code, out) == (2, "") and words[-2] in err and str(words[-1]) in err, err
    weights = tmp_path / "weights.png"
    weights.write_bytes((whole_run / "model.safetensors").read_bytes())
    code, _, err = call(sample, "--checkpoint", weights, "--output", weights)
    assert code == 2 and "--output" in err and "the checkpoint itself" in err
    assert before == {path: path.read_bytes() for path in before} and not temporary_files(whole_run)


# ---- advice; `call` checks in all tests that a command has the flags that its errors name


@pytest.fixture
def with_a_bad_image(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (32, 32), (60 * i, 0, 0)).save(folder / f"{i}.png")
    (folder / "bad.png").write_bytes(b"no image")
    return folder


def test_bad_images_are_skipped_by_the_flag_in_every_command_that_reads_images(with_a_bad_image, tmp_path, light):
    data = ["--dataset", "folder", "--data-dir", with_a_bad_image, "--image-size", 8]
    run = ["--steps", 1, "--timesteps", 4, "--batch-size", 2, "--device", "cpu", "--compile", "off"]
    refusals = [call(train, *data, *run, "--output-dir", tmp_path / "runs")]
    code, _, err = call(train, *data, *run, "--output-dir", tmp_path / "runs", "--skip-bad-images")
    assert code == 0, err
    few = ["--num-images", 16, "--bound-images", 2, "--steps", 2]
    measuring = [tmp_path / "runs/00000-true-folder", "--output", tmp_path / "e.json", *few]
    refusals.append(call(evaluate, "--checkpoint", *measuring, "--data-dir", with_a_bad_image))
    comparison = [*data, "--output-dir", tmp_path / "comparison", "--amount", 1]
    refusals.append(call(compare, *comparison))
    for code, _, err in refusals:
        assert code == 2 and "bad.png" in err and "--skip-bad-images" in err, err
    code, _, err = call(evaluate, "--checkpoint", *measuring, "--data-dir", with_a_bad_image, "--skip-bad-images")
    assert code == 0 and (tmp_path / "e.json").exists(), err
    code, _, err = call(evaluate, "--checkpoint", *measuring)  # as the run was trained
    assert code == 0, err
    settings = compare.parser().parse_args(list(map(str, [*comparison, "--skip-bad-images"])))
    assert arm_config(settings, "true").skip_bad_images


def test_no_other_data_set_is_advised_to_measure_a_model_of_cifar10(whole_run, tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    code, _, err = call(evaluate, "--checkpoint", whole_run, "--dataset", "cifar10", "--data-dir", tmp_path)
    assert code == 2 and "cifar-10-python.tar.gz" in err
    assert "--data-dir" in err and "digits" not in err.replace(str(whole_run), "")


def test_what_a_training_run_advises_is_said_in_the_words_of_compare(tmp_path, monkeypatch):
    monkeypatch.setattr("lab.speed.SECONDS", 1e-3)
    options = ["--arms", "inspired", "--reference", "inspired", "--dataset", "digits", "--amount", 64, "--seeds", 1]
    options += ["--lrs", 1, "--timesteps", 4, "--device", "cpu", "--output-dir", tmp_path]
    monkeypatch.setattr("training.step.learning_rate", lambda *_: 1e30)
    code, _, err = call(compare, *options)
    assert code == 1 and "try lower --lrs" in err, err
    failed = RuntimeError("InvalidCxxCompiler")
    monkeypatch.setattr("training.loop.loop", lambda *_: (_ for _ in ()).throw(failed))
    monkeypatch.setattr("training.loop.is_compiler_failure", lambda error: error is failed)
    code, _, err = call(compare, *options)
    assert code == 2 and "leave out --compile" in err, err
