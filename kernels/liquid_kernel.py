"""All ODE steps of a liquid cell as one call of C++, on CPUs.

    if fits(features):
        h = integrate(h, features, offset, weight, num_steps, "euler", dt, tau_range)

`RealLiquidCell` does the same in torch, for every device and precision. Here an image's state stays in
the cache from the first step to the last, while torch writes and reads it several times per step; and what the steps
have in common, their weights, is prepared once. In fp32 the convolutions are Winograd's, on every processor (cell.cpp);
in bf16 they run on the matrix unit of those that have one (amx_cell.cpp: Intel AMX).
"""

import torch
from torch import Tensor

from kernels.native import AMX, FP32, call, empty_pixels, laid_out, lanes, operator, pixels, ready

MOST_CHANNELS = {torch.float32: 64, torch.bfloat16: 32}  # the AMX kernel has room for no more
SOLVERS = ("euler", "semi-implicit", "exponential")  # in the order of the kernels' schemes
TENSORS = "Tensor? h, Tensor features, Tensor offset, Tensor weight"
CELL = "int num_steps, str solver, float dt, float tau_min, float tau_max"


def fits(features: Tensor) -> bool:
    """Whether a kernel can integrate a cell with these features (B, 2C, H, W) here."""
    library = AMX if features.dtype == torch.bfloat16 else FP32
    return ready(library, features, features.dtype) and features.shape[1] <= 2 * MOST_CHANNELS.get(features.dtype, 0)


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
        return _integrate_amx(h, features, offset, weight, num_steps, solver, dt, *tau_range)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (h, features, offset, weight))
    return _integrate(h, features, offset, weight, num_steps, solver, dt, *tau_range, keep)[0]


# --- fp32 ------------------------------------------------------------------------------------------------------------


def _state_and_kept(h, features, offset, weight, num_steps, solver, dt, tau_min, tau_max, keep):
    batch, channels, *sides = features.shape
    wide = -(-channels // 2 // lanes()) * lanes()
    kept = [features.new_empty(batch, *sides, wide) for _ in range(num_steps - (h is None))] if keep else []
    return empty_pixels((batch, channels // 2, *sides), features), kept


@operator(f"integrate({TENSORS}, {CELL}, bool keep) -> (Tensor, Tensor[])", _state_and_kept)
def _integrate(h, features, offset, weight, *cell):
    """The state, and for the backward pass, if `keep`, W_rec * h + drive of each step that has a convolution."""
    output, kept = _state_and_kept(h, features, offset, weight, *cell)
    tensors = _for_fp32(h, features, offset, weight)
    call(FP32, "cell_forward", *_numbers(output, cell), *tensors, output, _of_steps(h, kept) if kept else None)
    return output, kept


def _gradients(gradient, h, features, offset, weight, *_):
    of_h = features.new_empty(0) if h is None else empty_pixels(h.shape, h)
    return of_h, empty_pixels(features.shape, features), offset.new_empty(offset.shape), weight.new_empty(weight.shape)


@operator(
    f"integrate_backward(Tensor gradient, {TENSORS}, Tensor[] kept, {CELL}) -> (Tensor, Tensor, Tensor, Tensor)",
    _gradients,
)
def _integrate_backward(gradient, h, features, offset, weight, kept, *cell):
    """The gradients of h (empty if h is None), features, offset and weight."""
    of_h, *others = gradients = _gradients(gradient, h, features, offset, weight)
    read = [pixels(gradient), *_for_fp32(h, features, offset, weight), _of_steps(h, kept)]
    call(FP32, "cell_backward", *_numbers(gradient, cell), *read, None if h is None else of_h, *others)
    return gradients


def _keep(ctx, inputs: tuple, output: tuple[Tensor, list[Tensor]]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4], *output[1])
    ctx.cell = inputs[4:-1]


def _backward(ctx, gradient: Tensor, _) -> tuple:
    h, features, offset, weight, *kept = ctx.saved_tensors
    of_h, *others, of_weight = _integrate_backward(gradient, h, features, offset, weight, kept, *ctx.cell)
    return None if h is None else of_h, *others, laid_out(of_weight, weight), *(None for _ in ctx.cell), None


_integrate.differentiate(_keep, _backward)


def _for_fp32(h: Tensor | None, features: Tensor, offset: Tensor, weight: Tensor) -> list[Tensor | None]:
    """The four tensors in the formats that the kernel reads."""
    return [None if h is None else pixels(h), pixels(features), offset.contiguous(), weight.contiguous()]


def _of_steps(h: Tensor | None, kept: list[Tensor]) -> list[Tensor | None]:
    """What was kept, by step; of a first step from zeros there is nothing."""
    return [None] * (h is None) + kept


# --- bf16 on Intel AMX -----------------------------------------------------------------------------------------------


def _state(h, features, *_):
    batch, channels, *sides = features.shape
    return empty_pixels((batch, channels // 2, *sides), features)


@operator(f"integrate_amx({TENSORS}, {CELL}) -> Tensor", _state)
def _integrate_amx(h, features, offset, weight, *cell):
    output = _state(h, features)
    call(AMX, "amx_cell_forward", *_numbers(output, cell), *_for_amx(h, features, offset, weight), output)
    return output


def _amx_gradients(gradient, h, features, offset, weight, *_):
    of_h = features.new_empty(0) if h is None else empty_pixels(h.shape, features)
    of_offset = features.new_empty(offset.shape)
    return of_h, empty_pixels(features.shape, features), of_offset, weight.new_empty(weight.shape, dtype=torch.float32)


@operator(
    f"integrate_amx_backward(Tensor gradient, {TENSORS}, {CELL}) -> (Tensor, Tensor, Tensor, Tensor)", _amx_gradients
)
def _integrate_amx_backward(gradient, h, features, offset, weight, *cell):
    """The gradients of h (empty if h is None), features, offset and weight."""
    of_h, *others = gradients = _amx_gradients(gradient, h, features, offset, weight)
    read = [_bf16_pixels(gradient), *_for_amx(h, features, offset, weight)]
    call(AMX, "amx_cell_backward", *_numbers(gradient, cell), *read, None if h is None else of_h, *others)
    return gradients


def _keep_amx(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.cell = inputs[4:]


def _backward_amx(ctx, gradient: Tensor) -> tuple:
    tensors = ctx.saved_tensors
    gradients = _integrate_amx_backward(gradient, *tensors, *ctx.cell)
    of_tensors = [None if x is None else laid_out(g, x) for x, g in zip(tensors, gradients, strict=True)]
    return *of_tensors, *(None for _ in ctx.cell)


_integrate_amx.differentiate(_keep_amx, _backward_amx)


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
