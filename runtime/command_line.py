"""What the commands share: argument parsing with one-line errors, stop signals, and exit codes.

Exit codes: 0 done; 1 the run failed; 2 something that the user can mend; 130 interrupted, after saving.
"""

import argparse
import contextlib
import gc
import math
import os
import signal
import sys
import threading
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
        of_several = {action.dest: isinstance(action.nargs, int) for action in self._actions}
        words = []
        for name, value in values.items():
            if name not in of_several or value in (None, False):
                continue
            if value is True:
                words.append(spelled(name))
            elif of_several[name] and isinstance(value, list):
                words += [spelled(name), *map(str, value)]
            else:
                words.append(f"{spelled(name)}={value}")
        self.parse_args(words)


def spelled(name: str) -> str:
    """The flag of an option's name: `batch_size` is `--batch-size`."""
    return f"--{name.replace('_', '-')}"


def _hyphens(arg: str) -> str:
    name, equals, value = arg.partition("=")
    return name.replace("_", "-") + equals + value if arg.startswith("--") else arg


def integer(minimum: int, maximum: int, why: str) -> Callable[[str], int]:
    """An argparse type: an integer from `minimum` to `maximum`; `why` tells who asks for more why that is the most."""
    kind = {0: "a non-negative integer", 1: "a positive integer"}.get(minimum, f"an integer of at least {minimum}")

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:  # no number, or one of more digits than Python reads
            value = maximum + 1 if text.strip().lstrip("+").isdecimal() else minimum - 1
        if value > maximum:
            raise argparse.ArgumentTypeError(f"must be at most {maximum} ({why}), got {_shortened(text)}")
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be {kind}, got {_shortened(text)}")
        return value

    return parse


def number(minimum: float, maximum: float, why: str, *, without: tuple[float, ...] = ()) -> Callable[[str], float]:
    """An argparse type: a number from `minimum` to `maximum`, `without` some of the two; `why` is as for `integer`."""
    least = f"greater than {minimum:g}" if minimum in without else f"of at least {minimum:g}"
    most = f"less than {maximum:g}" if maximum in without else f"at most {maximum:g}"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if value > maximum or (value == maximum and maximum in without):
            raise argparse.ArgumentTypeError(f"must be {most} ({why}), got {_shortened(text)}")
        if not minimum <= value or value in without:
            raise argparse.ArgumentTypeError(f"must be a number {least} and {most}, got {_shortened(text)}")
        return value

    return parse


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}..."


def file_or_folder(text: str) -> str:
    """An argparse type: a path, in which a leading `~` is the home folder, as shells have it."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must be a path, got nothing")
    expanded = os.path.expanduser(text)
    if expanded == text and (text == "~" or text.startswith(("~/", f"~{os.sep}"))):
        raise argparse.ArgumentTypeError(f"{text}: this user has no home folder; write the path without ~")
    return expanded


def parsed_by(parse: Callable[[str], object]) -> Callable[[str], object]:
    """An argparse type: what `parse` makes of the text; its ValueError is the message."""

    def typed(text: str) -> object:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error).replace(text, _shortened(text))) from None

    return typed


@contextmanager
def _handled_by(handler: Callable) -> Iterator[None]:
    """Let `handler` handle the stop signals. A signal that is ignored, as SIGHUP is under `nohup`, stays ignored.

    In another thread than the main one nothing happens: Python lets only the main thread handle signals. Neither does
    it for a signal that another language's code handles, since that could not be restored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    caught = [number for number, previous in before.items() if previous not in (signal.SIG_IGN, None)]
    for number in caught:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, before[number])


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that receives the first stop signal; a second signal raises KeyboardInterrupt at once.

    In another thread than the main one it stays empty.
    """
    received: list[int] = []

    def note(number: int, frame) -> None:
        if received:
            signal.default_int_handler(number, frame)
        received.append(number)

    with _handled_by(note):
        yield received


@contextmanager
def slow_imports() -> Iterator[None]:
    """A block that imports torch, for seconds, once the flags are known to be right.

    A stop signal ends the process in the block at once, in one line, since half-imported modules may not be able to end
    in order. Python does not look for garbage meanwhile, which took an eighth of the time and found none. Nor does it
    look through what was imported later on: that stays to the end.
    """
    first, collecting = "torch" not in sys.modules, gc.isenabled()
    gc.disable()
    try:
        with _handled_by(_leave_at_once):
            yield
    finally:
        if first:
            gc.freeze()
        if collecting:
            gc.enable()


def _leave_at_once(number: int, frame) -> None:
    with contextlib.suppress(OSError):
        print("interrupted", file=sys.stderr, flush=True)
    os._exit(130)


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
