"""`sample.py` as a user meets it: the same picture for the same seed, every option, and each refusal.

A few tests start processes of their own; the others call the command in this one, which costs no start of Python.
"""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import call, refused, run_forked, short_run
from PIL import Image

import sample
from baselines import MemoryLiquid, UntiedLiquid
from choices import EPS_SCALE, GUIDANCE, GUIDED_SHARE, SAMPLERS, SOLVERS
from diffusion.sampling import ByNoise, Guidance, sample_images
from images.pictures import save_grid
from lab.predictions import with_steps
from runtime.errors import UserError
from training.checkpoint import load_model, read_model, save_model

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


def line_of_refusal(*arguments) -> str:
    """The one line with which the command refuses its arguments, before it draws anything."""
    code, out, err = call(sample, "--num-images", 1, "--device", "cpu", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1), (code, out, err)
    assert err.startswith("sample.py: error: ")
    return err


BAD_VALUES = [
    ("--num-images", 0),
    ("--num-images", "x"),
    ("--batch-size", 0),
    ("--steps", 0),
    ("--steps", 9),
    ("--seed", -1),
    ("--eta", 1),  # the sampler is not ddim
    ("--eta", 3),
    ("--eta", "nan"),
    ("--output", "grid.jpg"),
    ("--guidance", 2),
    ("--guidance", "inf"),
    ("--guided-share", 1.1),
    ("--guided-share", 0.5),
    ("--eps-scale", 0),
    ("--classes", 3),
    ("--sampler", "euler"),
    ("--solver", "heun"),
    ("--ode-steps", 1),
    ("--no-such-flag", 1),
]


@pytest.mark.parametrize("flag, value", BAD_VALUES)
def test_a_bad_value_is_refused_by_its_flag(flag, value, digits_run, tmp_path):
    line = line_of_refusal("--checkpoint", digits_run, "--output", tmp_path / "out.png", flag, value)
    assert flag in line
    assert not (tmp_path / "out.png").exists()


def test_what_a_model_lacks_or_flags_contradict_is_said(digits_run, inspired_run, class_run, tmp_path):
    steps = ["--noisy-ode-steps", 1, 1, 1]
    for run, words in (
        (inspired_run, steps),
        (digits_run, ["--tau-maps", tmp_path / "maps.png", *steps]),
        (inspired_run, ["--autoguidance", 2]),
        (digits_run, ["--coarse-steps", 1, 2, 3]),
        (class_run, ["--autoguidance", 2, "--guidance", 2]),
    ):
        assert words[0] in line_of_refusal("--checkpoint", run, *words)


@pytest.mark.parametrize("model", [UntiedLiquid, MemoryLiquid])
@pytest.mark.parametrize("flag", ["--autoguidance", "--noisy-ode-steps"])
def test_an_ablation_whose_steps_cannot_be_chosen_is_refused(model, flag):
    with pytest.raises(UserError, match=f"^{flag}: "):
        with_steps(flag, model(), (1, 2, 3))


def test_an_unknown_class_is_refused_with_those_there_are(class_run):
    line = line_of_refusal("--checkpoint", class_run, "--classes", "cats,birds")
    assert "--classes" in line and "birds" in line and "cats, dogs" in line
    assert "--classes" in line_of_refusal("--checkpoint", class_run, "--classes", "2")
    assert "--classes" in line_of_refusal("--checkpoint", class_run, "--classes", "")


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


def test_models_that_do_not_draw_the_same_images_are_refused(digits_run, class_run):
    line = line_of_refusal("--checkpoint", digits_run, class_run)
    assert "--checkpoint" in line and "1x8x8" in line and "3x8x8" in line
    assert "twice" in line_of_refusal("--checkpoint", digits_run, digits_run)


@pytest.mark.parametrize("options", [["--ode-steps", 1, 1, 1], ["--solver", "rk4"], ["--tau-maps", "tau.png"]])
def test_a_model_without_an_ode_refuses_ode_options(options, inspired_run):
    line = line_of_refusal("--checkpoint", inspired_run, *options)
    assert options[0] in line and "inspired" in line


@pytest.mark.parametrize("name", ["missing", "empty", "text", "cut", "foreign", "nothing", "checkpoint.pt"])
def test_what_is_no_model_is_refused_by_its_name(name, digits_run, tmp_path):
    whole = (digits_run / "model.safetensors").read_bytes()
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("hello\n" * 20)
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "nothing").write_bytes(b"")
    (tmp_path / "checkpoint.pt").write_bytes((digits_run / "checkpoint.pt").read_bytes())
    safetensors.torch.save_file({"w": torch.zeros(2)}, tmp_path / "foreign")
    assert str(tmp_path / name) in line_of_refusal("--checkpoint", tmp_path / name)


@pytest.mark.parametrize("key", ["shape", "classes", "timesteps", "model_config"])
def test_a_model_whose_config_lacks_a_key_is_refused_by_its_name(key, digits_run, tmp_path):
    tensors, config = read_model(digits_run)
    path = tmp_path / "lacking.safetensors"
    save_model(path, tensors, {name: value for name, value in config.items() if name != key})
    assert str(path) in line_of_refusal("--checkpoint", path)


def test_a_model_that_is_not_of_its_config_is_refused_by_its_name(digits_run, inspired_run, tmp_path):
    path = tmp_path / "swapped.safetensors"
    save_model(path, read_model(digits_run)[0], read_model(inspired_run)[1])
    assert str(path) in line_of_refusal("--checkpoint", path)


def test_outputs_that_cannot_be_are_refused_by_their_flag(digits_run, tmp_path):
    (tmp_path / "file").write_text("kept")
    options = ["--checkpoint", digits_run, "--steps", 2, "--num-images", 1, "--output", tmp_path / "fine.png"]
    for flag in ("--gif", "--tau-maps"):  # a folder; --output takes one
        code, _, err = call(sample, *options, flag, tmp_path)
        assert code == 2 and f"sample.py: error: {flag}: " in err and str(tmp_path) in err
    line = line_of_refusal("--checkpoint", digits_run, "--output", tmp_path / "file" / "a.png")
    assert "--output" in line and (tmp_path / "file").read_text() == "kept"


def test_weights_that_are_not_finite_fail_and_leave_the_picture_as_it_was(digits_run, tmp_path):
    tensors, config = read_model(digits_run)
    broken, picture = tmp_path / "broken.safetensors", tmp_path / "out.png"
    save_model(broken, {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}, config)
    draw(digits_run, tmp_path)
    before = picture.read_bytes()
    code, out, err = call(sample, "--checkpoint", broken, "--output", picture, "--steps", 2, "--num-images", 1)
    assert code == 1 and out == "" and "Traceback" not in err
    assert err.splitlines()[-1].startswith("sample.py: failed: ") and "not finite" in err
    assert picture.read_bytes() == before


def test_without_published_weights_the_flag_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "PUBLISHED", tmp_path / "none.safetensors")
    assert "--checkpoint" in line_of_refusal()


def test_refusals_from_the_shell(tmp_path):
    refused(run_forked("sample.py", "--checkpoint", tmp_path / "none"), "sample.py: error: ", "none")
    refused(run_forked("sample.py", "--num-images", 0), "sample.py: error: --num-images: must be", "0")


def test_the_default_number_of_steps_suits_a_model_of_few_timesteps(digits_run, tmp_path):
    code, _, err = call(sample, "--checkpoint", digits_run, "--output", tmp_path / "a.png", "--num-images", 1)
    assert code == 0, err


def test_the_config_of_a_file_survives_json(digits_run):
    """What sample.py rebuilds from is plain JSON, equal to what the run's config.json records."""
    assert read_model(digits_run)[1] == json.loads((digits_run / "config.json").read_text())["model"]
