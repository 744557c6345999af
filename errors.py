"""The two ways in which a command ends badly; `command_line.run` turns them into exit codes."""


class UserError(Exception):
    """What the user can mend: a bad value, a missing or unreadable file. Exit code 2."""


class RunFailed(Exception):
    """The run itself failed: a loss that is not finite, a full disk. Exit code 1."""
