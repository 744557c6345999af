"""What is CUDA's own: the dtypes of its autocast, which fake tensors show anywhere, and, on a GPU, graphs and bytes."""

import gc
import signal
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from images.batches import training_batch
from images.datasets import load_images
from kernels.cuda_graph import CapturedGradient, RecordedFunction
from liquid_diffusion import STEP_FRACTION
from models import build_model
from runtime.processes import Processes
from training.checkpoint import load_model
from training.config import TrainConfig
from training.loop import train
from training.optimizer import Muon
from training.state import untrained
from training.step import TrainStep

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DIGITS = load_images("digits", "unused")
CUDA = torch.device("cuda")
CONFIG = TrainConfig(
    dataset="digits", epochs=None, steps=12, device="cuda", precision="bf16", compile="on", timesteps=20, log_every=5,
    sample_every=12, save_every=6, draw_grids=False,
)  # fmt: skip


@pytest.mark.parametrize("solver", STEP_FRACTION)
def test_under_autocast_the_state_has_the_drive_s_precision(solver):
    with FakeTensorMode(), torch.device("cuda"):
        torch.set_autocast_enabled("cuda", True)
        try:
            torch.set_autocast_dtype("cuda", torch.bfloat16)
            model = build_model("true", solver=solver)
            output, state = model(torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.long), return_state=True)
        finally:
            torch.set_autocast_enabled("cuda", False)
    assert {tensor.dtype for tensor in (output, *state)} == {torch.bfloat16}
    assert {tensor.device.type for tensor in (output, *state)} == {"cuda"}


@needs_gpu
@pytest.mark.parametrize("model", ["true", "inspired", "unet"])
def test_a_graph_gives_the_gradients_of_the_steps_that_it_replays(model, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    own = {"random_steps": True} if model == "true" else {}
    config = replace(CONFIG, model=model, model_config=own, precision="fp32")
    scheduler, state = untrained(config, DIGITS, CUDA)
    torch.nn.init.normal_(list(state.model.parameters())[-2], std=0.1)  # the head's, which are zero
    plain, captured = (
        TrainStep(replace(config, compile=mode), DIGITS, scheduler, state, Processes(CUDA)).gradient
        for mode in ("off", "on")
    )
    assert isinstance(captured, CapturedGradient)
    for number, ode_steps in enumerate([(3, 5, 7), (2, 3, 4), (3, 5, 7), (2, 3, 4)]):
        if own:
            state.model.set_solver(ode_steps=ode_steps)
        batch = training_batch(DIGITS, scheduler.draw_timesteps, seed=0, number=number, batch_size=8, device=CUDA)
        found = []
        for gradient in (plain, captured):
            loss = gradient(batch).clone()
            found.append([loss, *(p.grad.clone() for p in state.model.parameters())])
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)
    assert len(captured.graphs) == (2 if own else 1)


@needs_gpu
def test_graphs_of_many_trainings_take_turns():
    trainings = []
    for seed in range(8):
        config = replace(CONFIG, seed=seed, compile="off", precision="fp32")
        scheduler, state = untrained(config, DIGITS, CUDA)
        plain = TrainStep(config, DIGITS, scheduler, state, Processes(CUDA)).gradient
        trainings.append((scheduler, plain, CapturedGradient(plain, state.model)))
    for number in range(3):
        for scheduler, plain, captured in trainings:
            batch = training_batch(DIGITS, scheduler.draw_timesteps, seed=0, number=number, batch_size=8, device=CUDA)
            loss = captured(batch).clone()
            torch.testing.assert_close(loss, plain(batch))


@needs_gpu
def test_a_graph_outlives_one_that_was_recorded_before_it():
    def gram(matrices):
        return [matrices[0].mT @ matrices[0]]  # of so many rows that cuBLAS divides them, which takes a workspace

    x = torch.randn(2**15, 640, device=CUDA, dtype=torch.bfloat16, generator=torch.Generator(CUDA).manual_seed(0))
    first, second = RecordedFunction(gram), RecordedFunction(gram)
    for function in (first, second):
        for _ in range(2):  # the second time it is recorded
            function([x])
        assert len(function.graphs) == 1
    del first, function
    gc.collect()
    torch.cuda.empty_cache()  # the memory of the graph that is gone is nobody's
    torch.testing.assert_close(second([x]), gram([x]))


@needs_gpu
def test_muon_in_a_graph_moves_weights_as_on_the_cpu_wherever_their_gradients_are():
    torch.manual_seed(0)
    weights = torch.randn(16, 8, 3, 3).to(memory_format=torch.channels_last), torch.randn(32, 12)
    there, here = ([torch.nn.Parameter(weight.to(device)) for weight in weights] for device in ("cpu", CUDA))
    on_cpu, on_gpu = Muon(there, 0.01), Muon(here, 0.01)
    places = [[torch.empty_like(weight) for weight in here] for _ in range(2)]
    for step in range(8):
        for a, b, place in zip(there, here, places[step % 2], strict=True):
            a.grad = torch.randn_like(a)
            b.grad = place.copy_(a.grad)  # the two places take turns
        on_cpu.step()
        on_gpu.step()
    assert len(on_gpu.directions.graphs) == 2
    for a, b in zip(there, here, strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=0, atol=1e-4)  # 8 steps are 0.08 long


@needs_gpu
def test_same_seed_same_bytes_with_a_graph_and_after_a_resume(tmp_path):
    def stop(progress):
        if progress == 0.5:
            signal.raise_signal(signal.SIGTERM)

    def config(name, seed=0):
        return replace(CONFIG, output_dir=str(tmp_path / name), seed=seed)

    whole, again, other = (train(config(f"{i}", seed), data=DIGITS) for i, seed in enumerate((0, 0, 1)))
    with pytest.raises(KeyboardInterrupt, match="step 7 is saved"):
        train(config("stopped"), data=DIGITS, on_progress=stop)
    (stopped,) = (tmp_path / "stopped").iterdir()
    train(config("stopped"), resume=stopped, data=DIGITS)
    weights = [load_model(run)[0].state_dict() for run in (whole, again, stopped, other)]
    same = [all(torch.equal(weights[0][name], one[name]) for name in one) for one in weights]
    assert same == [True, True, True, False]
