"""Training with random numbers of ODE steps: what is drawn, what a step does with it, and what it buys."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import call, rows, trained

import train as train_command
from images.batches import held_out_bank, random_generator
from images.datasets import load_images
from liquid_diffusion import STEP_MULTIPLES
from models import build_model, multiply_adds, training_multiply_adds
from runtime.processes import Processes
from training.checkpoint import load_model
from training.config import TrainConfig
from training.loop import train
from training.state import untrained
from training.step import TrainStep
from training.validation import held_out_loss

DIGITS = load_images("digits", "data")
CONFIG = TrainConfig(
    dataset="digits", coarse_first=0, batch_size=8, device="cpu", precision="fp32", compile="off", timesteps=40
)
CPU = torch.device("cpu")


STEPS = {0.5: (2, 3, 4), 1: (3, 5, 7), 2: (6, 10, 14), 4: (12, 20, 28)}


def drawn_steps(seed: int, count: int) -> list[tuple[int, ...]]:
    """The ODE steps that a model draws for the batches of a run with this seed."""
    model, found = build_model("true", channels=(4, 4, 4), random_steps=True), []
    for number in range(count):
        model.draw_steps(random_generator("cpu", seed, number, stream=3))
        found.append(model.current_steps())
    return found


def test_half_to_four_times_the_steps_come_with_their_probabilities_and_depend_only_on_seed_and_number():
    drawn = drawn_steps(0, 4000)
    assert drawn[:50] == drawn_steps(0, 50)
    assert drawn[:50] != drawn_steps(1, 50)
    count = Counter(drawn)
    assert count.keys() == set(STEPS.values())
    for multiple, probability in STEP_MULTIPLES.items():
        expected = 4000 * probability
        assert count[STEPS[multiple]] == pytest.approx(expected, abs=4 * (expected * (1 - probability)) ** 0.5)


def test_only_training_draws_steps_and_only_with_random_steps():
    fixed, random = (build_model("true", channels=(4, 4, 4), random_steps=one) for one in (False, True))
    for model in (fixed, random.eval()):
        for number in range(20):
            model.draw_steps(random_generator("cpu", 0, number, stream=3))
            assert model.current_steps() == (3, 5, 7)


def test_a_training_step_is_that_of_a_model_with_the_drawn_number_of_steps():
    drawn = drawn_steps(0, 40)
    first = sorted(drawn.index(steps) for steps in set(drawn))  # the first batch with each number of steps
    assert len(first) == 4
    scheduler, state = untrained(replace(CONFIG, model_config={"random_steps": True}), DIGITS, CPU)
    for number in first:
        steps, state.step = drawn[number], number
        before = {name: value.clone() for name, value in state.model.state_dict().items()}
        fixed_config = replace(CONFIG, model_config={"ode_steps": steps})
        _, fixed = untrained(fixed_config, DIGITS, CPU)
        fixed.model.load_state_dict(before)
        fixed.step = number
        loss_before = state.loss_sum.clone()
        for one, config in ((fixed, fixed_config), (state, CONFIG)):
            TrainStep(config, DIGITS, scheduler, one, Processes(CPU))(0.0)
        assert (state.loss_sum - loss_before).item() == pytest.approx(fixed.loss_sum.item(), rel=1e-5)


def test_a_run_is_measured_saved_and_read_with_the_model_s_own_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(held_out_bank, "__defaults__", (100,))
    run = trained(tmp_path, "--random-ode-steps", "--steps", 12)
    model, scheduler, about = load_model(run)
    assert about["model_config"]["random_steps"] is True
    assert [cell.num_steps for cell in model.processor.cells.values()] == [3, 5, 7]
    bank = held_out_bank(DIGITS, scheduler.num_timesteps)
    measured = float(rows(run)[-1]["held_out_loss"])
    assert measured == pytest.approx(held_out_loss(model, scheduler, bank), rel=1e-5)


def test_training_costs_the_mean_over_the_drawn_numbers_of_steps():
    shape = (1, 8, 8)
    costs = [
        multiply_adds(build_model("true", in_channels=1, ode_steps=steps), shape)
        for steps in ((2, 3, 4), (3, 5, 7), (6, 10, 14), (12, 20, 28))
    ]
    model = build_model("true", in_channels=1, random_steps=True)
    assert training_multiply_adds(model, shape) == round(
        3 * (0.4 * costs[0] + 0.4 * costs[1] + 0.1 * costs[2] + 0.1 * costs[3])
    )
    assert multiply_adds(model, shape) == costs[1]


def test_half_the_steps_cost_it_less_than_a_model_that_always_saw_the_same(tmp_path, monkeypatch):
    """With two steps per cell, of which one is left, so that a short training shows the difference clearly."""
    monkeypatch.setattr("training.step.WARM_UP_STEPS", 10)
    monkeypatch.setattr(held_out_bank, "__defaults__", (300,))
    apart = []
    for random_steps in (False, True):
        shape = {"channels": (16, 16, 16), "ode_steps": (2, 2, 2), "random_steps": random_steps}
        config = replace(
            CONFIG, model_config=shape, epochs=None, steps=60, batch_size=16, lr=0.01, output_dir=str(tmp_path),
            draw_grids=False, sample_every=60,
        )  # fmt: skip
        model, scheduler, _ = load_model(train(config, data=DIGITS))
        bank = held_out_bank(DIGITS, config.timesteps)
        own = held_out_loss(model, scheduler, bank)
        model.set_solver(ode_steps=(1, 1, 1))
        apart.append(held_out_loss(model, scheduler, bank) / own - 1)
    assert abs(apart[1]) < abs(apart[0]) / 2


def test_only_the_true_model_has_steps_and_a_resumed_run_keeps_what_it_had(tmp_path):
    code, out, err = call(train_command, "--model", "inspired", "--random-ode-steps", "--dataset", "digits")
    assert (code, out) == (2, "") and err.startswith("train.py: error: --random-ode-steps: only the true model")
    run = trained(tmp_path, "--steps", 3)
    code, out, err = call(train_command, "--resume", run, "--random-ode-steps")
    assert (code, out) == (2, "") and "--random-ode-steps: True contradicts --resume" in err
