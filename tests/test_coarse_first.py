"""Training with half of the ODE steps first: when they are taken, what a step is, what it costs, and who has it."""

import json
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, call, same, trained

import compare
import train as train_command
from choices import ARMS
from images.batches import random_generator
from images.datasets import load_images
from lab import speed
from lab.comparison.experiment import arm_config
from liquid_diffusion import STEP_MULTIPLES, TrueLiquidDiffusionModel
from models import NETWORKS, build_model, multiply_adds, training_multiply_adds
from runtime.processes import Processes
from training.checkpoint import read_resume
from training.config import TrainConfig
from training.loop import train
from training.run_folder import read_config
from training.state import untrained
from training.step import TrainStep

DIGITS = load_images("digits", "data")
CPU = torch.device("cpu")
COARSE, FULL = (2, 3, 4), (3, 5, 7)
CONFIG = TrainConfig(
    dataset="digits", epochs=None, steps=10, coarse_first=0.6, batch_size=8, device="cpu", precision="fp32",
    compile="off", timesteps=8, lr=0.02, sample_every=2,
)  # fmt: skip


@pytest.fixture
def passes(monkeypatch) -> list[tuple[bool, tuple[int, ...]]]:
    """(whether it is trained by, its ODE steps) of every forward pass from now on."""
    found, forward = [], TrueLiquidDiffusionModel.forward

    def noted(self, *arguments, **options):
        found.append((torch.is_grad_enabled(), self.current_steps()))
        return forward(self, *arguments, **options)

    monkeypatch.setattr(TrueLiquidDiffusionModel, "forward", noted)
    return found


@pytest.mark.parametrize("budget", [{"steps": 10}, {"minutes": 1 / 6}])
def test_the_first_share_of_a_run_takes_half_of_the_steps_and_only_training_does(
    budget, tmp_path, light, passes, monkeypatch
):
    """By a clock on which each training step takes a second, ten steps are a sixth of a minute."""
    clock = SimpleNamespace(monotonic=lambda: float(sum(trains for trains, _ in passes)))
    monkeypatch.setattr("training.loop.time", clock)
    train(replace(CONFIG, **{"output_dir": tmp_path, "steps": None} | budget), data=DIGITS)
    assert [steps for trains, steps in passes if trains] == [COARSE] * 6 + [FULL] * 4
    measured = [steps for trains, steps in passes[: passes.index((True, FULL))] if not trains]
    assert len(measured) > 8 * 2  # held-out losses and grids of 8 denoising steps, while the training is coarse
    assert {steps for trains, steps in passes if not trains} == {FULL}


def test_a_coarse_step_is_that_of_a_model_with_half_of_the_steps():
    found = []
    for config in (CONFIG, replace(CONFIG, coarse_first=0, model_config={"ode_steps": COARSE})):
        scheduler, state = untrained(config, DIGITS, CPU)
        torch.nn.init.normal_(state.model.head.weight, std=0.1, generator=torch.Generator().manual_seed(0))
        step = TrainStep(config, DIGITS, scheduler, state, Processes(CPU))
        step(0.59)
        found.append([state.loss_sum, *(p.grad for p in state.model.parameters())])
    assert state.model.current_steps() == COARSE
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_with_random_steps_the_coarse_part_draws_half_of_each_multiple():
    model = build_model("true", channels=(4, 4, 4), random_steps=True)
    halved = {(2, 3, 4): (1, 2, 2), (3, 5, 7): (2, 3, 4), (6, 10, 14): (3, 5, 7), (12, 20, 28): (6, 10, 14)}
    seen = set()
    for number in range(60):
        drawn = []
        for coarse in (False, True, True):
            model.draw_steps(random_generator("cpu", 0, number, stream=3), coarse=coarse)
            drawn.append(model.current_steps())
        assert drawn[1:] == [halved[drawn[0]]] * 2
        seen.add(drawn[0])
    assert seen == halved.keys()


@pytest.mark.parametrize("random_steps", [False, True])
def test_a_run_stopped_before_at_or_after_the_switch_goes_on_bit_for_bit(random_steps, tmp_path, light):
    def config(name, share=0.6):
        shape = {"random_steps": random_steps}
        return replace(CONFIG, output_dir=tmp_path / name, model_config=shape, coarse_first=share, draw_grids=False)

    whole, full = train(config("whole"), data=DIGITS), train(config("full", share=0), data=DIGITS)
    weights, state = (whole / "model.safetensors").read_bytes(), read_resume(whole / "checkpoint.pt")
    assert weights != (full / "model.safetensors").read_bytes()
    for done in (4, 6, 8):  # of ten steps, of which the first six are coarse

        def stop(progress, done=done):
            if progress == (done - 1) / 10:
                signal.raise_signal(signal.SIGTERM)

        with pytest.raises(KeyboardInterrupt, match=f"step {done} is saved"):
            train(config(f"{done}"), data=DIGITS, on_progress=stop)
        (stopped,) = (tmp_path / f"{done}").iterdir()
        code, _, err = call(train_command, "--resume", stopped)
        assert code == 0, err
        assert (stopped / "model.safetensors").read_bytes() == weights
        resumed = read_resume(stopped / "checkpoint.pt")
        assert all(same(state[name], resumed[name]) for name in ("model", "ema", "optimizer", "step"))


def test_training_costs_the_mean_of_both_parts():
    shape = (1, 8, 8)
    by_steps = {
        steps: multiply_adds(build_model("true", in_channels=1, ode_steps=steps), shape)
        for steps in ((1, 2, 2), COARSE, FULL, (6, 10, 14), (12, 20, 28))
    }
    model = build_model("true", in_channels=1)
    expected = 3 * (0.6 * by_steps[COARSE] + 0.4 * by_steps[FULL])
    assert training_multiply_adds(model, shape, 0.6) == round(expected)
    assert model.current_steps() == FULL and training_multiply_adds(model, shape) == 3 * by_steps[FULL]
    random = build_model("true", in_channels=1, random_steps=True)
    coarse, full = (
        sum(probability * cost for probability, cost in zip(STEP_MULTIPLES.values(), costs, strict=True))
        for costs in (list(by_steps.values())[:4], list(by_steps.values())[1:])
    )
    assert training_multiply_adds(random, shape, 0.6) == round(3 * (0.6 * coarse + 0.4 * full))


def test_the_speed_is_that_of_the_whole_run(monkeypatch):
    """A coarse step takes one second and a full one two, so ten steps of 8 images take 6 + 8 seconds."""
    clock = [0.0]

    class Step:
        def __init__(self, config, *_):
            self.coarse_first = config.coarse_first

        def __call__(self, progress):
            clock[0] += 1.0 if progress < self.coarse_first else 2.0

    monkeypatch.setattr(speed, "TrainStep", Step)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])
    configs = {share: replace(CONFIG, coarse_first=share) for share in (0, 0.6)}
    assert speed.training_rates(configs, DIGITS, CPU) == {0: pytest.approx(4), 0.6: pytest.approx(80 / 14)}
    before = clock[0]
    speed.train_step(CONFIG, DIGITS, CPU)()
    assert clock[0] == before + 2  # who times a single step times all of the ODE


def test_an_arm_of_compare_trains_coarse_first_and_its_costs_say_so(tmp_path, monkeypatch, light):
    monkeypatch.setattr("lab.speed.SECONDS", 1e-3)
    for name in ("save_curves", "save_labelled_rows"):
        monkeypatch.setattr(f"lab.comparison.procedure.{name}", lambda *_: None)
    options = ["--dataset", "digits", "--timesteps", 8, "--batch-size", 8, "--device", "cpu", "--num-images", 0]
    options += ["--arms", "true:coarse-first", "--seeds", 1, "--lrs", 4e-3, "--amount", 80]
    code, _, err = call(compare, *options, "--output-dir", tmp_path)
    assert code == 0, err
    (run,) = tmp_path.glob("runs/*/*")
    assert read_config(run)["train"]["coarse_first"] == 0.6
    header, costs = ((tmp_path / "costs.csv").read_text().splitlines()[i].split(",") for i in range(2))
    assert 3 * 0.6 < int(costs[header.index("training_multiply_adds")]) / int(costs[header.index("multiply_adds")]) < 3
    settings = compare.parser().parse_args([])
    for arm in set(ARMS) - {"true:coarse-first"}:  # the others train as TrainConfig says
        assert arm_config(settings, arm).coarse_first == TrainConfig(model=ARMS[arm][0]).coarse_first, arm


def test_the_share_is_in_the_config_and_the_start_and_a_resumed_run_keeps_it(tmp_path, light):
    code, out, err = call(train_command, *TINY, "--coarse-first", 0.6, "--dry-run", "--output-dir", tmp_path)
    assert code == 0 and "\node      half of its steps in the first 60 % of the run, then all of them\n" in out, err
    run = trained(tmp_path, "--steps", 3, "--coarse-first", 0.5)
    assert read_config(run)["train"]["coarse_first"] == 0.5
    code, out, err = call(train_command, "--resume", run, "--coarse-first", 0.4)
    assert (code, out) == (2, "") and "--coarse-first: 0.4 contradicts --resume" in err
    code, out, err = call(train_command, "--resume", run, "--coarse-first", 0.5)
    assert code == 0 and "\node  " in out, err
    older = json.loads((run / "config.json").read_text())
    del older["train"]["coarse_first"]  # as written before there was the flag
    (run / "config.json").write_text(json.dumps(older))
    code, out, err = call(train_command, "--resume", run)
    assert code == 0 and "\node  " not in out, err


def test_a_model_without_an_ode_has_no_share(tmp_path):
    for name in NETWORKS:
        model, has_ode = build_model(name), TrainConfig(model=name, coarse_first=0.6).coarse_first == 0.6
        if has_ode:
            model.draw_steps(torch.Generator(), coarse=True)
            assert model.current_steps() == COARSE, name
        assert has_ode == (name.startswith("true") and name != "true:untied"), name
    options = [*TINY, "--model", "inspired", "--dry-run", "--output-dir", tmp_path]
    code, out, err = call(train_command, *options, "--coarse-first", 0.6)
    assert (code, out, err.count("\n")) == (2, "", 1) and "error: --coarse-first: only the true model has an ODE" in err
    assert call(train_command, *options, "--coarse-first", 0)[0] == 0
    code, _, err = call(train_command, "--coarse-first", 1)
    assert code == 2 and "--coarse-first: must be less than 1" in err
