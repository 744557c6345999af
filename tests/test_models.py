"""What all denoisers share: the call, the parameter budget, the rebuild from a file; and what sets them apart."""

import pytest
import torch

from choices import ARMS, LADDER, MODELS
from kernels.native import plain_torch
from models import build_model, complete_config, count_parameters, multiply_adds
from runtime.errors import UserError
from training.checkpoint import load_model, save_model

REBUILD = {
    "model": "true",
    "model_config": {"in_channels": 1},
    "timesteps": 100,
    "schedule": "cosine",
    "prediction_type": "v",
    "dataset": "digits",
    "shape": [1, 8, 8],
    "classes": ["0", "1"],
}


def trained_like(model: torch.nn.Module) -> torch.nn.Module:
    """Weights that are nowhere zero, as after training: a zero-initialised layer would hide what lies behind it."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_every_denoiser_has_the_same_call_and_starts_at_the_preconditioning(name):
    model = build_model(name, in_channels=3)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([0, 399])
    assert torch.equal(model(x, t), torch.zeros_like(x))
    model = trained_like(model)
    output, state = model(x, t, None, return_state=True)
    assert output.shape == x.shape and torch.equal(output, model(x, t))
    assert (state is not None) == (name == "true")
    assert (model(x, torch.tensor([100, 399])) - output)[0].abs().max() > 1e-4
    assert torch.allclose(model(x[:1], t[:1]), output[:1], atol=1e-4)  # images do not see each other


@pytest.mark.parametrize("name", MODELS)
def test_every_denoiser_learns_classes_and_none_is_the_class_behind_the_last(name):
    model = trained_like(build_model(name, in_channels=1, num_classes=3))
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([10, 10])
    outputs = [model(x, t, labels=torch.full((2,), label)) for label in range(4)]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-4
    assert torch.equal(outputs[3], model(x, t))


def test_parameters_are_within_one_percent_of_the_true_model_and_the_u_nets_near():
    true, inspired, unet = (count_parameters(build_model(name)) for name in ("true", "inspired", "unet"))
    assert abs(inspired - true) <= 0.01 * true
    assert abs(unet - true) <= 0.03 * true


def test_the_inspired_model_has_no_ode():
    """No weight acts twice in a pass, and no cell of the true model is inside."""
    from liquid_diffusion import RealLiquidCell

    model = build_model("inspired")
    assert not any(isinstance(module, RealLiquidCell) for module in model.modules())
    calls = []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(lambda module, *_: calls.append(id(module)))
    model(torch.randn(1, 3, 8, 8), torch.tensor([0]))
    assert len(calls) == len(set(calls)) > 0


def test_the_true_models_weights_act_at_every_ode_step():
    model = build_model("true")
    calls = dict.fromkeys(model.processor.cells, 0)
    for name, cell in model.processor.cells.items():
        cell.recurrent.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([0])
    with plain_torch():
        _, state = model(x, t, return_state=True)
        assert calls == {"global": 2, "local": 4, "detail": 6}  # from zeros, the first step needs no convolution
        model(x, t, state)
    assert calls == {"global": 2 + 3, "local": 4 + 5, "detail": 6 + 7}


def test_multiply_adds_count_every_ode_step():
    """Against a count by hand: each convolution's weights times the pixels it makes."""
    model = build_model("true", in_channels=1, ode_steps=(1, 1, 1))
    more = build_model("true", in_channels=1, ode_steps=(1, 1, 4))
    channels = model.head.in_channels
    assert multiply_adds(more, (1, 8, 8)) - multiply_adds(model, (1, 8, 8)) == 3 * 9 * channels**2 * 64
    assert multiply_adds(model, (1, 16, 16)) == pytest.approx(4 * multiply_adds(model, (1, 8, 8)), rel=0.2)


def test_a_model_is_rebuilt_from_its_file(tmp_path):
    model = trained_like(build_model("true", **REBUILD["model_config"]))
    save_model(tmp_path / "model.safetensors", model.state_dict(), REBUILD)
    loaded, scheduler, config = load_model(tmp_path)
    assert config == REBUILD
    assert (scheduler.num_timesteps, scheduler.schedule, scheduler.prediction_type) == (100, "cosine", "v")
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([5])
    assert torch.equal(loaded(x, t), model(x, t))


@pytest.mark.parametrize(
    "change",
    [
        {"model": "inspired"},
        {"model": "transformer"},
        {"model_config": {"in_channels": 3}},
        {"model_config": {"width": 3}},
        {"timesteps": "many"},
        {"schedule": None},
    ],
)
def test_weights_that_do_not_fit_their_config_are_refused(change, tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(path, build_model("true", **REBUILD["model_config"]).state_dict(), REBUILD | change)
    with pytest.raises(UserError):
        load_model(path)


@pytest.mark.parametrize("rung", [rung for rung in LADDER if rung != "35.7m"])
def test_a_rung_has_the_parameters_that_its_name_says(rung):
    number = rung.removesuffix("-flat")
    parameters = float(number[:-1]) * {"k": 1e3, "m": 1e6}[number[-1]]
    assert count_parameters(build_model("unet", **LADDER[rung])) == pytest.approx(parameters, rel=0.06)


@pytest.mark.parametrize("arm", ARMS)
def test_a_complete_config_has_every_default_and_builds_the_same_network(arm):
    name, own = ARMS[arm]
    if arm == "unet:35.7m":
        pytest.skip("large, and no other kind of network than the other rungs")
    config = complete_config(name, in_channels=1, **own)
    assert config["in_channels"] == 1 and config["num_classes"] == 0 and "channels" in config
    assert {"embedding_dim", "ode_steps", "solver"} <= config.keys() or not name.startswith("true")
    shapes = [[p.shape for p in build_model(name, **c).parameters()] for c in (config, {"in_channels": 1} | own)]
    assert shapes[0] == shapes[1]
