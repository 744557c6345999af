"""The characters of a font as a data set: which are drawn, where, and what train.py's loader makes of them."""

import shutil

import matplotlib
import numpy as np
import pytest
from conftest import call, refused, run_command
from matplotlib.font_manager import FontProperties
from matplotlib.ft2font import FT2Font
from matplotlib.path import Path as Outline
from matplotlib.textpath import TextPath
from PIL import Image

from data import render_font
from data.render_font import chosen, drawn, fitted, read_font
from images.datasets import load_images

FONT = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"


def rendered(folder, *arguments):
    """(what the command prints, the images by name as arrays of grey values)."""
    code, out, err = call(render_font, FONT, "--output", folder, *arguments)
    assert (code, err) == (0, "")
    return out, {path.name: np.asarray(Image.open(path)) for path in sorted(folder.iterdir())}


def covered(char: str, size: int, x: int, y: int, em: float) -> np.ndarray:
    """How much of each pixel of (size, size) a character's outline covers, from 6x6 points per pixel."""
    points = (np.arange(6 * size) + 0.5) / 6
    grid = np.stack(np.meshgrid(points, y - points), axis=-1).reshape(-1, 2)  # a font's y axis points upwards
    contours = TextPath((x, 0), char, size=em, prop=FontProperties(fname=FONT)).to_polygons()
    inside = np.logical_xor.reduce([Outline(contour).contains_points(grid) for contour in contours])
    return inside.reshape(size, 6, size, 6).mean((1, 3))


def test_the_sets_are_the_two_levels_of_the_japanese_standard():
    both, first = chosen("all-kanji"), chosen("kanji")
    assert (len(first), len(both), len(set(both))) == (2965, 6355, 6355)
    assert both[:2965] == first and (both[0], both[2964], both[2965], both[-1]) == ("亜", "腕", "弌", "熙")
    assert {"一", "愛", "龍"} <= set(first) and {"龜", "鬱"} <= set(both) - set(first)
    codes = [char.encode("iso2022_jp") for char in both]  # ESC $ B, row, cell, ESC ( B
    assert codes == sorted(codes) and {code[3] - 0x20 for code in codes} == {*range(16, 85)}


@pytest.mark.parametrize("size", [32, 64])
def test_an_image_is_the_outline_of_its_character_where_it_should_be(size):
    characters, font = list("ABOQgjx8é§"), read_font(FONT)
    places, em = fitted(font, characters, size)
    scaled = font.font_variant(size=em)
    ink = [1 - np.asarray(drawn(char, scaled, size, places[char])) / 255 for char in characters]
    outlines = [covered(char, size, *places[char], em) for char in characters]
    alike = np.corrcoef([image.ravel() for image in ink], [outline.ravel() for outline in outlines])
    alike = alike[: len(ink), len(ink) :]  # each image with each outline; the font's hints move strokes a little
    assert alike.diagonal().min() > 0.85 and (alike.argmax(1) == np.arange(len(ink))).all()
    np.testing.assert_allclose(np.sum(ink, (1, 2)), np.sum(outlines, (1, 2)), rtol=0.2)


def test_all_images_have_one_size_and_one_baseline_and_the_ink_fills_them(tmp_path):
    _, images = rendered(tmp_path / "letters", "--characters", "text:HoxÅj.")
    ink = {chr(int(name[2:-4], 16)): 255 - image.astype(int) for name, image in images.items()}
    boxes = {}
    for char, values in ink.items():
        assert values.shape == (32, 32) and values.max() == 255, "black on white"
        rows, columns = np.flatnonzero(values.max(1) > 64), np.flatnonzero(values.max(0) > 64)
        boxes[char] = rows[0], rows[-1], columns[0], columns[-1]
    assert boxes["H"][1] == boxes["x"][1] == boxes["."][1] < boxes["j"][1]
    assert boxes["Å"][0] in (1, 2) and boxes["j"][1] in (29, 30), "the highest and the lowest reach the margin"
    for char in "Hox.":
        assert abs(boxes[char][2] + boxes[char][3] - 31) <= 1, "in the middle"
    assert boxes["."][1] - boxes["."][0] < 5, "no character is enlarged for itself"


def test_what_the_font_lacks_or_shows_blank_is_left_out_and_counted(tmp_path):
    characters = [chr(number) for number in range(0x20, 0x500)] + list("漢字\u2003\u200b\U0010fffe")
    known = {chr(number) for number in FT2Font(FONT).get_charmap()}
    blank = set(" \xa0\u034f\u2003\u200b")
    assert set(fitted(read_font(FONT), characters, 32)[0]) == (known & set(characters)) - blank

    text = tmp_path / "text.txt"
    text.write_text("BAB A\n漢字\u200b A\r\n", encoding="utf-8-sig")
    out, images = rendered(tmp_path / "letters", "--characters", text)
    assert [*images] == ["U+0041.png", "U+0042.png"]
    assert out.splitlines() == [
        "left out: 3 characters that the font lacks or that have no ink",
        f"2 images of 32x32 pixels in {tmp_path / 'letters'}",
    ]


def test_the_loader_reads_the_folder_as_one_class_and_holds_out_every_fiftieth(tmp_path):
    text = "".join(map(chr, range(0x21, 0x7F)))
    out, images = rendered(tmp_path / "ascii", "--characters", f"text:{text}", "--size", "24")
    assert out == f"94 images of 24x24 pixels in {tmp_path / 'ascii'}\n"
    assert len({image.tobytes() for image in images.values()}) == 94
    data = load_images("folder", tmp_path / "ascii", 24)
    assert (data.shape, len(data.train), len(data.held_out), data.classes) == ((3, 24, 24), 92, 2, ("ascii",))
    assert not data.notes and not data.skipped
    read = np.stack([image for i, image in enumerate(images.values()) if i % 50 != 25])
    np.testing.assert_array_equal(data.train.numpy(), read[:, None].repeat(3, axis=1))


def test_the_same_command_gives_the_same_bytes_from_any_folder(tmp_path):
    words = [FONT, "--characters", "text:abc", "--size", 16, "--output"]
    for name in ("once", "again", "again"):  # also over what it wrote before
        done = run_command("data/render_font.py", *words, name, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (0, f"3 images of 16x16 pixels in {name}\n"), done.stderr
    once, again = ([path.read_bytes() for path in sorted((tmp_path / name).iterdir())] for name in ("once", "again"))
    assert len(once) == 3 and once == again


@pytest.mark.parametrize(
    "font, words, said",
    [
        ("nowhere.ttf", [], "FONT: cannot read nowhere.ttf: No such file"),
        (".", [], "FONT: cannot read .: Is a directory"),
        ("notes.txt", [], "FONT: notes.txt is not a font that can be rendered"),
        ("empty.txt", [], "FONT: empty.txt is not a font that can be rendered"),
        ("cut.ttf", [], "FONT: cut.ttf is not a font that can be rendered"),
        ("font.ttf", ["--characters", "text:漢字"], "FONT: the font has none of the 2 characters"),
        (
            "font.ttf",
            ["--characters", "kana"],
            "--characters: cannot read kana: No such file or directory; known sets are",
        ),
        ("font.ttf", ["--characters", "text: "], "--characters: text: has no characters"),
        ("font.ttf", ["--characters", "empty.txt"], "--characters: empty.txt has no characters"),
        ("font.ttf", ["--characters", "font.ttf"], "is not UTF-8 text"),
        ("font.ttf", ["--size", "0"], "--size: must be an integer of at least 8, got 0"),
        ("font.ttf", ["--characters", "text:A", "--output", "notes.txt"], "--output: notes.txt is not a folder"),
        (
            "font.ttf",
            ["--characters", "text:A", "--output", "full"],
            "--output: full has other files, such as U+0042.png",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_written(tmp_path, monkeypatch, font, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("no font")
    (tmp_path / "empty.txt").write_text("")
    shutil.copy(FONT, tmp_path / "font.ttf")
    (tmp_path / "cut.ttf").write_bytes((tmp_path / "font.ttf").read_bytes()[:20_000])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "U+0042.png").write_text("")
    before = sorted(tmp_path.rglob("*"))
    code, out, err = call(render_font, font, "--output", "new", *words)
    assert (code, out, err.count("\n")) == (2, "", 1) and said in err, err
    assert sorted(tmp_path.rglob("*")) == before


def test_the_font_and_the_folder_have_to_be_named():
    refused(run_command("data/render_font.py"), "render_font.py: error: the following arguments are required: FONT")
