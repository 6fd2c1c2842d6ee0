"""A trunk for PML's own trainers, with a student and a teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rkd_plugin.adapters.pml.tensors import Part, TensorWithTeacher, embeddings_of, plain


class TeacherStudentTrunk(nn.Module):
    """A trunk for PML's own trainers that passes the teacher's embeddings to the losses of this package.

    In train mode it returns the student's embeddings as a `TensorWithTeacher`: the losses of this package find the
    teacher's embeddings there; a classifier, a miner or another loss reads the student's embeddings only. In eval mode
    it returns the student's embeddings as a plain tensor. PML's ``MultipleLosses`` adds RKD to another loss:

        MultipleLosses({"rkd": RKDDALoss(), "task": TripletMarginLoss()}, weights={"rkd": 3, "task": 1})

    A ``tuple_miner`` of the trainer mines the student's embeddings for all losses; ``MultipleLosses(miners={"task":
    ...})`` mines for one. A separate ``embedder`` returns a plain tensor, for which the loss raises: put the embedder
    into the student, ``nn.Sequential(trunk, embedder)``, or use `RKDTrainer`.

    The teacher runs in eval mode and without gradients; afterwards its training mode is restored. Its ``requires_grad``
    is unchanged, and it may share layers with the student. It is not in ``parameters()`` or ``state_dict()``, but it
    moves with ``.to()``, ``.cuda()`` and ``.half()``, and is part of copies and pickles.

    Args:
        student: maps a batch to embeddings ``(N, D_s)``.
        teacher: maps the same batch to embeddings ``(N, D_t)``. None: its embeddings come with the batch, see
            `from_bank`. It gets a batch of images in the dtype and on the device of its parameters.
        student_output: the part of the student's output that is its embeddings, if the output is a dict, a tuple or a
            ``ModelOutput``: a name, an index, or a function of the output. None: the whole output.
        teacher_output: the same for the teacher.

    Raises:
        TypeError: when called, if a model does not return a floating-point tensor; names the side and the type.
        ValueError: when called, if a model does not return ``(N, D)``, or its output has no such part; or in train
            mode, if there is neither a teacher nor its embeddings, or both.
        RuntimeError: when called inside ``DataParallel`` on several devices, since the replicas would share one
            teacher; wrap student and teacher instead.

    Example:
        >>> import torch
        >>> trunk = TeacherStudentTrunk(torch.nn.Linear(5, 3), torch.nn.Linear(5, 4))
        >>> embeddings = trunk(torch.zeros(2, 5))
        >>> embeddings.shape, embeddings.teacher.shape
        (torch.Size([2, 3]), torch.Size([2, 4]))
        >>> list(trunk.state_dict())
        ['student.weight', 'student.bias']
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        student_output: Part = None,
        teacher_output: Part = None,
    ) -> None:
        super().__init__()
        self.student = student
        # In a tuple the teacher is not a submodule: parameters(), state_dict() and train() skip it.
        self._teacher = (teacher,)
        self.student_output = student_output
        self.teacher_output = teacher_output

    @property
    def teacher(self) -> nn.Module | None:
        """The teacher, or None."""
        return self._teacher[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TeacherStudentTrunk:
        if self.teacher is not None:
            self.teacher._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _replicate_for_data_parallel(self) -> TeacherStudentTrunk:
        raise RuntimeError(
            "TeacherStudentTrunk: expected no DataParallel around it, got one, whose replicas would share one teacher; "
            "write TeacherStudentTrunk(DataParallel(student), DataParallel(teacher))"
        )

    def forward(self, data: Any) -> Tensor:
        """A batch -> ``(N, D_s)``, in train mode with the teacher's ``(N, D_t)``."""
        where = type(self).__name__
        student = embeddings_of(where, "student", self.student(plain(data)), self.student_output)
        if not self.training:
            return student
        return TensorWithTeacher.of(student, teacher_embeddings(where, self.teacher, data, self.teacher_output))


def teacher_embeddings(where: str, teacher: nn.Module | None, data: Any, part: Part) -> Tensor:
    """``(N, D_t)``: the embeddings that come with the batch from a bank, or the teacher's output.

    Args:
        where: the caller, for error messages.
        teacher: the teacher; its mode and ``requires_grad`` stay as they are. None: the embeddings come with the batch.
        data: the batch.
        part: the part of the teacher's output that is its embeddings, as for `TeacherStudentTrunk`.

    Raises:
        TypeError, ValueError: as `TeacherStudentTrunk`.
    """
    has_embeddings = isinstance(data, TensorWithTeacher)
    if has_embeddings is (teacher is not None):
        raise ValueError(
            f"{where}: expected either a teacher or batches with its embeddings, got "
            f"{'both' if has_embeddings else 'neither'}; give a teacher, or the trainer **from_bank(...)"
        )
    if has_embeddings or teacher is None:
        embeddings: Tensor = data.teacher
        return embeddings
    with torch.no_grad(), _eval_mode(teacher):
        output = teacher(_as_parameters(data, teacher))
    return embeddings_of(where, "teacher", output, part)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Set eval mode in the block; afterwards restore the mode of each module."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _as_parameters(data: Any, model: nn.Module) -> Any:
    """A batch on the device of a model's parameters; floating-point data also in their dtype."""
    like = next((x for x in model.parameters() if x.is_floating_point()), None)
    if like is None or not isinstance(data, Tensor):
        return data
    return data.to(like.device, like.dtype if data.is_floating_point() else data.dtype)
