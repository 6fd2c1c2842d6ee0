"""The baselines of the paper that neither host has; importing this file registers them in torchdistill.

Attention transfer is torchdistill's ``ATLoss``, a hint is PyTorch's ``MSELoss``, and the triplet loss is
pytorch-metric-learning's, with the miner of this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pytorch_metric_learning.miners import BaseMiner
from pytorch_metric_learning.utils.loss_and_miner_utils import get_all_pairs_indices
from torch import Tensor, nn
from torch.nn.functional import linear
from torchdistill.models.registry import register_auxiliary_model_wrapper
from torchdistill.models.wrapper import AuxiliaryModelWrapper

from rkd_plugin.adapters.torchdistill import HookedLoss, mid_level_loss
from rkd_plugin.kernels.pairwise import squared_distances, widest


class DistanceWeightedNegatives(BaseMiner):
    """All pairs of one class, each with a negative that is drawn with the inverse density of its distance.

    On the unit sphere of ``D`` dimensions distances have density ``q(d) ~ d^(D-2) (1 - d^2/4)^((D-3)/2)`` (Wu et al.,
    "Sampling Matters in Deep Embedding Learning", ICCV 2017); a negative at distance d is drawn with probability
    ``~ 1/q(max(d, floor))`` if ``d < cutoff``, and never otherwise. As in the authors' code
    (``metric/pairsampler.py``), the draw is uniform over the negatives of an anchor if none of them is below the
    cutoff, or if all their weights underflow, which is frequent for wide embeddings. PML's own
    ``DistanceWeightedMiner`` drops such anchors, and draws positives at random.

    Args:
        floor: the smallest distance that is used; nearer negatives have this one.
        cutoff: negatives at this distance or a larger one are not drawn.
        kwargs: arguments of every PML miner.

    Example:
        >>> embeddings = torch.tensor([[1., 0., 0.], [.8, .6, 0.], [.6, .8, 0.], [-1., 0., 0.]])
        >>> anchors, positives, negatives = DistanceWeightedNegatives()(embeddings, torch.tensor([0, 0, 1, 2]))
        >>> anchors, positives, negatives  # the opposite row is too far to be drawn
        (tensor([0, 1]), tensor([1, 0]), tensor([2, 2]))
    """

    def __init__(self, floor: float = 0.5, cutoff: float = 1.4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.floor = floor
        self.cutoff = cutoff

    def mine(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """PML's hook: embeddings ``(N, D)``, labels ``(N,)`` -> indices of anchors, positives, negatives."""
        anchors, positives, _, _ = get_all_pairs_indices(labels, None if ref_labels is labels else ref_labels)
        probabilities = self.probabilities(embeddings, labels, ref_emb, ref_labels)[anchors]
        has_negative = probabilities.sum(1) > 0
        negatives = torch.multinomial(probabilities[has_negative], 1).squeeze(1)
        return anchors[has_negative], positives[has_negative], negatives

    def probabilities(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> Tensor:
        """``(N, M)``: the probability that row j of ``ref_emb`` is the negative of row i; 0 without negatives."""
        distances = self.distance(embeddings.float(), ref_emb.float())
        if ref_emb is embeddings:
            # As in the authors' code: the distance of a row to itself bounds the weights.
            distances = distances.fill_diagonal_(1.0)
        clamped = distances.clamp(min=self.floor)
        dim = embeddings.shape[1]
        # Opposite rows have density 0, and rounding can make it negative.
        height = (1.0 - 0.25 * clamped.square()).clamp(min=torch.finfo(clamped.dtype).eps)
        weights = (2.0 - dim) * clamped.log() - (dim - 3.0) / 2.0 * height.log()
        weights = (weights - weights.max(1, keepdim=True).values).exp()
        negative = labels[:, None] != ref_labels
        weights = torch.where(negative & (clamped < self.cutoff), weights, 0.0)
        weights = torch.where(weights.sum(1, keepdim=True) == 0, negative.float(), weights)
        return weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


class HardDarkRank(nn.Module):
    """Likelihood of the teacher's ranking under the student's distances: the HardRank loss of DarkRank.

    The teacher ranks the ``list_length`` nearest neighbours of each row. The student's scores are
    ``S = -alpha * distance ** beta``. The likelihood of the ranking is that of drawing the neighbours in this order
    without replacement, each with probability ``softmax(S)`` among those that are left. The loss is the mean negative
    log likelihood over the rows.

    Args:
        alpha: factor of the distance.
        beta: exponent of the distance.
        list_length: number of neighbours that are ranked; all of them if there are fewer.

    Raises:
        ValueError: when called, if the row counts differ or are below 2.

    Source: Chen, Wang, Zhang, "DarkRank", AAAI 2018; values as in the authors' ``metric/loss.py``.

    Example:
        >>> teacher = torch.tensor([[0.], [1.], [3.]])
        >>> HardDarkRank(alpha=1.0, beta=1.0)(teacher, teacher)  # softmax of (-1, -3), (-1, -2) and (-2, -3)
        tensor(0.2512)
    """

    def __init__(self, alpha: float = 3.0, beta: float = 3.0, list_length: int = 4) -> None:
        super().__init__()
        self.alpha = alpha
        self.beta = beta
        self.list_length = list_length

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """``(N, D_s), (N, D_t) -> scalar``; no gradient flows to ``teacher``."""
        count = len(student)
        if len(teacher) != count or count < 2:
            raise ValueError(
                f"HardDarkRank: expected as many student as teacher rows, at least 2, got {count} and {len(teacher)}"
            )
        student, teacher = student.to(widest(student)), teacher.detach().to(widest(teacher))
        nearest = squared_distances(teacher).fill_diagonal_(-1.0).argsort(1)[:, 1 : self.list_length + 1]
        squared = squared_distances(student).gather(1, nearest)
        # The square root has no finite gradient at 0, which is the distance of equal rows.
        scores = -self.alpha * torch.where(squared > 0, squared, 1.0).pow(self.beta / 2) * (squared > 0)
        left = scores.flip(1).logcumsumexp(1).flip(1)
        return (left - scores).sum(1).mean().float()


@mid_level_loss
class DarkRankLoss(HookedLoss, HardDarkRank):
    """`HardDarkRank` between two hooked modules; further arguments as in the RKD losses."""


class HintRegressor(nn.Conv2d):
    """A 1 x 1 convolution without bias that maps ``(N, C, H, W)`` or ``(N, C)`` to the width of the teacher.

    Raises:
        ValueError: if the features have another shape, in which the axis of channels is unknown.
    """

    def __init__(self, student_width: int, teacher_width: int, *, init_range: float) -> None:
        super().__init__(student_width, teacher_width, 1, bias=False)
        nn.init.uniform_(self.weight, -init_range, init_range)

    def forward(self, features: Tensor) -> Tensor:
        """The student's features in the teacher's width."""
        if features.ndim not in (2, 4) or features.shape[1] != self.in_channels:
            raise ValueError(
                f"HintRegressor: expected feature maps (N, {self.in_channels}, H, W) or vectors (N, {self.in_channels})"
                f", got {tuple(features.shape)}; hook another module, or change `channels`"
            )
        return super().forward(features) if features.ndim == 4 else linear(features, self.weight.flatten(1))


@register_auxiliary_model_wrapper
class HintRegressors(AuxiliaryModelWrapper):
    """A student with 1 x 1 convolutions that map its hooked outputs to the teacher's widths, and train with it.

    Hooks find the modules as ``student_model.<path>`` and ``regressors.<name>``.

    Args:
        student_model: passed by torchdistill.
        regressors: name -> ``{path: ..., channels: [student's, teacher's]}``; the path is ``'.'`` or a hooked module.
        init_range: the initial weights are uniform in ``[-init_range, init_range]``.
        kwargs: further arguments of torchdistill, about devices; not used.

    Source: Romero et al., "FitNets", ICLR 2015; regressor and initial values as in the authors' ``metric/loss.py``.
    Their ``run_distill_fitnet.py`` does not train the regressors; here they train, as in FitNets.
    """

    def __init__(
        self, student_model: nn.Module, regressors: Mapping[str, Any], init_range: float = 0.005, **kwargs: Any
    ) -> None:
        super().__init__()
        self.student_model = student_model
        self.paths = {name: config["path"] for name, config in regressors.items()}
        self.regressors = nn.ModuleDict(
            {name: HintRegressor(*config["channels"], init_range=init_range) for name, config in regressors.items()}
        )

    def forward(self, images: Tensor) -> Any:
        """What the student returns."""
        return self.student_model(images)

    def secondary_forward(self, io_dict: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Map the outputs that the hooks kept; hooks on the regressors keep the results."""
        for name, path in self.paths.items():
            self.regressors[name](io_dict[path]["output"])
