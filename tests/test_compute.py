"""How a run computes: a rule of processor and length; compiling changes only speed; freed memory is kept."""

import ctypes
import resource
import sys
from functools import lru_cache

import pytest
import torch
from conftest import forked
from torch import nn

from images.datasets import load_images
from kernels import native
from kernels.compilation import compiled, compiler_failure
from liquid_diffusion import RealLiquidCell
from models import build_model, training_multiply_adds
from runtime import hardware
from runtime.processes import Processes
from training import compute
from training.config import TrainConfig
from training.loop import train
from training.state import untrained

CPU = torch.device("cpu")
LONG = 10**6  # steps


def chosen(monkeypatch, flags, *, failure=None, kernels=True, **options):
    """The precision and compilation of a run of the digits on a processor with these instruction sets."""
    monkeypatch.setattr(native, "available", lambda library: kernels and library.needs <= set(flags.split()))
    monkeypatch.setattr(hardware, "cpu_flags", lambda: set(flags.split()))
    monkeypatch.setattr(compute, "compiler_failure", lambda device: failure)
    data = load_images("digits", "unused")
    config = TrainConfig(dataset="digits", epochs=None, **options)
    _, state = untrained(config, data, CPU)
    config = compute.resolved(config, state.model, data, Processes(CPU))
    return config.precision, config.compile


AVX2, ZEN4 = "avx2 fma", "avx2 avx512f avx512bw avx512dq avx512_bf16"
AMX = f"{ZEN4} amx_tile amx_bf16"


@pytest.mark.parametrize(
    "flags, options, choice",
    [
        (AVX2, {"steps": 10}, ("fp32", "off")),
        ("avx2 avx512f", {"steps": LONG}, ("fp32", "on")),  # no arithmetic in bf16
        (ZEN4, {"steps": 10}, ("fp32", "off")),  # our convolutions in fp32 are faster than torch's in bf16
        (ZEN4, {"steps": 10, "kernels": False}, ("bf16", "off")),  # too short to compile
        (ZEN4, {"steps": LONG, "kernels": False}, ("bf16", "on")),
        (AMX, {"steps": LONG}, ("bf16", "on")),
        (AMX, {"minutes": 4.0}, ("bf16", "off")),
        (AMX, {"minutes": 6.0}, ("bf16", "on")),
        (AVX2, {"minutes": 20.0}, ("fp32", "off")),
        (AVX2, {"minutes": 31.0}, ("fp32", "on")),
        (AVX2, {"minutes": 6.0, "kernels": False}, ("fp32", "on")),
        (AMX, {"steps": LONG, "compile": "off"}, ("bf16", "off")),
        (AVX2, {"steps": 10, "compile": "on", "precision": "bf16"}, ("bf16", "on")),
        (AMX, {"steps": LONG, "precision": "fp32"}, ("fp32", "on")),
    ],
)
def test_precision_and_compilation_follow_from_the_processor_and_the_length(monkeypatch, flags, options, choice):
    assert chosen(monkeypatch, flags, **options) == choice


def test_a_run_is_long_by_its_multiply_adds(monkeypatch):
    data = load_images("digits", "unused")
    _, state = untrained(TrainConfig(dataset="digits", steps=1, epochs=None), data, CPU)
    steps = int(compute.LONG_WORK / training_multiply_adds(state.model, data.shape) / 64)
    found = [chosen(monkeypatch, AMX, steps=n, batch_size=64)[1] for n in (steps - 1, steps + 1)]
    assert found == ["off", "on"]


def test_a_long_run_goes_on_where_there_is_no_compiler(monkeypatch, capsys):
    failure = RuntimeError("no g++\nand more")
    assert chosen(monkeypatch, AMX, steps=LONG, failure=failure) == ("bf16", "off")
    assert "no compiler works here (no g++)\n" in capsys.readouterr().out


def test_a_compiler_that_works_is_found_out_by_compiling():
    assert compiler_failure(CPU) is None  # test_faults.py has the machine without one


def test_a_compiled_cell_has_the_gradients_of_the_plain_one_and_copies_no_features():
    """A copy would be that of a depthwise convolution's input into another order in memory."""
    torch.manual_seed(0)
    cell = RealLiquidCell(8, 3, 8, num_steps=2, tau_range=(0.5, 4.0)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 16, 16).contiguous(memory_format=torch.channels_last).requires_grad_()
    embedding = torch.randn(2, 8)

    def gradients(network):
        cell.zero_grad()
        x.grad = None
        network(x, embedding).square().sum().backward()
        return [x.grad, *(p.grad for p in cell.parameters())]

    fast = compiled(cell)
    torch.testing.assert_close(gradients(fast), gradients(cell), rtol=1e-4, atol=1e-5)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        fast(x, embedding).square().sum().backward()
    copied = [event.input_shapes[0] for event in profile.events() if event.name == "aten::copy_"]
    assert [2, 8, 16, 16] not in copied


def test_compiling_says_nothing_of_what_a_network_looks_up_in_a_cache(recwarn):
    class Scaled(nn.Module):
        def forward(self, x):
            return factor() * x

    @lru_cache
    def factor():
        return 2

    assert compiled(Scaled())(torch.ones(1)) == 2
    assert not [warning for warning in recwarn if "lru_cache" in str(warning.message)]


PR_SET_THP_DISABLE = 41  # linux/prctl.h


def page_faults(keep: bool) -> int:
    """How many new pages five steps take after three others."""
    ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)  # one huge page would count as little as a small one
    if keep:
        hardware.keep_freed_memory()
    model = build_model("true", channels=(16, 4, 4))
    x, t = torch.zeros(16, 3, 32, 32), torch.zeros(16, dtype=torch.long)
    for step in range(8):
        if step == 3:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        model(x, t).sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_is_reused_without_new_pages():
    assert forked(page_faults, True) < forked(page_faults, False) / 5


def test_the_fast_way_costs_no_quality(tmp_path):
    """After the same images the held-out loss in compiled bf16 is within the spread that seeds alone make in fp32."""

    def held_out(seed, **options):
        config = TrainConfig(
            dataset="digits", epochs=None, steps=150, sample_every=150, draw_grids=False, timesteps=20, seed=seed,
            model_config={"channels": (4, 4, 4), "ode_steps": (1, 1, 2)}, output_dir=str(tmp_path), device="cpu",
            **options,
        )  # fmt: skip
        run = train(config, on_progress=lambda _: None)
        return float((run / "metrics.csv").read_text().splitlines()[-1].split(",")[-1])

    plain = [held_out(seed, precision="fp32", compile="off") for seed in range(3)]
    fast = held_out(0, precision="bf16", compile="on")
    assert abs(fast - plain[0]) < max(plain) - min(plain), (plain, fast)
