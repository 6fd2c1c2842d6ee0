"""Which errors have a message for the user, and which are faults of the program."""

from __future__ import annotations

import dis
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[2]
EXPECTED = ValueError, FloatingPointError, OSError, ModuleNotFoundError
RAISE = dis.opmap["RAISE_VARARGS"]
_FRAME = re.compile(r'File "(.+)", line \d+, in .+\n\s*(.*)')


def is_for_user(error: BaseException) -> bool:
    """Whether the message of an error is written for the user, so that it can be reported without a traceback.

    It is if the error has one of the types `EXPECTED`, or if a ``raise`` statement of this package raised it, such as
    the TypeError of a loss. A TypeError that Python raises for an expression, in this package or elsewhere, is a fault
    of the program. An error that only adds to the message of its cause is judged by its cause.

    Example:
        >>> is_for_user(ValueError("a.yaml: no such file")), is_for_user(TypeError("of the program"))
        (True, False)
    """
    if isinstance(error, EXPECTED):
        return True
    cause = error.__cause__
    if type(cause) is type(error) and str(cause) in str(error):
        return is_for_user(cause)
    return bool(str(error)) and _has_raise_statement(error)


def _has_raise_statement(error: BaseException) -> bool:
    """Whether a ``raise`` statement of this package raised an error; an ``assert`` is none."""
    traceback = error.__traceback__
    if traceback is None or isinstance(error, AssertionError):
        return False
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    code = traceback.tb_frame.f_code
    return _is_ours(code.co_filename) and code.co_code[traceback.tb_lasti] == RAISE


def _is_ours(file: str) -> bool:
    return PACKAGE in Path(file).parents


def message_from_worker(error: Exception) -> str | None:
    """The message that an error had in a worker of a ``DataLoader``; None if it is not from one, or not for the user.

    PyTorch puts the traceback of the worker into the message, as text.
    """
    caught = re.match(r"Caught \w+ in DataLoader worker process.*\n[\w.]+: (.*)", str(error), re.DOTALL)
    if caught is None:
        return None
    file, line = (_FRAME.findall(str(error)) or [("", "")])[-1]
    is_ours = _is_ours(file) and line.startswith("raise ")
    return caught[1].strip() if isinstance(error, EXPECTED) or is_ours else None
