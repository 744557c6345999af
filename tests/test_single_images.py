"""`sample.py --output` with an archive or a folder: the single images, as other programs read them."""

import csv

import numpy as np
import pytest
import torch
from conftest import call
from PIL import Image

import sample
from images.single import save_folder, save_npz

DRAW = ["--num-images", 5, "--steps", 2, "--seed", 7, "--device", "cpu"]


def test_the_archive_the_folder_and_the_grid_have_the_same_images(short_class_run, tmp_path):
    paths = [tmp_path / "grid.png", tmp_path / "all.npz", f"{tmp_path}/singles/"]
    code, out, err = call(sample, "--checkpoint", short_class_run, *DRAW, "--output", *paths)
    assert code == 0 and out.splitlines() == [str(tmp_path / name) for name in ("grid.png", "all.npz", "singles")], err
    arrays = np.load(tmp_path / "all.npz")
    assert arrays["arr_0"].shape == (5, 16, 16, 3) and arrays["arr_0"].dtype == np.uint8
    assert arrays["seeds"].tolist() == [7, 8, 9, 10, 11] and arrays["classes"].tolist() == ["cats", "dogs"]
    assert arrays["labels"].tolist() == [0, 1, 0, 1, 0]
    with open(tmp_path / "singles/images.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [f"{['cats', 'dogs'][i % 2]}/{7 + i:06d}.png" for i in range(5)]
    for row, pixels in zip(rows, arrays["arr_0"], strict=True):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "singles" / row["file"])), pixels)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    zoom = 64 // 16
    grid = grid[-2 * zoom * 17 - zoom :]  # without the names of its columns: two rows
    assert np.array_equal(grid[zoom : zoom * 17 : zoom, zoom : zoom * 17 : zoom], arrays["arr_0"][0])


def test_image_i_of_the_archive_is_that_of_its_seed(short_digits_run, tmp_path):
    for name, seed, count in (("all", 7, 3), ("one", 9, 1)):
        options = ["--num-images", count, "--steps", 2, "--seed", seed, "--output", tmp_path / f"{name}.npz"]
        code, _, err = call(sample, "--checkpoint", short_digits_run, *options)
        assert code == 0, err
    whole, one = (np.load(tmp_path / f"{name}.npz") for name in ("all", "one"))
    assert "labels" not in whole and np.array_equal(whole["arr_0"][2:], one["arr_0"])


@pytest.mark.parametrize("name", ["a/b", "..", "", "nul\0"])
def test_a_class_that_no_folder_can_be_named_after_goes_under_its_number(name, tmp_path):
    save_folder(torch.zeros(1, 1, 4, 4), torch.tensor([1]), ["x", name], 3, tmp_path)
    assert (tmp_path / "1" / "000003.png").exists()


def test_grey_levels_are_exact(tmp_path):
    levels = torch.arange(256).view(1, 1, 16, 16)
    save_npz(levels / 127.5 - 1, None, [], 0, tmp_path / "a.npz")
    assert np.array_equal(np.load(tmp_path / "a.npz")["arr_0"][0, ..., 2], levels[0, 0].numpy())


def test_other_endings_and_several_models_are_refused(short_digits_run, short_class_run, tmp_path):
    for options, word in (
        (["--output", tmp_path / "a.jpg"], "--output: must end in .png"),
        (["--output", tmp_path / "a.png", f"{tmp_path}/./a.png"], "--output"),
        (
            ["--output", tmp_path / "a.npz", "--checkpoint", short_digits_run, f"{short_digits_run}/model.safetensors"],
            "one",
        ),
    ):
        code, _, err = call(sample, "--checkpoint", short_digits_run, *DRAW, *options)
        assert code == 2 and word in err and err.count("\n") == 1, err
