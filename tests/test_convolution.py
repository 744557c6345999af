"""The 3x3 convolution of our own library against torch's in double precision, and where it stands in the networks."""

import pytest
import torch
import torch.nn.functional as F
from conftest import largest_error
from torch import nn

from baselines import UNetReference
from kernels import convolution, native
from kernels.convolution import Conv3x3
from lab.benchmark.kernels import threads
from liquid_diffusion_inspired import InspiredDiffusionModel

needs_compiler = pytest.mark.skipif(not native.available(native.FP32), reason="no C++ compiler")
SHAPES = [(2, 3, 32, 32, 32), (3, 32, 3, 32, 32), (2, 16, 24, 9, 13), (1, 1, 1, 1, 1), (2, 5, 70, 4, 7)]
SHAPES += [(9, 24, 24, 8, 8), (1, 130, 66, 12, 4)]


def tensors(images, inputs, outputs, height, width):
    random = torch.Generator().manual_seed(0)
    shapes = ((images, inputs, height, width), (outputs, inputs, 3, 3), (outputs,), (images, outputs, height, width))
    return [torch.randn(shape, generator=random) for shape in shapes]


def outcome(function, x, weight, bias, gradient):
    leaves = [value.clone().requires_grad_() for value in (x, weight, bias)]
    output = function(*leaves)
    output.backward(gradient)
    return [output.detach(), *(leaf.grad for leaf in leaves)]


@needs_compiler
@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_those_of_double_precision(shape, number):
    values = tensors(*shape)
    exact = outcome(lambda x, w, b: F.conv2d(x, w, b, padding=1), *(value.double() for value in values))
    with threads(number):
        found, again = (outcome(torch.ops.liquid.convolution, *values) for _ in range(2))
    for one, same, other in zip(found, again, exact, strict=True):
        assert torch.equal(one, same)
        assert largest_error(one, other) < 2e-5


@needs_compiler
def test_operator_keeps_torchs_contract():
    x, weight, bias, _ = (value.requires_grad_() for value in tensors(2, 5, 9, 6, 7))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.liquid.convolution.default, (x, weight, bias), test_utils=checks)
    torch.library.opcheck(torch.ops.liquid.convolution.default, (x, weight, None), test_utils=checks)


@needs_compiler
@pytest.mark.parametrize("model", [InspiredDiffusionModel, UNetReference])
def test_the_baselines_have_it_too(monkeypatch, model):
    """Whatever the true model gains by our own convolution, they may gain by the same."""
    monkeypatch.setattr(convolution, "pays", lambda layer, x: True)
    torch.manual_seed(0)
    network = model(channels=(8, 8) if model is UNetReference else (8, 8, 8))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    x, t = torch.randn(2, 3, 16, 16), torch.arange(2)
    found = network(x, t)
    with native.plain_torch():
        monkeypatch.setattr(convolution, "pays", lambda layer, x: False)
        by_torch = network(x, t)
        exact = network.double()(x.double(), t)
    assert not torch.equal(found, by_torch)
    assert (found - exact).norm() < 1e-5 * exact.norm()


def test_other_layers_and_other_numbers_are_torchs():
    layer = Conv3x3(8, 8)
    with torch.no_grad():
        assert torch.equal(layer.double()(torch.ones(1, 8, 4, 4).double()), F.conv2d(
            torch.ones(1, 8, 4, 4).double(), layer.weight, layer.bias, padding=1))  # fmt: skip
        with torch.autocast("cpu", torch.bfloat16):
            assert layer.float()(torch.ones(1, 8, 4, 4)).dtype == torch.bfloat16
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    convolution.use_kernel(model)
    assert [type(layer) for layer in model] == [nn.Conv2d, nn.Conv2d, Conv3x3]
