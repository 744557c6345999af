"""A 3x3 convolution on CPUs in fp32 by Winograd's method (convolution.cpp), where that is faster than torch's."""

import torch
from torch import Tensor, nn

from kernels.native import FP32, call, empty_pixels, laid_out, operator, pixels, ready


class Conv3x3(nn.Conv2d):
    """`nn.Conv2d(inputs, outputs, 3, padding=1)`, computed by our library where that is faster.

    forward(x (B, inputs, H, W)) -> (B, outputs, H, W). Weights, their names and their first values are those of Conv2d.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True):
        super().__init__(inputs, outputs, 3, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if pays(self, x):
            return _convolution(x, self.weight, self.bias)
        return super().forward(x)


def use_kernel(model: nn.Module) -> None:
    """Turn every layer of a model that `Conv3x3` can stand for into one, with the same weights."""
    for layer in model.modules():
        if type(layer) is nn.Conv2d and layer.padding_mode == "zeros":
            shape = layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups
            if shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1):
                layer.__class__ = Conv3x3


def pays(layer: nn.Conv2d, x: Tensor) -> bool:
    """Whether our library computes this layer for x (B, C, H, W), and faster than torch does (measured: LOG.md).

    It is not faster for images with three channels, nor where the weights outweigh the pixels.
    """
    possible = ready(FP32, x) and not torch.is_autocast_enabled("cpu")
    return possible and layer.in_channels >= 8 and x.shape[0] * x.shape[2] * x.shape[3] >= layer.in_channels


def _result(x, weight, bias):
    return empty_pixels((len(x), len(weight), *x.shape[2:]), x)


@operator("convolution(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _result)
def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    result = _result(x, weight, bias)
    numbers = (len(x), x.shape[1], len(weight), *x.shape[2:], False)
    call(FP32, "convolution", *numbers, pixels(x), weight.contiguous(), bias, result)
    return result


def _gradients(gradient, x, weight, of_input):
    return empty_pixels(x.shape, x) if of_input else x.new_empty(0), weight.new_empty(weight.shape)


@operator(
    "convolution_backward(Tensor gradient, Tensor x, Tensor weight, bool of_input) -> (Tensor, Tensor)", _gradients
)
def _convolution_backward(gradient: Tensor, x: Tensor, weight: Tensor, of_input: bool) -> tuple[Tensor, Tensor]:
    """The gradients of x (empty unless `of_input`) and of the weight."""
    of_x, of_weight = _gradients(gradient, x, weight, of_input)
    gradient, weight = pixels(gradient), weight.contiguous()
    outputs, inputs = weight.shape[:2]
    sides = x.shape[2:]
    if of_input:
        call(FP32, "convolution", len(x), outputs, inputs, *sides, True, gradient, weight, None, of_x)
    call(FP32, "convolution_weight_gradient", len(x), inputs, outputs, *sides, pixels(x), gradient, of_weight)
    return of_x, of_weight


def _keep(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
    of_input, _, of_bias = ctx.needs_input_grad
    x, weight = ctx.saved_tensors
    of_x, of_weight = _convolution_backward(gradient, x, weight, of_input)
    return of_x if of_input else None, laid_out(of_weight, weight), gradient.sum((0, 2, 3)) if of_bias else None


_convolution.differentiate(_keep, _backward)
