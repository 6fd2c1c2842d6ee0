"""Errors that are reported in one sentence instead of a traceback."""

from __future__ import annotations

import re

from rkd_plugin.experiments.support.failures import is_for_user
from rkd_plugin.printing import printable

# PyTorch raises these as RuntimeError with a long message.
_MEMORY = re.compile(r"can't allocate memory|not enough memory|cannot allocate memory|out of memory", re.IGNORECASE)
_WORKER = re.compile(r"DataLoader worker .*(?:killed|exited unexpectedly|bus error)|bus error.* in worker", re.DOTALL)


def one_sentence(error: Exception) -> str | None:
    r"""What is printed of an error: one sentence, or the list of a `RecipeError`; None for a fault of the program.

    Example:
        >>> one_sentence(MemoryError())
        'expected enough memory, got too little; use a smaller batch or fewer workers; what was written is kept'
        >>> one_sentence(OSError("a\x1b[31m.yaml: no such file"))
        'a\\x1b[31m.yaml: no such file'
        >>> one_sentence(TypeError("of the program")) is None
        True
    """
    from rkd_plugin.experiments.recipe.errors import RecipeError

    if isinstance(error, RecipeError):
        return str(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _MEMORY.search(str(error))):
        return "expected enough memory, got too little; use a smaller batch or fewer workers; what was written is kept"
    if isinstance(error, RuntimeError) and _WORKER.search(str(error)):
        return (
            "expected the workers that load data to continue, got one that the system ended, probably for lack of "
            "memory; use fewer workers (num_workers) or a smaller batch; what was written is kept"
        )
    return printable(str(error)) if is_for_user(error) else None
