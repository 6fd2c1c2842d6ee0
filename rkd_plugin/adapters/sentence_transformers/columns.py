"""What the losses share: from the text columns of a batch and its labels to one batch of each side."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

Features = dict[str, Any]
COMMON = ("weight", "normalize", "mini_batch_size", "gather_across_devices")


class Terms(dict[str, Tensor]):
    """The terms of a loss by name; the Trainer sums and logs them.

    A number times terms, and the sum of two with the same names, are terms again, since ``MatryoshkaLoss`` multiplies
    and adds what its loss returns.

    Example:
        >>> 0.0 + 2 * Terms(rkd_distance=torch.tensor(1.5)) + Terms(rkd_distance=torch.tensor(1.0))
        {'rkd_distance': tensor(4.)}
    """

    def __rmul__(self, weight: float) -> Terms:
        return Terms({name: weight * term for name, term in self.items()})

    def __add__(self, other: Mapping[str, Tensor]) -> Terms:
        return Terms({name: term + other[name] for name, term in self.items()})

    def __radd__(self, zero: float) -> Terms:
        return Terms({name: zero + term for name, term in self.items()})


class SentenceLoss(nn.Module):
    """The base of the losses: from the columns of a batch and its labels to a batch of both sides."""

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None = None,
        *,
        weight: float = 1.0,
        normalize: bool = True,
        mini_batch_size: int | None = None,
        gather_across_devices: bool = False,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if mini_batch_size is not None and mini_batch_size < 1:
            raise ValueError(f"{name}: expected mini_batch_size to be at least 1, got {mini_batch_size}")
        self.model = model  # under this name, since the Trainer replaces it by its wrapper
        self.weight = weight
        self.normalize = normalize
        self.mini_batch_size = mini_batch_size
        self.gather_across_devices = gather_across_devices
        # In a tuple, so that it is no submodule, whose parameters the Trainer would give to the optimizer.
        self._teacher: tuple[Any, ...] = () if teacher is None else (teacher.eval(),)
        self._tokenizer = _tokenizer_to_decode(name, model, teacher) if self._teacher else None

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Terms:
        """The terms of the loss for a batch of the Trainer.

        Args:
            sentence_features: the tokens of each text column, B texts each.
            labels: the teacher's vectors, ``(B, C, D_t)`` for C columns, or ``(B, D_t)`` for one column, or for a
                target that all columns share, as for translations. Not needed with a live teacher, which has priority.

        Returns:
            The terms by name, times the weight: scalars.

        Raises:
            TypeError: if the labels are not floating-point numbers.
            ValueError: if there is no text, the model has no pooling, there are neither labels nor a teacher, or the
                labels have another shape.
        """
        columns = list(sentence_features)
        name = type(self).__name__
        if any("input_ids" in column and not column["input_ids"].numel() for column in columns) or not columns:
            found = f"one of {len(columns)} columns without a token" if columns else "no column"
            raise ValueError(f"{name}: expected texts in every text column, got {found}; remove empty texts")
        targets = self._of_teacher(columns) if self._teacher else labels
        return self.compute_loss_from_embeddings([self._embed(column) for column in columns], targets)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None) -> Terms:
        """The terms for embeddings that are already computed, so that several losses share one forward pass.

        Args:
            embeddings: the student's, ``(B, D_s)`` for each column.
            labels: as in ``forward``.

        Returns:
            As ``forward``.

        Raises:
            TypeError, ValueError: as ``forward``.
        """
        teacher = self._joined(labels, len(embeddings[0]), len(embeddings), embeddings[0].device)
        student = torch.cat(embeddings)
        if self.normalize:
            # In float32 at least, since a length in half precision may overflow.
            student, teacher = (
                normalize(x.to(torch.promote_types(x.dtype, torch.float32))) for x in (student, teacher)
            )
        return self.weight * self._terms(student, teacher)

    def _terms(self, student: Tensor, teacher: Tensor) -> Terms:
        raise NotImplementedError

    def _embed(self, features: Features) -> Tensor:
        """``(B, D_s)``; with ``mini_batch_size``, the activations of two parts at most are in memory at once."""
        if self.mini_batch_size is None or "offsets" in features:  # those of an embedding table have no rows of tokens
            return self._embedding(self.model, features)
        if _in_matryoshka(self.model):
            raise ValueError(
                f"{type(self).__name__}: expected mini_batch_size=None in MatryoshkaLoss, which keeps the outputs of "
                f"one forward pass, got {self.mini_batch_size}"
            )
        first, *others = _parts(features, self.mini_batch_size)
        # DistributedDataParallel must see one forward pass, and none while gradients are computed.
        inner = getattr(self.model, "module", self.model)
        rows = [self._embedding(self.model, first)]
        rows += [checkpoint(self._embedding, inner, part, use_reentrant=False) for part in others]
        return torch.cat(rows)

    def _embedding(self, model: nn.Module, features: Features) -> Tensor:
        output = model(dict(features))  # a copy, since a model adds its outputs to it
        if "sentence_embedding" not in output:
            raise ValueError(
                f"{type(self).__name__}: expected a model that returns 'sentence_embedding', got "
                f"{', '.join(map(repr, output))}; add a Pooling module"
            )
        embedding: Tensor = output["sentence_embedding"]
        return embedding

    @torch.no_grad()
    def _of_teacher(self, columns: list[Features]) -> Tensor:
        """The vectors ``(B, C, D_t)`` of the live teacher."""
        device = next(self.model.parameters()).device
        teacher = self._teacher[0].to(device)
        if self._tokenizer is not None:
            decode = partial(self._tokenizer.batch_decode, skip_special_tokens=True)
            columns = [teacher.preprocess(decode(features["input_ids"])) for features in columns]
            columns = [{k: v.to(device) if isinstance(v, Tensor) else v for k, v in c.items()} for c in columns]
        return torch.stack([self._embedding(teacher, features) for features in columns], 1)

    def _joined(self, labels: Tensor | None, rows: int, columns: int, device: torch.device) -> Tensor:
        """The teacher's vectors ``(C * B, D_t)``, in the order of the joined columns."""
        name = type(self).__name__
        if labels is None:
            raise ValueError(
                f"{name}: expected the teacher's vectors as labels, got none; add a column `label` to the dataset, or "
                "give the loss a teacher"
            )
        if not labels.is_floating_point():
            raise TypeError(f"{name}: expected the teacher's vectors as labels, got {labels.dtype}")
        if labels.shape[:-1] not in ((rows,), (rows, columns)):
            raise ValueError(
                f"{name}: expected the teacher's vectors as labels of shape ({rows}, {columns}, D) or ({rows}, D), got "
                f"{tuple(labels.shape)}"
            )
        if _in_matryoshka(self.model) and labels.stride(-1) == 1:
            # It cuts labels of the student's width; the vectors are still whole in memory.
            labels = labels.as_strided((*labels.shape[:-1], labels.stride(-2)), labels.stride())
        if labels.ndim == 2:
            labels = labels[:, None].expand(-1, columns, -1)
        return labels.detach().to(device).transpose(0, 1).flatten(0, 1)

    def get_config_dict(self) -> dict[str, Any]:
        """The options, for the model card."""
        teacher = {"teacher": self._teacher[0]} if self._teacher else {}
        return {**teacher, **{name: getattr(self, name) for name in COMMON}}

    @property
    def citation(self) -> str:
        """BibTeX, for the model card."""
        return """
@inproceedings{park2019relational,
    title={Relational Knowledge Distillation},
    author={Park, Wonpyo and Kim, Dongju and Lu, Yan and Cho, Minsu},
    booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
    year={2019}
}
"""


def _in_matryoshka(model: nn.Module) -> bool:
    """Whether ``MatryoshkaLoss`` has replaced the forward pass of the model."""
    return type(model.forward).__name__ == "ForwardDecorator"


def _parts(features: Features, size: int) -> list[Features]:
    """The features of ``size`` texts each."""
    rows = next(len(value) for value in features.values() if isinstance(value, Tensor) and value.ndim)
    cut = [
        torch.split(value, size) if isinstance(value, Tensor) and value.ndim and len(value) == rows else repeat(value)
        for value in features.values()
    ]
    return [dict(zip(features, part, strict=True)) for part in zip(*cut, strict=False)]


def _tokenizer_to_decode(name: str, model: Any, teacher: Any) -> Any:
    """The student's tokenizer if the teacher cannot read its tokens; None if it can."""
    own: Any = getattr(model, "tokenizer", None)
    other: Any = getattr(teacher, "tokenizer", None)
    lengths = [getattr(side, "max_seq_length", None) or math.inf for side in (model, teacher)]
    if own is None or (type(own) is type(other) and own.get_vocab() == other.get_vocab() and lengths[0] <= lengths[1]):
        return None
    if not hasattr(own, "batch_decode"):
        raise ValueError(
            f"{name}: expected a student with a tokenizer of transformers for a live teacher, got "
            f"{type(own).__name__}; compute the teacher's vectors once, as labels"
        )
    return own
