"""The embeddings in a model's output, and a tensor of rows with the teacher's embeddings of these rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Part = str | int | Callable[[Any], Tensor] | None

# They change the dtype, device or memory of the rows, and nothing else.
_SAME_ROWS = {
    *(Tensor.to, Tensor.type, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16),
    *(Tensor.cpu, Tensor.cuda, Tensor.clone, Tensor.contiguous),
}


class TensorWithTeacher(Tensor):
    """Images or the student's embeddings, with the teacher's embeddings of the same rows as attribute ``teacher``.

    A classifier, a miner or another loss reads it as the tensor of the images or embeddings. The result of an operation
    is a plain tensor, except where each row stays with its teacher's row: a change of dtype or device, a selection of
    rows, a slice of columns, and ``torch.cat`` of such tensors along the rows. Do not write to its rows in place: the
    teacher's rows stay as they are.

    Example:
        >>> rows = TensorWithTeacher.of(torch.zeros(4, 3), torch.zeros(4, 5))
        >>> rows.shape, rows[1:].double().teacher.shape
        (torch.Size([4, 3]), torch.Size([3, 5]))
        >>> type(rows.flip(0))
        <class 'torch.Tensor'>
    """

    teacher: Tensor

    @classmethod
    def of(cls, rows: Tensor, teacher: Tensor) -> TensorWithTeacher:
        """``rows (N, ...)`` with ``teacher (N, D_t)``; gradients flow through the rows as before.

        Raises:
            ValueError: if the numbers of rows differ.
        """
        if len(rows) != len(teacher):
            raise ValueError(
                f"TensorWithTeacher: expected one teacher's row for each row, got {len(teacher)} for {len(rows)}; "
                "compute both from the same batch"
            )
        result = rows.as_subclass(cls)
        result.teacher = teacher
        return result

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            teacher = _teacher_of(func, *args, **(kwargs or {})) if isinstance(result, Tensor) else None
        return result if teacher is None else cls.of(plain(result), teacher)


def _teacher_of(func: Any, first: Any = None, *args: Any, **kwargs: Any) -> Tensor | None:
    """The teacher's rows of the result of ``func``, or None if they are not known."""
    if func is torch.cat:
        tensors, dim = kwargs.get("tensors", first), kwargs.get("dim", args[0] if args else 0)
        if dim == 0 and all(isinstance(x, TensorWithTeacher) for x in tensors):
            joined: Tensor = torch.cat([x.teacher for x in tensors])
            return joined
    elif not isinstance(first, TensorWithTeacher):
        return None
    elif func in _SAME_ROWS:
        return first.teacher
    elif func is Tensor.__getitem__:
        (index,) = args
        if isinstance(index, tuple) and index and all(isinstance(part, slice) for part in index):
            index = index[0]
        if isinstance(index, slice | list) or (isinstance(index, Tensor) and index.ndim == 1):
            chosen: Tensor = first.teacher[index]
            return chosen
    return None


def plain(x: Any) -> Any:
    """``x`` as a plain tensor, if it is a `TensorWithTeacher`; otherwise ``x``."""
    return x.as_subclass(Tensor) if isinstance(x, TensorWithTeacher) else x


def one_tensor(where: str, side: str, output: Any, part: Part = None) -> Tensor:
    """The floating-point tensor in a model's output.

    Args:
        where: the caller, for error messages.
        side: ``"student"`` or ``"teacher"``, for error messages.
        output: of the model.
        part: of the output: a name, an index, or a function of it; None: the whole output.

    Raises:
        TypeError: if this is not a floating-point tensor; names the side and the type.
        ValueError: if the output has no such part.
    """
    if callable(part):
        output = part(output)
    elif part is not None:
        try:
            if isinstance(part, str) and not isinstance(output, Mapping):
                output = getattr(output, part)
            else:
                output = output[part]
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ValueError(
                f"{where}: expected {side}_output={part!r} to choose a part of the {side}'s output, got "
                f"{_described(output)}; give the name or the index of a part, or a function of the output"
            ) from error
    if not isinstance(output, Tensor) or not output.is_floating_point():
        raise TypeError(
            f"{where}: expected the {side}'s embeddings as one floating-point tensor, got {_described(output)}; "
            f"choose it with {side}_output, a name, an index or a function, or pass the tensor itself"
        )
    return output


def embeddings_of(where: str, side: str, output: Any, part: Part = None) -> Tensor:
    """`one_tensor`; raises ValueError if its shape is not ``(N, D)``."""
    x = one_tensor(where, side, output, part)
    if x.ndim != 2:
        raise ValueError(
            f"{where}: expected the {side}'s embeddings as (N, D), got {tuple(x.shape)}; pool or flatten them"
        )
    return x


def _described(output: Any) -> str:
    kind = f"{type(output).__module__}.{type(output).__qualname__}".removeprefix("builtins.")
    if isinstance(output, Tensor):
        return f"a tensor of {output.dtype}"
    if isinstance(output, Mapping):
        return f"{kind} with {', '.join(map(repr, output)) or 'nothing'}"
    if isinstance(output, tuple | list):
        return f"{kind} of {', '.join(type(x).__name__ for x in output) or 'nothing'}"
    return kind
