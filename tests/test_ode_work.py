"""Quality against ODE work: the figures are those of a model built so, and finer solvers agree with each other."""

import json

import numpy as np
import pytest
import torch
from conftest import call, trained
from PIL import Image

import evaluate
from choices import SOLVERS
from diffusion.scheduler import DDPMScheduler
from images.batches import held_out_bank
from images.datasets import load_images
from lab.evaluation.ode_work import num_points, ode_work, save_ode_work
from liquid_diffusion import TrueLiquidDiffusionModel
from models import multiply_adds
from training.validation import held_out_loss

SHAPE = {"in_channels": 1, "channels": (8, 4, 4)}
SCHEDULER = DDPMScheduler(20)


@pytest.fixture(scope="module")
def bank():
    whole = held_out_bank(load_images("digits", "unused"), 20)
    return type(whole)(**{name: values[:50] for name, values in vars(whole).items()})


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = TrueLiquidDiffusionModel(**SHAPE)
    torch.nn.init.normal_(model.head.weight, std=0.1)  # else nothing of the ODE is seen
    return model


@pytest.fixture(scope="module")
def points(network, bank):
    return ode_work(network, SCHEDULER, bank)


def test_every_point_is_what_a_model_built_with_that_solver_costs_and_gives(network, bank, points):
    assert len(points) == num_points() and {point["solver"] for point in points} == set(SOLVERS)
    for point in (p for p in points if p["ode_steps"] is not None):
        model = TrueLiquidDiffusionModel(**SHAPE, solver=point["solver"], ode_steps=point["ode_steps"])
        model.load_state_dict(network.state_dict())
        assert point["value"] == pytest.approx(held_out_loss(model, SCHEDULER, bank), rel=1e-6)
        assert point["multiply_adds"] == multiply_adds(model, (1, 8, 8))
    (trained_way,) = (p for p in points if p["as_trained"])
    assert (trained_way["solver"], trained_way["ode_steps"]) == ("euler", [3, 5, 7])


def test_finer_steps_of_every_solver_approach_the_adaptive_one(points):
    (exact,) = (p["value"] for p in points if p["solver"] == "dopri5")
    for solver in set(SOLVERS) - {"dopri5"}:
        coarse, *_, fine = (abs(p["value"] - exact) for p in points if p["solver"] == solver)
        assert fine < coarse / 3, solver


def test_the_model_is_left_as_it_was(network, bank, monkeypatch):
    monkeypatch.setattr("lab.evaluation.ode_work.ways", lambda steps: [("rk4", [1, 1, 1]), ("dopri5", steps)])
    network.set_solver("exponential", (2, 3, 4))
    ode_work(network, SCHEDULER, type(bank)(**{name: values[:2] for name, values in vars(bank).items()}))
    cells = network.processor.cells.values()
    assert [(cell.solver, cell.num_steps) for cell in cells] == [("exponential", n) for n in (2, 3, 4)]
    network.set_solver("euler", (3, 5, 7))


def test_the_plot_has_a_line_for_every_solver(points, tmp_path):
    save_ode_work(points, tmp_path / "plot.png")
    pixels = np.asarray(Image.open(tmp_path / "plot.png").convert("RGB")).astype(int).reshape(-1, 3)
    colours = np.unique(pixels[np.ptp(pixels, axis=1) > 100], axis=0)
    assert len(colours) >= 5


def test_the_command_writes_figures_and_plot_and_refuses_what_has_no_ode(tmp_path, monkeypatch):
    monkeypatch.setattr(held_out_bank, "__defaults__", (30,))
    quick = ["--device", "cpu", "--precision", "fp32", "--timesteps", 8, "--batch-size", 16]
    run = trained(tmp_path, "--dataset", "digits", "--steps", 2, options=quick)
    few = ["--device", "cpu", "--num-images", 16, "--steps", 2, "--bound-images", 2]
    code, out, err = call(evaluate, "--checkpoint", run, *few, "--ode-work")
    assert code == 0 and str(run / "evaluation-ode-work.png") in out, err
    assert "euler 3/5/7" in out and "as trained" in out and "dopri5 its own" in out
    report = json.loads((run / "evaluation.json").read_text())
    (trained_way,) = (p for p in report["ode_work"]["points"] if p["as_trained"])
    assert trained_way["value"] == pytest.approx(report["eps_mse"]["value"])
    assert trained_way["multiply_adds"] == report["multiply_adds"]["value"]
    other = trained(tmp_path, "--dataset", "digits", "--steps", 2, "--model", "inspired", options=quick)
    code, out, err = call(evaluate, "--checkpoint", other, "--ode-work")
    assert (code, out, err.count("\n")) == (2, "", 1) and "--ode-work" in err and "inspired" in err, err
