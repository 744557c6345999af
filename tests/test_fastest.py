"""How a run computes, chosen on a clock that the test turns; that compiling changes speed alone; memory kept."""

import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import nn

import fastest
from hardware import Processes, compiled
from image_data import load_images
from liquid_diffusion import InputConv, RealLiquidCell
from train_config import TrainConfig
from train_state import untrained
from training import train

CPU = torch.device("cpu")
ROOT = Path(fastest.__file__).parent
LONG = 10**6  # steps


def chosen(monkeypatch, seconds, **options):
    """What `faster` makes of a run of the digits, where a step lasts seconds[precision, compiled]."""
    clock = [0.0]

    def gradient_function(state, scheduler, config, here):
        compiled = config.compile == "on" and torch.compile(state.model)

        def gradient(batch):
            clock[0] += seconds[config.precision, compiled == "compiled"]

        return gradient

    monkeypatch.setattr(fastest, "gradient_function", gradient_function)
    monkeypatch.setattr(fastest.time, "perf_counter", lambda: clock[0])
    data = load_images("digits", "unused")
    config = TrainConfig(dataset="digits", epochs=None, **options)
    scheduler, state = untrained(config, data, CPU)
    config = fastest.faster(config, state, scheduler, data, Processes(CPU))
    return config.precision, config.compile


PRECISION = {("fp32", False): 0.02, ("bf16", False): 0.01, ("fp32", True): 0.01, ("bf16", True): 0.005}


@pytest.mark.parametrize(
    "seconds, options, choice",
    [
        (PRECISION, {"steps": 10}, ("bf16", "off")),  # too short to compile
        (PRECISION, {"steps": LONG}, ("bf16", "on")),
        (PRECISION, {"minutes": 4.0}, ("bf16", "off")),
        (PRECISION, {"minutes": 6.0}, ("bf16", "on")),
        (PRECISION, {"steps": LONG, "compile": "off"}, ("bf16", "off")),
        (PRECISION, {"steps": 10, "compile": "on"}, ("bf16", "on")),
        (PRECISION, {"steps": LONG, "precision": "fp32"}, ("fp32", "on")),
        (PRECISION | {("bf16", False): 0.019}, {"steps": 10}, ("fp32", "off")),  # not clearly faster
        (PRECISION | {("bf16", True): 0.0095}, {"steps": LONG}, ("bf16", "off")),
    ],
)
def test_a_run_computes_in_the_way_that_is_clearly_faster(monkeypatch, seconds, options, choice):
    monkeypatch.setattr(torch, "compile", lambda network, **_: "compiled")
    assert chosen(monkeypatch, seconds, **options) == choice


def test_a_long_run_goes_on_where_there_is_no_compiler(monkeypatch, capsys):
    def refuse(network, **_):
        raise torch._inductor.exc.InvalidCxxCompiler()

    monkeypatch.setattr(torch, "compile", refuse)
    assert chosen(monkeypatch, PRECISION, steps=LONG) == ("bf16", "off")
    assert "cannot be compiled" in capsys.readouterr().out


def test_choosing_leaves_weights_and_gradients_as_they_were():
    data = load_images("digits", "unused")
    config = TrainConfig(dataset="digits", epochs=None, steps=1, batch_size=4)
    scheduler, state = untrained(config, data, CPU)
    before = [p.clone() for p in state.model.parameters()]
    fastest.faster(config, state, scheduler, data, Processes(CPU))
    assert all(map(torch.equal, before, state.model.parameters()))
    assert all(p.grad is None for p in state.model.parameters())


def test_a_compiled_cell_has_the_gradients_of_the_plain_one():
    torch.manual_seed(0)
    cell = RealLiquidCell(3, 4, 8, num_steps=2, tau_range=(0.5, 4.0))
    x, embedding = torch.randn(2, 3, 8, 8), torch.randn(2, 8)

    def gradients(network):
        cell.zero_grad()
        network(x, embedding).square().sum().backward()
        return [p.grad for p in cell.parameters()]

    torch.testing.assert_close(gradients(torch.compile(cell)), gradients(cell), rtol=1e-4, atol=1e-5)


def test_a_compiled_depthwise_convolution_copies_no_features():
    torch.manual_seed(0)
    network = compiled(InputConv(8, 6).to(memory_format=torch.channels_last))
    x = torch.randn(2, 8, 16, 16).contiguous(memory_format=torch.channels_last).requires_grad_()
    network(x).sum().backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        network(x).square().sum().backward()
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


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_is_reused_without_new_pages():
    script = """
import resource, torch, hardware, models
{}
model = models.build_model("true", channels=(16, 4, 4))
x, t = torch.zeros(16, 3, 32, 32), torch.zeros(16, dtype=torch.long)
for step in range(8):
    if step == 3:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    model(x, t).sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

    def page_faults(call):
        command = [sys.executable, "-c", script.format(call)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)

    assert page_faults("hardware.keep_freed_memory()") < page_faults("") / 5


def test_the_fast_way_costs_no_quality(tmp_path):
    """After the same images the held-out loss in compiled bf16 is within the spread that seeds alone make in fp32."""

    def held_out(seed, **options):
        config = TrainConfig(
            dataset="digits", epochs=None, steps=150, sample_every=150, draw_grids=False, timesteps=20, seed=seed,
            model_config={"channels": (8, 8, 8), "ode_steps": (1, 2, 2)}, output_dir=str(tmp_path), device="cpu",
            **options,
        )  # fmt: skip
        run = train(config, on_progress=lambda _: None)
        return float((run / "metrics.csv").read_text().splitlines()[-1].split(",")[-1])

    plain = [held_out(seed, precision="fp32", compile="off") for seed in range(3)]
    fast = held_out(0, precision="bf16", compile="on")
    assert abs(fast - plain[0]) < max(plain) - min(plain), (plain, fast)
