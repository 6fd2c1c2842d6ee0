"""The losses of `rkd_plugin.losses` between any two hooked modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from rkd_plugin import losses
from rkd_plugin.adapters.torchdistill.hooks import IO, Hooked, Pool, find_hooked, pooled
from rkd_plugin.adapters.torchdistill.registering import mid_level_loss
from rkd_plugin.memory import RelationMemory


class HookedLoss(nn.Module):
    """A mixin for a loss of two tensors that finds student and teacher embeddings in torchdistill's dictionaries."""

    renamed: ClassVar[Mapping[str, str]] = {
        "student_output_path": "student_module_path",
        "teacher_output_path": "teacher_module_path",
    }
    """Arguments of torchdistill's losses, and their names here."""

    def __init__(
        self,
        student_module_path: str | None = None,
        teacher_module_path: str | None = None,
        student_module_io: IO = "output",
        teacher_module_io: IO = "output",
        pool: Pool | Mapping[str, Pool] = "auto",
        l2_normalize: bool = False,
        **options: Any,
    ) -> None:
        name = type(self).__name__
        for old, new in self.renamed.items():
            if old in options:
                raise TypeError(
                    f"{name}: expected none of the arguments of torchdistill's losses, got {old}; use {new}"
                )
        super().__init__(**options)
        if options.get("reduction") == "anchor":
            raise ValueError(f"{name}: expected a scalar for torchdistill, got reduction 'anchor'; use 'mean'")
        sides = ("student", "teacher")
        if isinstance(pool, Mapping) and not set(pool) <= set(sides):
            raise ValueError(f"{name}: expected pool for 'student' and 'teacher', got {', '.join(map(repr, pool))}")
        self.pools = {side: pool.get(side, "auto") if isinstance(pool, Mapping) else pool for side in sides}
        for value in self.pools.values():
            if value not in get_args(Pool):
                raise ValueError(f"{name}: expected pool to be one of {get_args(Pool)}, got {value!r}")
        self.l2_normalize = l2_normalize
        self.paths = {"student": student_module_path, "teacher": teacher_module_path}
        self.ios = {"student": student_module_io, "teacher": teacher_module_io}
        for side, io in self.ios.items():
            if io not in get_args(IO):
                raise ValueError(f"{name}: expected {side}_module_io to be one of {get_args(IO)}, got {io!r}")

    def forward(self, student: Tensor | Hooked, teacher: Tensor | Hooked, *_: Any) -> Tensor:
        """The dictionaries of torchdistill, or two tensors under ``SimpleLossWrapper``; ignores further arguments."""
        try:
            loss: Tensor = super().forward(self.embeddings("student", student), self.embeddings("teacher", teacher))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self}: {error}") from error
        return loss

    def embeddings(self, side: str, source: Tensor | Hooked) -> Tensor:
        """``(N, D)``, or sets ``(N, T, D)``: the rows of a side's hooked module, pooled and scaled by the options.

        Raises:
            TypeError: if the module's output is not one tensor.
            ValueError: if the module is not hooked, or `pool` does not fit its shape.
        """
        path = self.paths[side]
        if isinstance(source, Mapping):
            if path is None:
                raise ValueError(f"expected {side}_module_path to be one of {list(source)}, got None; set it")
            source = find_hooked(source, side, path, self.ios[side])
        try:
            vectors = pooled(source, self.pools[side])
        except ValueError as error:
            raise ValueError(f"the {side}: {error}") from error
        # In float32 at least, since a length in half precision may overflow.
        return (
            normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=-1)
            if self.l2_normalize
            else vectors
        )

    def extra_repr(self) -> str:
        """The options, as they were passed."""
        places = ", ".join(
            f"{side}={self.paths[side]!r} {self.ios[side]} pool={self.pools[side]!r}" for side in self.paths
        )
        return f"{places}, l2_normalize={self.l2_normalize}, {super().extra_repr()}"


@mid_level_loss
class RKDDistanceLoss(HookedLoss, losses.RKDDistanceLoss):
    """See `rkd_plugin.rkd_distance_loss`; between any two hooked modules, of any widths.

    Args:
        student_module_path: the student's hooked module, ``'.'`` for its output. Not needed under SimpleLossWrapper.
        teacher_module_path: the teacher's hooked module.
        student_module_io: ``'input'`` or ``'output'`` of the student's module.
        teacher_module_io: the same for the teacher.
        pool: how larger outputs become vectors ``(N, D)``; one name, or ``{student: ..., teacher: ...}``:

            * ``'avg'``: the mean over the positions of maps ``(N, C, L)``, ``(N, C, H, W)`` or ``(N, C, D, H, W)``.
            * ``'avg_channels_last'``: the same of maps ``(N, H, W, C)`` or ``(N, D, H, W, C)``, as in a Swin block.
              This is the order of the axes, not the memory format ``torch.channels_last``.
            * ``'mean'``, ``'cls'``, ``'last'``: the mean, the first or the last of tokens ``(N, T, D)``, including
              padding.
            * ``'flatten'``: all numbers of an example, as in torchdistill's ``RKDLoss``.
            * ``'auto'``: ``'avg'`` for four axes and more; three axes, and maps ``(N, S, S, C)``, raise an error.
        l2_normalize: whether the rows of both sides are then scaled to length 1, as in the authors' code for image
            classification.
        options: ``reduction``, ``huber_delta``, ``impl``, ``gather``; for RKDAngleLoss and RKDDALoss also ``anchors``;
            for RKDDALoss also ``distance_weight``, ``angle_weight``. With ``gather: true`` the loss is over the batches
            of all processes, see `rkd_plugin.distributed`.

    Raises:
        TypeError: if an option is unknown (for an option of torchdistill's ``RKDLoss`` the message has the new name),
            or the output of a module is not a tensor.
        ValueError: if a module is not hooked (the message names those that are), ``pool`` does not fit its shape, or
            the batches differ in length.

    Example:
        >>> import torch
        >>> student = {"fc": {"output": torch.tensor([[0., 0.], [1., 0.], [2., 0.]])}}
        >>> teacher = {"layer4": {"output": torch.tensor([[0., 0.], [4., 0.], [0., 3.]])}}
        >>> RKDDistanceLoss(student_module_path="fc", teacher_module_path="layer4")(student, teacher)
        tensor(0.0972)
    """

    renamed: ClassVar[Mapping[str, str]] = {
        **HookedLoss.renamed,
        "dist_factor": "the term's weight",
        "angle_factor": "RKDDALoss",
    }


@mid_level_loss
class RKDAngleLoss(HookedLoss, losses.RKDAngleLoss):
    """See `rkd_plugin.rkd_angle_loss`; arguments as `RKDDistanceLoss`."""

    renamed: ClassVar[Mapping[str, str]] = {
        **HookedLoss.renamed,
        "dist_factor": "RKDDALoss",
        "angle_factor": "the term's weight",
    }


@mid_level_loss
class RKDDALoss(HookedLoss, losses.RKDDALoss):
    """See `rkd_plugin.rkd_da_loss`; arguments as `RKDDistanceLoss`.

    torchdistill's ``RKDLoss`` calls the weights ``dist_factor`` and ``angle_factor``. It flattens feature maps, while
    this loss averages them: ``pool: flatten`` gives the same numbers.
    """

    renamed: ClassVar[Mapping[str, str]] = {
        **HookedLoss.renamed,
        "dist_factor": "distance_weight",
        "angle_factor": "angle_weight",
    }


class _Remembering(losses.RelationalLoss):
    def forward(self, student: Tensor, teacher: Tensor, *unexpected: Any) -> Tensor:
        loss = super().forward(student, teacher, *unexpected)
        if isinstance(self.references, RelationMemory):
            self.references.update(student, teacher)
        return loss


@mid_level_loss
class RelationalLoss(HookedLoss, _Remembering):
    """See `rkd_plugin.relational_loss`; any relation between any two hooked modules. Arguments as `RKDDistanceLoss`.

    Two more names for ``pool`` keep a set of rows of each example; relations are then within each set:

    * ``'tokens'``: the tokens of ``(N, T, D)``.
    * ``'channels'``: the channels of maps ``(N, C, L)``, ``(N, C, H, W)`` or ``(N, C, D, H, W)``, as ICKD does.

    The options are those of `rkd_plugin.RelationalLoss`. In YAML a function is
    ``potential: !import_get {key: 'package.file.function'}``, and a memory is
    ``references: &memory !import_call {key: 'rkd_plugin.RelationMemory', init: {kwargs: {size: 256}}}``. The loss adds
    each batch to it. A checkpoint has its rows if `TrainedWith` names it, ``modules: {memory: *memory}``; otherwise a
    run that goes on starts with an empty memory.

    Example:
        >>> ickd = RelationalLoss(potential="dot", penalty="mse", pool="channels")
        >>> ickd(torch.ones(2, 3, 4, 4), torch.ones(2, 3, 8, 8))
        tensor(0.)
    """
