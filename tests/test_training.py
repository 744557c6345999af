"""The loop's pure functions, and what a short run learns."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from diffusion.scheduler import DDPMScheduler
from images.batches import held_out_bank, training_batch
from images.datasets import load_images
from lab.comparison.wiener import fit_wiener
from runtime.errors import UserError
from runtime.hardware import choose_device
from training.checkpoint import load_model, read_resume
from training.config import TrainConfig
from training.loop import train
from training.state import TrainState, ema_decay
from training.step import learning_rate
from training.validation import held_out_loss


def short_training(folder: Path, **options) -> Path:
    """A training on digits of a network that learns a lot in a few hundred quick steps; its run folder."""
    network = {"channels": (24, 16, 16), "ode_steps": (1, 2, 3)}
    options = {"dataset": "digits", "epochs": None, "batch_size": 32, "precision": "fp32", "compile": "off"} | options
    options |= {"model_config": network, "sample_every": 10_000, "save_every": 50, "draw_grids": False}
    return train(TrainConfig(output_dir=str(folder), **options))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return short_training(tmp_path_factory.mktemp("runs"), steps=300, lr=0.02)


def test_a_short_run_beats_the_best_linear_denoiser(run):
    data = load_images("digits", "unused")
    model, scheduler, _ = load_model(run)
    bank = held_out_bank(data, scheduler.num_timesteps)
    assert held_out_loss(model, scheduler, bank) < 0.95 * held_out_loss(*fit_wiener(data, scheduler), bank)


def test_the_saved_model_is_the_average_and_not_the_last_weights(run):
    model, _, _ = load_model(run)
    state = read_resume(run / "checkpoint.pt")
    for name, value in model.state_dict().items():
        assert torch.equal(value, state["ema"][f"module.{name}"])
    assert any(not torch.equal(value, state["model"][name]) for name, value in model.state_dict().items())


def test_the_average_of_a_50_step_run_is_usable(tmp_path):
    folder = short_training(tmp_path, steps=50)
    data = load_images("digits", "unused")
    average, scheduler, _ = load_model(folder)
    bank = held_out_bank(data, scheduler.num_timesteps)
    last, _, _ = load_model(folder)
    last.load_state_dict(read_resume(folder / "checkpoint.pt")["model"])
    assert held_out_loss(average, scheduler, bank) < 1.1 * held_out_loss(last, scheduler, bank)


def test_the_average_is_the_weighted_mean_of_the_weights():
    """The decays' products are the weights of the mean, as a closed form: with (1 + n) / (10 + n) they fall as n^9."""
    decays = [ema_decay(0.999, step) for step in range(1000)]
    assert decays[0] == 0.1 and decays == sorted(decays)
    assert ema_decay(0.999, 10**6) == 0.999
    assert ema_decay(0.0, 10) == 0.0
    weight_of_first = torch.tensor(decays[:50], dtype=torch.float64).prod().item()
    assert weight_of_first < 1e-6


def test_the_average_moves_as_torch_s_own():
    model = torch.nn.Linear(3, 2)
    state = TrainState(model, {}, lr=0.1, longest_decay=0.1, optimizer="adamw")  # which no step is below
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.1))
    for _ in range(20):
        with torch.no_grad():
            model.weight.normal_()
            model.bias.normal_()
        theirs.update_parameters(model)
        state.average()
        state.step += 1
        torch.testing.assert_close(state.ema.state_dict(), theirs.state_dict())


def test_learning_rate_warms_up_and_follows_a_cosine():
    assert learning_rate(1.0, 0, 0.0) == pytest.approx(1 / 200)
    assert learning_rate(1.0, 199, 0.0) == pytest.approx(1)
    assert learning_rate(1.0, 10_000, 0.5) == pytest.approx(0.51)
    assert learning_rate(1.0, 10_000, 1.0) == pytest.approx(0.02)


def test_budget_in_epochs_and_steps_and_minutes():
    assert TrainConfig().total_steps(50_000) == 18_750  # the mission: batch 8, 3 epochs
    assert TrainConfig(epochs=None, steps=7).total_steps(50_000) == 7
    assert TrainConfig(epochs=None, minutes=1.0).total_steps(50_000) is None
    assert TrainConfig(epochs=0.5, batch_size=64).total_steps(100) == 1


def test_held_out_loss_is_the_mean_over_the_bank_in_any_chunks():
    data = load_images("digits", "unused")
    scheduler = DDPMScheduler(400)
    bank = held_out_bank(data, 400)
    generator = torch.Generator().manual_seed(0)

    class Network(torch.nn.Module):
        num_classes = 0

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(1, 1, 3, 3, generator=generator))

        def forward(self, x, t):
            return torch.nn.functional.conv2d(x, self.weight, padding=1)

    network = Network()
    expected = scheduler.loss(network, bank.x_0, bank.t, bank.eps).double().mean().item()
    assert held_out_loss(network, scheduler, bank, chunk=300) == pytest.approx(expected, rel=1e-6)


def test_a_device_that_is_not_there_is_named():
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
    missing = next((d for d in ("cuda", "mps") if choose_device("auto").type != d), None)
    with pytest.raises(UserError, match=f"--device: {missing}"):
        choose_device(missing)


@pytest.mark.parametrize(
    "dataset, wanted, mirrored", [("folder", True, True), ("folder", False, False), ("digits", True, False)]
)
def test_images_are_mirrored_where_that_makes_sense_and_is_wanted(
    dataset, wanted, mirrored, class_images, monkeypatch, tmp_path
):
    """Of what the loop is given, a batch of many draws has two versions of an image, or one."""
    found = []
    monkeypatch.setattr("training.loop.loop", lambda config, data, *_: found.append(data) or True)
    train(TrainConfig(dataset=dataset, data_dir=class_images, mirror=wanted, output_dir=tmp_path, compile="off"))
    data = replace(found[0], train=found[0].train[:1], train_labels=found[0].train_labels[:1])
    x_0 = training_batch(data, lambda uniform: uniform.long(), seed=0, number=0, batch_size=32).x_0
    assert len(x_0.unique(dim=0)) == 1 + mirrored
