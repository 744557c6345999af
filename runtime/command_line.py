"""What the commands share: argument parsing with one-line errors, stop signals, and exit codes.

Exit codes: 0 done; 1 the run failed; 2 something that the user can mend; 130 interrupted, after saving.
"""

import argparse
import contextlib
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from runtime.errors import RunFailed, UserError

# closing the terminal sends SIGHUP; Windows has none
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        tells = action.default is not None and action.default is not False
        return super()._get_help_string(action) if tells else action.help


class Parser(argparse.ArgumentParser):
    """argparse with defaults in `--help`, UserError for errors, and `--batch_size` accepted for `--batch-size`."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=_HelpFormatter, allow_abbrev=False, **kwargs)

    def parse_args(self, args: Sequence[str] | None = None, namespace=None) -> argparse.Namespace:  # type: ignore[override]
        return super().parse_args([_hyphens(arg) for arg in (sys.argv[1:] if args is None else args)], namespace)

    def error(self, message: str):
        raise UserError(message.removeprefix("argument "))

    def take_defaults(self, defaults: dict[str, object]) -> None:
        """Set the default of every option that has a value here."""
        for action in self._actions:
            action.default = defaults.get(action.dest, action.default)

    def given(self, args: Sequence[str] | None = None) -> dict[str, object]:
        """Only the options that the user has given on the command line."""
        defaults = {action: action.default for action in self._actions}
        for action in self._actions:
            action.default = argparse.SUPPRESS
        try:
            return vars(self.parse_args(args))
        finally:
            for action, default in defaults.items():
                action.default = default

    def check(self, values: dict[str, object]) -> None:
        """Check values as if they had been given on the command line, if they are options. Raises UserError."""
        names = {action.dest for action in self._actions}
        flags = [(spelled(name), value) for name, value in values.items() if name in names]
        on = [flag for flag, value in flags if value is True]
        self.parse_args([*on, *(f"{flag}={value}" for flag, value in flags if value not in (None, True, False))])


def spelled(name: str) -> str:
    """The flag of an option's name: `batch_size` is `--batch-size`."""
    return f"--{name.replace('_', '-')}"


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
    """An argparse type: a finite number that is `allowed`; errors describe it as `kind`."""

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
def _handled_by(handler: Callable) -> Iterator[None]:
    """Let `handler` handle the stop signals. A signal that is ignored, as SIGHUP is under `nohup`, stays ignored."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    caught = [number for number, previous in before.items() if previous is not signal.SIG_IGN]
    for number in caught:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, before[number])


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that receives the first stop signal; a second signal raises KeyboardInterrupt at once."""
    received: list[int] = []

    def note(number: int, frame) -> None:
        if received:
            signal.default_int_handler(number, frame)
        received.append(number)

    with _handled_by(note):
        yield received


def run(prog: str, main: Callable[[], None]) -> None:
    """Call main() and leave the process with the right exit code, and with one line on stderr if it failed."""
    sys.excepthook = sys.__excepthook__  # the imports that `interrupted_import` guards are over
    if sys.stdout.errors == "strict":  # a name that the terminal cannot show should not end the run
        sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with _handled_by(signal.default_int_handler):
            main()
            sys.stdout.flush()
    except UserError as error:
        _leave(2, f"{prog}: error: {error}")
    except RunFailed as error:
        _leave(1, f"{prog}: failed: {error}")
    except KeyboardInterrupt as interrupt:
        _leave(130, f"{prog}: interrupted{f': {interrupt}' if str(interrupt) else ''}")
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        _leave(1)
    except OSError as error:  # such as output redirected to a full disk
        _leave(1, f"{prog}: failed: {error}")


def _leave(code: int, message: str = "") -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        if message:
            print(" ".join(message.split()), file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # reported above; the interpreter would report it again at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
