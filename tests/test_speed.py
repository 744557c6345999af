"""Speeds from a clock that the test turns: what is counted, and that models take turns."""

import pytest
import torch

from images.datasets import load_images
from lab import speed
from runtime.hardware import machine_name
from training.config import TrainConfig


def test_calls_take_turns_and_a_slow_one_has_fewer_rounds(monkeypatch):
    clock, order = [0.0], []

    def takes(name, seconds):
        order.append(name)
        clock[0] += seconds

    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])
    calls = {"quick": lambda: takes("quick", 2.0), "slow": lambda: takes("slow", 11.0)}
    assert speed.in_turn(calls, torch.device("cpu"), seconds=1.0, warmed_up=True) == {
        "quick": [2.0] * 5,
        "slow": [11.0] * 3,
    }
    assert order == ["quick", "slow"] * 3 + ["quick"] * 2


def test_the_rate_is_images_over_time_and_the_models_take_turns(monkeypatch):
    """One model's step takes half a second, the other's two and, in one round, a disturbed twenty."""
    clock, order = [0.0], []
    data = load_images("digits", "unused")

    class Step:
        def __init__(self, config, *_):
            self.name = config.model

        def __call__(self, progress):
            order.append(self.name)
            clock[0] += 0.5 if self.name == "inspired" else 20.0 if order.count("true") == 3 else 2.0

    monkeypatch.setattr(speed, "TrainStep", Step)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])
    configs = {name: TrainConfig(model=name, dataset="digits", batch_size=8) for name in ("true", "inspired")}
    rates = speed.training_rates(configs, data, torch.device("cpu"))
    assert rates == {"true": pytest.approx(4.0), "inspired": pytest.approx(16.0)}
    warm_up, rounds = order[:2], order[2:]
    assert warm_up == ["true", "inspired"]
    assert rounds == ["true", "inspired", "inspired"] * speed.RATE_ROUNDS


def test_a_real_step_is_timed(monkeypatch):
    monkeypatch.setattr(speed, "SECONDS", 0.01)
    config = TrainConfig(model="true:pooled", dataset="digits", batch_size=4, precision="fp32")
    (rate,) = speed.training_rates({"it": config}, load_images("digits", "unused"), torch.device("cpu")).values()
    assert 0 < rate < 1e5


def test_the_machine_is_named_with_its_threads():
    name = machine_name(torch.device("cpu"))
    assert name.endswith(f", {torch.get_num_threads()} threads") and len(name) > len(", 1 threads")
