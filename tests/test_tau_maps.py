"""The maps of time constants: they are those of the ODE that is solved, and the picture shows them."""

import numpy as np
import torch
from conftest import call
from PIL import Image

import sample
from diffusion.sampling import sample_images
from diffusion.scheduler import DDPMScheduler
from lab.evaluation.tau_maps import record, save_tau_maps
from liquid_diffusion import TrueLiquidDiffusionModel
from models import complete_config
from training.checkpoint import save_model

SCHEDULER = DDPMScheduler(20)


def model(**options) -> TrueLiquidDiffusionModel:
    torch.manual_seed(0)
    return TrueLiquidDiffusionModel(channels=(8, 4, 4), **options)


def test_the_maps_are_the_time_constants_that_the_state_decays_with():
    """With no target, tau dh/dt = -h: over one exponential step h shrinks by exp(-T / tau), which gives tau away."""
    network, decays = model(solver="exponential", ode_steps=(1, 1, 1)), []
    for cell in network.processor.cells.values():
        cell.activation = torch.zeros_like

    def decay_of_ones(cell, inputs, _):
        decays.append(cell.integrate(torch.ones(2, 8, 16, 16), *cell.drive_and_tau(*inputs[:2])))

    network.processor.detail_cell.register_forward_hook(decay_of_ones)
    maps = record(network, SCHEDULER, (3, 16, 16), 2, steps=5)
    assert len(maps.x_0) == len(maps.noise) == len(maps.tau["detail"]) == 5
    for decay, tau in zip(decays, maps.tau["detail"], strict=True):
        torch.testing.assert_close((-1 / decay.log()).mean(1), tau)


def test_each_cell_has_its_resolution_and_the_images_are_those_drawn():
    network = model()
    maps = record(network, SCHEDULER, (3, 16, 16), 2, steps=4, seed=7)
    shapes = {name: tuple(each[0].shape) for name, each in maps.tau.items()}
    assert shapes == {"global": (2, 4, 4), "local": (2, 8, 8), "detail": (2, 16, 16)}
    images = sample_images(network, SCHEDULER, (3, 16, 16), 2, steps=4, seed=7)
    torch.testing.assert_close(maps.x_0[-1], images)
    assert sorted(maps.noise, reverse=True) == maps.noise and maps.noise[0] > 0.99
    record(network, SCHEDULER, (3, 16, 16), 2, steps=4)
    assert not any(cell._forward_hooks for cell in network.processor.cells.values())


def test_under_guidance_the_maps_are_those_with_the_class():
    network = model(num_classes=2)
    labels = torch.tensor([0, 1, 0])
    with torch.no_grad():
        network.embedding.classes.weight[2] = 100.0  # "no class" has other time constants
    options = {"steps": 1, "labels": labels}
    guided, plain = (record(network, SCHEDULER, (3, 16, 16), 2, guidance=g, **options) for g in (3.0, 1.0))
    torch.testing.assert_close(guided.tau["detail"][0], plain.tau["detail"][0])


def test_the_picture_is_bright_where_the_network_is_slow(tmp_path):
    maps = record(model(), SCHEDULER, (3, 16, 16), 1, steps=3)
    for name, each in maps.tau.items():
        maps.tau[name] = [torch.full_like(tau, 0.5) for tau in each]
    maps.tau["detail"][-1][:] = 1.5
    save_tau_maps(maps, tmp_path / "tau.png")
    pixels = np.asarray(Image.open(tmp_path / "tau.png").convert("RGB")).astype(int)
    dark, bright = [(pixels == colour).all(-1).sum() for colour in ([[0, 0, 3]], [[252, 254, 164]])]
    assert 6 * bright < dark < 10 * bright  # 8 of the 9 maps are fast


def test_the_command_writes_the_picture(tmp_path):
    network = model()
    about = {"model": "true", "model_config": complete_config("true", channels=[8, 4, 4]), "timesteps": 20}
    about |= {"schedule": "linear", "prediction_type": "edm", "dataset": "folder", "shape": [3, 16, 16], "classes": []}
    save_model(tmp_path / "m.safetensors", network.state_dict(), about | {"training_images": 1})
    code, out, err = call(
        sample, "--checkpoint", tmp_path / "m.safetensors", "--num-images", 2, "--steps", 3, "--device", "cpu",
        "--output", tmp_path / "a.png", "--tau-maps", tmp_path / "tau.png",
    )  # fmt: skip
    assert code == 0 and out.splitlines() == [str(tmp_path / "a.png"), str(tmp_path / "tau.png")], err
    with Image.open(tmp_path / "tau.png") as picture:
        assert picture.width > 300 and picture.height > 400
