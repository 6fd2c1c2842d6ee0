"""The losses of `rkd_plugin.losses` for sentence-transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rkd_plugin import losses
from rkd_plugin.adapters.sentence_transformers.columns import COMMON, SentenceLoss, Terms
from rkd_plugin.functional import relation_terms
from rkd_plugin.options import Options


class _RKDLoss(SentenceLoss):
    """The base of the three losses of the paper."""

    def __init__(
        self, model: nn.Module, teacher: nn.Module | None, distance_weight: float, angle_weight: float, kwargs: Any
    ) -> None:
        super().__init__(model, teacher, **{name: kwargs.pop(name) for name in COMMON if name in kwargs})
        self.options = Options(distance_weight, angle_weight, gather=self.gather_across_devices, **kwargs)
        self.options.check(type(self).__name__)
        _check_scalar(self, self.options.reduction)

    def _terms(self, student: Tensor, teacher: Tensor) -> Terms:
        found = relation_terms(type(self).__name__, student, teacher, self.options)
        vectors = {"rkd_distance": found.distance, "rkd_angle": found.angle, "rkd": found.zero}
        terms = {name: vector.sum() for name, vector in vectors.items() if vector is not None}
        return Terms({name: term.to(torch.promote_types(student.dtype, torch.float32)) for name, term in terms.items()})

    def get_config_dict(self) -> dict[str, Any]:
        """The options, for the model card."""
        names = ("distance_weight", "angle_weight", "reduction", "huber_delta", "anchors", "impl")
        return {**{name: getattr(self.options, name) for name in names}, **super().get_config_dict()}


class RKDDistanceLoss(_RKDLoss):
    """`rkd_plugin.rkd_distance_loss` for sentence-transformers: RKD-D, the term ``rkd_distance``.

    Args:
        model: the student, a ``SentenceTransformer``.
        teacher: a ``SentenceTransformer`` that runs at each step, instead of labels. It is set to eval mode and gets no
            gradient. If its vocabulary is not the student's, it gets the texts that the student's tokens decode to,
            without what the student's tokenizer drops, such as upper case; labels are exact, and cost one pass.
        kwargs: ``weight`` of the terms (1.0). ``normalize``: whether the rows of both sides are scaled to length 1
            (True). ``mini_batch_size``: the number of texts in a forward pass (None: all). As in the library's cached
            losses, activations are computed twice, and the gradients are those of the whole batch; an embedding table
            ignores it, and ``MatryoshkaLoss`` does not work with it. ``gather_across_devices``: whether the loss is
            over the batches of all processes (False). ``reduction``: ``"mean"``, ``"tuple_mean"`` or ``"sum"``.
            ``huber_delta``, ``impl``: as in `rkd_plugin.rkd_distance_loss`.

    Raises:
        TypeError, ValueError: if an option has the wrong type or an invalid value, or the texts cannot be decoded for
            the teacher; when called, see ``forward``.

    Source: Park, Kim, Lu, Cho, "Relational Knowledge Distillation", CVPR 2019.

    Example:
        An embedding table without a tokenizer; three texts in two columns, and the teacher's vector of each text.

        >>> class Table(nn.EmbeddingBag):
        ...     def forward(self, features):
        ...         return {"sentence_embedding": super().forward(features["input_ids"])}
        >>> loss = RKDDistanceLoss(Table(10, 4))
        >>> columns = [{"input_ids": torch.tensor([[1, 2], [3, 4], [5, 6]])} for _ in range(2)]
        >>> terms = loss(columns, torch.randn(3, 2, 16))
        >>> list(terms)
        ['rkd_distance']
    """

    def __init__(self, model: nn.Module, teacher: nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__(model, teacher, 1.0, 0.0, kwargs)


class RKDAngleLoss(_RKDLoss):
    """`rkd_plugin.rkd_angle_loss` for sentence-transformers: RKD-A, the term ``rkd_angle``.

    Arguments, errors and source as `RKDDistanceLoss`, and ``anchors`` as in `rkd_plugin.rkd_angle_loss`.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__(model, teacher, 0.0, 1.0, kwargs)


class RKDDALoss(_RKDLoss):
    """`rkd_plugin.rkd_da_loss` for sentence-transformers: RKD-DA, the terms ``rkd_distance`` and ``rkd_angle``.

    Arguments, errors and source as `RKDDistanceLoss`, and ``distance_weight``, ``angle_weight`` and ``anchors`` as in
    `rkd_plugin.rkd_da_loss`.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None = None,
        *,
        distance_weight: float = 1.0,
        angle_weight: float = 2.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, teacher, distance_weight, angle_weight, kwargs)


class RelationalLoss(SentenceLoss):
    """`rkd_plugin.relational_loss` for sentence-transformers: any relation and any penalty, the term ``relational``.

    Args:
        model: the student, as in `RKDDistanceLoss`.
        teacher: as in `RKDDistanceLoss`.
        potential: as in `rkd_plugin.relational_loss`.
        penalty: as in `rkd_plugin.relational_loss`.
        kwargs: ``weight``, ``normalize``, ``mini_batch_size`` and ``gather_across_devices`` as in `RKDDistanceLoss`;
            the others are those of `rkd_plugin.RelationalLoss`.

    Raises:
        TypeError, ValueError: as `RKDDistanceLoss`.

    Example:
        A softmax over the cosines of each row to 6 of its 7 neighbours. Without ``neighbours`` the row itself, whose
        cosine is 1, would have nearly all of the softmax.

        >>> loss = RelationalLoss(nn.Identity(), None, "cosine", "kl", scale="softmax", temperature=0.1, neighbours=6)
        >>> list(loss.compute_loss_from_embeddings([torch.randn(8, 4)], torch.randn(8, 16)))
        ['relational']
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None = None,
        potential: Any = "distance",
        penalty: Any = "huber",
        **kwargs: Any,
    ) -> None:
        super().__init__(model, teacher, **{name: kwargs.pop(name) for name in COMMON if name in kwargs})
        self.relations = losses.RelationalLoss(potential, penalty, gather=self.gather_across_devices, **kwargs)
        _check_scalar(self, str(self.relations.reduction))

    def _terms(self, student: Tensor, teacher: Tensor) -> Terms:
        return Terms(relational=self.relations(student, teacher))

    def get_config_dict(self) -> dict[str, Any]:
        """The options, for the model card."""
        names = ("potential", "penalty", "scale", "temperature", "huber_delta", "neighbours", "reduction", "anchors")
        options = {name: getattr(self.relations, name) for name in names}
        named = {name: getattr(value, "__name__", value) for name, value in options.items()}  # of functions
        return {**named, **super().get_config_dict()}


def _check_scalar(loss: nn.Module, reduction: str) -> None:
    if reduction == "anchor":
        raise ValueError(
            f"{type(loss).__name__}: expected a scalar for the Trainer, got reduction 'anchor'; use 'mean'"
        )
