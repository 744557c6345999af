"""`evaluate.py` as a user meets it: what it measures, what it writes and what it says."""

import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import FEW_DRAWN, call, run_forked, short_run
from PIL import Image

import evaluate
from choices import EPS_SCALE
from diffusion.sampling import ByNoise, Guidance, sample_images
from diffusion.scheduler import DDPMScheduler
from images.batches import held_out_bank, to_float
from images.datasets import load_images
from lab.evaluation import inception, measures, procedure
from lab.evaluation.likelihood import variational_bound
from lab.evaluation.measures import drawing_multiply_adds
from lab.evaluation.neighbours import nearest
from lab.evaluation.sliced_wasserstein import sliced_wasserstein
from liquid_diffusion import TrueLiquidDiffusionModel
from models import multiply_adds
from training.checkpoint import load_model
from training.validation import held_out_loss

# no weights in the cache and no host that answers: what a machine without a network meets
NO_NETWORK = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")


def measured(*arguments, output) -> tuple[dict, str]:
    """(the JSON that the command writes, what it prints)."""
    code, out, err = call(evaluate, *FEW_DRAWN, *arguments, "--output", output)
    assert code == 0, err
    return json.loads(output.read_text()), out


@pytest.fixture
def small_bank(monkeypatch):
    """Few held-out images with their noise, for tests that look at other figures."""
    monkeypatch.setattr(held_out_bank, "__defaults__", (100,))


@pytest.fixture(scope="module")
def digits_report(short_digits_run):
    """From the shell, into the run folder, asking for an FID that cannot be had."""
    empty = short_digits_run.parent / "torch"
    options = ["--checkpoint", short_digits_run, *FEW_DRAWN, "--fid"]
    done = run_forked("evaluate.py", *options, TORCH_HOME=str(empty), no_proxy="", **NO_NETWORK)
    assert done.returncode == 0, done.stderr
    return json.loads((short_digits_run / "evaluation.json").read_text()), done.stdout


def test_the_eps_mse_is_that_of_training_and_its_bins_average_to_it(short_digits_run, digits_report):
    model, scheduler, _ = load_model(short_digits_run)
    bank = held_out_bank(load_images("digits", "unused"), scheduler.num_timesteps)
    found = digits_report[0]["eps_mse"]
    assert found["value"] == pytest.approx(held_out_loss(model, scheduler, bank), rel=1e-5)
    bins = found["bins"]
    assert sum(part["n"] for part in bins) == found["n"] == 2000
    assert sum(part["n"] * part["value"] for part in bins) / 2000 == pytest.approx(found["value"], rel=1e-5)
    assert [part["t"] for part in bins] == [[2 * i, 2 * i + 1] for i in range(10)]
    errors = scheduler.loss(model, bank.x_0, bank.t, bank.eps).detach()
    for part in bins:
        inside = (bank.t >= part["t"][0]) & (bank.t <= part["t"][1])
        assert part["value"] == pytest.approx(errors[inside].mean().item(), rel=1e-4)


def test_a_model_of_few_timesteps_has_bins_without_one(short_digits_run):
    model, scheduler, _ = load_model(short_digits_run)
    short = type(scheduler)(4, "linear", scheduler.prediction_type)
    bins = measures.eps_mse(model, short, held_out_bank(load_images("digits", "unused"), 4))["bins"]
    assert [part["t"] for part in bins if part["n"]] == [[0, 0], [1, 1], [2, 2], [3, 3]]
    assert all(part["value"] is None and part["t"] is None for part in bins if not part["n"])


def test_the_distances_are_those_of_the_same_samples(short_digits_run, digits_report):
    """Samples drawn anew, rounded to 8 bits here, against images chosen by what the report says."""
    model, scheduler, config = load_model(short_digits_run)
    data = load_images("digits", "unused")
    report = digits_report[0]
    found = report["sliced_wasserstein"]
    samples = sample_images(model, scheduler, config["shape"], 20, steps=3, eps_scale=EPS_SCALE)
    samples = ((samples.numpy() + 1) / 2 * 255).round().astype(np.uint8)
    assert found["n"] == 20 and list(found["value"]) == ["8"]
    shuffled = torch.randperm(36, generator=torch.Generator().manual_seed(0))
    again = sliced_wasserstein(data.held_out[shuffled[:20]], [torch.from_numpy(samples)])[0][8]
    assert found["value"]["8"] == pytest.approx(1000 * again, rel=1e-3)
    assert 0 < found["floor"]["8"] < found["value"]["8"]

    near = report["nearest_training_images"]
    gaps = samples[:16, None].astype(float) - data.train[None].numpy()  # (16, N, 1, 8, 8)
    distances = np.sqrt((gaps**2).mean((2, 3, 4)))
    assert near["distances"] == pytest.approx(distances.min(1).tolist(), rel=1e-3)
    assert near["indices"] == distances.argmin(1).tolist()
    assert near["value"] == pytest.approx(np.median(near["distances"]))
    gaps = data.held_out[:, None].double() - data.train[None]
    truth = gaps.square().mean((2, 3, 4)).sqrt().amin(1).numpy()
    assert near["held_out"]["value"] == pytest.approx(np.median(truth))
    assert near["held_out"]["least"] == pytest.approx(truth.min())


def test_the_report_says_what_everything_is(short_digits_run, digits_report):
    report, out = digits_report
    assert report["checkpoint"] == str(short_digits_run) and len(report["checkpoint_sha256"]) == 64
    assert report["data"] == {
        "dataset": "digits",
        "shape": [1, 8, 8],
        "classes": 10,
        "train_images": 1761,
        "held_out_images": 36,
    }
    assert report["device"] == "cpu" and report["seed"] == 0
    assert report["versions"]["torch"] == torch.__version__.split("+")[0]
    assert report["versions"]["python"] == sys.version.split()[0]
    model = load_model(short_digits_run)[0]
    assert report["parameters"]["value"] == sum(p.numel() for p in model.parameters())
    assert report["multiply_adds"]["value"] > report["parameters"]["value"]
    assert (report["sampling"]["sampler"], report["sampling"]["steps"]) == ("dpmpp", 3)
    figures = ("eps_mse", "variational_bound", "sampling", "sliced_wasserstein", "nearest_training_images")
    for name in figures:
        assert {"value", "unit", "n"} <= report[name].keys(), name
    drawn = {"sampler": "dpmpp", "steps": 3, "seed": 0, "classes": "unconditional", "guidance": 1}
    drawn |= {"guided_share": 1, "eps_scale": EPS_SCALE}
    for name in ("sliced_wasserstein", "nearest_training_images", "classifier", "fid", "kid"):
        assert report[name]["samples"] == drawn
    speed = report["sampling"]
    assert speed["value"] == pytest.approx(speed["n"] / speed["seconds"])
    for shown in (f"{report['eps_mse']['value']:.5f}", f"{report['variational_bound']['value']:.4f}"):
        assert shown in out
    assert out.splitlines()[-2:] == [str(short_digits_run / f"evaluation{end}") for end in ("-neighbours.png", ".json")]


def test_the_bound_of_the_report_adds_up(digits_report):
    bound = digits_report[0]["variational_bound"]
    terms = bound["terms"]
    assert bound["n"] == 36 and bound["standard_error"] > 0
    assert bound["value"] == pytest.approx(sum(terms[name]["value"] for name in ("prior", "kl", "decoder")))
    assert sum(part["value"] for part in terms["kl_by_stratum"]) == pytest.approx(terms["kl"]["value"])
    assert 0 < terms["decoder"]["value"] < bound["value"] < 100


def test_weights_that_are_not_to_be_had_are_one_line_and_no_failure(digits_report):
    report, out = digits_report
    lines = [line for line in out.splitlines() if "not downloadable" in line]
    assert lines[0].startswith("fid      not measured: ") and len(lines) == 2  # and the table's
    for name in ("fid", "kid"):
        assert report[name]["value"] is None and "not downloadable" in report[name]["reason"]


def test_the_picture_shows_samples_beside_their_neighbours(short_digits_run, digits_report):
    data = load_images("digits", "unused")
    with Image.open(short_digits_run / "evaluation-neighbours.png") as picture:
        pixels = np.asarray(picture)
    zoom, cell = 8, 9
    assert pixels.shape == ((16 * cell + 1) * zoom,) * 2 + (3,)
    for row, index in enumerate(digits_report[0]["nearest_training_images"]["indices"]):
        top, left = (1 + cell * row) * zoom, (1 + cell * 2) * zoom
        drawn = pixels[top : top + 8 * zoom : zoom, left : left + 8 * zoom : zoom, 0]
        assert np.abs(drawn.astype(int) - data.train[index, 0].numpy()).max() <= 1


def test_the_same_seed_gives_the_same_figures_and_a_bare_file_the_same_as_its_run(
    short_digits_run, digits_report, tmp_path
):
    bare = tmp_path / "bare.safetensors"
    bare.write_bytes((short_digits_run / "model.safetensors").read_bytes())
    code, _, err = call(evaluate, "--checkpoint", bare, *FEW_DRAWN, "--batch-size", 7)
    assert code == 0, err
    report = json.loads((tmp_path / "bare-evaluation.json").read_text())
    assert (tmp_path / "bare-evaluation-neighbours.png").is_file()
    assert report["checkpoint"] == str(bare)
    assert report["fid"]["value"] is None and "--fid" in report["fid"]["reason"]
    for name, path in (("eps_mse", "value"), ("variational_bound", "value"), ("nearest_training_images", "value")):
        assert report[name][path] == pytest.approx(digits_report[0][name][path], rel=1e-3), name
    other, _ = measured("--checkpoint", bare, "--seed", 100, output=tmp_path / "other.json")
    assert other["eps_mse"]["value"] == report["eps_mse"]["value"]  # frozen
    for name in ("variational_bound", "sliced_wasserstein", "nearest_training_images"):
        assert other[name]["value"] != report[name]["value"], name


def test_flags_act(short_digits_run, small_bank, tmp_path):
    options = ["--checkpoint", short_digits_run / "model.safetensors"]
    options += ["--sampler", "ddpm", "--steps", 4, "--bound-images", 9]
    report, out = measured(*options, "--num-images", 17, output=tmp_path / "new" / "out.json")
    assert report["variational_bound"]["n"] == 9
    assert report["sampling"]["n"] == report["sliced_wasserstein"]["n"] == 17
    assert report["sampling"]["sampler"] == "ddpm" and "ddpm, 4 network calls" in out
    assert (tmp_path / "new" / "out-neighbours.png").is_file()


def test_a_model_with_classes_is_told_them_in_turns_and_measured_by_them(short_class_run, small_bank, tmp_path):
    """The run's config.json says where the images are."""
    report, _ = measured("--checkpoint", short_class_run, output=tmp_path / "a.json")
    model, scheduler, _ = load_model(short_class_run)
    data = load_images("folder", report["data_dir"], 16)
    bank = held_out_bank(data, scheduler.num_timesteps)
    truth = held_out_loss(model, scheduler, bank)
    assert report["eps_mse"]["value"] == pytest.approx(truth, rel=1e-5)
    labels = torch.arange(20) % 2
    how = {"steps": 3, "labels": labels, "guidance": Guidance.usual(model), "eps_scale": EPS_SCALE}
    samples = sample_images(model, scheduler, (3, 16, 16), 20, **how)
    samples = ((samples + 1) * 127.5).round().byte()
    distances = nearest(samples[:16], data.train, 1, mirror=True).distance[:, 0]
    assert report["nearest_training_images"]["distances"] == pytest.approx(distances.tolist(), abs=0.05)
    shuffled = torch.randperm(len(data.held_out), generator=torch.Generator().manual_seed(0))
    labels = data.held_out_labels[shuffled]
    assert len(labels.unique()) == 2
    bound = variational_bound(model, scheduler, to_float(data.held_out[shuffled]), labels).total.mean().item()
    assert report["variational_bound"]["value"] == pytest.approx(bound, rel=1e-4)
    assert report["sampling"]["classes"] == "in turns" and list(report["sliced_wasserstein"]["value"]) == ["16"]


def test_images_smaller_than_a_patch_are_null_with_the_reason():
    images = torch.zeros(20, 1, 4, 4, dtype=torch.uint8)
    data = measures.ImageData("digits", images, images[:, 0, 0, 0], images, images[:, 0, 0, 0], ("0",), False)
    found = measures.patch_distance(images, data, torch.device("cpu"), 0)
    assert found["value"] is None and "7x7" in found["reason"] and "4x4" in found["reason"]


def test_a_measured_fid_is_labelled(short_digits_run, stand_in, small_bank, monkeypatch, tmp_path):
    monkeypatch.setattr(procedure, "inception_weights", lambda: tmp_path / "weights.pth")
    report, out = measured("--checkpoint", short_digits_run, "--fid", "--bound-images", 2, output=tmp_path / "a.json")
    model, scheduler, config = load_model(short_digits_run)
    drawn = sample_images(model, scheduler, config["shape"], 20, steps=3, eps_scale=EPS_SCALE)
    samples = ((drawn + 1) * 127.5).round().byte()
    data = load_images("digits", "unused")
    again = inception.inception_distances(samples, data.train, "unused", device=torch.device("cpu"))
    assert (report["fid"]["value"], report["kid"]["value"]) == pytest.approx((again["fid"], again["kid"]), rel=1e-3)
    for name in ("fid", "kid"):
        figure = report[name]
        assert math.isfinite(figure["value"]) and figure["n"] == 20 and figure["n_reference"] == 1761
        assert figure["split"] == "samples against training images" and figure["weights"] == "weights.pth"
        assert figure["library"].startswith("torch-fidelity ")
    assert report["kid"]["subset_size"] == 20
    assert f"{report['fid']['value']:.2f}" in out


def test_bad_images_that_the_run_skipped_are_skipped_again(class_images, small_bank, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(class_images, images)
    (images / "cats" / "bad.png").write_text("not an image")
    options = ["--dataset", "folder", "--data-dir", images, "--image-size", 16, "--skip-bad-images", "--steps", 2]
    run = short_run(tmp_path / "runs", *options)
    report, _ = measured("--checkpoint", run, "--bound-images", 2, output=tmp_path / "a.json")
    assert report["data"]["train_images"] + report["data"]["held_out_images"] == 120


def test_a_drawing_costs_what_its_network_calls_cost():
    """Counted by hand: 10 calls, of which 8 are in the noisier three quarters of 400 timesteps."""
    model, scheduler, shape = TrueLiquidDiffusionModel(num_classes=2).eval(), DDPMScheduler(), (3, 8, 8)
    coarse = model.with_steps((1, 2, 3))
    whole, part = multiply_adds(model, shape), multiply_adds(coarse, shape)
    mixed = ByNoise(coarse, model, 100)
    for drawn_by, guidance, expected in (
        (model, Guidance(), 10 * whole),
        (model, Guidance(2.0), 20 * whole),
        (model, Guidance(2.0, coarse), 10 * whole + 10 * part),
        (mixed, Guidance(), 2 * whole + 8 * part),
        (mixed, Guidance(2.0, between=(0.0, 0.1)), 2 * whole + 8 * part + whole),
    ):
        assert drawing_multiply_adds(drawn_by, guidance, scheduler, 10, shape) == expected
