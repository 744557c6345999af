"""Render the characters of a font as small grey images, which train.py reads as a data set.

python data/render_font.py NotoSansCJK-Regular.ttc --output data/kanji
python data/render_font.py FONT --characters all-kanji --size 48 --output data/all-kanji
python data/render_font.py FONT --characters text:0123456789 --output data/figures
python train.py --dataset folder --data-dir data/kanji

Each image is one character, black on white, and is named by its code point: U+4E9C.png. The font's own layout is kept:
all characters have one size and one baseline, and each stands in the middle of its advance width. The size is the
largest that leaves a margin of about a 32nd of the side, at least a pixel, around the ink of all.
"""

import sys
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # Python looks for modules beside this file only

from runtime import interrupted_import  # noqa: F401  # isort: skip

from PIL import Image, ImageDraw, ImageFont, ImageOps

from runtime.command_line import Parser, file_or_folder, integer, run
from runtime.errors import UserError, reason
from runtime.files import check_writable, errors_named, make_folder

PROG = "render_font.py"
SETS = {"kanji": range(16, 48), "all-kanji": range(16, 85)}  # name -> rows of JIS X 0208
TEXT = "text:"  # what the characters themselves begin with, so that they are not taken for a file
EM = 100  # pixels; the size at which glyphs are measured and compared
ROOM = 4 * EM  # pixels; the side of the square in which that is done: some glyphs are far wider than an em
NO_CHARACTER = chr(0x10FFFF)  # Unicode gives it to no character, so that every font shows its missing-glyph sign


def parser() -> Parser:
    """All flags."""
    p = Parser(prog=PROG, description="Render the characters of a font as images, for train.py --dataset folder.")
    add = p.add_argument
    # fmt: off
    add("font", type=file_or_folder, metavar="FONT", help="a TTF, OTF or TTC file; of a collection the first font")
    add("--characters", type=file_or_folder, default="kanji",
        help="kanji (the 2,965 of JIS X 0208 level 1), all-kanji (the 6,355 of levels 1 and 2), a UTF-8 text file with "
        "the characters, or text:ABC for the characters A, B and C")
    add("--size", type=integer(8, 1024, "larger images would need a larger network"), default=32,
        help="the side of the images in pixels")
    add("--output", type=file_or_folder, required=True, metavar="FOLDER", help="where the images are written, as PNG")
    # fmt: on
    return p


def main() -> None:
    """Parse, check, render."""
    args = parser().parse_args()
    font, characters, folder = read_font(args.font), chosen(args.characters), Path(args.output)
    check_writable(folder, "--output")
    try:
        places, em = fitted(font, characters, args.size)
    except OSError as error:  # an outline is damaged
        raise UserError(f"FONT: cannot render {args.font}: {reason(error)}") from error
    paths = {folder / f"U+{ord(char):04X}.png": char for char in places}
    make_folder(folder, "--output")
    check_alone(folder, paths)
    scaled = font.font_variant(size=em)
    for path, char in paths.items():
        with errors_named(path):
            drawn(char, scaled, args.size, places[char]).save(path)
    if len(places) < len(characters):
        print(f"left out: {len(characters) - len(places):,} characters that the font lacks or that have no ink")
    print(f"{len(places):,} images of {args.size}x{args.size} pixels in {folder}")


def read_font(path: str) -> ImageFont.FreeTypeFont:
    """The first font of a file, at the measuring size. Raises UserError."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"FONT: cannot read {path}: {reason(error)}") from error
    try:  # the basic layout is the same on every machine, and shows each character by the glyph that is meant for it
        return ImageFont.truetype(BytesIO(content), EM, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise UserError(f"FONT: {path} is not a font that can be rendered: {reason(error)}") from error


def chosen(characters: str) -> list[str]:
    """The different characters of a set, of a text file, or of `text:` and the characters. Raises UserError."""
    if characters in SETS:
        return kanji(SETS[characters])
    text = characters.removeprefix(TEXT)
    if text == characters:
        try:
            text = Path(characters).read_text("utf-8-sig")
        except OSError as error:
            known = f"known sets are {', '.join(SETS)}; {TEXT}ABC gives the characters themselves"
            raise UserError(f"--characters: cannot read {characters}: {reason(error)}; {known}") from error
        except ValueError as error:
            raise UserError(f"--characters: {characters} is not UTF-8 text") from error
    found = [char for char in dict.fromkeys(text) if not char.isspace()]
    if not found:
        raise UserError(f"--characters: {characters} has no characters")
    return found


def kanji(rows: Iterable[int]) -> list[str]:
    """The characters in these rows of JIS X 0208, which has 94 cells per row, some of them empty."""
    cells = (bytes((0xA0 + row, 0xA0 + cell)) for row in rows for cell in range(1, 95))
    return [char for cell in cells for char in cell.decode("euc_jp", "ignore")]


def fitted(font: ImageFont.FreeTypeFont, characters: list[str], size: int) -> tuple[dict[str, tuple[int, int]], int]:
    """How to fit characters into squares of `size` pixels: the place of each that the font can show, and the em.

    A place (x, y), in pixels from the top left of an image, is where the character begins on its baseline. It and the
    em, the size of the font, are whole pixels: the font's hints then make the strokes sharpest. Pillow does not tell
    which glyph a character gets; the sign for a missing one is known by its looks. Raises UserError if the font can
    show none of the characters.
    """
    start = ROOM // 2
    missing = drawn(NO_CHARACTER, font, ROOM, (start, start))
    centres, halves, tops, bottoms = {}, [], [], []
    for char in characters:
        image = drawn(char, font, ROOM, (start, start))
        box = ImageOps.invert(image).getbbox()
        if box and image != missing:
            left, top, right, bottom = (edge - start for edge in box)
            centres[char] = centre = font.getlength(char) / 2
            halves.append(max(centre - left, right - centre))
            tops.append(top)
            bottoms.append(bottom)
    if not centres:
        raise UserError(f"FONT: the font has none of the {len(characters):,} characters")
    top, bottom = min(tops), max(bottoms)
    em = max(1, int(EM * (size - 2 * max(1, size / 32)) / max(2 * max(halves), bottom - top)))
    scale = em / EM
    y = round(size / 2 - (top + bottom) / 2 * scale)
    return {char: (round(size / 2 - centre * scale), y) for char, centre in centres.items()}, em


def drawn(char: str, font: ImageFont.FreeTypeFont, side: int, place: tuple[int, int]) -> Image.Image:
    """A grey square image of one character, black on white, that begins on its baseline at `place`."""
    image = Image.new("L", (side, side), "white")
    ImageDraw.Draw(image).text(place, char, "black", font, anchor="ls")
    return image


def check_alone(folder: Path, paths: Iterable[Path]) -> None:
    """Raise UserError if the folder has other files than these, which would be taken for characters of the font."""
    others = sorted(path.name for path in set(folder.iterdir()).difference(paths) if not path.name.startswith("."))
    if others:
        raise UserError(f"--output: {folder} has other files, such as {others[0]}; name an empty folder")


if __name__ == "__main__":
    run(PROG, main)
