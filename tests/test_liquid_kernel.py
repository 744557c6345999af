"""The compiled cell against the same steps in torch, in double precision: in fp32, and in bf16 where there is AMX."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import largest_error

from baselines import FixedTauCell
from kernels import cell_input, liquid_kernel, native
from kernels.compilation import compiled
from lab.benchmark.kernels import threads
from lab.benchmark.peers import TorchdiffeqCell
from liquid_diffusion import STEP_FRACTION, RealLiquidCell, TrueLiquidDiffusionModel

resource = pytest.importorskip("resource")
needs_compiler = pytest.mark.skipif(not native.available(native.FP32), reason="no C++ compiler")
needs_amx = pytest.mark.skipif(not native.available(native.AMX), reason="no AMX, or no C++ compiler")
DTYPES = [pytest.param(torch.float32, marks=needs_compiler), pytest.param(torch.bfloat16, marks=needs_amx)]
SHAPES = [
    ((3, 32, 32, 32), 7, False),
    ((5, 24, 16, 16), 5, True),
    ((2, 24, 8, 8), 3, False),
    ((2, 7, 12, 20), 4, True),
    ((1, 1, 4, 4), 2, False),
    ((3, 24, 1, 1), 3, True),
    ((2, 5, 4, 1), 3, True),
    ((1, 32, 28, 28), 1, True),
    ((1, 17, 7, 7), 5, False),
]
WIDE = [((1, 64, 31, 50), 3, False), ((1, 33, 9, 13), 4, True)]  # more channels than the AMX kernel has room for
NAMES = ("output", "h", "features", "offset", "weight")
DT, TAU_RANGE = 0.4, (0.5, 3.0)


def by_torch(h, features, offset, weight, num_steps, solver, dt, tau_range):
    """The steps as they are written down, from zeros where h is None."""
    drive, logit = (features + offset[:, :, None, None]).chunk(2, dim=1)
    tau = tau_range[0] + (tau_range[1] - tau_range[0]) * torch.sigmoid(logit)
    h, a = torch.zeros_like(drive) if h is None else h, dt / tau
    share = {"euler": a, "semi-implicit": a / (1 + a), "exponential": 1 - torch.exp(-a)}[solver]
    for _ in range(num_steps):
        h = h + share * (F.silu(F.conv2d(h, weight, padding=1) + drive) - h)
    return h


def with_gradients(integrate, tensors, gradient, num_steps, solver="euler"):
    """The output and the gradient of each tensor, None for one that is None."""
    leaves = [None if x is None else x.clone(memory_format=torch.preserve_format).requires_grad_() for x in tensors]
    output = integrate(*leaves, num_steps, solver, DT, TAU_RANGE)
    output.backward(gradient.to(output.dtype))
    return dict(zip(NAMES, [output.detach(), *(None if x is None else x.grad for x in leaves)], strict=True))


def inputs(shape, dtype, *, carried, seed=0):
    random = torch.Generator().manual_seed(seed)
    batch, channels, height, width = shape
    features = torch.randn(batch, 2 * channels, height, width, generator=random).to(dtype)
    features = features.contiguous(memory_format=torch.channels_last)
    offset = torch.randn(batch, 2 * channels, generator=random).to(dtype)
    h = torch.randn(shape, generator=random).to(dtype) if carried else None
    weight = torch.randn(channels, channels, 3, 3, generator=random) / (3 * channels**0.5)
    gradient = torch.randn(shape, generator=random).to(dtype)
    return [h, features, offset, weight], gradient


def error(x, y):
    """Of the whole, relative to its size."""
    return ((x.double() - y).norm() / y.norm()).item()


@needs_compiler
@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize("shape, num_steps, carried", SHAPES + WIDE)
@pytest.mark.parametrize("solver", STEP_FRACTION)
def test_output_and_gradients_in_fp32_are_those_of_double_precision(shape, num_steps, carried, solver, number):
    """With more threads than images, several threads share an image."""
    tensors, gradient = inputs(shape, torch.float32, carried=carried)
    exact = with_gradients(by_torch, [x if x is None else x.double() for x in tensors], gradient, num_steps, solver)
    with threads(number):
        found = with_gradients(liquid_kernel.integrate, tensors, gradient, num_steps, solver)
    for name in NAMES:
        assert (found[name] is None) == (exact[name] is None), name
        if found[name] is not None:
            assert largest_error(found[name], exact[name]) < 2e-5, name


@needs_amx
@pytest.mark.parametrize("shape, num_steps, carried", SHAPES)
@pytest.mark.parametrize("solver", STEP_FRACTION)
def test_output_and_gradients_in_bf16_are_those_of_double_precision_within_bf16(shape, num_steps, carried, solver):
    tensors, gradient = inputs(shape, torch.bfloat16, carried=carried)
    exact = with_gradients(by_torch, [x if x is None else x.double() for x in tensors], gradient, num_steps, solver)
    found = with_gradients(liquid_kernel.integrate, tensors, gradient, num_steps, solver)
    for name in NAMES:
        assert (found[name] is None) == (exact[name] is None), name
        if found[name] is not None:
            assert error(found[name], exact[name]) < 2**-7, name


@needs_amx
def test_no_less_exact_than_torch_in_bf16():
    tensors, gradient = inputs((4, 32, 16, 16), torch.bfloat16, carried=False)
    exact = with_gradients(by_torch, [x if x is None else x.double() for x in tensors], gradient, 7)
    found = with_gradients(liquid_kernel.integrate, tensors, gradient, 7)
    rounded = [x if x is None else x.to(torch.bfloat16) for x in tensors]
    torch_bf16 = with_gradients(by_torch, rounded, gradient, 7)
    for name in ("output", "features", "offset", "weight"):
        assert error(found[name], exact[name]) < error(torch_bf16[name], exact[name]), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_image_is_integrated_alone_and_the_same_every_time(dtype):
    """With one thread; where two share an image, rows between them are summed in another order."""
    tensors, gradient = inputs((3, 24, 16, 16), dtype, carried=True)
    with threads(1):
        together = with_gradients(liquid_kernel.integrate, tensors, gradient, 5)
        again = with_gradients(liquid_kernel.integrate, tensors, gradient, 5)
        alone = [with_gradients(liquid_kernel.integrate, [*(x[i : i + 1] for x in tensors[:3]), tensors[3]],
                                gradient[i : i + 1], 5) for i in range(3)]  # fmt: skip
    for name in NAMES:
        assert torch.equal(together[name], again[name])
    for name in ("output", "h", "features", "offset"):
        assert torch.equal(together[name], torch.cat([part[name] for part in alone]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_drives_stay_finite(dtype):
    tensors, gradient = inputs((1, 32, 8, 8), dtype, carried=False)
    tensors[1] = 1000 * tensors[1]
    for value in with_gradients(liquid_kernel.integrate, tensors, gradient, 3).values():
        assert value is None or value.isfinite().all()


@needs_compiler
@pytest.mark.parametrize("size", [1e3, 1e8, 1e15])
def test_huge_values_are_those_of_double_precision(size):
    tensors, _ = inputs((2, 12, 9, 8), torch.float32, carried=True)
    tensors[0], tensors[1] = size * tensors[0], size * tensors[1]
    exact = by_torch(*(x.double() for x in tensors), 3, "euler", DT, TAU_RANGE)
    assert largest_error(liquid_kernel.integrate(*tensors, 3, "euler", DT, TAU_RANGE), exact) < 2e-5


@needs_compiler
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_a_number_does_not_vanish(value):
    """So that training notices it."""
    tensors, _ = inputs((2, 12, 9, 8), torch.float32, carried=False)
    tensors[1][0, 3, 4, 4] = value
    output = liquid_kernel.integrate(*tensors, 3, "euler", DT, TAU_RANGE)
    assert not output[0].isfinite().all()
    assert output[1].isfinite().all()


@needs_compiler
@pytest.mark.parametrize("images", [1, 3, 8])
def test_same_threads_give_the_same_bytes(images):
    tensors, gradient = inputs((images, 24, 16, 16), torch.float32, carried=False)
    for number in (1, 2, 4):
        with threads(number):
            first, second = (with_gradients(liquid_kernel.integrate, tensors, gradient, 5) for _ in range(2))
        assert all(first[name] is None or torch.equal(first[name], second[name]) for name in NAMES)


@needs_compiler
def test_slopes_are_those_of_small_differences():
    """Along a random direction through all tensors at once, as gradcheck does; in fp32, so with a coarse difference."""
    tensors, gradient = inputs((2, 5, 6, 7), torch.float32, carried=True)
    found = with_gradients(liquid_kernel.integrate, tensors, gradient, 4, "semi-implicit")
    random = torch.Generator().manual_seed(1)
    direction = [torch.randn(x.shape, generator=random) for x in tensors]
    moved = [[x + way * 1e-2 * d for x, d in zip(tensors, direction, strict=True)] for way in (1, -1)]
    ahead, behind = (liquid_kernel.integrate(*each, 4, "semi-implicit", DT, TAU_RANGE) for each in moved)
    slope = ((ahead - behind) * gradient).sum() / 2e-2
    expected = sum((found[name] * d).sum() for name, d in zip(NAMES[1:], direction, strict=True))
    assert slope.item() == pytest.approx(expected.item(), rel=5e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", [1, 2])
def test_model_computes_the_same_with_and_without_it(dtype, number):
    torch.manual_seed(0)
    model = TrueLiquidDiffusionModel(channels=(8, 8, 8), embedding_dim=8)
    torch.nn.init.normal_(model.head.weight)
    x, t = torch.randn(5, 3, 16, 16), torch.arange(5)

    def outcome(model, x, *, bf16=dtype == torch.bfloat16):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = model(x, t)
        output.float().square().sum().backward()
        return torch.cat([output.detach().flatten(), *(p.grad.flatten() for p in model.parameters())])

    with threads(number):
        found = outcome(model, x)
        with native.plain_torch():
            without = outcome(model, x)
        exact = outcome(model.double(), x.double(), bf16=False)
    assert not torch.equal(found, without)  # so the kernel did run
    assert error(found, exact) < (1e-5 if dtype == torch.float32 else 2**-5)
    assert error(found, exact) < 2 * error(without, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_does_not_divide_what_is_compiled(dtype):
    cell = RealLiquidCell(4, 8, 8, num_steps=2, tau_range=(0.5, 4))
    compiled(cell)  # nothing is compiled before it is called
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = torch._dynamo.explain(cell)(torch.randn(1, 4, 8, 8), torch.randn(1, 8))
    assert found.graph_break_count == 0
    operator = torch.ops.liquid.integrate if dtype == torch.float32 else torch.ops.liquid.integrate_amx
    assert operator in found.ops_per_graph[0]


@needs_compiler
def test_compiled_model_has_the_same_gradients():
    torch.manual_seed(0)
    model = TrueLiquidDiffusionModel(channels=(8, 8, 8), embedding_dim=8, ode_steps=(1, 2, 2))
    torch.nn.init.normal_(model.head.weight)
    x, t = torch.randn(2, 3, 8, 8), torch.arange(2)

    def outcome(network):
        model.zero_grad()
        output = network(x, t)
        output.square().sum().backward()
        return torch.cat([output.detach().flatten(), *(p.grad.flatten() for p in model.parameters())])

    expected = outcome(model)
    assert error(outcome(compiled(model)), expected.double()) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_where_memory_runs_out_it_raises_memory_error(dtype):
    tensors, gradient = inputs((1, 1, 120, 120), dtype, carried=False)
    features = tensors[1].requires_grad_()
    output = liquid_kernel.integrate(*tensors, 3, "euler", DT, TAU_RANGE)
    enough = liquid_kernel.integrate(*inputs((1, 1, 2000, 2000), dtype, carried=False)[0], 1, "euler", DT, TAU_RANGE)
    large = [inputs((1, 1, side, side), dtype, carried=False)[0] for side in (5000, 5001)]  # more than any freed memory
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(), limits[1]))
    try:
        for more in large:
            with pytest.raises((MemoryError, RuntimeError), match="memory"):
                liquid_kernel.integrate(*more, 1, "euler", DT, TAU_RANGE)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert enough.isfinite().all()
    output.backward(gradient)
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_operators_keep_torchs_contract(dtype):
    tensors, _ = inputs((2, 24, 8, 8), dtype, carried=True)
    tensors = [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in tensors]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    if dtype == torch.bfloat16:
        operator, more = torch.ops.liquid.integrate_amx.default, ()
    else:
        operator, more = torch.ops.liquid.integrate.default, (True,)
    torch.library.opcheck(operator, (*tensors, 3, "euler", DT, *TAU_RANGE, *more), test_utils=checks)


@pytest.mark.parametrize(
    "cell, options, dtype",
    [
        (RealLiquidCell, {}, torch.float64),
        (RealLiquidCell, {"channels": 65}, torch.float32),
        (RealLiquidCell, {"channels": 33}, torch.bfloat16),  # more than the kernel has room for
        (RealLiquidCell, {"activation": "tanh"}, torch.float32),
        (RealLiquidCell, {"solver": "rk4"}, torch.float32),
        (FixedTauCell, {}, torch.float32),
        (TorchdiffeqCell, {}, torch.float32),
    ],
)
def test_other_cells_are_integrated_by_torch(monkeypatch, cell, options, dtype):
    monkeypatch.setattr(native, "available", lambda library: True)
    monkeypatch.setattr(cell_input, "fits", lambda *_: False)
    monkeypatch.setattr(liquid_kernel, "integrate", lambda *_: pytest.fail("the kernel was called"))
    cell = cell(4, **{"channels": 8} | options, embedding_dim=8, num_steps=2, tau_range=(0.5, 4)).to(dtype)
    with torch.no_grad():
        assert cell(torch.randn(1, 4, 8, 8, dtype=dtype), torch.randn(1, 8, dtype=dtype)).isfinite().all()
