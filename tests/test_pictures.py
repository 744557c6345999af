"""Grids, animations and curves, read back from the files."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from images.pictures import class_columns, save_gif, save_grid, save_loss_curves
from runtime.errors import RunFailed


def test_a_grid_shows_every_image_in_its_place_enlarged(tmp_path):
    images = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, 3, 8, 8)
    save_grid(images, tmp_path / "grid.png")
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    assert pixels.shape == ((2 * 9 + 1) * 8, (3 * 9 + 1) * 8, 3)  # 3 columns, a pixel of frame, 8 times enlarged
    for i, expected in enumerate([0, 64, 128, 191, 255]):
        row, column = divmod(i, 3)
        assert pixels[8 * (9 * row + 5), 8 * (9 * column + 5)].tolist() == pytest.approx([expected] * 3, abs=1)


def test_images_that_are_not_finite_are_not_drawn(tmp_path):
    images = torch.zeros(2, 1, 8, 8)
    images[1, 0, 3, 3] = float("nan")
    with pytest.raises(RunFailed, match="not finite"):
        save_grid(images, tmp_path / "grid.png")
    assert not list(tmp_path.iterdir())


def test_an_animation_has_its_frames(tmp_path):
    frames = [{"true": torch.full((4, 3, 8, 8), value)} for value in (-1.0, 0.0, 1.0)]
    save_gif(frames, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 3
        centres = []
        for i in range(3):
            gif.seek(i)
            centres.append(gif.convert("L").getpixel((40, 40)))
    assert centres == pytest.approx([0, 128, 255], abs=3)


def test_named_grids_stand_side_by_side_under_their_names(tmp_path):
    dark, bright = torch.full((4, 3, 8, 8), -1.0), torch.full((4, 3, 8, 8), 1.0)
    save_grid({"true": dark, "inspired": bright}, tmp_path / "both.png")
    save_grid(dark, tmp_path / "one.png")
    both, one = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("both.png", "one.png"))
    height, width, _ = one.shape
    caption, pixels = both[:-height], both[-height:]
    assert np.array_equal(pixels[:, :width], one)
    assert pixels[:, -width:].min() == 255
    assert caption[:, :width].min() < 100 and caption[:, -width:].min() < 100  # something is written above each


def test_columns_stand_under_their_names_and_a_long_name_stays_in_its_column(tmp_path):
    images = torch.full((6, 3, 8, 8), -1.0)
    save_grid(images, tmp_path / "names.png", ["a", "", "W" * 40])
    save_grid(images, tmp_path / "none.png")
    names, none = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("names.png", "none.png"))
    height, width, _ = none.shape  # three columns, too: about square
    assert np.array_equal(names[-height:], none)
    written = (names[:-height] < 100).any(axis=(0, 2))
    column = (width - 8) // 3  # and the frame's last line
    first, second, third = (written[i * column : (i + 1) * column].any() for i in range(3))
    assert first and third and not second


@pytest.mark.parametrize(
    "classes, images, columns",
    [
        *[(10, None, 10), (2, None, 8), (3, None, 9), (16, None, 16), (1, None, 0), (17, None, 0), (0, None, 0)],
        *[(10, 9, 0), (10, 10, 10), (2, 5, 4), (2, 100, 8)],
    ],
)
def test_each_class_has_its_own_columns_where_they_fit(classes, images, columns):
    turns = [f"class {i}" for i in range(classes)]
    names = class_columns(turns, images)
    assert len(names) == columns
    assert all(name == turns[i % classes] for i, name in enumerate(names))


def test_curves_of_a_run_that_was_stopped_before_its_first_line_are_empty_without_a_warning(tmp_path, recwarn):
    (tmp_path / "metrics.csv").write_text("step,images,seconds,loss,lr,held_out_loss\n")
    save_loss_curves(tmp_path / "metrics.csv", tmp_path / "loss.png")
    assert not recwarn.list


def test_curves_take_gaps_in_the_held_out_column(tmp_path):
    with open(tmp_path / "metrics.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["step", "images", "loss", "held_out_loss"], [1, 8, 0.5, ""], [2, 16, 0.4, 0.45]])
    save_loss_curves(tmp_path / "metrics.csv", tmp_path / "loss.png")
    pixels = np.asarray(Image.open(tmp_path / "loss.png").convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10  # two coloured curves, not a blank page
