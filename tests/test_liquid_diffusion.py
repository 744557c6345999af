"""The cell against torchdiffeq and closed forms, its gradients, its bounds; the model's coupling and state."""

import itertools
import math

import pytest
import torch
from torch.nn.functional import conv2d, interpolate
from torchdiffeq import odeint

from choices import SOLVERS
from liquid_diffusion import STEP_FRACTION, TAU_RANGE, RealLiquidCell, TrueLiquidDiffusionModel, upsample
from models import count_parameters


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def make_cell(**options) -> RealLiquidCell:
    return RealLiquidCell(3, 4, 5, **{"num_steps": 6, "tau_range": (0.5, 4.0), "activation": "tanh"} | options)


def make_inputs(size: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(2, 3, size, size), torch.randn(2, 5), torch.randn(2, 4, size, size)


def reference_derivative(cell: RealLiquidCell, drive: torch.Tensor, tau: torch.Tensor):
    """The ODE written from the design's formula, not from the cell's code."""
    weight = cell.recurrent.weight
    return lambda _, h: (-h + torch.tanh(conv2d(h, weight, padding=1) + drive)) / tau


def make_model(**options) -> TrueLiquidDiffusionModel:
    """A model whose head is not zero, so that its output depends on its cells."""
    model = TrueLiquidDiffusionModel(**options)
    torch.nn.init.normal_(model.head.weight)
    return model


def test_euler_is_torchdiffeqs_euler():
    cell = make_cell(solver="euler", num_steps=7)
    x, embedding, h = make_inputs()
    drive, tau = cell.drive_and_tau(x, embedding)
    times = torch.linspace(0, cell.horizon, 8)
    expected = odeint(reference_derivative(cell, drive, tau), h, times, method="euler")[-1]
    assert (cell(x, embedding, h) - expected).abs().max() < 1e-10


@pytest.mark.parametrize("solver", STEP_FRACTION)
def test_each_scheme_is_of_first_order(solver):
    cell = make_cell(solver=solver)
    x, embedding, h = make_inputs()
    drive, tau = cell.drive_and_tau(x, embedding)
    times = torch.tensor([0, cell.horizon])
    exact = odeint(reference_derivative(cell, drive, tau), h, times, method="dopri5", rtol=1e-12, atol=1e-12)[-1]
    steps = [64, 128, 256]
    errors = [(cell.integrate(h, drive, tau, num_steps=n) - exact).norm().item() for n in steps]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("solver, rate", [("midpoint", 2), ("rk4", 4)])
def test_torchdiffeq_solvers_have_their_order_on_the_cell(solver, rate):
    cell = make_cell(solver=solver)
    x, embedding, h = make_inputs()
    drive, tau = cell.drive_and_tau(x, embedding)
    times = torch.tensor([0, cell.horizon])
    exact = odeint(reference_derivative(cell, drive, tau), h, times, method="dopri5", rtol=1e-13, atol=1e-13)[-1]
    errors = [(cell.integrate(h, drive, tau, num_steps=n) - exact).norm().item() for n in (8, 16)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(rate, abs=0.4)


def test_exponential_without_recurrence_is_the_closed_form():
    cell = make_cell(solver="exponential", num_steps=3)
    torch.nn.init.zeros_(cell.recurrent.weight)
    x, embedding, h = make_inputs()
    drive, tau = cell.drive_and_tau(x, embedding)
    expected = torch.tanh(drive) + (h - torch.tanh(drive)) * torch.exp(-cell.horizon / tau)
    assert (cell(x, embedding, h) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("solver", ["semi-implicit", "exponential"])
def test_state_is_bounded_for_any_weights_and_horizon(solver):
    cell = make_cell(solver=solver, horizon=1e4)
    torch.nn.init.normal_(cell.recurrent.weight, std=1e3)
    torch.nn.init.normal_(cell.input.pointwise.weight, std=1e3)
    x, embedding, _ = make_inputs()
    h = torch.rand(2, 4, 6, 6) * 2 - 1
    assert cell(x, embedding, h).abs().max() <= 1


def test_euler_is_bounded_up_to_steps_of_tau_and_not_beyond():
    cell = make_cell(solver="euler")
    torch.nn.init.normal_(cell.recurrent.weight, std=1e3)
    drive = torch.randn(2, 4, 6, 6)
    h = torch.rand(2, 4, 6, 6) * 2 - 1
    tau = torch.ones_like(drive)
    assert cell.integrate(h, drive, tau, horizon=50.0, num_steps=50).abs().max() <= 1
    assert cell.integrate(h, drive, tau, horizon=125.0, num_steps=50).abs().max() > 1e3


@pytest.mark.parametrize("horizon_over_steps, name", [(2 / 3, "global"), (2 / 5, "local"), (2 / 7, "detail")])
def test_default_step_is_at_most_tau(horizon_over_steps, name):
    assert horizon_over_steps <= TAU_RANGE[name][0]


@pytest.mark.parametrize("activation", ["tanh", "silu"])
@pytest.mark.parametrize("solver", STEP_FRACTION)
def test_gradients(solver, activation):
    cell = make_cell(solver=solver, num_steps=3, activation=activation)
    x, embedding, h = make_inputs(size=3)
    names, parameters = zip(*cell.named_parameters(), strict=True)

    def call(x, h, *parameters):
        return torch.func.functional_call(cell, dict(zip(names, parameters, strict=True)), (x, embedding, h))

    inputs = [v.detach().clone().requires_grad_() for v in (x, h, *parameters)]
    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("scale", [1.0, 10.0, 1e3])
def test_tau_stays_in_its_bounds_and_depends_on_the_input(scale):
    cell = make_cell()
    x, embedding, _ = make_inputs()
    _, tau = cell.drive_and_tau(scale * x, scale * embedding)
    assert tau.min() >= 0.5 and tau.max() <= 4.0
    assert tau.std() > 0.1


def test_tau_has_a_gradient_at_both_bounds():
    cell = make_cell()
    x, embedding, _ = make_inputs()
    embedding = (30 * embedding).requires_grad_()
    _, tau = cell.drive_and_tau(x, embedding)
    assert tau.min() < 0.51 and tau.max() > 3.99
    (gradient,) = torch.autograd.grad(tau.sum(), embedding)
    assert (gradient != 0).all()


def test_no_state_is_a_state_of_zeros():
    model = make_model()
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 200])
    zeros = tuple(torch.zeros(2, c, 16 // s, 16 // s) for c, s in ((24, 4), (24, 2), (32, 1)))
    output, state = model(x, t, None, return_state=True)
    output_from_zeros, state_from_zeros = model(x, t, zeros, return_state=True)
    assert torch.equal(output, output_from_zeros)
    assert [h.shape for h in state] == [h.shape for h in zeros]
    assert all(torch.equal(a, b) for a, b in zip(state, state_from_zeros, strict=True))


def test_a_carried_state_changes_the_output():
    model = make_model()
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([50])
    output, state = model(x, t, return_state=True)
    assert (model(x, t, state) - output).abs().max() > 1e-3


@pytest.mark.parametrize("solver", STEP_FRACTION)
def test_two_halves_are_the_whole(solver):
    cell = make_cell(solver=solver)
    x, embedding, h = make_inputs()
    drive, tau = cell.drive_and_tau(x, embedding)
    whole = cell.integrate(h, drive, tau, horizon=2.0, num_steps=6)
    half = cell.integrate(h, drive, tau, horizon=1.0, num_steps=3)
    assert (cell.integrate(half, drive, tau, horizon=1.0, num_steps=3) - whole).abs().max() < 1e-14


def test_one_pixel_acts_near_and_through_the_slow_cells_far():
    model = make_model()
    x, t = torch.randn(1, 3, 96, 96), torch.tensor([100])
    # the normalisation couples all pixels by their mean and deviation; without it what is left is the coupling we test
    for cell in model.processor.cells.values():
        cell.input.norm = torch.nn.Identity()
    touched = x.clone()
    touched[0, :, 48, 48] += 1
    change = (model(touched, t) - model(x, t)).abs().amax(1)[0]
    reach_of_detail_cell = 1 + 2 + 6 + 1  # stem, W_in, six recurrent convolutions, head
    assert change[48, 48] > 1e-2
    assert change[48, 48 + reach_of_detail_cell + 4] > 1e-9
    assert change[48, 48] > 10 * change[48, 48 + reach_of_detail_cell]
    assert change[0, 0] == 0


def test_tau_and_the_steps_do_work():
    model = make_model()
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([100])
    output = model(x, t)
    one_step = make_model(ode_steps=(1, 1, 1))
    one_step.load_state_dict(model.state_dict())
    assert (one_step(x, t) - output).abs().max() > 1e-2
    for cell in model.processor.cells.values():  # the tau rows' weights at zero: tau no longer depends on x and t
        half = cell.input.pointwise.out_channels // 2
        torch.nn.init.zeros_(cell.input.pointwise.weight[half:])
        torch.nn.init.zeros_(cell.time.weight[half:])
    assert (model(x, t) - output).abs().max() > 1e-2


@pytest.mark.parametrize("solver", SOLVERS)
def test_more_steps_of_any_solver_meet_the_same_solution(solver):
    model = make_model()
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([100])
    model.set_solver("dopri5", None)
    expected = model(x, t)
    model.set_solver(solver, (400, 400, 400))
    assert (model(x, t) - expected).abs().max() < 5e-2 * expected.abs().max()


def test_upsampling_and_its_gradient_are_torchs():
    x, weight = torch.randn(2, 3, 4, 6, requires_grad=True), torch.randn(2, 3, 8, 12)
    ours, torchs = upsample(x), interpolate(x, scale_factor=2, mode="nearest")
    assert torch.equal(ours, torchs)
    gradients = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (ours, torchs)]
    torch.testing.assert_close(*gradients)


def test_parameter_budget():
    assert 38_000 <= count_parameters(TrueLiquidDiffusionModel()) <= 38_999
    assert 38_000 <= count_parameters(TrueLiquidDiffusionModel(num_classes=10)) <= 38_999


@pytest.mark.parametrize("channels, height, width", [(1, 8, 8), (3, 32, 32), (4, 28, 20)])
def test_any_channels_and_any_size_that_4_divides(channels, height, width):
    model = make_model(in_channels=channels)
    assert model(torch.randn(2, channels, height, width), torch.tensor([0, 399])).shape == (2, channels, height, width)


def test_classes_change_the_output_and_none_is_the_class_behind_the_last():
    model = make_model(num_classes=3)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([10, 10])
    outputs = [model(x, t, labels=torch.full((2,), c)) for c in range(4)]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3
    assert torch.equal(outputs[3], model(x, t))


@pytest.mark.parametrize(
    "options, word",
    [
        ({"solver": "newton"}, "newton"),
        ({"num_steps": 0}, "0"),
        ({"tau_range": (1.0, 0.5)}, "tau"),
        ({"activation": "relu"}, "relu"),
    ],
)
def test_bad_settings_are_named(options, word):
    with pytest.raises(ValueError, match=word):
        make_cell(**options)


def test_a_side_that_4_does_not_divide_is_named():
    with pytest.raises(ValueError, match="30x32"):
        TrueLiquidDiffusionModel()(torch.randn(1, 3, 30, 32), torch.tensor([0]))


def test_the_model_can_be_exported():
    model = make_model(channels=(4, 4, 4)).eval()
    inputs = torch.randn(2, 3, 8, 8), torch.tensor([10, 300])
    exported = torch.export.export(model, inputs).module()
    torch.testing.assert_close(exported(*inputs), model(*inputs))


def test_other_steps_of_the_same_weights_leave_the_model_as_it_is():
    model = TrueLiquidDiffusionModel().eval()
    coarse = model.with_steps((1, 2, 3))
    assert coarse.current_steps() == (1, 2, 3) and model.current_steps() == (3, 5, 7)
    assert all(a is b for a, b in zip(model.parameters(), coarse.parameters(), strict=True))
    with torch.no_grad():
        model.head.weight.normal_()  # the other one's, too
        x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 70])
        there = coarse(x, t)
        assert not torch.allclose(model(x, t), there)
        model.set_solver(ode_steps=(1, 2, 3))
        assert torch.equal(model(x, t), there)
