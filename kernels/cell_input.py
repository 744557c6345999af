"""The input of a liquid cell as one call of C++, on CPUs: normalisation, depthwise and pointwise convolution.

    if fits(x, depthwise):
        features = input_conv(x, depthwise, pointwise, eps)

`liquid_diffusion.InputConv` does the same in torch. Here nothing goes to memory between the three (input.cpp). All is
computed in fp32, under autocast, too: torch takes longer for a large depthwise kernel in bf16.
"""

import torch
from torch import Tensor, nn

from kernels.native import FP32, call, empty_pixels, laid_out, operator, pixels, ready

SIDES = (3, 5)  # of the depthwise kernel
LAYERS = "Tensor depth_weight, Tensor depth_bias, Tensor point_weight"


def fits(x: Tensor, depthwise: nn.Conv2d) -> bool:
    """Whether `input_conv` can compute with x (B, C, H, W) here."""
    known = depthwise.kernel_size[0] in SIDES and depthwise.weight.dtype == torch.float32
    return known and x.dtype in (torch.float32, torch.bfloat16) and ready(FP32, x, x.dtype)


def input_conv(x: Tensor, depthwise: nn.Conv2d, pointwise: nn.Conv2d, eps: float) -> Tensor:
    """pointwise(depthwise(n)), where n is x (B, C, H, W) normalised over each image: (B, D, H, W).

    depthwise: a convolution of each channel by itself, its kernel as wide as one of SIDES. pointwise: a 1x1
    convolution. Both have a bias. The result has autocast's type.
    """
    layers = (depthwise.weight, depthwise.bias, pointwise.weight, pointwise.bias)
    features = _input_conv(x.float(), *layers, eps)[0]
    return features.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else features


def _features(x, depth_weight, depth_bias, point_weight, *_):
    return empty_pixels((len(x), len(point_weight), *x.shape[2:]), x), x.new_empty(len(x), 2)


@operator(f"input_conv(Tensor x, {LAYERS}, Tensor point_bias, float eps) -> (Tensor, Tensor)", _features)
def _input_conv(x, depth_weight, depth_bias, point_weight, point_bias, eps):
    """The features, and of each image the mean and 1 / standard deviation."""
    features, means = _features(x, depth_weight, depth_bias, point_weight)
    layers = (w.contiguous() for w in (depth_weight, depth_bias, point_weight, point_bias))
    call(FP32, "input_forward", *_numbers(x, features, depth_weight), float(eps), pixels(x), *layers, features, means)
    return features, means


def _gradients(gradient, x, means, depth_weight, depth_bias, point_weight):
    layers = [w.new_empty(w.shape) for w in (depth_weight, depth_bias, point_weight)]
    return empty_pixels(x.shape, x), *layers, x.new_empty(len(point_weight))


@operator(
    f"input_conv_backward(Tensor gradient, Tensor x, Tensor means, {LAYERS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _gradients,
)
def _input_conv_backward(gradient, x, means, depth_weight, depth_bias, point_weight):
    """The gradients of x, of the depthwise convolution's weight and bias, and of the pointwise one's."""
    gradients = _gradients(gradient, x, means, depth_weight, depth_bias, point_weight)
    layers = (w.contiguous() for w in (depth_weight, depth_bias, point_weight))
    sizes = _numbers(x, gradient, depth_weight)
    call(FP32, "input_backward", *sizes, pixels(gradient), pixels(x), means, *layers, *gradients)
    return gradients


def _keep(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], output[1], *inputs[1:4])


def _backward(ctx, gradient: Tensor, _) -> tuple:
    _, _, depth_weight, _, point_weight = ctx.saved_tensors
    of_x, of_depth, of_bias, of_point, of_point_bias = _input_conv_backward(gradient, *ctx.saved_tensors)
    return of_x, laid_out(of_depth, depth_weight), of_bias, laid_out(of_point, point_weight), of_point_bias, None


_input_conv.differentiate(_keep, _backward)


def _numbers(x: Tensor, features: Tensor, depth_weight: Tensor) -> list[int]:
    """The sizes: images, inputs, outputs, side of the depthwise kernel, height, width."""
    return [len(x), x.shape[1], features.shape[1], depth_weight.shape[-1], *x.shape[2:]]
