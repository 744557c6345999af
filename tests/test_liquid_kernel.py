"""The compiled kernel against the same steps in torch, in double precision, and where there is none."""

import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from baselines import FixedTauCell
from kernels import liquid_kernel
from kernels.compilation import compiled
from lab.benchmark.peers import TorchdiffeqCell
from liquid_diffusion import STEP_FRACTION, RealLiquidCell, TrueLiquidDiffusionModel

resource = pytest.importorskip("resource")
needs_kernel = pytest.mark.skipif(not liquid_kernel.available(), reason="no AMX, or no C++ compiler")
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


def inputs(shape, *, carried, seed=0):
    random = torch.Generator().manual_seed(seed)
    batch, channels, height, width = shape
    features = torch.randn(batch, 2 * channels, height, width, generator=random).to(torch.bfloat16)
    features = features.contiguous(memory_format=torch.channels_last)
    offset = torch.randn(batch, 2 * channels, generator=random).to(torch.bfloat16)
    h = torch.randn(shape, generator=random).to(torch.bfloat16) if carried else None
    weight = torch.randn(channels, channels, 3, 3, generator=random) / (3 * channels**0.5)
    gradient = torch.randn(shape, generator=random).to(torch.bfloat16)
    return [h, features, offset, weight], gradient


def error(x, y):
    return ((x.double() - y).norm() / y.norm()).item()


@needs_kernel
@pytest.mark.parametrize(
    "shape, num_steps, carried",
    [
        ((3, 32, 32, 32), 7, False),
        ((5, 24, 16, 16), 5, True),
        ((2, 24, 8, 8), 3, False),
        ((2, 7, 12, 20), 4, True),
        ((1, 1, 4, 4), 2, False),
        ((3, 24, 1, 1), 3, True),
        ((2, 5, 4, 1), 3, True),
        ((1, 32, 28, 28), 1, True),
    ],
)
@pytest.mark.parametrize("solver", STEP_FRACTION)
def test_output_and_gradients_are_those_of_double_precision_within_bf16(shape, num_steps, carried, solver):
    tensors, gradient = inputs(shape, carried=carried)
    exact = with_gradients(by_torch, [x if x is None else x.double() for x in tensors], gradient, num_steps, solver)
    found = with_gradients(liquid_kernel.integrate, tensors, gradient, num_steps, solver)
    for name in NAMES:
        assert (found[name] is None) == (exact[name] is None), name
        if found[name] is not None:
            assert error(found[name], exact[name]) < 2**-7, name


@needs_kernel
def test_no_less_exact_than_torch_in_bf16():
    tensors, gradient = inputs((4, 32, 16, 16), carried=False)
    exact = with_gradients(by_torch, [x if x is None else x.double() for x in tensors], gradient, 7)
    found = with_gradients(liquid_kernel.integrate, tensors, gradient, 7)
    rounded = [x if x is None else x.to(torch.bfloat16) for x in tensors]
    torch_bf16 = with_gradients(by_torch, rounded, gradient, 7)
    for name in ("output", "features", "offset", "weight"):
        assert error(found[name], exact[name]) < error(torch_bf16[name], exact[name]), name


@needs_kernel
def test_image_is_integrated_alone_and_the_same_every_time():
    tensors, gradient = inputs((3, 24, 16, 16), carried=True)
    together = with_gradients(liquid_kernel.integrate, tensors, gradient, 5)
    again = with_gradients(liquid_kernel.integrate, tensors, gradient, 5)
    alone = [with_gradients(liquid_kernel.integrate, [*(x[i : i + 1] for x in tensors[:3]), tensors[3]],
                            gradient[i : i + 1], 5) for i in range(3)]  # fmt: skip
    for name in NAMES:
        assert torch.equal(together[name], again[name])
    for name in ("output", "h", "features", "offset"):
        assert torch.equal(together[name], torch.cat([part[name] for part in alone]))


@needs_kernel
def test_extreme_drives_stay_finite():
    tensors, gradient = inputs((1, 32, 8, 8), carried=False)
    tensors[1] = 1000 * tensors[1]
    for value in with_gradients(liquid_kernel.integrate, tensors, gradient, 3).values():
        assert value is None or value.isfinite().all()


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2])
def test_model_computes_the_same_with_and_without_it(monkeypatch, threads):
    """`threads`: the weight's gradient is summed over them."""
    torch.manual_seed(0)
    model = TrueLiquidDiffusionModel(channels=(8, 8, 8), embedding_dim=8)
    torch.nn.init.normal_(model.head.weight)
    x, t = torch.randn(5, 3, 16, 16), torch.arange(5)

    def outcome(bf16):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = model(x, t).float()
        output.square().sum().backward()
        return torch.cat([output.detach().flatten(), *(p.grad.flatten() for p in model.parameters())])

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        exact, found = outcome(bf16=False), outcome(bf16=True)
        monkeypatch.setattr(liquid_kernel, "available", lambda: False)
        without = outcome(bf16=True)
    finally:
        torch.set_num_threads(before)
    assert not torch.equal(found, without)  # so the kernel did run
    assert error(found, exact) < 2**-5
    assert error(found, exact) < 1.5 * error(without, exact)


@needs_kernel
def test_it_does_not_divide_what_is_compiled():
    cell = RealLiquidCell(4, 8, 8, num_steps=2, tau_range=(0.5, 4))
    compiled(cell)  # nothing is compiled before it is called
    with torch.autocast("cpu", torch.bfloat16):
        found = torch._dynamo.explain(cell)(torch.randn(1, 4, 8, 8), torch.randn(1, 8))
    assert found.graph_break_count == 0
    assert torch.ops.liquid.integrate in found.ops_per_graph[0]


@needs_kernel
def test_where_memory_runs_out_it_raises_memory_error():
    tensors, gradient = inputs((1, 1, 120, 120), carried=False)
    features = tensors[1].requires_grad_()
    output = liquid_kernel.integrate(*tensors, 3, "euler", DT, TAU_RANGE)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(), limits[1]))
    try:
        for steps in (2000, 2001):  # each needs room of its own, more than any freed memory
            with pytest.raises(MemoryError):
                liquid_kernel.integrate(*tensors, steps, "euler", DT, TAU_RANGE)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    output.backward(gradient)
    assert features.grad.isfinite().all()


@needs_kernel
def test_operators_keep_torchs_contract():
    tensors, _ = inputs((2, 24, 8, 8), carried=True)
    tensors = [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in tensors]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.liquid.integrate.default, (*tensors, 3, "euler", DT, *TAU_RANGE), test_utils=checks)


@pytest.mark.parametrize(
    "cell, options, dtype",
    [
        (RealLiquidCell, {}, torch.float32),
        (RealLiquidCell, {"channels": 33}, torch.bfloat16),  # more than the kernel has room for
        (RealLiquidCell, {"activation": "tanh"}, torch.bfloat16),
        (RealLiquidCell, {"solver": "rk4"}, torch.bfloat16),
        (FixedTauCell, {}, torch.bfloat16),
        (TorchdiffeqCell, {}, torch.bfloat16),
    ],
)
def test_other_cells_are_integrated_by_torch(monkeypatch, cell, options, dtype):
    monkeypatch.setattr(liquid_kernel, "available", lambda: True)
    monkeypatch.setattr(liquid_kernel, "integrate", lambda *_: pytest.fail("the kernel was called"))
    cell = cell(4, **{"channels": 8} | options, embedding_dim=8, num_steps=2, tau_range=(0.5, 4)).to(dtype)
    with torch.no_grad():
        assert cell(torch.randn(1, 4, 8, 8, dtype=dtype), torch.randn(1, 8, dtype=dtype)).isfinite().all()


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_there_is_no_kernel_and_no_file(tmp_path, monkeypatch, compiler):
    """One that is not there, one that fails."""
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises((OSError, subprocess.CalledProcessError)):
        liquid_kernel.compiled_file("this processor")
    assert liquid_kernel.library.__wrapped__() is None
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@needs_kernel
def test_it_is_compiled_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = liquid_kernel.compiled_file("this processor")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
    assert liquid_kernel.compiled_file("this processor") == path
    with pytest.raises(pytest.fail.Exception, match="compiled again"):
        liquid_kernel.compiled_file("another processor")
