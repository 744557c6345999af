"""The classifier of a data set: its network, its file, its command, and what `evaluate.py` says by it."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import FEW_DRAWN, call
from PIL import Image
from scipy import linalg

import evaluate
import sample
from choices import EPS_SCALE, GUIDED_SHARE
from diffusion.sampling import Guidance, sample_images
from images.batches import held_out_bank
from images.datasets import ImageData, load_images
from lab.classifier import __main__ as command
from lab.classifier import network
from lab.classifier.network import Classifier, load_classifier, published_classifier, read, save_classifier
from lab.classifier.training import shifted, train_classifier
from lab.evaluation.by_classifier import by_classifier, classifier_or_reason
from models import count_parameters
from training.checkpoint import load_model, read_model


@pytest.fixture(scope="module")
def of_digits(tmp_path_factory):
    """(the file that the command makes of the digits in seconds, what it prints)."""
    path = tmp_path_factory.mktemp("classifier") / "digits.safetensors"
    code, out, err = call(command, "--dataset", "digits", "--images", 8000, "--device", "cpu", "--output", path)
    assert code == 0, err
    return path, out


@pytest.fixture
def small_bank(monkeypatch):
    monkeypatch.setattr(held_out_bank, "__defaults__", (100,))


def test_the_command_learns_the_digits_and_its_file_is_enough(of_digits):
    path, out = of_digits
    classifier, about = load_classifier(path)
    data = load_images("digits", "unused")
    with torch.no_grad():
        right = [
            int(classifier(image[None].float() / 127.5 - 1).argmax()) == label
            for image, label in zip(data.held_out, data.held_out_labels.tolist(), strict=True)
        ]
    assert np.mean(right) > 0.85
    assert about["held_out"] == {"accuracy": pytest.approx(np.mean(right)), "n": 36}
    assert f"{np.mean(right):.1%} of 36 held-out images are read rightly" in out and str(path) in out
    assert (about["dataset"], about["classes"], about["shape"]) == ("digits", [*map(str, range(10))], [1, 8, 8])
    assert "lab.classifier --dataset digits --images 8000" in about["command"]
    assert path.stat().st_size < 1e6 and count_parameters(classifier) <= 480_000
    assert {tensor.dtype for tensor in read_model(path)[0].values()} == {torch.float16}


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 28, 28), (3, 8, 12), (1, 20, 4)])
def test_the_folded_network_is_the_one_that_was_trained_and_its_file_keeps_it(shape, tmp_path):
    torch.manual_seed(0)
    trained, x = Classifier(shape[0], 3, norm=True), torch.randn(8, *shape)
    for layer in trained.layers:
        layer.norm.momentum = None  # running means over all batches
        torch.nn.init.normal_(layer.norm.bias)
    for _ in range(3):
        trained(torch.randn(8, *shape))
    folded = trained.eval().folded()
    with torch.no_grad():
        truth = trained(x)
        assert torch.allclose(folded(x), truth, rtol=1e-3, atol=1e-4 * truth.abs().max())
        assert folded.features(x).shape == (8, network.FEATURES)
        save_classifier(tmp_path / "a.safetensors", folded, {"classes": ["a", "b", "c"], "shape": list(shape)})
        loaded, about = load_classifier(tmp_path / "a.safetensors")
        assert about["shape"] == list(shape) and not loaded.training
        assert torch.allclose(loaded(x), truth, rtol=1e-2, atol=1e-2 * truth.abs().max())
    with pytest.raises(ValueError, match="no norm"):
        folded.folded()


def test_images_are_read_in_batches_in_their_order():
    torch.manual_seed(0)
    classifier = Classifier(3, 4).eval()
    images = torch.randint(0, 256, (10, 3, 8, 8), dtype=torch.uint8)
    done = []
    features, logits = read(classifier, images, batch_size=4, on_batch=done.append)
    with torch.no_grad():
        truth = torch.cat([classifier.features(image[None] / 127.5 - 1) for image in images])
    assert torch.allclose(features, truth, rtol=1e-4, atol=1e-5) and done == [4, 4, 2]
    assert torch.allclose(logits, classifier.head(truth).detach(), rtol=1e-4, atol=1e-5)


def test_shifted_images_are_parts_of_mirrored_ones():
    images, by = torch.randn(5, 2, 6, 8), torch.tensor([[0, 0], [-2, 1], [2, 2], [1, -2], [0, 2]])
    truth = []
    for image, (down, right) in zip(images.numpy(), by.tolist(), strict=True):
        padded = np.pad(image, ((0, 0), (2, 2), (2, 2)), mode="reflect")
        truth.append(padded[:, 2 + down : 8 + down, 2 + right : 10 + right])
    assert np.array_equal(shifted(images, by, 2).numpy(), np.stack(truth))


def test_the_same_seed_gives_the_same_network_and_another_one_another():
    data = load_images("digits", "unused")
    first, again, other = (train_classifier(data, images=600, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_a_set_without_classes_is_refused_in_one_line(tmp_path):
    for i in range(60):
        (tmp_path / "all").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "all" / f"{i}.png")
    for folder in (tmp_path, tmp_path / "all"):
        options = ["--dataset", "folder", "--data-dir", folder, "--output", tmp_path / "a.safetensors"]
        code, out, err = call(command, *options)
        assert (code, out) == (2, "") and "at least two classes" in err.splitlines()[-1], err
        assert not (tmp_path / "a.safetensors").exists()


def test_files_that_are_no_classifier_or_no_model_are_refused(of_digits, short_digits_run, short_class_run, tmp_path):
    (tmp_path / "text").write_text("hello")
    for path, word in ((short_digits_run, "not a classifier"), (tmp_path / "text", "safetensors"), ("no", "no")):
        code, _, err = call(evaluate, "--checkpoint", short_digits_run, "--classifier", path)
        assert code == 2 and err.count("\n") == 1 and word in err, err
    code, _, err = call(evaluate, *FEW_DRAWN, "--checkpoint", short_class_run, "--classifier", of_digits[0])
    assert code == 2 and "--classifier" in err and "another shape" in err, err
    for module in (evaluate, sample):
        code, _, err = call(module, "--checkpoint", of_digits[0])
        assert code == 2 and err.count("\n") == 1 and str(of_digits[0]) in err, err


def test_the_published_classifier_is_that_of_these_classes_and_this_shape(of_digits, tmp_path, monkeypatch):
    monkeypatch.setattr(network, "PUBLISHED", tmp_path)
    classes = tuple(map(str, range(10)))
    assert published_classifier(classes, (1, 8, 8)) is None
    (tmp_path / "classifier-digits.safetensors").write_bytes(of_digits[0].read_bytes())
    assert published_classifier(classes, (1, 8, 8)) == tmp_path / "classifier-digits.safetensors"
    assert published_classifier(classes, (1, 16, 16)) is published_classifier(classes[::-1], (1, 8, 8)) is None


def test_the_share_that_is_recognised_is_that_of_the_classes_asked_for(of_digits):
    """Real digits stand in for samples: all of them are asked for rightly, then every fourth one wrongly."""
    classifier, data = load_classifier(of_digits[0])[0], load_images("digits", "unused")
    logits = read(classifier, data.train)[1]
    sure = (logits.argmax(1) == data.train_labels).nonzero()[:100, 0]
    images, asked = data.train[sure], data.train_labels[sure]
    found = by_classifier(images, asked, data, classifier, seed=0)
    assert found["recognised"]["value"] == 1 and found["recognised"]["interval"] == 0
    asked = asked.clone()
    asked[::4] = (asked[::4] + 1) % 10
    found = by_classifier(images, asked, data, classifier, seed=0)["recognised"]
    assert found["value"] == pytest.approx(0.75) and found["n"] == 100
    assert found["floor"]["value"] == pytest.approx(
        (logits.argmax(1) == data.train_labels).double().mean().item(), abs=0.1
    )
    assert "recognised" not in by_classifier(images, None, data, classifier, seed=0)


def test_samples_that_are_real_images_are_as_near_as_training_images_and_noise_is_far(of_digits):
    classifier, data = load_classifier(of_digits[0])[0], load_images("digits", "unused")
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(7))
    drawn, train, held_out = data.train[order[:300]], order[300:1000], order[1000:]
    labels = data.train_labels
    data = ImageData(
        "digits", data.train[train], labels[train], data.train[held_out], labels[held_out], data.classes, False
    )
    real = by_classifier(drawn, None, data, classifier, seed=0)
    noise = torch.randint(0, 256, (300, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    far = by_classifier(noise, None, data, classifier, seed=0)
    for name in ("fd", "kid"):
        assert abs(real[name]["value"] - real[name]["floor"]["value"]) < 2 * real[name]["floor"]["interval"]
        assert far[name]["value"] > 2 * real[name]["value"] and far[name]["floor"] == real[name]["floor"]
    one = by_classifier(drawn[:1].expand(300, -1, -1, -1), None, data, classifier, seed=0)
    assert one["recall"]["value"] < 0.1 < 0.8 < real["recall"]["value"] and real["precision"]["value"] > 0.8
    assert real["fd"]["n_reference"] == 761 and real["recall"]["n_reference"] == 300


def test_too_few_images_have_no_classifier_and_the_reason_is_said(of_digits):
    data = load_images("digits", "unused")
    few = ImageData("digits", *(2 * (data.held_out[:9], data.held_out_labels[:9])), data.classes, False)
    reason, path = classifier_or_reason(str(of_digits[0]), few)
    assert path is None and "at least 16" in str(reason)


def test_evaluate_says_the_figures_of_the_samples_that_it_drew(of_digits, short_digits_run, small_bank, tmp_path):
    options = ["--checkpoint", short_digits_run, *FEW_DRAWN, "--bound-images", 2, "--output", tmp_path / "a.json"]
    code, out, err = call(evaluate, *options, "--classifier", of_digits[0])
    assert code == 0, err
    found = json.loads((tmp_path / "a.json").read_text())["classifier"]
    model, scheduler, config = load_model(short_digits_run)
    drawn = sample_images(model, scheduler, config["shape"], 20, steps=3, eps_scale=EPS_SCALE)
    samples = ((drawn + 1) * 127.5).round().byte()
    x, y = (
        read(load_classifier(of_digits[0])[0], images)[0].double().numpy()
        for images in (samples, load_images("digits", "unused").held_out)
    )
    covariances = np.cov(x.T), np.cov(y.T)
    root = linalg.sqrtm(covariances[0] @ covariances[1] + 1e-10 * np.eye(len(covariances[0]))).real
    fd = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(sum(covariances)) - 2 * np.trace(root)
    assert found["fd"]["value"] == pytest.approx(fd, rel=1e-2)
    assert found["fd"]["n"] == 20 and found["fd"]["n_reference"] == 36 and found["fd"]["interval"] > 0
    assert found["file"] == "digits.safetensors" and len(found["sha256"]) == 64
    lines = [line for line in out.splitlines() if "of our classifier" in line]
    assert [line.split()[0] for line in lines] == ["FD", "KID"] and f"{found['fd']['value']:.3f}" in lines[0]
    assert "time     about " in out

    code, out, _ = call(evaluate, *options)
    found = json.loads((tmp_path / "a.json").read_text())["classifier"]
    assert found["value"] is None and "python -m lab.classifier --dataset digits" in found["reason"]
    assert found["reason"] in out


def test_guidance_changes_the_samples_of_a_model_with_classes_and_is_refused_for_others(
    short_class_run, short_digits_run, class_images, small_bank, tmp_path
):
    for split in ("train", "test"):
        shutil.copytree(class_images, tmp_path / "images" / split)
    path, images = tmp_path / "cats.safetensors", ["--dataset", "folder", "--data-dir", tmp_path / "images"]
    options = [*FEW_DRAWN, *images, "--bound-images", 2, "--output", tmp_path / "a.json"]
    code, out, err = call(command, *images, "--image-size", 16, "--images", 2000, "--output", path)
    assert code == 0 and out.startswith("100.0%"), err
    found = []
    for guidance in (1, 3):
        code, out, err = call(
            evaluate, *options, "--checkpoint", short_class_run, "--classifier", path, "--guidance", guidance
        )
        assert code == 0, err
        report = json.loads((tmp_path / "a.json").read_text())
        assert report["sampling"]["guidance"] == report["classifier"]["samples"]["guidance"] == guidance
        model, scheduler, _ = load_model(short_class_run)
        asked = torch.arange(20) % 2
        how = {"guidance": Guidance(guidance, between=(0.0, GUIDED_SHARE)), "eps_scale": EPS_SCALE}
        drawn = sample_images(model, scheduler, (3, 16, 16), 20, steps=3, labels=asked, **how)
        share = (read(load_classifier(path)[0], ((drawn + 1) * 127.5).round().byte())[1].argmax(1) == asked).double()
        assert report["classifier"]["recognised"]["value"] == pytest.approx(share.mean().item())
        assert "  recognised" in out
        found.append(report["classifier"]["fd"]["value"])
    assert found[0] != found[1]
    code, _, err = call(evaluate, "--checkpoint", short_digits_run, "--guidance", 2)
    assert code == 2 and err.count("\n") == 1 and "--guidance" in err
