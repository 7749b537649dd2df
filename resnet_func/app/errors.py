"""What ends a command with one line on stderr instead of a traceback."""

import re
import sys

from resnet_func.app.names import printable


class AppError(Exception):
    """A command cannot be carried out as asked; the message is one line with the way out."""


class UsageError(AppError):
    """The command's options are wrong or do not go together."""


class Interrupted(Exception):  # noqa: N818, it is no error
    """The user stopped the run; its state is saved."""


class Unspoken(Exception):  # noqa: N818, it is told elsewhere
    """What ends this process is told already, or by another rank; `cause` decides the exit code."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


def warn(message: str) -> None:
    """Print a message on stderr, as one line; what could steer a terminal is escaped."""
    print("resnet-func: " + printable(re.sub(r"\s*[\r\n]\s*", " ", message.strip())), file=sys.stderr)
