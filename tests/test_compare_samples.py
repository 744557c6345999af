"""The samples that `compare.py` draws and measures are those of `evaluate.py`."""

import json
import shutil
import signal
import time
from pathlib import Path
from unittest import mock

import pytest
from comparing import GOES_ON, TINY, compared, table
from conftest import ForkedCommand, call, wait_for

import compare
import evaluate
from choices import ARMS
from images.batches import held_out_bank
from images.datasets import load_images
from lab.classifier.training import save_and_check, train_classifier
from lab.comparison import procedure, samples
from models import build_model
from training.run_folder import read_config


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """That of the digits, hardly trained."""
    path, data = tmp_path_factory.mktemp("classifier") / "digits.safetensors", load_images("digits", "unused")
    save_and_check(path, train_classifier(data, images=600), data, "")
    return path


def by_evaluate(run: Path, *options) -> dict:
    """What `evaluate.py` says of 20 samples of a run by the classifier."""
    few = ["--num-images", 20, "--bound-images", 2, "--device", "cpu", "--output", run / "e.json"]
    with mock.patch.object(held_out_bank, "__defaults__", (50,)):
        code, _, err = call(evaluate, "--checkpoint", run, *few, *options)
    assert code == 0, err
    return json.loads((run / "e.json").read_text())["classifier"]


def slow_drawing() -> None:
    """Let it last long enough to be stopped."""
    draw = samples.sample_images
    samples.sample_images = lambda *a, **b: (time.sleep(0.5), draw(*a, **b))[1]


def test_the_samples_of_an_earlier_comparison_are_measured_also_when_that_is_stopped(experiment, classifier, tmp_path):
    """The figures are those of `evaluate.py`; a run whose weights are gone keeps its row, and none is trained."""
    source, options, before = experiment
    folder = shutil.copytree(source, tmp_path / "copy")
    (lost,) = folder.glob("runs/unet-38k-*seed1-share1")
    shutil.rmtree(lost)
    options = [*options, "--output-dir", folder]
    measuring = [*options, "--classifier", classifier, "--num-images", 20]
    assert "FD" not in (folder / "comparison.md").read_text()

    process = ForkedCommand("compare.py", *TINY, *measuring, prepare=slow_drawing)
    wait_for(lambda: table(folder / "comparison.csv")[0]["fd"], process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors.strip().splitlines()[-1] == GOES_ON, errors
    assert not table(folder / "comparison.csv")[1]["fd"]
    rows = compared(folder, *measuring[:-4], "--jobs", 2, *measuring[-4:])
    own = ("fd", "kid", "recognised")
    assert [{k: v for k, v in row.items() if k not in own} for row in rows] == [
        {k: v for k, v in row.items() if k not in own} for row in before
    ]
    for row in (rows[0], rows[2]):
        (run,) = folder.glob(f"runs/{row['arm'].replace(':', '-')}-*seed{row['seed']}-share1/*")
        found = by_evaluate(run, "--classifier", classifier)
        assert float(row["fd"]) == pytest.approx(found["fd"]["value"], rel=1e-3)
        assert float(row["kid"]) == pytest.approx(found["kid"]["value"], rel=1e-3)
    assert rows[3]["fd"] == rows[0]["recognised"] == ""
    text = (folder / "comparison.md").read_text()
    assert "20 samples" in text and "in 8 steps" in text and f"{float(rows[2]['fd']):.3f} |" in text

    with mock.patch.object(samples, "distances", side_effect=AssertionError):
        assert compared(folder, *measuring) == rows
    for flag, value in (("--num-images", 30), ("--eps-scale", 1)):
        code, out, err = call(compare, *TINY, *measuring, flag, value)
        assert (code, out) == (2, "") and flag in err and "use another --output-dir" in err
    assert compared(folder, *options, "--num-images", 0) == rows
    assert (folder / "comparison.md").read_text() == text

    settings = json.loads((folder / "comparison.json").read_text())  # as it was before the flags
    del settings["distances"]["guided_share"], settings["distances"]["eps_scale"]
    (folder / "comparison.json").write_text(json.dumps(settings))
    code, out, err = call(compare, *TINY, *measuring)
    assert (code, out) == (2, "") and "--eps-scale" in err
    assert compared(folder, *measuring, "--eps-scale", 1) == rows


def test_with_classes_all_arms_learn_them_and_are_drawn_with_guidance(classifier, tmp_path):
    options = ["--arms", "inspired", "unet:38k", "--reference", "inspired", "--seeds", 1, "--lrs", 1e-2]
    options += ["--amount", 80, "--class-conditional", "--guidance", 50, "--classifier", classifier, "--num-images", 20]
    for row in compared(tmp_path, *options):
        (run,) = tmp_path.glob(f"runs/{row['arm'].replace(':', '-')}-*/*")
        assert read_config(run)["train"]["class_conditional"]
        network = build_model(ARMS[row["arm"]][0], in_channels=1, num_classes=10, **ARMS[row["arm"]][1])
        assert int(row["parameters"]) == sum(p.numel() for p in network.parameters())
        found = by_evaluate(run, "--classifier", classifier, "--guidance", 50)
        for name in ("fd", "recognised"):
            assert float(row[name]) == pytest.approx(found[name]["value"], rel=1e-5)
        other = by_evaluate(run, "--classifier", classifier, "--guidance", 1)
        assert float(row["fd"]) != pytest.approx(other["fd"]["value"], rel=1e-4)
    assert "guidance 50" in (tmp_path / "comparison.md").read_text()
    code, _, err = call(compare, *TINY, "--output-dir", tmp_path, "--lrs", 1e-2, "--amount", 80)
    assert code == 2 and "--class-conditional" in err, err


def test_without_a_classifier_one_line_says_why_and_how_to_train_one(experiment):
    folder, options, _ = experiment
    with mock.patch.object(procedure, "save_curves"):
        _, out, _ = call(compare, *TINY, "--output-dir", folder, *options)
    (said,) = (line for line in out.splitlines() if line.startswith("FD and KID are not measured: "))
    assert "python -m lab.classifier --dataset digits --image-size 8 " in said
