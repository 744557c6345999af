"""A liquid cell in C++: its input, and all of its ODE steps as one call, on CPUs.

    if fits_input(x):
        features = input_conv(x, depthwise, pointwise, eps)
    if fits(features):
        h = integrate(h, features, offset, weight, num_steps, "euler", dt, tau_range)

`InputConv` and `RealLiquidCell` do the same in torch, for every device and precision. Here an image's state stays in
the cache from the first step to the last, while torch writes and reads it several times per step; and what the steps
have in common, their weights, is prepared once. In fp32 the convolutions are Winograd's, on every processor (cell.cpp);
in bf16 they run on the matrix unit of those that have one (amx_cell.cpp: Intel AMX).
"""

import torch
from torch import Tensor, nn

from kernels.native import AMX, FP32, call, empty_pixels, lanes, pixels, ready

MOST_CHANNELS = {torch.float32: 64, torch.bfloat16: 32}  # the AMX kernel has room for no more
SOLVERS = ("euler", "semi-implicit", "exponential")  # in the order of the kernels' schemes
TENSORS = "Tensor? h, Tensor features, Tensor offset, Tensor weight"
CELL = "int num_steps, str solver, float dt, float tau_min, float tau_max"


def fits(features: Tensor) -> bool:
    """Whether a kernel can integrate a cell with these features (B, 2C, H, W) here."""
    library = AMX if features.dtype == torch.bfloat16 else FP32
    return ready(library, features, features.dtype) and features.shape[1] <= 2 * MOST_CHANNELS.get(features.dtype, 0)


def fits_input(x: Tensor) -> bool:
    """Whether `input_conv` can compute with x (B, C, H, W) here."""
    return ready(FP32, x) and not torch.is_autocast_enabled("cpu")


def integrate(
    h: Tensor | None,
    features: Tensor,
    offset: Tensor,
    weight: Tensor,
    num_steps: int,
    solver: str,
    dt: float,
    tau_range: tuple[float, float],
) -> Tensor:
    """The state after `num_steps` steps h <- h + g(dt / tau) (silu(W_rec * h + drive) - h) from h; None means zeros.

    g belongs to the solver (liquid_diffusion.STEP_FRACTION). h (B, C, H, W), the result and features (B, 2C, H, W) are
    fp32, or all bf16; then products are computed in bf16, and sums in fp32. features plus offset (B, 2C) give the drive
    and the logit of tau = tau_min + (tau_max - tau_min) sigmoid(logit). weight is W_rec, (C, C, 3, 3).
    """
    if features.dtype == torch.bfloat16:
        return torch.ops.liquid.integrate_amx(h, features, offset, weight, num_steps, solver, dt, *tau_range)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (h, features, offset, weight))
    return torch.ops.liquid.integrate(h, features, offset, weight, num_steps, solver, dt, *tau_range, keep)[0]


# --- fp32 ------------------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "liquid::integrate",
    mutates_args=(),
    device_types="cpu",
    schema=f"({TENSORS}, {CELL}, bool keep) -> (Tensor, Tensor[])",
)
def _integrate(h, features, offset, weight, *cell):
    """The state, and for the backward pass, if `keep`, W_rec * h + drive of each step that has a convolution."""
    output, kept = _state_and_kept(h, features, offset, weight, *cell)
    z = [None] * (h is None) + kept if kept else None
    tensors = (None if h is None else pixels(h), pixels(features), offset.contiguous(), weight.contiguous())
    call(FP32, "cell_forward", *_numbers(output, cell), *tensors, output, z)
    return output, kept


def _state_and_kept(h, features, offset, weight, num_steps, solver, dt, tau_min, tau_max, keep):
    batch, channels, *sides = features.shape
    wide = -(-channels // 2 // lanes()) * lanes()
    kept = [features.new_empty(batch, *sides, wide) for _ in range(num_steps - (h is None))] if keep else []
    return empty_pixels((batch, channels // 2, *sides), features), kept


_integrate.register_fake(_state_and_kept)


@torch.library.custom_op(
    "liquid::integrate_backward",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor gradient, {TENSORS}, Tensor[] kept, {CELL}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _integrate_backward(gradient, h, features, offset, weight, kept, *cell):
    """The gradients of h (empty if h is None), features, offset and weight."""
    gradients = _gradients(gradient, h, features, offset, weight)
    z = [None] * (h is None) + kept
    tensors = (None if h is None else pixels(h), pixels(features), offset.contiguous(), weight.contiguous())
    of_h, *others = gradients
    call(
        FP32,
        "cell_backward",
        *_numbers(gradient, cell),
        pixels(gradient),
        *tensors,
        z,
        None if h is None else of_h,
        *others,
    )
    return gradients


@_integrate_backward.register_fake
def _gradients(_, h, features, offset, weight, *__):
    of_h = features.new_empty(0) if h is None else empty_pixels(h.shape, h)
    return of_h, empty_pixels(features.shape, features), offset.new_empty(offset.shape), weight.new_empty(weight.shape)


def _keep(ctx, inputs: tuple, output: tuple[Tensor, list[Tensor]]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4], *output[1])
    ctx.cell = inputs[4:-1]


def _backward(ctx, gradient: Tensor, _) -> tuple:
    h, features, offset, weight, *kept = ctx.saved_tensors
    of_h, *others = torch.ops.liquid.integrate_backward(gradient, h, features, offset, weight, kept, *ctx.cell)
    return None if h is None else of_h, *others, *(None for _ in ctx.cell), None


_integrate.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("liquid::input_conv", mutates_args=(), device_types="cpu")
def _input_conv(
    x: Tensor, depth_weight: Tensor, depth_bias: Tensor, point_weight: Tensor, point_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The features, and of each image the mean and 1 / standard deviation."""
    features, means = _features(x, depth_weight, depth_bias, point_weight)
    layers = (w.contiguous() for w in (depth_weight, depth_bias, point_weight, point_bias))
    call(FP32, "input_forward", *_input_numbers(x, features), float(eps), pixels(x), *layers, features, means)
    return features, means


@_input_conv.register_fake
def _features(x, depth_weight, depth_bias, point_weight, *_):
    return empty_pixels((len(x), len(point_weight), *x.shape[2:]), x), x.new_empty(len(x), 2)


@torch.library.custom_op("liquid::input_conv_backward", mutates_args=(), device_types="cpu")
def _input_conv_backward(
    gradient: Tensor, x: Tensor, means: Tensor, depth_weight: Tensor, depth_bias: Tensor, point_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, of the depthwise convolution's weight and bias, and of the pointwise one's."""
    gradients = _input_gradients(gradient, x, means, depth_weight, depth_bias, point_weight)
    layers = (w.contiguous() for w in (depth_weight, depth_bias, point_weight))
    call(FP32, "input_backward", *_input_numbers(x, gradient), pixels(gradient), pixels(x), means, *layers, *gradients)
    return gradients


@_input_conv_backward.register_fake
def _input_gradients(gradient, x, means, depth_weight, depth_bias, point_weight):
    layers = [w.new_empty(w.shape) for w in (depth_weight, depth_bias, point_weight)]
    return empty_pixels(x.shape, x), *layers, x.new_empty(len(point_weight))


def _keep_input(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], output[1], *inputs[1:4])


def _input_backward(ctx, gradient: Tensor, _) -> tuple:
    return *torch.ops.liquid.input_conv_backward(gradient, *ctx.saved_tensors), None


_input_conv.register_autograd(_input_backward, setup_context=_keep_input)


def input_conv(x: Tensor, depthwise: nn.Conv2d, pointwise: nn.Conv2d, eps: float) -> Tensor:
    """pointwise(depthwise(n)), where n is x (B, C, H, W) normalised over each image: (B, D, H, W).

    depthwise: a 3x3 convolution of each channel by itself, pointwise: a 1x1 convolution, both with a bias.
    """
    layers = (depthwise.weight, depthwise.bias, pointwise.weight, pointwise.bias)
    return torch.ops.liquid.input_conv(x, *layers, eps)[0]


# --- bf16 on Intel AMX -----------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "liquid::integrate_amx", mutates_args=(), device_types="cpu", schema=f"({TENSORS}, {CELL}) -> Tensor"
)
def _integrate_amx(h, features, offset, weight, *cell):
    output = _state(h, features)
    call(AMX, "amx_cell_forward", *_numbers(output, cell), *_for_amx(h, features, offset, weight), output)
    return output


@_integrate_amx.register_fake
def _state(h, features, *_):
    batch, channels, *sides = features.shape
    return empty_pixels((batch, channels // 2, *sides), features)


@torch.library.custom_op(
    "liquid::integrate_amx_backward",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor gradient, {TENSORS}, {CELL}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _integrate_amx_backward(gradient, h, features, offset, weight, *cell):
    """The gradients of h (empty if h is None), features, offset and weight."""
    of_h, *others = gradients = _amx_gradients(gradient, h, features, offset, weight)
    tensors = [_bf16_pixels(gradient), *_for_amx(h, features, offset, weight), None if h is None else of_h, *others]
    call(AMX, "amx_cell_backward", *_numbers(gradient, cell), *tensors)
    return gradients


@_integrate_amx_backward.register_fake
def _amx_gradients(_, h, features, offset, weight, *__):
    of_h = features.new_empty(0) if h is None else empty_pixels(h.shape, features)
    of_offset = features.new_empty(offset.shape)
    return of_h, empty_pixels(features.shape, features), of_offset, weight.new_empty(weight.shape, dtype=torch.float32)


def _keep_amx(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.cell = inputs[4:]


def _backward_amx(ctx, gradient: Tensor) -> tuple:
    tensors = ctx.saved_tensors
    gradients = torch.ops.liquid.integrate_amx_backward(gradient, *tensors, *ctx.cell)
    of_tensors = [None if x is None else g.to(x.dtype) for x, g in zip(tensors, gradients, strict=True)]
    return *of_tensors, *(None for _ in ctx.cell)


_integrate_amx.register_autograd(_backward_amx, setup_context=_keep_amx)


def _for_amx(h: Tensor | None, features: Tensor, offset: Tensor, weight: Tensor) -> list[Tensor | None]:
    """The four tensors in the formats that the kernel reads."""
    offset, weight = offset.to(torch.bfloat16).contiguous(), weight.float().contiguous()
    return [None if h is None else _bf16_pixels(h), _bf16_pixels(features), offset, weight]


def _bf16_pixels(x: Tensor) -> Tensor:
    return pixels(x.to(torch.bfloat16))


# ---------------------------------------------------------------------------------------------------------------------


def _numbers(state: Tensor, cell: tuple) -> list[int | float]:
    """What both kernels read first; the cell: steps, solver, dt, tau_min, tau_max, and maybe more."""
    num_steps, solver, dt, tau_min, tau_max = cell[:5]
    return [*state.shape, num_steps, SOLVERS.index(solver), float(dt), float(tau_min), float(tau_max)]


def _input_numbers(x: Tensor, features: Tensor) -> list[int]:
    return [len(x), x.shape[1], features.shape[1], *x.shape[2:]]
