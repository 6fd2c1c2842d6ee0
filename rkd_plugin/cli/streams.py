"""Standard streams that can be closed, end early, or be limited to ASCII."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


class LastingStream:
    """A text stream that discards its text after its reader has ended, so that ``rkd run | head`` continues to train.

    Args:
        stream: the stream that is wrapped.
        reports: whether other errors, such as that of a full disk, are raised; otherwise they are ignored as well.
    """

    def __init__(self, stream: Any, reports: bool) -> None:
        self._stream = stream
        self._reports = reports

    def write(self, text: str) -> int:
        """See `io.TextIOBase.write`."""
        with self._lasting():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """See `io.IOBase.flush`."""
        with self._lasting():
            self._stream.flush()

    def drain(self) -> None:
        """Flush and ignore errors; where errors matter, the stream was flushed before."""
        with contextlib.suppress(OSError):
            self.flush()

    @contextlib.contextmanager
    def _lasting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # Flushing the rest of the buffer would fail again when Python ends.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            if self._reports and not isinstance(error, BrokenPipeError):
                raise OSError(f"expected to print to {self._stream.name}, got: {error.strerror}") from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lasting_streams() -> Iterator[None]:
    """In the block, printing to stdout and stderr does not fail if the reader has ended or the encoding is limited."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # This is the lowest free descriptor. If it stayed free, the next file that is opened would get it.
            os.open(os.devnull, os.O_RDWR)
    with contextlib.ExitStack() as stack:
        for name, descriptor in (("stdout", 1), ("stderr", 2)):
            stream = getattr(sys, name) or stack.enter_context(open(descriptor, "w", closefd=False))
            if hasattr(stream, "reconfigure"):
                stack.callback(stream.reconfigure, errors=stream.errors)
                stream.reconfigure(errors="backslashreplace")
            lasting = LastingStream(stream, reports=name == "stdout")
            stack.callback(setattr, sys, name, getattr(sys, name))
            stack.callback(lasting.drain)
            setattr(sys, name, lasting)
        yield
