"""Muon against its formulas, a singular value decomposition and torch's own; AdamW's share against torch; resuming."""

import copy
import io
import json
import signal
from dataclasses import replace

import pytest
import torch
from conftest import call
from torch import nn

import compare
import train as train_command
from choices import LADDER
from images.batches import held_out_bank
from images.datasets import load_images
from lab import speed
from models import build_model
from training.checkpoint import load_model
from training.config import TrainConfig
from training.loop import train
from training.optimizer import MOMENTUM, STACK_COST, WEIGHT_DECAY, Muon, PaddedStacks, grouped, make_optimizer

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


def orthogonalized(matrices: list[torch.Tensor]) -> list[torch.Tensor]:
    stacks = PaddedStacks(matrices)
    for slot, matrix in zip(stacks.slots, matrices, strict=True):
        slot.copy_(matrix)
    stacks.orthogonalize()
    return [slot / (0.2 * max(slot.shape) ** 0.5) for slot in stacks.slots]


def test_singular_values_come_near_one_and_directions_stay():
    torch.manual_seed(0)
    shapes = [(24, 24), (9, 24), (24, 9), (48, 200), (200, 48), (32, 288)]  # square, wide and tall ones
    matrices = [torch.randn(shape) for shape in shapes]
    assert len(PaddedStacks(matrices).stacks) == 2
    for matrix, result in zip(matrices, orthogonalized(matrices), strict=True):
        assert result.shape == matrix.shape
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        along = u.T @ result @ v.T
        assert (along - along.diag().diag()).abs().max() < 1e-4  # no other direction
        lengths = along.diag()[s > s[0] / 100]
        assert lengths.min() > 0.6 and lengths.max() < 1.3  # five steps bring them so near to one
        (alone,) = orthogonalized([matrix])
        torch.testing.assert_close(result, alone, atol=1e-5, rtol=0)  # whatever it was stacked with


def test_stacks_are_as_few_as_pays():
    shapes = [(8, 72), (72, 8), (8, 70), (64, 64), (16, 64)]
    together = {cost: sorted(sorted(group.members) for group in grouped(shapes, cost)) for cost in (0, 1e6, 1e9)}
    assert together[0] == [[0, 1], [2], [3], [4]]  # of one shape, on whichever side
    # four of 16 x 72 take 0.8 million multiply-adds, five of 64 x 72 take 21 million
    assert together[1e6] == [[0, 1, 2, 4], [3]]
    assert together[1e9] == [[0, 1, 2, 3, 4]]


def test_on_a_gpu_600_thousand_parameters_are_one_stack():
    with torch.device("meta"):
        matrices = [p.flatten(1) for p in build_model("unet", **LADDER["600k"]).parameters() if p.ndim in (2, 4)]
    (group,) = grouped([(len(matrix), len(matrix.T)) for matrix in matrices], STACK_COST["cuda"])
    assert sorted(group.members) == list(range(len(matrices)))


class MatrixByMatrix:
    """Muon as its papers have it, in double precision."""

    def __init__(self, weights: list[torch.Tensor]):
        self.weights = [weight.detach().double() for weight in weights]
        self.momenta = [torch.zeros_like(weight) for weight in self.weights]

    def step(self, gradients: list[torch.Tensor | None], lr: float):
        for weight, momentum, gradient in zip(self.weights, self.momenta, gradients, strict=True):
            if gradient is None:
                continue
            gradient = gradient.double()
            momentum.copy_(MOMENTUM * momentum + (1 - MOMENTUM) * gradient)
            x = ((1 - MOMENTUM) * gradient + MOMENTUM * momentum).flatten(1)
            length = 0.2 * max(x.shape) ** 0.5
            x = x / x.norm()
            for _ in range(5):
                x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
            weight.copy_(weight - lr * WEIGHT_DECAY * weight - lr * length * x.view_as(weight))


def some_weights() -> list[nn.Parameter]:
    """Wide, tall and square ones, in both memory formats, in several stacks."""
    torch.manual_seed(0)
    shapes = [(16, 8, 3, 3), (12, 8, 1, 1), (64, 9, 1, 1), (48, 48), (96, 400), (400, 96), (8, 130)]
    values = [torch.randn(shape) for shape in shapes]
    values[0] = values[0].to(memory_format=torch.channels_last)
    assert len(PaddedStacks(values).stacks) > 1
    return [nn.Parameter(value) for value in values]


def test_steps_are_those_of_the_formulas_whichever_weights_have_gradients():
    weights = some_weights()
    expected, optimizer = MatrixByMatrix(weights), Muon(weights, LR)
    for step in range(6):
        lr = LR / (1 + step)
        optimizer.param_groups[0]["lr"] = lr
        for i, weight in enumerate(weights):
            # the first never has one, another one misses every step
            weight.grad = None if i in (0, step) else torch.randn_like(weight)
        expected.step([weight.grad for weight in weights], lr)
        optimizer.step()
    for ours, theirs in zip(weights, expected.weights, strict=True):
        torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=2e-6)
    assert not optimizer.state[weights[0]]


def test_state_goes_through_a_file_no_larger_than_its_momenta():
    weights = some_weights()
    others = copy.deepcopy(weights)
    gradients = [[torch.randn_like(weight) for weight in weights] for _ in range(4)]

    def move(optimizer, weights, gradients):
        for gradient in gradients:
            for weight, value in zip(weights, gradient, strict=True):
                weight.grad = value
            optimizer.step()

    optimizer = Muon(weights, LR)
    move(optimizer, weights, gradients)
    first = Muon(others, LR)
    move(first, others, gradients[:2])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    assert file.tell() < 4 * sum(weight.numel() for weight in weights) + 8000
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    expected = MatrixByMatrix([torch.zeros_like(weight) for weight in weights])
    for gradient in gradients[:2]:
        expected.step(gradient, LR)
    for i, momentum in enumerate(expected.momenta):
        assert list(saved["state"][i]) == ["momentum"]
        torch.testing.assert_close(saved["state"][i]["momentum"], momentum.float())
    second = Muon(others, 0.0)
    move(second, others, gradients[:1])  # without moving: its own momenta are to be replaced
    second.load_state_dict(saved)
    move(second, others, gradients[2:])
    assert all(map(torch.equal, weights, others))


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
