"""The inputs and outputs that hooks store of a model's modules, and the vectors that a loss compares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from torchdistill.common.module_util import get_module

IO = Literal["input", "output"]
Pool = Literal["auto", "avg", "avg_channels_last", "mean", "cls", "last", "flatten", "tokens", "channels"]
Hooked = Mapping[str, Mapping[str, Any]]


def find_hooked(io_dict: Hooked, side: str, path: str, io: str) -> Tensor:
    """The tensor that a hook stored at ``io_dict[path][io]``.

    Raises:
        TypeError: if it is not one tensor.
        ValueError: if the module is not hooked.
    """
    if path not in io_dict or io not in io_dict[path]:
        there = ", ".join(f"{name!r} ({', '.join(kinds) or 'nothing'})" for name, kinds in io_dict.items()) or "nothing"
        raise ValueError(
            f"expected the {side}'s {io} of module {path!r}, got only {there}; list it under "
            f"train.{side}.forward_hook.{io}"
        )
    value = io_dict[path][io]
    if not isinstance(value, Tensor):
        raise TypeError(
            f"expected the {side}'s {io} of module {path!r} to be one tensor, got {type(value).__name__}; hook another"
        )
    return value


@contextmanager
def reading(model: nn.Module, reads: Iterable[tuple[str, str]]) -> Iterator[dict[tuple[str, str], Any]]:
    """In the block, a forward pass of ``model`` fills the dictionary with inputs and outputs of its modules.

    Args:
        model: the model of the modules.
        reads: pairs of a module's path, ``"."`` for the model, and ``"input"`` or ``"output"``.
    """
    values: dict[tuple[str, str], Any] = {}

    def keep(read: tuple[str, str]) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            values[read] = inputs[0] if read[1] == "input" else output

        return hook

    with ExitStack() as hooks:
        for path, io in reads:
            module = model if path == "." else get_module(model, path)
            hooks.enter_context(module.register_forward_hook(keep((path, io))))
        yield values


class _Pooling(NamedTuple):
    shape: str
    ndims: range
    apply: Callable[[Tensor], Tensor]


_POOLINGS = {
    "avg": _Pooling("(N, C, L), (N, C, H, W) or (N, C, D, H, W)", range(3, 6), lambda maps: maps.flatten(2).mean(2)),
    "avg_channels_last": _Pooling(
        "(N, H, W, C) or (N, D, H, W, C)", range(4, 6), lambda maps: maps.flatten(1, -2).mean(1)
    ),
    "mean": _Pooling("tokens (N, T, D)", range(3, 4), lambda tokens: tokens.mean(1)),
    "cls": _Pooling("tokens (N, T, D)", range(3, 4), lambda tokens: tokens[:, 0]),
    "last": _Pooling("tokens (N, T, D)", range(3, 4), lambda tokens: tokens[:, -1]),
    "flatten": _Pooling("(N, ...)", range(3, 64), lambda values: values.flatten(1)),
    "tokens": _Pooling("tokens (N, T, D)", range(3, 4), lambda tokens: tokens),
    "channels": _Pooling("(N, C, L), (N, C, H, W) or (N, C, D, H, W)", range(3, 6), lambda maps: maps.flatten(2)),
}


def pooling(value: Tensor, pool: Pool = "auto") -> Pool | None:
    """The name of the pooling that gives vectors for a module's input or output, never ``"auto"``; None for vectors.

    Raises:
        ValueError: if ``pool`` does not fit the shape, or is ``"auto"`` and the axis of the channels is ambiguous.
    """
    shape = tuple(value.shape)
    if len(shape) < 3:
        return None
    if pool == "auto":
        if len(shape) == 3:
            raise ValueError(
                f"expected a pool for the three axes {shape}, got 'auto'; set pool to 'mean', 'cls' or 'last' for "
                "tokens (N, T, D), or to 'avg' for (N, C, L)"
            )
        if not _is_channels_first(shape):
            raise ValueError(
                f"expected a feature map (N, C, H, W), got {shape}, whose channels may be last; set pool to "
                "'avg_channels_last', or to 'avg' if axis 1 holds the channels"
            )
        pool = "avg"
    if len(shape) not in _POOLINGS[pool].ndims:
        fitting = [repr(name) for name, known in _POOLINGS.items() if len(shape) in known.ndims]
        raise ValueError(
            f"pool {pool!r}: expected {_POOLINGS[pool].shape}, got {shape}; set pool to one of {', '.join(fitting)}"
        )
    return pool


def is_channels_last(shape: Sequence[int]) -> bool:
    """Whether a map of four or five axes looks like ``(N, H, W, C)``: most maps are square, with more channels."""
    return shape[-3] == shape[-2] != shape[-1]


def _is_channels_first(shape: Sequence[int]) -> bool:
    """Whether a map can only be ``(N, C, H, W)``: it is square, or has more channels than positions along an axis."""
    channels, *positions = shape[1:]
    is_square = len(set(positions)) == 1 and channels != positions[0]
    return is_square or channels > max(positions) or set(positions) == {1}


def pooled(value: Tensor, pool: Pool = "auto") -> Tensor:
    """``(N, D)``: a module's input or output as the vectors that a loss compares; see `RKDDistanceLoss` for ``pool``.

    ``(N, T, D)`` for ``"tokens"`` and ``"channels"``, see `RelationalLoss`.

    Raises:
        ValueError: see `pooling`.

    Example:
        >>> import torch
        >>> tokens = torch.arange(12.).reshape(1, 3, 4)
        >>> pooled(tokens, "cls"), pooled(tokens, "mean"), pooled(tokens, "avg")
        (tensor([[0., 1., 2., 3.]]), tensor([[4., 5., 6., 7.]]), tensor([[1.5000, 5.5000, 9.5000]]))
    """
    name = pooling(value, pool)
    return value if name is None else _POOLINGS[name].apply(value)
