"""What the commands share: argument parsing with one-line errors, stop signals, and exit codes.

0 done; 1 the run failed; 2 something the user can mend; 130 interrupted, after saving.
"""

import argparse
import math
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from errors import RunFailed, UserError


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        tells = action.default is not None and action.default is not False
        return super()._get_help_string(action) if tells else action.help


class Parser(argparse.ArgumentParser):
    """argparse with `--help` that shows defaults, one-line errors, and `--batch_size` accepted for `--batch-size`."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=_HelpFormatter, allow_abbrev=False, **kwargs)

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        return super().parse_args([_hyphens(arg) for arg in (sys.argv[1:] if args is None else args)], namespace)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {' '.join(message.removeprefix('argument ').split())}\n")

    def given(self, args: Sequence[str] | None = None) -> dict[str, object]:
        """Only the options that stand on the command line."""
        defaults = {action: action.default for action in self._actions}
        for action in self._actions:
            action.default = argparse.SUPPRESS
        try:
            return vars(self.parse_args(args))
        finally:
            for action, default in defaults.items():
                action.default = default


def _hyphens(arg: str) -> str:
    name, equals, value = arg.partition("=")
    return name.replace("_", "-") + equals + value if arg.startswith("--") else arg


def integer(minimum: int, maximum: int = 10**12) -> Callable[[str], int]:
    """An argparse type: an integer from `minimum` to `maximum`."""
    kind = {0: "a non-negative integer", 1: "a positive integer"}.get(minimum, f"an integer of at least {minimum}")

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value > maximum:
            raise argparse.ArgumentTypeError(f"must be at most {maximum}, got {text}")
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be {kind}, got {text}")
        return value

    return parse


def number(kind: str, allowed: Callable[[float], bool]) -> Callable[[str], float]:
    """An argparse type: a number that is `allowed`, described as `kind`; never one that is not finite."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not allowed(value):
            raise argparse.ArgumentTypeError(f"must be a number {kind}, got {text}")
        return value

    return parse


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list into which the first SIGINT or SIGTERM is put; a second one acts as if nothing had caught it."""
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _frame) -> None:
        received.append(number)
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        restore()


def run(prog: str, main: Callable[[], None]) -> None:
    """Call main() and leave the process with the exit code of how it ended, one line on stderr if badly."""
    try:
        main()
    except UserError as error:
        _leave(2, f"{prog}: error: {error}")
    except RunFailed as error:
        _leave(1, f"{prog}: failed: {error}")
    except KeyboardInterrupt as interrupt:
        _leave(130, f"{prog}: interrupted{f': {interrupt}' if str(interrupt) else ''}")
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        sys.stderr.close()
        sys.exit(1)


def _leave(code: int, message: str) -> None:
    print(" ".join(message.split()), file=sys.stderr)
    sys.exit(code)
