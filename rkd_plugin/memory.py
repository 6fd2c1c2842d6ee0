"""A queue of student and teacher rows of the same images, to which the next batches are related."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from rkd_plugin.options import Gather, check_batch


class RelationMemory(nn.Module):
    """The last rows of a training run: ``references`` of `relational_loss` for a small batch.

    The rows of the student are some steps old and carry no gradient. A new memory is empty, and the loss of a first
    step is 0. The rows are saved in ``state_dict``, in the order of their arrival.

    Args:
        size: the number of rows; of more rows, the oldest ones leave.
        gather: True, or a process group: `update` takes the rows of all its processes, so that all have the same
            memory.

    Raises:
        TypeError, ValueError: if ``size`` is not an integer of at least 1.

    Example:
        >>> import torch
        >>> from rkd_plugin import relational_loss
        >>> memory = RelationMemory(size=4)
        >>> for _ in range(3):
        ...     student, teacher = torch.randn(3, 2, requires_grad=True), torch.randn(3, 5)
        ...     loss = relational_loss(student, teacher, "cosine", "kl", scale="softmax", references=memory)
        ...     loss.backward()
        ...     memory.update(student, teacher)
        >>> [rows.shape for rows in memory.references]
        [torch.Size([4, 2]), torch.Size([4, 5])]
    """

    student: Tensor
    teacher: Tensor
    size: int
    gather: Gather

    def __init__(self, size: int, gather: Gather = False) -> None:
        super().__init__()
        if isinstance(size, bool) or not isinstance(size, Integral):
            raise TypeError(f"RelationMemory: expected size to be an integer, got {size!r}")
        if size < 1:
            raise ValueError(f"RelationMemory: expected size to be at least 1, got {size!r}")
        self.size = int(size)
        self.gather = gather
        for side in ("student", "teacher"):
            self.register_buffer(side, torch.zeros(0, 0))

    @property
    def references(self) -> tuple[Tensor, Tensor]:
        """The rows of student and teacher, ``(M, D_s)`` and ``(M, D_t)``, the oldest first; ``(0, 0)`` while empty."""
        return self.student, self.teacher

    @torch.no_grad()
    def update(self, student: Tensor, teacher: Tensor) -> None:
        """Add the rows of a batch, ``(N, D_s)`` and ``(N, D_t)``, after the loss of this batch.

        Raises:
            TypeError, ValueError: as `rkd_distance_loss`; also if the widths are not those of earlier rows.
            RuntimeError: if ``gather`` finds no process group.
        """
        name = "RelationMemory"
        check_batch(name, student, teacher)
        new = student.detach(), teacher.detach()
        if self.gather is not False:
            from rkd_plugin import distributed  # not every build of PyTorch has it

            batch = distributed.gather(name, *new, self.gather, draws=False)
            if batch is not None:
                new = batch.student, batch.teacher
        for side, old, rows in zip(("student", "teacher"), self.references, new, strict=True):
            if len(old) and old.shape[1] != rows.shape[1]:
                raise ValueError(f"{name}: expected {side} rows of width {old.shape[1]}, got {rows.shape[1]}")
            # A copy: the batch may be overwritten.
            kept = torch.cat([old.to(rows), rows] if len(old) else [rows])[-self.size :].clone()
            setattr(self, side, kept)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for side in ("student", "teacher"):  # of any number of rows
            if (saved := state_dict.get(prefix + side)) is not None:
                setattr(self, side, torch.empty_like(saved, device=getattr(self, side).device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """The options, as they were passed."""
        return f"size={self.size}, gather={self.gather!r}"
