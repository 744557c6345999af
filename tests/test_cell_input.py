"""The compiled input of a cell, `W_in`, against the same layers of torch in double precision."""

import pytest
import torch
from conftest import largest_error

from kernels import cell_input, native
from lab.benchmark.kernels import threads
from liquid_diffusion import InputConv

needs_compiler = pytest.mark.skipif(not native.available(native.FP32), reason="no C++ compiler")


@needs_compiler
@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("side", cell_input.SIDES)
@pytest.mark.parametrize(
    "shape, outputs",
    [((2, 56, 32, 32), 64), ((3, 24, 8, 8), 48), ((1, 5, 9, 3), 7), ((2, 1, 3, 2), 2), ((3, 33, 5, 31), 10)],
)
def test_input_is_that_of_double_precision(shape, outputs, side, number):
    torch.manual_seed(0)
    layer = InputConv(shape[1], outputs, side)
    x, gradient = 3 * torch.randn(shape) + 5, torch.randn(shape[0], outputs, *shape[2:])

    def outcome(layer, x, gradient):
        layer.zero_grad()
        x = x.clone().requires_grad_()
        output = layer(x)
        output.backward(gradient)
        return [output.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]

    with threads(number):
        found, again = outcome(layer, x, gradient), outcome(layer, x, gradient)
    exact = outcome(layer.double(), x.double(), gradient.double())
    for one, same, other in zip(found, again, exact, strict=True):
        assert torch.equal(one, same)
        assert largest_error(one, other) < 2e-5


@needs_compiler
def test_under_autocast_the_input_is_computed_in_fp32_and_given_as_autocast_would():
    torch.manual_seed(0)
    layer, x = InputConv(5, 7, 5), torch.randn(2, 5, 8, 8)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        found, narrow = layer(x), layer(x.bfloat16())
        with native.plain_torch():
            expected = layer(x)
    assert found.dtype == narrow.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(found, exact.bfloat16())  # torch rounds between the three as well
    assert not torch.equal(found, expected) and largest_error(expected, exact) < 0.02
    narrow.sum().backward()
    assert layer.depthwise.weight.grad.dtype == torch.float32
    assert not cell_input.fits(x.bfloat16(), layer.bfloat16().depthwise)


@needs_compiler
def test_input_operator_keeps_torchs_contract():
    tensors = [
        torch.randn(shape, requires_grad=True) for shape in ((2, 5, 6, 7), (5, 1, 3, 3), (5,), (9, 5, 1, 1), (9,))
    ]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.liquid.input_conv.default, (*tensors, 1e-5), test_utils=checks)
