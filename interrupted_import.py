"""Imported first by a command: Ctrl-C while it imports torch, which takes seconds, ends it in one line, not in a trace.

From `command_line.run` on, the command's own handling of stop signals holds.
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
    os._exit(130)  # at once: what is half imported may not come to an orderly end


sys.excepthook = _leave_if_interrupted
