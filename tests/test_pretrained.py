"""The published weights: what their model card says of the digits is measured again, which needs no download."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from diffusion.sampling import sample_images
from images.batches import Batch, held_out_bank
from images.datasets import load_images
from lab.classifier.network import load_classifier, published_classifier
from models import count_parameters
from training.checkpoint import load_model
from training.validation import held_out_loss

PRETRAINED = Path(__file__).parent.parent / "pretrained"


def card(name: str) -> str:
    """What the model card says of one file: from its name to the next file's or the end."""
    text = (PRETRAINED / "README.md").read_text()
    return re.search(rf"^## `{re.escape(name)}`\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)[1]


@pytest.fixture(scope="module")
def digits():
    return load_model(PRETRAINED / "true-digits.safetensors")


@pytest.mark.parametrize("path", sorted(PRETRAINED.glob("[ti]*.safetensors")), ids=lambda path: path.stem)
def test_every_file_loads_and_has_the_parameters_of_its_card(path):
    model, _, config = load_model(path)
    assert path.name.startswith(f"{config['model']}-")
    assert f" {count_parameters(model):,} parameters" in card(path.name)


@pytest.mark.parametrize("path", sorted(PRETRAINED.glob("classifier-*.safetensors")), ids=lambda path: path.stem)
def test_a_classifier_is_found_by_its_classes_and_has_the_figures_of_its_card(path):
    classifier, about = load_classifier(path)
    assert published_classifier(about["classes"], about["shape"]) == path
    assert path.stat().st_size < 1e6
    assert f" {count_parameters(classifier):,} parameters" in card(path.name)
    assert f"{100 * about['held_out']['accuracy']:.2f} %" in card(path.name)


def test_the_held_out_error_is_the_card_s_and_twice_the_ode_steps_keep_it(digits):
    model, scheduler, config = digits
    bank = held_out_bank(load_images("digits", "data", config["shape"][1]), scheduler.num_timesteps)
    loss = held_out_loss(model, scheduler, bank)
    assert loss == pytest.approx(
        float(re.search(r"held-out eps-MSE \| ([0-9.]+)", card("true-digits.safetensors"))[1]), rel=0.002
    )
    part = Batch(**{name: values[:500] for name, values in vars(bank).items()})
    loss = held_out_loss(model, scheduler, part)
    try:
        model.set_solver(ode_steps=(6, 10, 14))
        assert held_out_loss(model, scheduler, part) < 1.01 * loss
    finally:
        model.set_solver(ode_steps=model.ode_steps)


def test_a_classifier_that_never_saw_a_drawing_reads_the_drawn_digits(digits):
    model, scheduler, config = digits
    asked = torch.arange(100) % 10
    drawn = sample_images(model, scheduler, config["shape"], 100, steps=10, labels=asked, guidance=2.0)
    real = load_digits()
    reader = LogisticRegression(max_iter=1000).fit(real.data / 16, real.target)
    read = reader.predict(((F.avg_pool2d(drawn, 2).flatten(1) + 1) / 2).numpy())
    assert (read == asked.numpy()).mean() > 0.9
