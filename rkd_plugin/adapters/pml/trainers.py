"""PML's trainers with a teacher."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from pytorch_metric_learning.trainers import MetricLossOnly
from pytorch_metric_learning.trainers.base_trainer import BaseTrainer
from pytorch_metric_learning.utils import common_functions as c_f
from torch import Tensor, nn

from rkd_plugin.adapters.pml.bank import from_bank
from rkd_plugin.adapters.pml.tensors import Part, embeddings_of, one_tensor, plain
from rkd_plugin.adapters.pml.trunk import teacher_embeddings
from rkd_plugin.teacher_bank import Bank


class RKDTrainerMixin(BaseTrainer):
    """Adds a teacher and a separate RKD loss to any trainer of PML; `RKDTrainer` is ``MetricLossOnly`` with it.

    It is the first base class: ``class RKDWithClassifier(RKDTrainerMixin, TrainWithClassifier): pass``. The class takes
    the arguments of that trainer, with ``models={"trunk": ..., "teacher": ..., ...}``, ``loss_funcs={"rkd_loss":
    RKDDALoss(), ...}`` and optionally ``loss_weights``, with a weight for ``rkd_loss``. ``rkd_loss`` compares the
    embeddings that PML computes for each batch (after the ``embedder``, if there is one) with the teacher's embeddings
    of the same batch. It always uses the whole batch, not the tuples of a ``tuple_miner``: the batches of both streams
    together in ``TwoStreamMetricLoss``, the whole embedding in ``CascadedEmbeddings``, only real images in
    ``DeepAdversarialMetricLearning``. A ``metric_loss`` is optional where the trainer of PML allows it.

    The teacher runs in eval mode and without gradients; afterwards its training mode is restored. Its ``requires_grad``
    is unchanged, and it may share layers with the student. It needs no optimizer. It is ``trainer.teacher``, not in
    ``trainer.models``, whose members PML sets to train mode, optimizes and saves.

    Args:
        args: of the trainer of PML.
        teacher_bank: a `Bank` instead of a teacher, see `from_bank`.
        student_output: the part of the trunk's output that is its embeddings, if the output is a dict, a tuple or a
            ``ModelOutput``: a name, an index, or a function of the output. None: the whole output. PML's testers need
            a trunk that returns a tensor.
        teacher_output: the same for the teacher.
        kwargs: of the trainer of PML.

    Raises:
        AssertionError: by PML, if a model or loss is missing or unknown.
        TypeError: if ``rkd_loss`` takes no ``ref_emb``, or a loss is from ``rkd_plugin`` instead of
            ``rkd_plugin.adapters.pml``; if ``teacher_bank`` is not a `Bank`, for example its path; if the order of base
            classes hides the trainer of PML; in training, if a model does not return a floating-point tensor.
        ValueError: if the teacher has an optimizer; if there are a bank and a teacher; if the bank is of another data
            set, or of several modules; in training, if a model does not return ``(N, D)``, or has no such part.
        RuntimeError: in training, if the trainer does not compute embeddings by ``get_trunk_output`` and
            ``get_final_embeddings``.

    Example:
        >>> from pytorch_metric_learning.trainers import TwoStreamMetricLoss
        >>> class RKDTwoStream(RKDTrainerMixin, TwoStreamMetricLoss):
        ...     pass
    """

    models: dict[str, nn.Module]
    dataset: Any
    collate_fn: Any
    data_and_label_getter: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = list(cls.__mro__)
        hosts = [base for base in order if "calculate_loss" in vars(base) and not issubclass(base, RKDTrainerMixin)]
        hidden = next((base for base in hosts if not issubclass(hosts[0], base)), None)
        if hidden or order.index(hosts[0]) < order.index(RKDTrainerMixin):
            host = (hidden or hosts[0]).__name__
            raise TypeError(
                f"{cls.__name__}: expected RKDTrainerMixin before {host}, got an order of bases in which one hides "
                f"the other; write class {cls.__name__}(RKDTrainerMixin, {host})"
            )

    def __init__(
        self,
        *args: Any,
        teacher_bank: Bank | None = None,
        student_output: Part = None,
        teacher_output: Part = None,
        **kwargs: Any,
    ) -> None:
        self.teacher_bank = teacher_bank
        self.student_output = student_output
        self.teacher_output = teacher_output
        self._trunk_outputs: list[tuple[Tensor, Any]] = []
        self._embeddings: list[tuple[Tensor, Any]] = []
        super().__init__(*args, **kwargs)

    def custom_setup(self) -> None:
        """With a teacher bank, let the batches contain its vectors."""
        super().custom_setup()
        if self.teacher_bank is None:
            return
        if "teacher" in self.models:
            raise ValueError(
                f"{type(self).__name__}: expected a teacher or a teacher_bank, got both; remove one of them"
            )
        for name, value in from_bank(
            self.teacher_bank, self.dataset, self.collate_fn, self.data_and_label_getter
        ).items():
            setattr(self, name, value)

    def modify_schema(self) -> None:
        """Add the teacher and its loss to the models and losses that PML accepts and requires."""
        super().modify_schema()
        if "teacher_optimizer" in self.optimizers:
            raise ValueError(
                f"{type(self).__name__}: expected no optimizer of the teacher, which is not trained, got a "
                "teacher_optimizer; remove it from optimizers"
            )
        if self.teacher_bank is None:
            self.schema["models"].keys += ["teacher"]
            self.schema["models"].essential += ["teacher"]
        self.schema["loss_funcs"].keys += ["rkd_loss"]
        self.schema["loss_funcs"].essential += ["rkd_loss"]
        self.schema["loss_funcs"].important = []  # metric_loss is optional: no warning without it
        self.schema["optimizers"].important = [f"{name}_optimizer" for name in self.models if name != "teacher"]

    def initialize_models(self) -> None:
        """Remove the teacher from ``models``, so that PML neither trains nor saves it."""
        _check_losses(type(self).__name__, self.loss_funcs)
        self.teacher = self.models.get("teacher")
        self.models = {name: model for name, model in self.models.items() if name != "teacher"}
        super().initialize_models()

    def update_loss_weights(self) -> None:
        """Keep the weight of ``rkd_loss``, which the schedules of some trainers set to 0."""
        weight = self.loss_weights["rkd_loss"]
        super().update_loss_weights()
        self.loss_weights["rkd_loss"] = weight

    def calculate_loss(self, curr_batch: tuple[Any, Tensor]) -> None:
        """Compute ``self.losses`` for one batch."""
        self._trunk_outputs, self._embeddings = [], []
        super().calculate_loss(curr_batch)
        batches, self._trunk_outputs, self._embeddings = self._embeddings, [], []
        # DeepAdversarialMetricLearning has do_metric, False while it trains its generator only.
        if self.loss_weights["rkd_loss"] <= 0 or not getattr(self, "do_metric", True):
            return
        if not batches:
            raise RuntimeError(
                f"{type(self).__name__}: expected embeddings of get_trunk_output and get_final_embeddings, got none; "
                "call both in calculate_loss"
            )
        student = torch.cat([embeddings for embeddings, _ in batches])
        teacher = torch.cat([self._teacher_embeddings(data) for _, data in batches])
        labels = torch.cat([curr_batch[1]] * len(batches))
        self.losses["rkd_loss"] = self.loss_funcs["rkd_loss"](student, labels, ref_emb=teacher)

    def _teacher_embeddings(self, data: Any) -> Tensor:
        moved = data if self.teacher is None else c_f.to_device(data, device=self.data_device)
        return teacher_embeddings(type(self).__name__, self.teacher, moved, self.teacher_output)

    def get_trunk_output(self, data: Any) -> Tensor:
        """The output of the student's trunk for a batch, stored until the end of `calculate_loss`."""
        output: Tensor = super().get_trunk_output(plain(data))
        if self.student_output is not None:
            output = one_tensor(type(self).__name__, "student", output, self.student_output)
        self._trunk_outputs.append((output, data))
        return output

    def get_final_embeddings(self, base_output: Tensor) -> Tensor:
        """The student's embeddings; those of a trunk's output, not synthetic ones, are compared with the teacher's."""
        embeddings: Tensor = super().get_final_embeddings(base_output)
        for output, data in self._trunk_outputs:
            if output is base_output:
                embeddings = embeddings_of(type(self).__name__, "student", embeddings)
                self._embeddings.append((embeddings, data))
        return embeddings


def _check_losses(where: str, loss_funcs: dict[str, Any]) -> None:
    for name, loss in loss_funcs.items():
        for part in loss.modules() if isinstance(loss, nn.Module) else ():
            if type(part).__module__ == "rkd_plugin.losses":
                kind = type(part).__name__
                raise TypeError(
                    f"{where}: expected a loss of PML as {name}, got rkd_plugin.{kind}, which takes no labels; "
                    f"import {kind} from rkd_plugin.adapters.pml"
                )
    loss = loss_funcs["rkd_loss"]
    parameters = inspect.signature(getattr(loss, "forward", loss)).parameters
    if "ref_emb" not in parameters and not any(x.kind is x.VAR_KEYWORD for x in parameters.values()):
        raise TypeError(
            f"{where}: expected an rkd_loss that takes the teacher's embeddings as ref_emb, got "
            f"{type(loss).__name__}; give RKDDALoss of rkd_plugin.adapters.pml, and other losses as metric_loss"
        )


class RKDTrainer(RKDTrainerMixin, MetricLossOnly):
    """PML's ``MetricLossOnly`` with a ``teacher`` among the models and an ``rkd_loss`` among the losses.

    It takes ``models={"trunk": ..., "teacher": ...}`` and optionally an ``embedder``; ``loss_funcs={"rkd_loss":
    RKDDALoss()}`` and optionally a ``metric_loss``; and ``loss_weights`` for each. ``tuple_miner`` mines the student's
    embeddings for ``metric_loss``; ``rkd_loss`` always uses the whole batch. See `RKDTrainerMixin`, which does the same
    for the other trainers of PML.

    Args:
        args: of ``MetricLossOnly``.
        teacher_bank: a `Bank` instead of a teacher, see `from_bank`.
        student_output: the part of the trunk's output that is its embeddings, see `RKDTrainerMixin`.
        teacher_output: the same for the teacher.
        kwargs: of ``MetricLossOnly``.

    Raises:
        AssertionError, TypeError, ValueError, RuntimeError: as `RKDTrainerMixin`.

    Example:
        >>> import torch
        >>> from pytorch_metric_learning.utils.common_functions import EmbeddingDataset
        >>> from rkd_plugin.adapters.pml import RKDDALoss
        >>> student, teacher = torch.nn.Linear(5, 3), torch.nn.Linear(5, 4)
        >>> trainer = RKDTrainer(
        ...     models={"trunk": student, "teacher": teacher},
        ...     optimizers={"trunk_optimizer": torch.optim.Adam(student.parameters())},
        ...     batch_size=8,
        ...     loss_funcs={"rkd_loss": RKDDALoss()},
        ...     dataset=EmbeddingDataset(torch.randn(16, 5), torch.arange(16)),
        ...     dataloader_num_workers=0,
        ...     data_device="cpu",
        ... )
        >>> trainer.train(num_epochs=1)
    """
