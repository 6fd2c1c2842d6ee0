"""Any relation as a loss of pytorch-metric-learning."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from rkd_plugin.adapters.pml.base import LossWithTeacher, mined
from rkd_plugin.memory import RelationMemory
from rkd_plugin.options import Gather, Impl, Options, RelationalOptions
from rkd_plugin.relational import Penalty, Potential, References, Scale, checked_loss


class RelationalLoss(LossWithTeacher):
    """`rkd_plugin.relational_loss` as a loss of PML: ``loss(student, labels, ref_emb=teacher)``.

    Called as `RKDDistanceLoss`. Of a miner's tuples, a potential of two rows takes the pairs and one of three rows the
    triplets: ``(anchor, positive, negative)``.

    Args:
        potential: a name, or a function of 1, 2 or 3 rows.
        penalty: ``"huber"``, ``"mse"``, ``"l1"``, ``"kl"``, ``"js"``, or a function of both sides' relations.
        scale: None, ``"mean"``, ``"row_sum"``, ``"row_norm"``, ``"softmax"``, or ``"auto"``: that of the potential.
        temperature: of ``"softmax"``, and of ``"gaussian"``.
        huber_delta: the threshold between the quadratic and the linear part of the Huber function.
        neighbours: k: only relations among the k nearest of each row in the teacher's space; None: all.
        references: a `rkd_plugin.RelationMemory`, to which this loss adds each batch, or ``(student_rows,
            teacher_rows)``: relations to these rows; None: to the batch.
        anchors: the number or fraction of the rows that start tuples, drawn at random in each call; None: all.
        gather: as in `RKDDistanceLoss`.
        impl: the kernel: ``"auto"``, ``"reference"``, ``"chunked"`` or ``"fused"``.
        kwargs: of every loss of PML, as in `RKDDistanceLoss`; the mean that ``collect_stats`` records is
            ``relational_loss_mean``.

    Raises:
        TypeError, ValueError: as `RKDDistanceLoss`; when called, also for tuples of a miner with a potential of one
            row, with ``neighbours``, ``references`` or ``gather``.

    Example:
        >>> import torch
        >>> teacher = torch.tensor([[0., 0.], [4., 0.], [0., 3.]])
        >>> student = torch.tensor([[0., 0.], [1., 0.], [2., 0.]])
        >>> RelationalLoss("dot", "mse")(student, ref_emb=teacher)  # SP
        tensor(0.1463)
    """

    references: References | None
    _options_type: ClassVar[type[Options]] = RelationalOptions
    _recorded: ClassVar[list[str]] = ["temperature", "huber_delta"]

    def __init__(
        self,
        potential: Potential = "distance",
        penalty: Penalty = "huber",
        scale: Scale | None = "auto",
        temperature: float = 1.0,
        huber_delta: float = 1.0,
        neighbours: int | None = None,
        references: References | None = None,
        anchors: float | None = None,
        gather: Gather = False,
        impl: Impl = "auto",
        **kwargs: Any,
    ) -> None:
        options = {
            "potential": potential,
            "penalty": penalty,
            "scale": scale,
            "temperature": temperature,
            "huber_delta": huber_delta,
            "neighbours": neighbours,
            "references": references,
            "anchors": anchors,
            "gather": gather,
            "impl": impl,
        }
        super().__init__(options, **kwargs)

    def _sub_loss_names(self) -> list[str]:
        return ["relational_loss"]

    def _terms(
        self, student: Tensor, teacher: Tensor, indices_tuple: tuple[Tensor, ...] | None
    ) -> dict[str, Tensor | None]:
        name, order = type(self).__name__, self._options().order
        pairs, triplets = mined(name, indices_tuple, student.device, angles=order == 3)
        tuples: dict[str, Any] = {"triplets": triplets} if order == 3 else {"pairs": pairs}
        loss = checked_loss(name, student, teacher, self._options(**tuples))
        if isinstance(self.references, RelationMemory):
            self.references.update(student, teacher)
        return {"relational_loss": loss}
