"""The base of the losses of pytorch-metric-learning that take the teacher's embeddings."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.reducers import ClassWeightedReducer
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from torch import Tensor

from rkd_plugin.adapters.pml.tensors import TensorWithTeacher, embeddings_of, plain
from rkd_plugin.kernels.pairwise import widen
from rkd_plugin.options import Options, Pairs, Triplets


class LossWithTeacher(BaseMetricLossFunction):
    """The base of the losses: checks both sides, and gives a reducer each term of ``_sub_loss_names``.

    Args:
        options: of the loss; each becomes an attribute.
        kwargs: of every loss of PML.
    """

    _options_type: ClassVar[type[Options]] = Options
    _recorded: ClassVar[list[str]]

    def __init__(self, options: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._option_names = tuple(options)
        for option, value in options.items():
            setattr(self, option, value)
        name = type(self).__name__
        self._options().check(name)
        if options["gather"] is not False and any(isinstance(m, ClassWeightedReducer) for m in self.modules()):
            raise ValueError(
                f"{name}: expected a reducer that needs no labels with gather, got ClassWeightedReducer, since gather "
                "exchanges no labels; use DistributedLossWrapper(loss, efficient=False) instead of gather"
            )
        lp = self.distance
        if not isinstance(lp, LpDistance) or lp.p != 2 or lp.power != 1:
            raise ValueError(
                f"{name}: expected a Euclidean distance, got {type(lp).__name__} with p={lp.p} and "
                f"power={lp.power}; pass LpDistance(p=2, power=1), with normalize_embeddings True or False"
            )
        self.add_to_recordable_attributes(list_of_names=self._recorded)
        sides = [f"{side}_{stat}" for side in ("student", "teacher") for stat in ("mean_distance", "zero_share")]
        self.add_to_recordable_attributes(
            list_of_names=[*sides, *(f"{name}_mean" for name in self._sub_loss_names())], is_stat=True
        )

    def _options(self, **tuples: Any) -> Any:
        options = {name: getattr(self, name) for name in self._option_names}
        return self._options_type(reduction="anchor", **options, **tuples)

    def _terms(
        self, student: Tensor, teacher: Tensor, indices_tuple: tuple[Tensor, ...] | None
    ) -> dict[str, Tensor | None]:
        """Each term as a vector ``(N,)``; None for a weight of 0."""
        raise NotImplementedError

    def get_default_distance(self) -> Any:
        """No normalisation of the rows: their norms are part of the relations."""
        return LpDistance(p=2, normalize_embeddings=False)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Any:
        """The loss between the embeddings of a batch and the teacher's.

        Args:
            embeddings: the student's, ``(N, D_s)``, floating point. For half precision the loss is float32, and the
                gradient saturates at the largest number of the dtype.
            labels: ``(N,)``; used by a ``ClassWeightedReducer`` only.
            indices_tuple: 3 or 4 index vectors of a PML miner. Then only the mined pairs count for the distances, each
                as often as it was mined, and only the mined triplets for the angles (vertex at the anchor, arms to
                positive and negative). The mean distance is still over the whole batch. Without tuples the loss is 0.
            ref_emb: the teacher's, ``(N, D_t)``, floating point: row i is the example of row i of ``embeddings``.
                They are moved to the student's device. Not needed if ``embeddings`` is a `TensorWithTeacher`, as
                `TeacherStudentTrunk` returns.
            ref_labels: not used.

        Returns:
            The result of the reducer, which gets one loss per anchor and term; a scalar by default.

        Raises:
            TypeError: if a side is not one floating-point tensor, such as a model's tuple, dict or ``ModelOutput``; if
                ``indices_tuple`` is not a tuple of index vectors.
            ValueError: if the teacher's embeddings are missing, a side is not ``(N, D)``, the numbers of rows differ,
                or ``indices_tuple`` does not fit the batch.
            RuntimeError: if ``gather`` is set inside a ``DistributedLossWrapper``, which gathers too.
        """
        name = type(self).__name__
        if ref_emb is None and isinstance(embeddings, TensorWithTeacher):
            ref_emb = embeddings.teacher
        if ref_emb is None or ref_emb is embeddings:
            raise ValueError(
                f"{name}: expected the teacher's embeddings, got none; call loss(student, ref_emb=teacher), train with "
                "RKDTrainer, or with TeacherStudentTrunk and the embedder inside its student"
            )
        student = embeddings_of(name, "student", plain(embeddings))
        teacher = embeddings_of(name, "teacher", ref_emb)
        if len(teacher) != len(student):
            raise ValueError(
                f"{name}: expected one row per example in embeddings and ref_emb, got {len(student)} and "
                f"{len(teacher)} rows; under DistributedLossWrapper pass ref_emb=teacher and set efficient=False"
            )
        if self.gather is not False and _inside_distributed_wrapper():
            raise RuntimeError(
                f"{name}: expected gather=False inside DistributedLossWrapper, which gathers too, got {self.gather!r}; "
                "remove the wrapper and keep gather, which distributes the work over the processes"
            )
        # PML casts the terms to the dtype of the embeddings; float16 would lose digits of the loss.
        return super().forward(_float32(student), labels, indices_tuple, teacher.to(student.device), ref_labels)

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: tuple[Tensor, ...] | None,
        ref_emb: Tensor,
        ref_labels: Tensor | None,
    ) -> dict[str, dict[str, Any]]:
        """Each term as a vector ``(N,)`` for the reducer: one loss per anchor, whose mean is the mean over all tuples.

        * ``MeanReducer`` (default), ``DivisorReducer``: as ``reduction="mean"`` in `rkd_plugin.functional`.
        * ``SumReducer``: N times that.
        * ``ThresholdReducer``, ``AvgNonZeroReducer``: the mean over the anchors whose loss is within the bounds.
        * ``PerAnchorReducer``: the result of its inner reducer, since there is one loss per anchor.
        * ``ClassWeightedReducer``: weighted by the anchor's label.
        * ``DoNothingReducer``: the dictionary of vectors. ``MultipleReducers``: one reducer for each of the terms
          ``distance_loss`` and ``angle_loss``, or for ``relational_loss``, then their sum.
        """
        ref_emb = _float32(ref_emb.detach())
        student, teacher = self.distance.maybe_normalize(embeddings), self.distance.maybe_normalize(ref_emb)
        self.distance.reset_stats()
        self.distance.set_default_stats(embeddings, ref_emb, student, teacher)
        vectors = self._terms(student, teacher, indices_tuple)
        losses = {term: self._reducible(vectors[term], student.dtype) for term in self._sub_loss_names()}
        if self.collect_stats and len(student) > 1:
            self._set_stats(student, teacher, losses)
        return losses

    def _reducible(self, losses: Tensor | None, dtype: torch.dtype) -> dict[str, Any]:
        """A term in the form that PML's reducers expect."""
        if losses is None or not len(losses):
            zero: dict[str, Any] = self.zero_loss()
            return zero
        return {
            "losses": losses.to(dtype),
            "indices": c_f.torch_arange_from_size(losses),
            "reduction_type": "element",
            "divisor": len(losses),  # read by DivisorReducer only
        }

    @torch.no_grad()
    def _set_stats(self, student: Tensor, teacher: Tensor, terms: dict[str, dict[str, Any]]) -> None:
        for side, x in (("student", student), ("teacher", teacher)):
            distances = torch.pdist(x)
            setattr(self, f"{side}_mean_distance", distances.mean().item())
            setattr(self, f"{side}_zero_share", (distances == 0).double().mean().item())
        for name, term in terms.items():
            setattr(self, f"{name}_mean", float(torch.as_tensor(term["losses"]).float().mean()))


def _float32(x: Tensor) -> Tensor:
    return widen(x, torch.float32) if x.dtype in (torch.float16, torch.bfloat16) else x


def mined(name: str, indices_tuple: Any, device: torch.device, angles: bool) -> tuple[Pairs | None, Triplets | None]:
    """The pairs and, if ``angles``, the triplets of a PML miner, as `rkd_plugin.functional` expects them."""
    if indices_tuple is None:
        return None, None
    expected = f"{name}: expected indices_tuple to be 3 or 4 index vectors of a PML tuple miner"
    if not isinstance(indices_tuple, tuple | list) or not all(isinstance(index, Tensor) for index in indices_tuple):
        raise TypeError(f"{expected}, got {type(indices_tuple).__name__}; pass what miner(embeddings, labels) returns")
    shapes = [tuple(index.shape) for index in indices_tuple]
    # 3 vectors: anchors, positives, negatives. 4 vectors: anchors, positives, more anchors, negatives.
    fits = (
        len(shapes) in (3, 4) and shapes[0] == shapes[1] and shapes[-1] == shapes[-2] and {1} == set(map(len, shapes))
    )
    if not fits:
        raise ValueError(f"{expected}, got shapes {shapes}; pass what miner(embeddings, labels) returns")
    # PML's empty tuples are torch.tensor([]), which is float.
    fractional = [
        index.dtype for index in indices_tuple if len(index) and index.dtype not in (torch.int64, torch.int32)
    ]
    if fractional:
        raise TypeError(f"{expected}, got {fractional[0]}; pass int64")
    indices = tuple(index.to(device, torch.long) for index in indices_tuple)
    anchors, positives, more_anchors, negatives = lmu.convert_to_pairs(indices, None)
    pairs = torch.cat([anchors, more_anchors]), torch.cat([positives, negatives])
    return pairs, lmu.convert_to_triplets(indices, None) if angles else None


def _inside_distributed_wrapper() -> bool:
    """Whether `DistributedLossWrapper` is on the call stack; a module does not know which module wraps it."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is DistributedLossWrapper.forward.__code__:
            return True
        frame = frame.f_back
    return False
