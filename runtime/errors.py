"""The two ways in which a command fails; `command_line.run` turns them into exit codes.

Networks, schedulers and measures raise plain `ValueError`s; a command that passes a user's values to them does so
inside `user_errors`.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """The user can mend it: a bad value, or a missing or unreadable file. Exit code 2."""


class RunFailed(Exception):
    """The run itself failed: the loss is not finite, or the disk is full. Exit code 1."""


def reason(error: BaseException) -> str:
    """The first line of what the error says; for an OSError without the path, which the caller names."""
    lines = (getattr(error, "strerror", None) or str(error)).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


@contextmanager
def user_errors(flag: str) -> Iterator[None]:
    """Raise a ValueError or ImportError of the block as a UserError that names the flag whose value caused it."""
    try:
        yield
    except (ImportError, ValueError) as error:
        raise UserError(f"{flag}: {reason(error)}") from error
