"""Muon's first step against a singular value decomposition, AdamW's share against torch, and a run that goes on."""

import json
import signal
from dataclasses import replace

import pytest
import torch
from conftest import call
from torch import nn

import compare
import train as train_command
from errors import UserError
from image_data import load_images
from models import build_model, load_model
from optimizer import MuonAndAdamW, as_matrix, make_optimizer
from train_config import TrainConfig
from training import train

DIGITS = load_images("digits", "unused")
LR = 0.01


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


def test_a_matrix_moves_equally_far_in_all_directions_of_its_gradient():
    model = model_with_gradients("true")
    weights = {
        "convolution": model.processor.cells["detail"].recurrent.weight,  # (32, 32, 3, 3)
        "linear": model.processor.cells["local"].time.weight,  # (48, 32)
    }
    before = {name: weight.clone() for name, weight in weights.items()}
    make_optimizer("muon", model, LR).step()
    for name, weight in weights.items():
        moved = as_matrix(before[name] * (1 - LR * 0.01) - weight.detach())
        u, _, v = torch.linalg.svd(as_matrix(weight.grad), full_matrices=False)
        along = u.T @ moved @ v.T / (LR * 0.2 * max(moved.shape) ** 0.5)
        lengths = along.diag()
        assert lengths.min() > 0.6 and lengths.max() < 1.3, name  # five steps bring them so near to 1
        assert (along - lengths.diag()).abs().max() < 0.06, name  # and in no other direction; products in bf16


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


def test_it_needs_weights_that_are_channels_last_and_a_torch_that_has_it(monkeypatch):
    with pytest.raises(ValueError, match="channels last"):
        MuonAndAdamW(nn.Conv2d(8, 8, 3), LR)
    with pytest.raises(UserError, match="--optimizer: must be one of adamw, muon, got 'sgd'"):
        make_optimizer("sgd", nn.Linear(8, 8), LR)
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(UserError, match=r"--optimizer: muon needs torch 2\.9"):
        make_optimizer("muon", nn.Linear(8, 8), LR)


def test_a_resumed_run_ends_with_the_same_weights_and_keeps_its_optimizer(tmp_path):
    def stop(progress):
        if progress == 0.5:
            signal.raise_signal(signal.SIGTERM)

    config = TrainConfig(
        dataset="digits", epochs=None, steps=12, optimizer="muon", device="cpu", precision="fp32", compile="off",
        timesteps=20, sample_every=12, draw_grids=False, output_dir=str(tmp_path / "whole"),
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


def test_a_comparison_from_before_the_flag_is_one_with_adamw(tmp_path):
    arguments = ["--arms", "inspired", "--dataset", "digits", "--amount", 80, "--seeds", 1, "--lrs", 1e-3]
    arguments += ["--reference", "inspired", "--output-dir", tmp_path, "--device", "cpu"]
    settings = compare.shared_settings(compare.parser().parse_args(list(map(str, arguments))), tmp_path)
    assert settings.pop("optimizer") == "adamw"
    (tmp_path / "comparison.json").write_text(json.dumps(settings))
    code, _, err = call(compare, *arguments, "--optimizer", "muon")
    assert code == 2 and "--optimizer: muon contradicts" in err
    assert call(compare, *arguments)[0] == 0
