"""Imported first by every command: Ctrl-C while modules are imported, and standard streams that the caller has closed.

Interrupted, the command should end in one line and not in a traceback. From `command_line.run` on it handles stop
signals itself, also while it imports torch (`command_line.slow_imports`). A closed stream (`>&-`) is opened as one to
nowhere: the next file that the command opens would take its number, and receive what is printed.
"""

import contextlib
import os
import sys


def _leave_if_interrupted(kind: type[BaseException], error: BaseException, trace) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    with contextlib.suppress(OSError):
        print("interrupted", file=sys.stderr)
    os._exit(130)  # at once, since half-imported modules may not be able to end in order


def _open_closed_streams() -> None:
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
            os.set_inheritable(nowhere, True)
        if getattr(sys, name) is None:  # as Python leaves it
            setattr(sys, name, open(os.devnull, "r" if number == 0 else "w"))  # noqa: SIM115


_open_closed_streams()
sys.excepthook = _leave_if_interrupted
