"""Imported first by every command, so that Ctrl-C while torch is imported ends it in one line and not in a traceback.

That import takes seconds. From `command_line.run` on, the command handles stop signals itself.
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


sys.excepthook = _leave_if_interrupted
