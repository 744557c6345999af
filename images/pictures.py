"""The pictures that the commands write: grids of images, animations and loss curves."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from runtime.errors import RunFailed
from runtime.files import PRODUCER, atomic_path, save_figure

GAP, CAPTION = 16, 28  # pixels between two grids, and above a grid for its name
NAME_SIZE, SMALLEST_SIZE = 16, 8  # pixels; of the letters of a name
MOST_COLUMNS = 16  # of a grid with a column for each class
SMALLEST_SIDE = 64  # pixels; the images of a grid are enlarged to about this side, so that a person sees them


def class_columns(turns: Sequence[str], num_images: int | None = None) -> list[str]:
    """The name of each column of a grid whose images take turns over these classes: each class has its own columns.

    There are about eight columns, or one for each class, and none for fewer than 2 or more than MOST_COLUMNS classes,
    nor for fewer images than classes.
    """
    if not 2 <= len(turns) <= min(MOST_COLUMNS, num_images or MOST_COLUMNS):
        return []
    repeats = max(1, min(round(8 / len(turns)), (num_images or MOST_COLUMNS) // len(turns)))
    return list(turns) * repeats


def grid_image(images: Tensor, columns: int | None = None, names: Sequence[str] = ()) -> Image.Image:
    """A grid of images (N, C, H, W) in [-1, 1], enlarged by a whole factor; about square unless `columns` is given.

    names: of the columns, written above them; there are as many columns, then. Raises RunFailed if a value is not
    finite, since such an image would be drawn black.
    """
    if not torch.isfinite(images).all():
        raise RunFailed("the images have values that are not finite; no picture was written")
    columns = len(names) or columns or math.ceil(math.sqrt(len(images)))
    rows, (height, width) = math.ceil(len(images) / columns), images.shape[-2:]
    pixels = ((images.clamp(-1, 1) + 1) / 2 * 255).round().byte().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    picture = Image.new("RGB", (columns * (width + 1) + 1, rows * (height + 1) + 1), "white")
    for i, image in enumerate(pixels):
        picture.paste(Image.fromarray(image), (i % columns * (width + 1) + 1, i // columns * (height + 1) + 1))
    zoom = max(1, SMALLEST_SIDE // images.shape[-1])
    picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
    if not names:
        return picture
    whole = Image.new("RGB", (picture.width, picture.height + CAPTION), "white")
    whole.paste(picture, (0, CAPTION))
    text, room = ImageDraw.Draw(whole), zoom * (width + 1)
    font, shown = fitting(names, zoom * width)
    for i, name in enumerate(shown):
        text.text((i * room + (room + zoom) // 2, CAPTION // 2), name, "black", anchor="mm", font=font)
    return whole


def fitting(names: Sequence[str], width: int) -> tuple[ImageFont.FreeTypeFont | ImageFont.ImageFont, list[str]]:
    """A font in which each name takes at most `width` pixels, and the names, shortened if no font is small enough."""
    for size in range(NAME_SIZE, SMALLEST_SIZE - 1, -1):
        font = ImageFont.load_default(size)
        if all(font.getlength(name) <= width for name in names):
            break
    shown = []
    for name in names:
        cut = name
        while cut and font.getlength(cut if cut == name else f"{cut}.") > width:
            cut = cut[:-1]
        shown.append(name if cut == name else f"{cut}.")
    return font, shown


def grids_beside(grids: dict[str, Tensor], names: Sequence[str] = ()) -> Image.Image:
    """Grids of images (N, C, H, W) in [-1, 1] side by side, each under its name; a single grid has no name.

    names: of the columns of every grid.
    """
    pictures = [grid_image(images, names=names) for images in grids.values()]
    if len(pictures) == 1:
        return pictures[0]
    font = ImageFont.load_default(NAME_SIZE)
    widths = [max(p.width, math.ceil(font.getlength(name))) for name, p in zip(grids, pictures, strict=True)]
    height = CAPTION + max(picture.height for picture in pictures)
    whole = Image.new("RGB", (sum(widths) + GAP * (len(widths) - 1), height), "white")
    text, left = ImageDraw.Draw(whole), 0
    for name, picture, width in zip(grids, pictures, widths, strict=True):
        text.text((left + width // 2, CAPTION // 2), name, "black", anchor="mm", font=font)
        whole.paste(picture, (left, CAPTION))
        left += width + GAP
    return whole


def save_grid(images: Tensor | dict[str, Tensor], path: str | Path, names: Sequence[str] = ()) -> None:
    """Write a grid of images (N, C, H, W) in [-1, 1], or several named grids side by side, as PNG.

    names: of the columns of every grid.
    """
    picture = grids_beside(images if isinstance(images, dict) else {"": images}, names)
    mark = PngInfo()
    mark.add_text("Software", PRODUCER)
    with atomic_path(path) as temporary:
        picture.save(temporary, "PNG", pnginfo=mark, compress_level=4)  # in half of level 6's time; 1 % larger


def save_gif(frames: Sequence[dict[str, Tensor]], path: str | Path, names: Sequence[str] = ()) -> None:
    """Write an animation of grids, each frame as for `grids_beside`; the last frame stays for two seconds."""
    pictures = [grids_beside(frame, names) for frame in frames]
    timing = {"duration": [80] * (len(pictures) - 1) + [2000], "loop": 0}
    with atomic_path(path) as temporary:
        pictures[0].save(temporary, "GIF", save_all=True, append_images=pictures[1:], comment=PRODUCER, **timing)


def save_labelled_rows(rows: dict[str, Tensor], path: str | Path) -> None:
    """Write rows of images as PNG, each row (N, C, H, W) in [-1, 1] with its label on the left."""
    from matplotlib.figure import Figure  # no pyplot: it would look for a display

    count = max(map(len, rows.values()))
    figure = Figure(figsize=(0.9 * count + 2.2, 0.95 * len(rows)), layout="constrained")
    for axes, (label, images) in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows.items(), strict=True):
        axes.imshow(grid_image(images, columns=count), interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        axes.set_ylabel(label, rotation=0, ha="right", va="center")
        axes.spines[:].set_visible(False)
    save_figure(path, figure, dpi=120)


def save_loss_curves(metrics: Path, path: str | Path) -> None:
    """Plot the training loss and held-out eps-MSE of a `metrics.csv` against the images seen, as PNG."""
    from matplotlib.figure import Figure  # no pyplot: it would look for a display

    with open(metrics, newline="") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for column, label, style in (("loss", "training loss", "-"), ("held_out_loss", "held-out eps-MSE (EMA)", "o-")):
        points = [(int(row["images"]), float(row[column])) for row in rows if row[column]]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1, markersize=4)
    axes.set(xlabel="images seen", ylabel="mean squared error", yscale="log")
    axes.grid(alpha=0.3, which="both")
    if axes.lines:
        axes.legend()
    save_figure(path, figure, dpi=120)
