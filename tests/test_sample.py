"""`sample.py` as a user meets it: the same picture for the same seed, every option, and each refusal."""

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import main_refuses, refused, run_command, train_tiny
from PIL import Image

import sample
from diffusion import SAMPLERS, sample_images
from models import load_model


@pytest.fixture(scope="module")
def class_run(tmp_path_factory):
    """A class-conditional run that is long enough for the class to matter."""
    return train_tiny(tmp_path_factory.mktemp("classes"), "--steps", 300, "--class-conditional", "--sample-every", 1000)


def draw(run, tmp_path, *options, name="out.png") -> np.ndarray:
    path = tmp_path / name
    done = run_command("sample.py", "--checkpoint", run, "--output", path, "--num-images", 4, "--steps", 8, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == str(path)
    return np.asarray(Image.open(path))


def test_a_run_and_its_file_give_the_same_picture_in_a_folder_that_is_made(whole_run, tmp_path):
    a = draw(whole_run, tmp_path, name="new/folder/a.png")
    b = draw(whole_run / "model.safetensors", tmp_path)
    assert a.std() > 10 and np.array_equal(a, b)
    assert not np.array_equal(a, draw(whole_run, tmp_path, "--seed", 100))


def test_an_image_depends_on_its_seed_and_not_on_the_batch(whole_run):
    model, scheduler, config = load_model(whole_run)
    for sampler in SAMPLERS:
        options = {"sampler": sampler, "steps": 10, "eta": 0.5}
        images = sample_images(model, scheduler, config["shape"], 7, seed=3, **options)
        for batch_size in (1, 3):
            other = sample_images(model, scheduler, config["shape"], 7, seed=3, batch_size=batch_size, **options)
            assert (images - other).abs().max() < 1e-4
        alone = sample_images(model, scheduler, config["shape"], 1, seed=8, **options)
        assert (images[5] - alone[0]).abs().max() < 1e-4
        assert (images[0] - images[1]).abs().max() > 0.1


def test_samplers_and_solvers_are_options_that_act(whole_run, tmp_path):
    pictures = [
        draw(whole_run, tmp_path),
        draw(whole_run, tmp_path, "--sampler", "ddim"),
        draw(whole_run, tmp_path, "--sampler", "ddpm"),
        draw(whole_run, tmp_path, "--ode-steps", 1, 1, 1),
        draw(whole_run, tmp_path, "--solver", "rk4"),
    ]
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)
    # with eta = 1 DDIM is DDPM also where steps are left out
    like_ddpm = draw(whole_run, tmp_path, "--sampler", "ddim", "--eta", 1)
    assert np.abs(like_ddpm.astype(int) - pictures[2]).max() <= 1


def test_a_gif_shows_every_denoising_step(whole_run, tmp_path):
    draw(whole_run, tmp_path, "--gif", tmp_path / "a.gif", "--batch-size", 3)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 8


def test_classes_by_name_or_number_and_guidance(class_run, tmp_path):
    three = draw(class_run, tmp_path, "--classes", "3")
    assert np.array_equal(three, draw(class_run, tmp_path, "--classes", "3,3"))
    assert not np.array_equal(three, draw(class_run, tmp_path, "--classes", "7"))
    assert not np.array_equal(three, draw(class_run, tmp_path, "--classes", "3", "--guidance", 3))


def test_training_moves_the_class_vectors(class_run):
    model, _, _ = load_model(class_run)
    torch.manual_seed(0)
    untrained = type(model)(in_channels=1, num_classes=10)
    assert not torch.equal(model.embedding.classes.weight, untrained.embedding.classes.weight)
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([200])
    outputs = torch.stack([model(x, t, labels=torch.tensor([label])) for label in range(10)])
    assert outputs.std(0).max() > 1e-3


def test_refusals(whole_run, class_run, tmp_path, monkeypatch, capsys):
    (tmp_path / "text").write_text("hello\n" * 20)
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut").write_bytes((whole_run / "model.safetensors").read_bytes()[:5000])
    safetensors.torch.save_file({"w": torch.zeros(2)}, tmp_path / "foreign")
    cases = [
        *[(["--checkpoint", tmp_path / name], [name]) for name in ("text", "empty", "cut", "foreign", "missing")],
        (["--checkpoint", whole_run, "--num-images", 0], ["--num-images", "0"]),
        (["--checkpoint", whole_run, "--steps", 401], ["--steps", "401"]),
        (["--checkpoint", whole_run, "--eta", 1], ["--eta"]),
        (["--checkpoint", whole_run, "--classes", "3"], ["--classes"]),
        (["--checkpoint", whole_run, "--guidance", 2], ["--guidance"]),
        (["--checkpoint", whole_run, "--output", tmp_path], ["--output", str(tmp_path)]),
        (["--checkpoint", whole_run, "--output", tmp_path / "text" / "a.png"], ["--output", "text"]),
        (["--checkpoint", whole_run, "--sampler", "euler"], ["--sampler", "euler"]),
        (["--checkpoint", class_run, "--classes", "3,eleven"], ["--classes", "eleven"]),
    ]
    for arguments, words in cases:
        error = main_refuses("sample.py", sample.main, arguments, monkeypatch, capsys)
        assert all(word in error for word in words), error


def test_a_refusal_leaves_the_shell_with_2_and_one_line(tmp_path):
    refused(run_command("sample.py", "--checkpoint", tmp_path / "gone"), "sample.py: error: ", "gone")


def test_a_model_without_an_ode_refuses_ode_options(tmp_path):
    run = train_tiny(tmp_path, "--steps", 2, "--model", "inspired")
    refused(run_command("sample.py", "--checkpoint", run, "--ode-steps", 1, 1, 1), "--ode-steps", "inspired")
