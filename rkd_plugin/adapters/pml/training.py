"""Ways to train with a teacher in pytorch-metric-learning: a trunk for its own trainers, and trainers that know one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_metric_learning.trainers import MetricLossOnly
from pytorch_metric_learning.trainers.base_trainer import BaseTrainer
from pytorch_metric_learning.utils import common_functions as c_f
from torch import Tensor, nn
from torch.utils.data import default_collate

from rkd_plugin.adapters.pml.tensors import Part, TensorWithTeacher, embeddings_of, one_tensor, plain


class TeacherStudentTrunk(nn.Module):
    """A trunk for PML's own trainers whose embeddings bring the teacher's to the losses of this package.

    In train mode it returns the student's embeddings as a `TensorWithTeacher`: the losses of this package find the
    teacher's embeddings there, everything else (a classifier, a miner, another loss) reads the student's alone. In eval
    mode it returns the student's embeddings as a plain tensor. So the host's ``MultipleLosses`` adds RKD to a loss:

        MultipleLosses({"rkd": RKDDALoss(), "task": TripletMarginLoss()}, weights={"rkd": 3, "task": 1})

    A ``tuple_miner`` of the trainer mines the student's embeddings for all of them; ``MultipleLosses(miners={"task":
    ...})`` mines for one. A separate ``embedder`` returns a tensor without a teacher, on which the loss raises: put the
    embedder into the student, ``nn.Sequential(trunk, embedder)``, or use `RKDTrainer`.

    The teacher runs in eval mode and without gradient, and is otherwise left as it is: its training mode and
    ``requires_grad`` are the caller's, and it may share layers with the student. It is no part of ``parameters()`` or
    ``state_dict()``, yet moves with ``.to()``, ``.cuda()`` and ``.half()``, copies and pickles.

    Args:
        student: maps a batch to embeddings ``(N, D_s)``.
        teacher: maps the same batch to embeddings ``(N, D_t)``. None: its embeddings come with the batch, `from_bank`.
            A batch of images is given to it in the dtype and on the device of its parameters.
        student_output: which part of its output are the student's embeddings, if that is a dict, a tuple or a
            ``ModelOutput``: a name, an index, or a function of the output. None: all of it.
        teacher_output: the same of the teacher.

    Raises:
        TypeError: when called, if a model returns no floating point tensor; names the side and the type.
        ValueError: when called, if a model does not return ``(N, D)``, or returns no such part; or in train mode, if
            there is neither a teacher nor its embeddings, or both.
        RuntimeError: when called inside ``DataParallel`` on several devices, whose copies would share one teacher; wrap
            student and teacher instead.

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
        # Inside a tuple the teacher is no submodule: no optimiser, checkpoint or train() reaches it.
        self._teacher = (teacher,)
        self.student_output = student_output
        self.teacher_output = teacher_output

    @property
    def teacher(self) -> nn.Module | None:
        """The teacher."""
        return self._teacher[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TeacherStudentTrunk:
        if self.teacher is not None:
            self.teacher._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _replicate_for_data_parallel(self) -> TeacherStudentTrunk:
        raise RuntimeError(
            "TeacherStudentTrunk: expected no DataParallel around it, got one, whose copies would share one teacher; "
            "write TeacherStudentTrunk(DataParallel(student), DataParallel(teacher))"
        )

    def forward(self, data: Any) -> Tensor:
        """A batch -> ``(N, D_s)``, in train mode with the teacher's ``(N, D_t)``."""
        where = type(self).__name__
        student = embeddings_of(where, "student", self.student(plain(data)), self.student_output)
        if not self.training:
            return student
        return TensorWithTeacher.of(student, _teachers_embeddings(where, self.teacher, data, self.teacher_output))


def _teachers_embeddings(where: str, teacher: nn.Module | None, data: Any, part: Part) -> Tensor:
    """``(N, D_t)``: what comes with the batch from a bank, or the teacher's output, which leaves no trace in it."""
    from_bank = isinstance(data, TensorWithTeacher)
    if from_bank is (teacher is not None):
        raise ValueError(
            f"{where}: expected either a teacher or batches with its embeddings, got "
            f"{'both' if from_bank else 'neither'}; give a teacher, or the trainer **from_bank(...)"
        )
    if from_bank or teacher is None:
        embeddings: Tensor = data.teacher
        return embeddings
    with torch.no_grad(), _eval_mode(teacher):
        output = teacher(_as_parameters(data, teacher))
    return embeddings_of(where, "teacher", output, part)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode in the block; afterwards each module has its mode from before."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _as_parameters(data: Any, model: nn.Module) -> Any:
    """A batch on the device of a model's parameters, and images in their dtype."""
    like = next((x for x in model.parameters() if x.is_floating_point()), None)
    if like is None or not isinstance(data, Tensor):
        return data
    return data.to(like.device, like.dtype if data.is_floating_point() else data.dtype)


class _CollateWithTeacher:
    """Collates pairs of an item and its vectors; a class, so that processes that load data can be sent it."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, batch: list[tuple[Any, list[Tensor]]]) -> tuple[Any, list[Tensor]]:
        items, vectors = zip(*batch, strict=True)
        return self.collate(list(items)), [torch.stack(rows) for rows in zip(*vectors, strict=True)]


def from_bank(
    teacher_bank: Any,
    dataset: Any,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    data_and_label_getter: Callable[[Any], tuple[Any, Any]] | None = None,
) -> dict[str, Any]:
    """Arguments of PML's trainers with which a batch brings the teacher's embeddings from a bank.

    They are those of the images that the host's sampler draws, by their index in ``dataset``.

    Args:
        teacher_bank: such as ``rkd_plugin.teacher_bank.Bank("dino.npy")``, whose ``over(dataset)`` is a data set of
            pairs of the item and a list of one vector.
        dataset: as the trainer would be given it; testers and hooks still take it so.
        collate_fn: as the trainer would be given it.
        data_and_label_getter: as the trainer would be given it.

    Returns:
        ``dataset``, ``collate_fn`` and ``data_and_label_getter``.

    Raises:
        TypeError: if that is no bank, such as the path of one; of a batch, if its data are no tensor.
        ValueError: if the bank is of another data set; of a batch, if the bank is of several modules, or if an item has
            not one image and one label, as for ``TwoStreamMetricLoss``, whose second images have no row in a bank.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from pytorch_metric_learning.utils.common_functions import EmbeddingDataset
        >>> from rkd_plugin.adapters.pml import RKDDALoss
        >>> from rkd_plugin.teacher_bank import Bank
        >>> with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        ...     np.save(file.name, np.random.randn(16, 4).astype(np.float32))
        ...     student = torch.nn.Linear(5, 3)
        ...     trainer = MetricLossOnly(
        ...         models={"trunk": TeacherStudentTrunk(student)},
        ...         optimizers={"trunk_optimizer": torch.optim.Adam(student.parameters())},
        ...         batch_size=8,
        ...         loss_funcs={"metric_loss": RKDDALoss()},
        ...         **from_bank(Bank(file.name), EmbeddingDataset(torch.randn(16, 5), torch.arange(16))),
        ...         dataloader_num_workers=0,
        ...         data_device="cpu",
        ...     )
        ...     trainer.train(num_epochs=1)
    """
    if not hasattr(teacher_bank, "over"):
        raise TypeError(
            f"from_bank: expected a teacher_bank such as Bank('dino.npy'), got {type(teacher_bank).__name__}; open it "
            "with rkd_plugin.teacher_bank.Bank"
        )

    def getter(batch: tuple[Any, list[Tensor]]) -> tuple[Any, Any]:
        items, vectors = batch
        if len(vectors) != 1:
            raise ValueError(
                f"from_bank: expected a teacher_bank of one module, got {len(vectors)}; write one of that alone"
            )
        parts = data_and_label_getter(items) if data_and_label_getter else items
        if len(parts) != 2:
            raise ValueError(
                f"from_bank: expected items of one image and its label, got {len(parts)} parts, and a bank has one "
                "row an item; give a teacher instead of a bank"
            )
        data, labels = parts
        if not isinstance(data, Tensor):
            raise TypeError(
                f"from_bank: expected a batch of images as one tensor, got {type(data).__name__}; choose it in "
                "data_and_label_getter"
            )
        return TensorWithTeacher.of(data, vectors[0]), labels

    return {
        "dataset": teacher_bank.over(dataset),
        "collate_fn": _CollateWithTeacher(collate_fn or default_collate),
        "data_and_label_getter": getter,
    }


class RKDTrainerMixin(BaseTrainer):
    """Adds a teacher and a loss of its own for RKD to any trainer of PML; `RKDTrainer` is ``MetricLossOnly`` with it.

    Write it first: ``class RKDWithClassifier(RKDTrainerMixin, TrainWithClassifier): pass``. It takes the arguments of
    that trainer, with ``models={"trunk": ..., "teacher": ..., ...}``, ``loss_funcs={"rkd_loss": RKDDALoss(), ...}``
    and, if wanted, ``loss_weights``, of which ``rkd_loss`` is one. ``rkd_loss`` compares the embeddings that the host
    computes of each batch, behind an ``embedder`` if there is one, with the teacher's of the same batch, whatever a
    ``tuple_miner`` finds: the batches of both streams together in ``TwoStreamMetricLoss``, the whole embedding in
    ``CascadedEmbeddings``, real images alone in ``DeepAdversarialMetricLearning``. A ``metric_loss`` may be left out
    where the host allows it.

    The teacher runs in eval mode and without gradient, and is otherwise left as it is: its training mode and
    ``requires_grad`` are the caller's, and it may share layers with the student. It needs no optimiser, and is kept as
    ``trainer.teacher``, outside ``trainer.models``, whose members the host sets to train mode, optimises and writes to
    disk.

    Args:
        args: the host's.
        teacher_bank: such as ``rkd_plugin.teacher_bank.Bank("dino.npy")`` instead of a teacher, see `from_bank`.
        student_output: which part of its output are the trunk's embeddings, if that is a dict, a tuple or a
            ``ModelOutput``: a name, an index, or a function of the output. None: all of it. A tester of the host needs
            a trunk that returns a tensor.
        teacher_output: the same of the teacher.
        kwargs: the host's.

    Raises:
        AssertionError: from the host, if a model or loss is missing or unknown.
        TypeError: if ``rkd_loss`` takes no ``ref_emb``, or a loss is one of ``rkd_plugin`` instead of
            ``rkd_plugin.adapters.pml``; if the bank is none, such as the path of one; if the order of base classes
            hides the host's trainer; in training, if a model returns no floating point tensor.
        ValueError: if the teacher is given an optimiser; if there are a bank and a teacher; if the bank is of another
            data set, or of several modules; in training, if a model does not return ``(N, D)``, or no such part.
        RuntimeError: in training, if the host computes no embeddings by ``get_trunk_output`` and
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
                f"{cls.__name__}: expected RKDTrainerMixin and then {host}, got an order of bases in which one hides "
                f"the other; write class {cls.__name__}(RKDTrainerMixin, {host})"
            )

    def __init__(
        self,
        *args: Any,
        teacher_bank: Any = None,
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
        """Have the batches bring the bank's vectors."""
        super().custom_setup()
        if self.teacher_bank is None:
            return
        if "teacher" in self.models:
            raise ValueError(
                f"{type(self).__name__}: expected no teacher beside a teacher_bank, got one; leave one of them out"
            )
        for name, value in from_bank(
            self.teacher_bank, self.dataset, self.collate_fn, self.data_and_label_getter
        ).items():
            setattr(self, name, value)

    def modify_schema(self) -> None:
        """Add the teacher and its loss to what the host accepts and requires."""
        super().modify_schema()
        if "teacher_optimizer" in self.optimizers:
            raise ValueError(
                f"{type(self).__name__}: expected no optimiser of the teacher, which is not trained, got a "
                "teacher_optimizer; remove it from optimizers"
            )
        if self.teacher_bank is None:
            self.schema["models"].keys += ["teacher"]
            self.schema["models"].essential += ["teacher"]
        self.schema["loss_funcs"].keys += ["rkd_loss"]
        self.schema["loss_funcs"].essential += ["rkd_loss"]
        self.schema["loss_funcs"].important = []  # metric_loss is a choice here, and missing without a warning
        self.schema["optimizers"].important = [f"{name}_optimizer" for name in self.models if name != "teacher"]

    def initialize_models(self) -> None:
        """Take the teacher out of the host's hands."""
        _check_losses(type(self).__name__, self.loss_funcs)
        self.teacher = self.models.get("teacher")
        self.models = {name: model for name, model in self.models.items() if name != "teacher"}
        super().initialize_models()

    def update_loss_weights(self) -> None:
        """Keep the weight of ``rkd_loss``, which a host's schedule of its own losses sets to 0."""
        weight = self.loss_weights["rkd_loss"]
        super().update_loss_weights()
        self.loss_weights["rkd_loss"] = weight

    def calculate_loss(self, curr_batch: tuple[Any, Tensor]) -> None:
        """Fill ``self.losses`` for one batch."""
        self._trunk_outputs, self._embeddings = [], []
        super().calculate_loss(curr_batch)
        batches, self._trunk_outputs, self._embeddings = self._embeddings, [], []
        # The one host that trains without embeddings of a batch, its generator alone, has do_metric.
        if self.loss_weights["rkd_loss"] <= 0 or not getattr(self, "do_metric", True):
            return
        if not batches:
            raise RuntimeError(
                f"{type(self).__name__}: expected the host to compute embeddings by get_trunk_output and "
                "get_final_embeddings of its result, got none; call them in calculate_loss"
            )
        student = torch.cat([embeddings for embeddings, _ in batches])
        teacher = torch.cat([self._teachers_embeddings(data) for _, data in batches])
        labels = torch.cat([curr_batch[1]] * len(batches))
        self.losses["rkd_loss"] = self.loss_funcs["rkd_loss"](student, labels, ref_emb=teacher)

    def _teachers_embeddings(self, data: Any) -> Tensor:
        moved = data if self.teacher is None else c_f.to_device(data, device=self.data_device)
        return _teachers_embeddings(type(self).__name__, self.teacher, moved, self.teacher_output)

    def get_trunk_output(self, data: Any) -> Tensor:
        """What the student's trunk gives for a batch; remembered until the end of `calculate_loss`."""
        output: Tensor = super().get_trunk_output(plain(data))
        if self.student_output is not None:
            output = one_tensor(type(self).__name__, "student", output, self.student_output)
        self._trunk_outputs.append((output, data))
        return output

    def get_final_embeddings(self, base_output: Tensor) -> Tensor:
        """The student's embeddings; those of a trunk's output, not synthetic ones, meet the teacher's."""
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

    ``models={"trunk": ..., "teacher": ...}``, an ``embedder`` if wanted; ``loss_funcs={"rkd_loss": RKDDALoss()}``, a
    ``metric_loss`` if wanted; ``loss_weights`` for each. ``tuple_miner`` mines the student's embeddings for
    ``metric_loss``; ``rkd_loss`` always takes the whole batch. `RKDTrainerMixin` describes the rest, and does the same
    for the other trainers of PML.

    Args:
        args: the host's.
        teacher_bank: instead of a teacher, see `from_bank`.
        student_output: which part of the trunk's output are its embeddings; see `RKDTrainerMixin`.
        teacher_output: the same of the teacher.
        kwargs: the host's.

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
