"""Progress bars: in place on a terminal, and elsewhere, as in a log file, a line every half minute."""

import sys
from typing import TextIO

from tqdm import tqdm

SECONDS_PER_LINE = 30


class _Lines:
    """What tqdm writes to redraw a bar in place, as lines of `stream`."""

    encoding = "utf-8"

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.last = ""

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line and line != self.last:
            self.stream.write(f"{line}\n")
            self.stream.flush()
            self.last = line

    def flush(self) -> None:
        """Each line is flushed already."""


def progress_bar(*, mininterval: float = 0.5, **options) -> tqdm:
    """A tqdm bar on stderr, with tqdm's options. mininterval: seconds between two drawings on a terminal."""
    if sys.stderr.isatty():
        return tqdm(mininterval=mininterval, **options)
    # a line only after half a minute and at the end: a delay of nearly nothing leaves out the first one
    every = {"mininterval": SECONDS_PER_LINE, "maxinterval": SECONDS_PER_LINE, "miniters": 1}
    lines = {"file": _Lines(sys.stderr), "ascii": True, "delay": 1e-9}
    return tqdm(**{**every, **lines, **options})
