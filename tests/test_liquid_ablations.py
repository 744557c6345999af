"""Each ablation takes away what its name says, keeps the size, and leaves the rest as it is."""

import pytest
import torch

from baselines import ABLATIONS, FixedTauLiquid, PooledLiquid, UntiedLiquid
from choices import ARMS
from liquid_diffusion import TrueLiquidDiffusionModel
from models import build_model, count_parameters, multiply_adds


def outputs_of(model, x, t=5):
    torch.manual_seed(1)
    torch.nn.init.normal_(model.head.weight)  # it starts at zero
    return model(x, torch.full((len(x),), t))


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_has_the_size_of_the_model_and_every_weight_learns(name):
    model = build_model(*[f"true:{name}"], in_channels=3)
    assert 38_000 <= count_parameters(model) < 39_000
    outputs_of(model, torch.randn(2, 3, 16, 16)).square().sum().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert silent == []


def test_pooled_cells_do_not_see_where_a_pixel_lies():
    x = torch.randn(2, 3, 16, 16)
    t = torch.tensor([3, 7])
    _, state = PooledLiquid()(x, t, return_state=True)
    assert [h.shape[2:] for h in state] == [(1, 1)] * 3
    model = PooledLiquid()
    features = torch.randn(2, 32, 16, 16)
    embedding = model.embedding(t)
    for a, b in zip(*(model.processor(f, embedding) for f in (features, features.roll((3, 5), (2, 3)))), strict=True):
        assert torch.allclose(a, b, atol=1e-6)  # a moved image is the same to them


def test_a_fixed_tau_is_the_same_for_every_input_time_and_pixel():
    model = FixedTauLiquid()
    for cell in model.processor.cells.values():
        x = torch.randn(2, cell.input.depthwise.in_channels, 8, 8)
        _, tau = cell.drive_and_tau(x, torch.randn(2, cell.time.in_features))
        assert tau.unique().tolist() == pytest.approx([(cell.tau_min + cell.tau_max) / 2])


def test_untied_steps_with_equal_weights_are_the_tied_model():
    torch.manual_seed(0)
    tied, untied = TrueLiquidDiffusionModel(channels=(8, 8, 8)), UntiedLiquid(channels=(8, 8, 8))
    weights = tied.state_dict()
    for name in list(weights):
        if ".recurrent.weight" in name:
            steps = len(untied.get_submodule(name.removesuffix(".weight")))
            weight = weights.pop(name)
            weights |= {name.replace("recurrent", f"recurrent.{i}"): weight for i in range(steps)}
    untied.load_state_dict(weights)
    x = torch.randn(2, 3, 16, 16)
    assert torch.allclose(outputs_of(tied, x), outputs_of(untied, x), atol=1e-4)  # Winograd rounds differently
    assert multiply_adds(tied, (3, 16, 16)) == multiply_adds(untied, (3, 16, 16))
    with pytest.raises(ValueError, match="zeros"):
        untied(x, torch.zeros(2, dtype=torch.long), tuple(torch.zeros(2, 8, s, s) for s in (4, 8, 16)))


def test_one_step_skips_the_recurrence():
    one, three = (build_model(ARMS[arm][0], **ARMS[arm][1]) for arm in ("true:steps=1", "true"))
    assert count_parameters(one) == count_parameters(three)
    assert multiply_adds(one, (3, 32, 32)) < 0.2 * multiply_adds(three, (3, 32, 32))


@pytest.mark.parametrize("change", [{"solver": "rk4"}, {"solver": "exponential"}, {"ode_steps": (6, 10, 14)}])
def test_an_untied_model_cannot_be_solved_otherwise(change):
    """Its steps are layers with weights of their own."""
    model = build_model("true:untied")
    with pytest.raises(ValueError, match="untied"):
        model.set_solver(**change)
    model.set_solver("euler", (3, 5, 7))
