"""The convolutions and kernel calls that `benchmark.py` times by themselves are those of the models."""

from collections import Counter
from unittest import mock

import pytest
import torch
from conftest import BF16_FLAGS
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kernels import convolution, native
from kernels.convolution import Conv3x3
from lab.benchmark import kernels, sections
from lab.benchmark.convolutions import Convolution, convolutions, seconds_alone
from models import build_model

needs_compiler = pytest.mark.skipif(not native.available(native.FP32), reason="no C++ compiler")


class Net(nn.Module):
    """A stem, a recurrent convolution called three times, and a strided depthwise one."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.recurrent = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.down = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4)

    def forward(self, x, t):
        h = self.stem(x)
        for _ in range(3):
            h = self.recurrent(h)
        return self.down(h)


def by_hand(channels, batch, side, *, groups=1, stride=1, bias=True, input_gradient=True):
    c_in, c_out = channels
    options = ((stride, stride), (1, 1), (1, 1), False, (0, 0), groups)
    shapes = (batch, c_in, side, side), (c_out, c_in // groups, 3, 3), (batch, c_out, side // stride, side // stride)
    return Convolution(*shapes, bias, options, input_gradient)


def test_the_convolutions_of_a_small_network_are_those_counted_by_hand():
    assert convolutions(Net(), (3, 8, 8), batch_size=5) == Counter(
        {
            by_hand((3, 4), 5, 8, input_gradient=False): 1,
            by_hand((4, 4), 5, 8, bias=False): 3,
            by_hand((4, 4), 5, 8, groups=4, stride=2): 1,
        }
    )


def test_work_and_bytes_of_one_convolution_by_hand():
    c = by_hand((3, 4), 2, 8, input_gradient=False)
    assert c.multiply_adds == 2 * 4 * 8 * 8 * 3 * 9
    assert c.training_multiply_adds == 2 * c.multiply_adds
    x, w, y = 2 * 3 * 64, 4 * 3 * 9, 2 * 4 * 64
    assert c.training_bytes("fp32") == 4 * 2 * (x + w + y)
    assert by_hand((3, 4), 2, 8).training_bytes("bf16") == 2 * 3 * (x + w + y)


@pytest.mark.parametrize("arm", ["true", "inspired", "unet:38k"])
def test_the_convolutions_of_a_model_are_all_of_its_convolutions(arm):
    model = build_model(sections.ARMS[arm][0])
    with FlopCounterMode(display=False) as counter, torch.no_grad(), native.plain_torch():
        model(torch.zeros(4, 3, 16, 16), torch.zeros(4, dtype=torch.long))
    flops = counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
    counts = convolutions(model, (3, 16, 16), batch_size=4)
    assert 2 * sum(count * c.multiply_adds for c, count in counts.items()) == flops
    assert sum(count for c, count in counts.items() if not c.input_gradient) == 1  # the stem's


def test_every_ode_step_but_the_first_from_zeros_is_a_recurrent_convolution():
    counts = convolutions(build_model("true", ode_steps=(2, 4, 9)), (3, 32, 32), batch_size=1)
    recurrent = {c.input[-1]: n for c, n in counts.items() if not c.bias}
    assert recurrent == {8: 1, 16: 3, 32: 8}


def test_the_time_alone_is_the_sum_over_calls_of_what_is_best_for_each(monkeypatch):
    """Passes that take 1 s, but 0.5 s in one form; a clock that nobody waits for."""
    times = {"forward": 1.0, "backward": 1.0}

    def in_turn(calls, device, seconds):
        return {name: [0.5 if name[:2] == ("bf16", "contiguous") else times[name[2]]] for name in calls}

    monkeypatch.setattr("lab.benchmark.convolutions.in_turn", in_turn)
    monkeypatch.setattr("runtime.hardware.cpu_flags", lambda: BF16_FLAGS)
    alone, rows = seconds_alone(convolutions(Net(), (3, 8, 8), 2), torch.device("cpu"), seconds=0.1)
    assert alone == pytest.approx(5 * (0.5 + 0.5))  # five calls per step
    assert [row["calls_a_step"] for row in rows] == [1, 3, 1]
    assert {row["best"] for row in rows} == {"bf16 contiguous"}
    assert len(rows[0]["seconds"]) == 2 * 2 * 2


@needs_compiler
@pytest.mark.parametrize("name, steps", [("detail", 7), ("local", 5), ("global", 3)])
def test_what_is_timed_of_a_cell_is_the_cell_and_the_convolutions_that_the_model_calls(name, steps):
    model = kernels.true_model()
    cell, shape = model.processor.cells[name], kernels.input_shapes(model, 16)[name]
    embedding = torch.randn(2, cell.time.in_features)
    (x,) = kernels.randoms((2, *shape))  # raises nothing: the cell reads this shape
    with torch.no_grad(), native.plain_torch():
        expected, features, offset = cell(x, embedding), cell.input(x), cell.time(embedding)
        for function in (kernels.Steps(cell), kernels.KernelSteps(cell)):
            torch.testing.assert_close(function(features, offset), expected, rtol=1e-4, atol=1e-5)
    (recurrent, times), *_ = [
        (c, n) for c, n in convolutions(model, (3, 16, 16), 2).items() if not c.bias and c.input[2:] == shape[1:]
    ]
    assert times == steps - 1
    seen = []
    with mock.patch.object(kernels, "convolution_passes", lambda *found: seen.append(found) or {}):
        assert set(kernels.cell_calls(model, name, shape, 2, compile=False)) == {"torch", "ours"}
    assert seen == [(recurrent, times)]


@needs_compiler
def test_both_timed_forms_of_a_convolution_are_called_as_often_as_it_says():
    counter = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            counter[function] += 1
            return function(*args, **(kwargs or {}))

    found = kernels.convolution_passes(by_hand((8, 16), 2, 4), 3)
    for who, (forward, backward) in {
        "torch": (torch.ops.aten.convolution, torch.ops.aten.convolution_backward),
        "ours": (torch.ops.liquid.convolution, torch.ops.liquid.convolution_backward),
    }.items():
        for part, backwards in (("forward", 0), ("training", 3)):
            counter.clear()
            with Count():
                found[who][part]()
            assert (counter[forward.default], counter[backward.default]) == (3, backwards)


@needs_compiler
def test_the_gradients_that_are_timed_are_those_of_all_inputs_and_weights():
    cell = kernels.true_model().processor.detail_cell
    inputs = kernels.randoms((2, 64, 8, 8), (2, 64))
    ours, by_torch = (
        kernels.both_passes(steps(cell), inputs, [cell.recurrent.weight], torch.ones(2, 32, 8, 8))
        for steps in (kernels.KernelSteps, kernels.Steps)
    )
    assert not ours["forward"]().requires_grad
    assert len(ours["training"]()) == 3
    for one, other in zip(ours["training"](), by_torch["training"](), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())


@needs_compiler
@pytest.mark.parametrize("arm", ["inspired", "unet:38k", "unet:150k"])
def test_the_convolutions_timed_for_an_arm_are_those_that_reach_our_kernel(arm):
    name, own = sections.ARMS[arm]
    model, reached = build_model(name, **own), Counter()

    def keep(layer, inputs, output):
        if convolution.pays(layer, inputs[0]):
            reached[inputs[0].shape[1:], output.shape[1:]] += 1

    for layer in model.modules():
        if isinstance(layer, Conv3x3):
            layer.register_forward_hook(keep)
    with torch.no_grad():
        model(torch.zeros(1, 3, 16, 16), torch.zeros(1, dtype=torch.long))
    found = Counter()
    for c, count in kernels.our_convolutions(arm, 16, 4).items():
        assert c.input[0] == 4
        found[c.input[1:], c.output[1:]] += count
    assert found == reached and reached.total() > 3


@needs_compiler
def test_the_largest_errors_are_small_and_those_of_another_result_large():
    errors = kernels.largest_errors(8, 2)
    assert list(errors) == ["global", "local", "detail"]
    found = [value for both in errors.values() for part in both.values() for value in part.values()]
    assert len(found) == 3 * 2 * 4 and min(found) > 0 and max(found) < 1e-4
    with mock.patch.object(kernels.KernelSteps, "forward", lambda self, features, offset: (
            1.5 * kernels.Steps.forward(self, features, offset))):  # fmt: skip
        wrong = kernels.largest_errors(8, 2)["local"]
    assert wrong["ours"] == pytest.approx(dict.fromkeys(wrong["ours"], 0.5), rel=1e-3)
    assert max(wrong["torch"].values()) < 1e-4


def test_the_number_of_threads_is_given_back():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), kernels.threads(before + 1):
        assert torch.get_num_threads() == before + 1
        1 / 0  # noqa: B018
    assert torch.get_num_threads() == before
