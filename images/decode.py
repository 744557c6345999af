"""One image file as uint8 pixels, and a process that decodes many of them: `python -m images.decode`.

This module imports neither torch nor anything else that takes seconds, so that one process per core starts at once.
"""

import json
import os
import struct
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from runtime.errors import reason
from runtime.files import PRODUCER

BACKGROUND = (255, 255, 255)  # what shows through transparent pixels
# endings that Pillow knows but that are no still images, or that need another program
NO_STILLS = {".mpg", ".mpeg", ".bufr", ".grib", ".h5", ".hdf", ".iim", ".emf", ".wmf", ".eps", ".ps", ".fit", ".fits"}
# TIFF tags MinSampleValue, MaxSampleValue, SMinSampleValue and SMaxSampleValue
DECLARED = ((280, 281), (340, 341))


class OwnPicture(Exception):
    """The file is a picture that one of the commands wrote: a grid, an animation or a plot."""


class UnknownRange(Exception):
    """The values of a deep grey image, of which the file does not say which one is white."""

    def __init__(self, least: int, largest: int):
        super().__init__(f"values from {least} to {largest}")
        self.largest = largest


def readable_suffixes() -> set[str]:
    """The endings of all still image formats that Pillow reads on this machine."""
    Image.init()
    return {end for end, name in Image.registered_extensions().items() if name in Image.OPEN} - NO_STILLS


def decode(path: str, height: int, width: int, white: int | None = None) -> np.ndarray:
    """One image as uint8 (3, height, width): upright, resized to cover the rectangle, cropped in the centre.

    Transparent pixels are composited on white. Grey of more than 8 bits is scaled by the range that the file declares,
    else by `white`. Raises UnknownRange without either, OwnPicture for our own pictures, and nearly anything for a
    damaged file.
    """
    with Image.open(path) as image:
        if PRODUCER in (str(image.info.get("Software", "")), _text(image.info.get("comment", b""))):
            raise OwnPicture
        declared = _declared_range(path, image) if image.mode.startswith("I") else None
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):
            image = _grey(np.asarray(image).astype(np.int64), declared, white)
        if image.mode == "F":
            raise ValueError("floating-point pixels; which values are black and white is not known")
        if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
            with_alpha = image.convert("RGBA")
            image = Image.new("RGB", image.size, BACKGROUND)
            image.paste(with_alpha, mask=with_alpha.getchannel("A"))
        fitted = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.BICUBIC)
    return np.asarray(fitted).transpose(2, 0, 1)


def _text(value: str | bytes) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else value


def _declared_range(path: str, image: Image.Image) -> tuple[int, int] | None:
    """(black, white) as the file declares them: TIFF's sample values, or the significant bits of a PNG."""
    tags = getattr(image, "tag_v2", {})
    for least, largest in DECLARED:
        if largest in tags:
            black, white = (np.atleast_1d(tags.get(tag, 0))[0] for tag in (least, largest))
            return (int(black), int(white)) if white > black else None
    if image.format == "PNG":
        bits = _significant_bits(path)
        return (0, (1 << bits) - 1) if bits else None
    return None


def _significant_bits(path: str) -> int | None:
    """The first value of a PNG's sBIT chunk, which stands before the pixels."""
    with open(path, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"sBIT":
                return file.read(1)[0]
            if kind == b"IDAT":
                return None
            file.seek(length + 4, os.SEEK_CUR)
    return None


def _grey(values: np.ndarray, declared: tuple[int, int] | None, white: int | None) -> Image.Image:
    """Grey pixels of 8 bits from deeper ones."""
    least, largest = int(values.min()), int(values.max())
    if declared is None and white is None:
        raise UnknownRange(least, largest)
    black, white = declared or (0, white or 1)
    if least < black or largest > white:
        raise ValueError(f"values from {least} to {largest} lie outside of the range {black} to {white}")
    grey = ((values - black) * 255 // (white - black)).astype(np.uint8)
    if least < largest and grey.min() == grey.max():
        raise ValueError(f"values from {least} to {largest} of a range to {white} would become one grey")
    return Image.fromarray(grey)


def outcome(path: str, height: int, width: int, white: int | None = None) -> np.ndarray | dict[str, Any]:
    """The pixels of `decode`, or why there are none.

    That is {"bad": line}, {"own": True} for a picture of ours, or {"largest": value} for an unknown range.
    """
    try:
        return decode(path, height, width, white)
    except OwnPicture:
        return {"own": True}
    except UnknownRange as error:
        return {"largest": error.largest}
    except Exception as error:  # Pillow's decoders raise nearly anything for a damaged file
        return {"bad": f"cannot read {path}: {reason(error)}"}


@contextmanager
def strictly() -> Iterator[None]:
    """A block in which a huge image is refused and not decoded, and Pillow makes no remarks on odd metadata."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def main() -> None:
    """Decode the paths on stdin, each ended by a zero byte; their outcomes go to stdout.

    Arguments: height, width, white (0 if unknown). An outcome is a length, 4 bytes, and then a JSON text of that length
    or, after a length of 0, the pixels.
    """
    height, width, white = map(int, sys.argv[1:])
    out = sys.stdout.buffer
    with strictly():
        for name in sys.stdin.buffer.read().split(b"\0")[:-1]:
            found = outcome(os.fsdecode(name), height, width, white or None)
            if isinstance(found, dict):
                text = json.dumps(found).encode()
                out.write(struct.pack(">I", len(text)) + text)
            else:
                out.write(struct.pack(">I", 0) + found.tobytes())
    out.flush()


if __name__ == "__main__":
    main()
