"""`sample.py` as a user meets it: the same picture for the same seed, and an effect of every option.

A few tests start processes of their own; the others call the command in this one, which costs no start of Python.
"""

import json

import numpy as np
import pytest
import torch
from conftest import call, run_forked, short_run
from PIL import Image

import sample
from choices import EPS_SCALE, GUIDANCE, GUIDED_SHARE, SAMPLERS, SOLVERS
from diffusion.sampling import ByNoise, Guidance, sample_images
from images.pictures import save_grid
from training.checkpoint import load_model, read_model

FEW_TIMESTEPS = ["--timesteps", 8]


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    options = [*FEW_TIMESTEPS, "--dataset", "digits", "--steps", 100, "--no-class-conditional"]
    return short_run(tmp_path_factory.mktemp("digits"), *options)


@pytest.fixture(scope="module")
def class_run(class_images, tmp_path_factory):
    options = [*FEW_TIMESTEPS, "--dataset", "folder", "--data-dir", class_images, "--image-size", 8, "--steps", 60]
    return short_run(tmp_path_factory.mktemp("classes"), *options)


@pytest.fixture(scope="module")
def inspired_run(tmp_path_factory):
    options = [*FEW_TIMESTEPS, "--dataset", "digits", "--steps", 2, "--model", "inspired"]
    options += ["--no-class-conditional"]
    return short_run(tmp_path_factory.mktemp("inspired"), *options)


def draw(run, tmp_path, *options, name="out.png") -> np.ndarray:
    """The pixels of the grid that the command draws."""
    path = tmp_path / name
    code, out, err = call(
        sample, "--checkpoint", run, "--output", path, "--num-images", 4, "--steps", 4, "--device", "cpu", *options
    )
    assert code == 0, err
    assert out.splitlines()[0] == str(path)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture)


def test_a_run_and_its_file_give_the_same_bytes_in_a_folder_that_is_made(digits_run, tmp_path):
    options = ["--num-images", 9, "--steps", 8, "--device", "cpu", "--seed", 3]
    a, b = tmp_path / "new" / "folder" / "a.png", tmp_path / "b.png"
    for checkpoint, path in ((digits_run, a), (digits_run / "model.safetensors", b)):
        done = run_forked("sample.py", "--checkpoint", checkpoint, "--output", path, *options)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{path}\n"
    assert a.read_bytes() == b.read_bytes()
    other = draw(digits_run, tmp_path, *options, "--seed", 4, name="c.png")
    assert np.asarray(Image.open(a)).std() > 10 and not np.array_equal(np.asarray(Image.open(a)), other)


def test_the_grid_holds_each_image_in_its_place(digits_run, tmp_path):
    model, scheduler, config = load_model(digits_run)
    images = sample_images(model, scheduler, config["shape"], 4, steps=4, eps_scale=EPS_SCALE)
    grid = draw(digits_run, tmp_path)
    zoom, cell = 8, 9  # 8 pixels become 64; a border of one pixel stands between two images
    assert grid.shape == ((2 * cell + 1) * zoom, (2 * cell + 1) * zoom, 3)
    for i, image in enumerate(images):
        top, left = (1 + cell * (i // 2)) * zoom, (1 + cell * (i % 2)) * zoom
        drawn = grid[top : top + 8 * zoom : zoom, left : left + 8 * zoom : zoom, 0]
        assert np.abs(drawn - ((image[0] + 1) / 2 * 255).numpy()).max() <= 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_depends_on_its_seed_and_not_on_the_batch(sampler, class_run):
    model, scheduler, config = load_model(class_run)
    options = {"sampler": sampler, "steps": 8, "eta": 0.5}

    def drawn(count, **more):
        labels = torch.zeros(count, dtype=torch.long)
        return sample_images(model, scheduler, config["shape"], count, labels=labels, guidance=2.0, **options, **more)

    images = drawn(70)
    for batch_size in (1, 3):
        assert (images[:7] - drawn(7, batch_size=batch_size)).abs().max() < 1e-4
    assert (images - drawn(70, batch_size=70)).abs().max() < 1e-4
    assert (images[5] - drawn(1, seed=5)[0]).abs().max() < 1e-4
    assert (images[66] - drawn(1, seed=66)[0]).abs().max() < 1e-4  # of the second batch of 64
    assert (images[0] - images[1]).abs().max() > 0.1


def test_every_sampler_and_solver_is_an_option_that_acts(digits_run, tmp_path):
    options = [
        *(["--sampler", sampler] for sampler in SAMPLERS),
        ["--sampler", "ddim", "--eta", 0.5],
        ["--ode-steps", 1, 1, 1],
        *(["--solver", solver] for solver in SOLVERS if solver != "euler"),
    ]
    pictures = [draw(digits_run, tmp_path, *option).tobytes() for option in options]
    assert len(set(pictures)) == len(pictures)


def test_ddim_of_eta_one_is_ddpm(digits_run, tmp_path):
    ancestral = draw(digits_run, tmp_path, "--sampler", "ddpm").astype(int)
    assert np.abs(ancestral - draw(digits_run, tmp_path, "--sampler", "ddim", "--eta", 1)).max() <= 1


def test_the_defaults_are_the_solver_and_steps_of_the_training(digits_run, tmp_path):
    default = draw(digits_run, tmp_path)
    assert np.array_equal(default, draw(digits_run, tmp_path, "--solver", "euler", "--ode_steps", 3, 5, 7))
    assert np.array_equal(default, draw(digits_run, tmp_path, "--sampler", "dpmpp", "--seed", 0))


def test_a_gif_shows_every_denoising_step_and_ends_with_the_picture(digits_run, tmp_path):
    # with a scaled eps the first x_0 of this short run are all black or white
    options = ["--batch-size", 3, "--steps", 6, "--eps-scale", 1]
    picture = draw(digits_run, tmp_path, "--gif", tmp_path / "new" / "a.gif", *options)
    with Image.open(tmp_path / "new" / "a.gif") as gif:
        assert gif.n_frames == 6
        gif.seek(0)
        first = np.asarray(gif.convert("RGB")).astype(int)
        gif.seek(5)
        last = np.asarray(gif.convert("RGB")).astype(int)
        assert gif.info["duration"] == 2000
    assert np.abs(last - picture).mean() < 5 < np.abs(first - picture).mean()  # a GIF has 256 colours


def test_classes_by_name_or_number_take_turns(class_run, tmp_path):
    dogs, cats = draw(class_run, tmp_path, "--classes", "dogs"), draw(class_run, tmp_path, "--classes", "cats")
    assert dogs.mean() > cats.mean() + 50
    assert np.array_equal(dogs, draw(class_run, tmp_path, "--classes", "1"))
    in_turns = draw(class_run, tmp_path, "--classes", "cats, 1")  # four columns under their names
    frame = 8  # pixels of a line, after each image and before the first
    side = (dogs.shape[1] - frame) // 2
    row = in_turns[-(side + frame) :]
    assert np.array_equal(row[:side, :side], cats[:side, :side])
    assert np.array_equal(row[:side, side : 2 * side], dogs[:side, side : 2 * side])
    assert np.array_equal(in_turns, draw(class_run, tmp_path))  # all classes by default


def test_guidance_acts_in_its_share_of_the_timesteps_and_one_is_none(class_run, tmp_path):
    def drawn(*options, classes="dogs"):
        return draw(class_run, tmp_path, "--classes", classes, "--eps-scale", 1, *options)

    usual, plain, pushed = drawn(), drawn("--guidance", 1), drawn("--guidance", GUIDANCE + 1)
    assert np.array_equal(usual, drawn("--guidance", GUIDANCE, "--guided-share", GUIDED_SHARE))
    assert np.array_equal(plain, drawn("--guided-share", 0))
    everywhere = drawn("--guided-share", 1)
    assert len({picture.tobytes() for picture in (usual, plain, pushed, everywhere)}) == 4
    nobody = [drawn("--guidance", 0, "--guided-share", 1, classes=name) for name in ("dogs", "cats")]
    assert np.array_equal(*nobody)  # guidance 0 leaves the class out


def test_the_scale_of_eps_acts(class_run, tmp_path):
    pictures = [draw(class_run, tmp_path, *scale) for scale in ([], ["--eps-scale", EPS_SCALE], ["--eps-scale", 1])]
    assert np.array_equal(*pictures[:2]) and not np.array_equal(*pictures[1:])


def test_a_coarser_integration_of_the_same_weights_guides(class_run, digits_run, tmp_path):
    """By hand: away from the model that takes fewer ODE steps, and, where there are classes, from no class."""
    for run, labels in ((class_run, torch.tensor([0, 1, 0, 1])), (digits_run, None)):
        model, scheduler, config = load_model(run)
        names = () if labels is None else ("cats", "dogs") * 2
        for given, steps in (([], (2, 3, 4)), (["--coarse-steps", 1, 1, 2], (1, 1, 2))):
            drawn = draw(run, tmp_path, "--autoguidance", 3, *given)
            coarse = load_model(run)[0]
            coarse.set_solver(ode_steps=steps)
            options = {"steps": 4, "labels": labels, "guidance": Guidance(3, coarse), "eps_scale": EPS_SCALE}
            save_grid(sample_images(model, scheduler, config["shape"], 4, **options), tmp_path / "hand.png", names)
            assert np.array_equal(drawn, np.asarray(Image.open(tmp_path / "hand.png")))
            assert not np.array_equal(drawn, draw(run, tmp_path))


def test_fewer_ode_steps_are_taken_where_noise_is_high(digits_run, tmp_path):
    model, scheduler, config = load_model(digits_run)
    by_hand = ByNoise(model.with_steps((1, 2, 2)), model, 2)  # from a quarter of its 8 timesteps
    drawn = draw(digits_run, tmp_path, "--noisy-ode-steps", 1, 2, 2)
    save_grid(
        sample_images(by_hand, scheduler, config["shape"], 4, steps=4, eps_scale=EPS_SCALE), tmp_path / "hand.png"
    )
    assert np.array_equal(drawn, np.asarray(Image.open(tmp_path / "hand.png")))
    assert not np.array_equal(drawn, draw(digits_run, tmp_path))


def test_training_moves_the_class_vectors_and_the_output_hears_them(class_run):
    model, _, config = load_model(class_run)
    torch.manual_seed(0)
    start = type(model)(**config["model_config"]).embedding.classes.weight
    # weight decay alone would scale all values by one factor
    ratios = (model.embedding.classes.weight / start).detach()[:2]
    assert ratios.std() > 0.01
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([4])
    outputs = torch.stack([model(x, t, labels=torch.tensor([label])) for label in range(3)])
    assert outputs.std(0).max() > 1e-2


def test_models_side_by_side_start_from_the_same_noise(digits_run, inspired_run, tmp_path):
    """Each half of the picture and of the last frame is what the model draws alone."""
    alone = [draw(run, tmp_path, "--eps-scale", 1) for run in (digits_run, inspired_run)]
    code, out, err = call(
        sample, "--checkpoint", digits_run, inspired_run, "--num-images", 4, "--steps", 4, "--device", "cpu",
        "--eps-scale", 1,
        "--output", tmp_path / "both.png", "--gif", tmp_path / "both.gif",
    )  # fmt: skip
    assert code == 0 and out.splitlines() == [str(tmp_path / "both.png"), str(tmp_path / "both.gif")], err
    both = np.asarray(Image.open(tmp_path / "both.png"))
    height, width, _ = alone[0].shape
    assert np.array_equal(both[-height:, :width], alone[0]) and np.array_equal(both[-height:, -width:], alone[1])
    with Image.open(tmp_path / "both.gif") as gif:
        assert gif.n_frames == 4 and gif.size == (both.shape[1], both.shape[0])


def test_the_default_number_of_steps_suits_a_model_of_few_timesteps(digits_run, tmp_path):
    code, _, err = call(sample, "--checkpoint", digits_run, "--output", tmp_path / "a.png", "--num-images", 1)
    assert code == 0, err


def test_the_config_of_a_file_survives_json(digits_run):
    """What sample.py rebuilds from is plain JSON, equal to what the run's config.json records."""
    assert read_model(digits_run)[1] == json.loads((digits_run / "config.json").read_text())["model"]
