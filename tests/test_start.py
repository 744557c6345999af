"""`train.py --init`: a run that starts from the weights of another, with other data, classes and colours."""

import pytest
import torch
from conftest import ROOT, TINY, call, trained

import train
from training.checkpoint import load_model, read_model

QUICK = ["--sample-every", 1000, "--log-every", 1]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run on the digits that learned their classes, with a large rate."""
    return trained(tmp_path_factory.mktemp("source"), "--steps", 6, "--lr", 0.02, "--class-conditional", *QUICK)


def started(source, folder, *options, steps=1):
    """(weights after one step with a tiny rate, what was printed)."""
    arguments = [*TINY, "--steps", steps, "--lr", 1e-9, "--ema-decay", 0, "--init", source, "--output-dir", folder]
    code, out, err = call(train, *arguments, *QUICK, *options)
    assert code == 0, err
    return read_model(sorted(folder.iterdir())[-1])[0], out


def test_the_weights_are_those_of_the_source_and_classes_are_found_by_name(source, tmp_path):
    weights, out = started(source, tmp_path, "--class-conditional")
    before, _ = read_model(source)
    assert all(torch.allclose(weights[name], before[name], atol=1e-5) for name in before)
    total = f"{len(before)} of {len(before)} tensors of {source} and 10 of 10 classes taken over"
    assert f"start    {total}\n" in out


def test_without_classes_and_with_other_colours_what_does_not_fit_is_new_and_said(source, class_images, tmp_path):
    options = ["--dataset", "folder", "--data-dir", class_images, "--image-size", 8]
    weights, out = started(source, tmp_path / "plain", *options, "--no-class-conditional")
    before, _ = read_model(source)
    assert "embedding.classes.weight" not in weights
    assert "new: stem.weight, head.weight, head.bias" in out
    assert torch.allclose(weights["processor.local_cell.recurrent.weight"],
                          before["processor.local_cell.recurrent.weight"], atol=1e-5)  # fmt: skip
    weights, out = started(source, tmp_path / "classes", *options, "--class-conditional")
    nothing = before["embedding.classes.weight"][-1]
    assert torch.allclose(weights["embedding.classes.weight"], nothing.expand(3, -1), atol=1e-5)
    assert "0 of 2 classes" in out


def test_the_shape_of_the_source_is_taken_over_unless_the_flags_name_another(tmp_path):
    shape = ["--channels", 8, 16, 24, "--ode-steps", 4, 3, 2]
    narrow = trained(tmp_path / "narrow", "--steps", 3, "--lr", 0.02, *shape, *QUICK)
    _, out = started(narrow, tmp_path / "same")
    assert "new:" not in out
    (run,) = (tmp_path / "same").iterdir()
    model = load_model(run)[0]
    assert model.current_steps() == (4, 3, 2) and model.processor.global_cell.recurrent.weight.shape[0] == 24
    _, out = started(narrow, tmp_path / "other", "--channels", 8, 16, 16)
    assert "new: processor.to_coarse.weight" in out


def test_new_classes_of_a_model_without_any_change_nothing_at_first(source, tmp_path):
    plain = trained(tmp_path / "plain", "--steps", 3, "--lr", 0.02, "--no-class-conditional", *QUICK)
    weights, _ = started(plain, tmp_path / "new", "--class-conditional")
    assert weights["embedding.classes.weight"].abs().max() < 1e-6


def test_a_resumed_run_needs_the_source_no_more_and_another_model_is_refused(source, tmp_path):
    started(source, tmp_path / "run", "--class-conditional")
    (run,) = (tmp_path / "run").iterdir()
    code, out, err = call(train, "--resume", run, "--steps", 2)
    assert code == 0 and "start    " not in out, err
    for options, words in (
        (["--model", "inspired"], "--init: {} is of the model true; add --model true"),
        (["--timesteps", 9], "--init: {} was trained with --timesteps 8, this run has 9; add --timesteps 8"),
        (["--prediction-type", "v"], "add --prediction-type edm"),
    ):
        code, _, err = call(train, *TINY, "--init", source, "--output-dir", tmp_path / "none", "--steps", 1, *options)
        assert code == 2 and words.format(source) in err, err
    nothing = ["--init", tmp_path / "nowhere", "--dataset", "folder", "--data-dir", tmp_path / "no data either"]
    code, _, err = call(train, *nothing, "--output-dir", tmp_path / "none", "--steps", 1)
    assert code == 2 and "nowhere" in err and not (tmp_path / "none").exists()


def test_the_published_weights_are_a_start(tmp_path):
    published = ROOT / "pretrained/true-digits.safetensors"
    options = ["--dataset", "digits", "--image-size", 16, "--class-conditional", "--init", published, "--dry-run"]
    code, out, err = call(train, *options, "--output-dir", tmp_path / "runs")
    assert code == 0, err
    assert f"tensors of {published} and 10 of 10 classes taken over\n" in out and "new: " not in out
    assert not (tmp_path / "runs").exists()
