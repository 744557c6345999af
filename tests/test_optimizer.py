"""Muon against a singular value decomposition and torch's own, AdamW's share against torch, and a run that goes on."""

import json
import signal
from dataclasses import replace

import pytest
import torch
from conftest import call
from torch import nn

import compare
import train as train_command
from images.batches import held_out_bank
from images.datasets import load_images
from lab import speed
from models import build_model
from training.checkpoint import load_model
from training.config import TrainConfig
from training.loop import train
from training.optimizer import WEIGHT_DECAY, Muon, make_optimizer, orthogonalized

DIGITS = load_images("digits", "unused")
LR = 0.01


@pytest.fixture
def quick_measurements(monkeypatch):
    """Few held-out images, and speeds that are soon known."""
    monkeypatch.setattr(held_out_bank, "__defaults__", (50,))
    monkeypatch.setattr(speed, "SECONDS", 0.01)


def model_with_gradients(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(name).to(memory_format=torch.channels_last)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("name", ["true", "inspired", "unet"])
def test_every_weight_moves_once(name):
    model = model_with_gradients(name)
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = make_optimizer("muon", model, LR)
    moved_by = [len(group["params"]) for group in optimizer.param_groups]
    assert sum(moved_by) == len(before) and min(moved_by) > 0
    optimizer.step()
    assert not any(map(torch.equal, before, model.parameters()))
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_singular_values_come_near_one_and_directions_stay():
    torch.manual_seed(0)
    shapes = [(24, 24), (9, 24), (24, 9), (48, 200), (200, 48), (32, 288)]  # square, wide and tall ones in three stacks
    matrices = [torch.randn(shape) for shape in shapes]
    for matrix, result in zip(matrices, orthogonalized(matrices), strict=True):
        assert result.shape == matrix.shape
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        along = u.T @ result @ v.T
        assert (along - along.diag().diag()).abs().max() < 1e-4  # no other direction
        lengths = along.diag()[s > s[0] / 100]
        assert lengths.min() > 0.6 and lengths.max() < 1.3  # five steps bring them so near to one
        (alone,) = orthogonalized([matrix])
        torch.testing.assert_close(result, alone, atol=1e-5, rtol=0)  # whatever it was stacked with


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9")
def test_three_steps_go_where_those_of_torch_go():
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(16, 8, 3, 3)), nn.Parameter(torch.randn(32, 12))]
    theirs = [nn.Parameter(weight.detach().flatten(1).clone()) for weight in ours]
    start = [weight.detach().clone() for weight in theirs]
    optimizers = [Muon(ours, LR), torch.optim.Muon(theirs, LR, WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")]
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.flatten(1)
        for optimizer in optimizers:
            optimizer.step()
    for a, b, before in zip(ours, theirs, start, strict=True):
        difference = (a.flatten(1) - b).norm() / (b - before).norm()
        assert difference < 0.02  # theirs computes in bf16


def test_what_is_no_matrix_moves_as_with_adamw():
    model, other = model_with_gradients("true"), model_with_gradients("true")
    make_optimizer("muon", model, LR).step()
    make_optimizer("adamw", other, LR).step()
    same = {
        name
        for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True)
        if torch.equal(ours, theirs)
    }
    biases = {name for name, parameter in model.named_parameters() if parameter.ndim == 1}
    assert same == biases | {"head.weight"}  # of three rows


def test_an_optimizer_that_is_not_there():
    with pytest.raises(ValueError, match="optimizer: must be one of adamw, muon, got 'sgd'"):
        make_optimizer("sgd", nn.Linear(8, 8), LR)


def test_a_resumed_run_ends_with_the_same_weights_and_keeps_its_optimizer(tmp_path, quick_measurements):
    def stop(progress):
        if progress == 0.5:
            signal.raise_signal(signal.SIGTERM)

    config = TrainConfig(
        model="inspired", dataset="digits", epochs=None, steps=6, optimizer="muon", device="cpu", precision="fp32",
        compile="off", timesteps=20, sample_every=6, draw_grids=False, output_dir=str(tmp_path / "whole"),
    )  # fmt: skip
    whole = train(config, data=DIGITS, on_progress=lambda _: None)
    config = replace(config, output_dir=str(tmp_path / "stopped"))
    with pytest.raises(KeyboardInterrupt):
        train(config, data=DIGITS, on_progress=stop)
    (stopped,) = (tmp_path / "stopped").iterdir()
    code, _, err = call(train_command, "--resume", stopped, "--optimizer", "adamw")
    assert code == 2 and "--optimizer: adamw contradicts --resume" in err
    assert call(train_command, "--resume", stopped)[0] == 0
    weights = [load_model(run)[0].state_dict() for run in (whole, stopped)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_what_was_begun_before_the_flag_goes_on_with_adamw(tmp_path, quick_measurements):
    arguments = [
        "--arms",
        "inspired",
        "--dataset",
        "digits",
        "--amount",
        40,
        "--timesteps",
        8,
        "--seeds",
        1,
        "--lrs",
        1e-3,
    ]
    arguments += ["--reference", "inspired", "--output-dir", tmp_path, "--device", "cpu"]
    settings = compare.shared_settings(compare.parser().parse_args(list(map(str, arguments))), tmp_path)
    assert settings.pop("optimizer") == "muon"
    (tmp_path / "comparison.json").write_text(json.dumps(settings))
    code, _, err = call(compare, *arguments)
    assert code == 2 and "--optimizer: muon contradicts" in err
    assert call(compare, *arguments, "--optimizer", "adamw")[0] == 0
    (run,) = (tmp_path / "runs").glob("*/*-inspired-digits")
    config = json.loads((run / "config.json").read_text())
    assert config["train"].pop("optimizer") == "adamw"
    (run / "config.json").write_text(json.dumps(config))
    assert call(train_command, "--resume", run, "--steps", 7)[0] == 0
    assert call(train_command, "--resume", run, "--optimizer", "muon")[0] == 2
