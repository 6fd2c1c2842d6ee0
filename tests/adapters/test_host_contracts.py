"""What the adapters and the runner rely on in torchdistill and pytorch-metric-learning, whose documents promise it not.

A host that changes one of these fails here in a sentence, before it fails somewhere else in a puzzle.
"""

from __future__ import annotations

import inspect
import os
import warnings
from importlib.metadata import version

import pytest
import torch
import torchvision  # noqa: F401  before torchdistill
import yaml
from pytorch_metric_learning import losses, reducers, trainers
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from torch import nn
from torch.utils.data import SequentialSampler, TensorDataset
from torchdistill.common import yaml_util
from torchdistill.common.main_util import import_dependencies, load_ckpt
from torchdistill.core.distillation import DistillationBox, get_distillation_box
from torchdistill.core.interfaces.registry import FORWARD_PROC_FUNC_DICT, PRE_EPOCH_PROC_FUNC_DICT
from torchdistill.core.training import get_training_box
from torchdistill.losses.mid_level import RKDLoss
from torchdistill.losses.registry import MIDDLE_LEVEL_LOSS_DICT, get_high_level_loss, register_mid_level_loss
from torchdistill.models.registry import AUXILIARY_MODEL_WRAPPER_DICT
from torchdistill.models.wrapper import AuxiliaryModelWrapper


def holds(host: str, is_so: bool, contract: str, relied_on_by: str) -> None:
    assert is_so, f"{host} {version(host)} no longer does this: {contract}; {relied_on_by} relies on it"


# torchdistill


class Recorder(nn.Module):
    """A mid-level loss, a forward process and a wrapper in one, which records its arguments."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.calls = []

    def forward(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        return self.weight + sum(io["output"].sum() * 0 for io in args[0].values())


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setitem(MIDDLE_LEVEL_LOSS_DICT, "Recorder", lambda: recorder)
    return recorder


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def stage(**changes):
    loader = {"dataset_id": "data", "sampler": {"class_or_func": SequentialSampler}, "kwargs": {"batch_size": 4}}
    term = {"criterion": {"key": "Recorder", "kwargs": {}}, "weight": 1.0}
    return {
        "num_epochs": 1,
        "train_data_loader": {**loader, "requires_supp": True},
        "val_data_loader": loader,
        "optimizer": {"key": "SGD", "kwargs": {"lr": 0.1}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"term": term}}},
        **changes,
    }


PLAIN = {"forward_proc": "forward_batch_only"}
FROZEN = {**PLAIN, "requires_grad": False}
SIDES = {"teacher": FROZEN, "student": {**PLAIN, "forward_hook": {"input": ["2"], "output": ["0", "2"]}}}


def box_of(config, teacher=None):
    data = {"data": TensorDataset(torch.randn(8, 3), torch.arange(8))}
    common = (data, config, torch.device("cpu"), None, False, 1)
    return get_distillation_box(teacher, net(), *common) if teacher else get_training_box(net(), *common)


def epoch_of(box, epoch=0):
    box.pre_epoch_process(epoch=epoch)
    for batch, targets, supplement in box.train_data_loader:
        box.pre_forward_process()
        box.post_forward_process(box.forward_process(batch, targets, supplement))
    box.post_epoch_process()


def test_torchdistill_registers_by_name_and_overwrites(monkeypatch):
    monkeypatch.setitem(MIDDLE_LEVEL_LOSS_DICT, "Thing", None)
    thing = register_mid_level_loss(type("Thing", (nn.Module,), {}))
    is_so = isinstance(thing, type) and MIDDLE_LEVEL_LOSS_DICT["Thing"] is thing
    holds("torchdistill", is_so, "a decorator registers a class under its name and returns it", "every adapter")
    other = register_mid_level_loss(type("Thing", (nn.Module,), {}))
    is_so = MIDDLE_LEVEL_LOSS_DICT["Thing"] is other
    holds("torchdistill", is_so, "a second class of that name replaces the first in silence", "_register, which raises")
    names = {
        "forward_batch_only": FORWARD_PROC_FUNC_DICT,
        "default_pre_epoch_process_with_teacher": PRE_EPOCH_PROC_FUNC_DICT,
        "EmptyModule": AUXILIARY_MODEL_WRAPPER_DICT,
    }
    for name, registry in names.items():
        holds("torchdistill", name in registry, f"{name} is registered under its name", "the adapter's own registering")


def test_torchdistill_calls_a_loss_with_the_hooked_tensors(recorder):
    box = box_of(stage(**SIDES), net())
    epoch_of(box)
    (student, teacher, targets, *rest), kwargs = recorder.calls[-1]
    kept = {path: set(io) for path, io in student.items()}
    is_so = kept == {".": {"output"}, "0": {"output"}, "2": {"input", "output"}}
    holds("torchdistill", is_so, f"a loss gets {{path: {{'input' or 'output': tensor}}}}, got {kept}", "HookedLoss")
    holds("torchdistill", {"."} == set(teacher), "the teacher's come second, and in the same form", "HookedLoss")
    is_so = torch.equal(targets, torch.arange(4, 8)) and not rest and not kwargs
    holds("torchdistill", is_so, "the labels are the third argument and the last", "PMLLoss")
    is_so = torch.equal(student["2"]["output"], student["."]["output"])
    holds("torchdistill", is_so, "the output of the model is under '.'", "HookedLoss")


def test_torchdistill_hides_a_losss_parameters_from_the_optimizer(recorder):
    box = box_of(stage(**SIDES), net())
    trained = {id(parameter) for group in box.optimizer.param_groups for parameter in group["params"]}
    is_so = not list(box.criterion.parameters()) and id(recorder.weight) not in trained
    holds("torchdistill", is_so, "the parameters of a loss are in no optimizer", "TrainedWith")


def test_torchdistill_leaves_the_teacher_in_training_mode(recorder):
    teacher = net()
    epoch_of(box_of(stage(**SIDES), teacher))
    is_so = teacher.training and bool(teacher[1].num_batches_tracked)
    holds(
        "torchdistill", is_so, "a teacher trains on as to BatchNorm and dropout", "forward_in_eval_mode, then needless,"
    )
    box = box_of(stage(teacher=PLAIN, student=PLAIN), net())
    count = sum(len(group["params"]) for group in box.optimizer.param_groups)
    is_so = count == 2 * len(list(net().parameters()))
    holds("torchdistill", is_so, "a teacher without requires_grad is trained", "`rkd check`, which requires it,")


def test_torchdistill_passes_model_batch_labels_and_more_to_a_forward_process(recorder, monkeypatch):
    calls = []
    monkeypatch.setitem(
        FORWARD_PROC_FUNC_DICT, "spy", lambda *args, **kwargs: calls.append((args, kwargs)) or args[0](args[1])
    )
    teacher = net()
    epoch_of(box_of(stage(teacher={"requires_grad": False, "forward_proc": "spy"}, student=PLAIN), teacher))
    (model, batch, *rest), kwargs = calls[0]
    is_so = model is teacher and batch.shape == (4, 3) and len(rest) == 2 and not kwargs
    holds("torchdistill", is_so, "forward_proc(model, batch, labels, supplement)", "forward_in_eval_mode")
    monkeypatch.setitem(FORWARD_PROC_FUNC_DICT, "none", lambda *_: None)
    epoch_of(box_of(stage(teacher={"requires_grad": False, "forward_proc": "none"}, student=PLAIN), teacher))
    is_so = recorder.calls[-1][0][1]["."]["output"] is None
    holds("torchdistill", is_so, "a teacher's forward process may give None", "no_forward")


def test_torchdistill_sets_processes_on_the_class(recorder, monkeypatch):
    epochs = []
    monkeypatch.setitem(PRE_EPOCH_PROC_FUNC_DICT, "spy", lambda self, epoch=0, **_: epochs.append((self, epoch)))
    box = box_of(stage(**SIDES, pre_epoch_process="spy"), net())
    epoch_of(box, epoch=3)
    holds("torchdistill", epochs == [(box, 3)], "pre_epoch_process(self, epoch=...) is a method", "seeded_epoch")
    is_so = "pre_epoch_process" in vars(DistillationBox)
    holds(
        "torchdistill", is_so, "the last box decides the processes of all", "a run's order: it builds a single box and"
    )
    box_of(stage(**SIDES), net())


@pytest.mark.parametrize("has_teacher", [True, False])
def test_torchdistill_gives_a_wrapper_the_model_by_name(has_teacher, recorder, monkeypatch):
    given = {}

    class Wrapper(AuxiliaryModelWrapper):
        def __init__(self, modules, **kwargs):
            super().__init__()
            given.update(kwargs)
            self.inner = next(value for name, value in kwargs.items() if name.endswith("model"))

        def forward(self, batch):
            return self.inner(batch)

    monkeypatch.setitem(AUXILIARY_MODEL_WRAPPER_DICT, "Wrapper", Wrapper)
    side = {**PLAIN, "auxiliary_model_wrapper": {"key": "Wrapper", "kwargs": {"modules": {}}}}
    sides = {"student": side, "teacher": FROZEN} if has_teacher else {"model": side}
    box = box_of(stage(**sides), net() if has_teacher else None)
    found = {name for name in given if name.endswith("model")}
    is_so = found <= {"student_model", "model"} and len(found) == 1
    holds(
        "torchdistill", is_so, f"a wrapper gets the model as student_model or model, got {sorted(given)}", "TrainedWith"
    )
    trained = sum(len(group["params"]) for group in box.optimizer.param_groups)
    is_so = trained == len(list(net().parameters()))
    holds("torchdistill", is_so, "what a wrapper holds is what the optimizer gets", "TrainedWith")


def test_torchdistills_box_has_what_the_runner_reads(recorder):
    for teacher, config in ((net(), stage(**SIDES)), (None, stage(model=PLAIN))):
        box = box_of(config, teacher)
        names = ["num_epochs", "train_data_loader", "val_data_loader", "optimizer", "lr_scheduler", "stage_grad_count"]
        missing = [name for name in names if not hasattr(box, name)]
        holds("torchdistill", not missing, f"a box has {missing or names}", "the runner")
        holds(
            "torchdistill", hasattr(box, "student_model" if teacher else "model"), "and its model by name", "the runner"
        )
        epoch_of(box)
        holds("torchdistill", box.stage_grad_count == 2, "a box counts its steps", "a resumed run")


def test_torchdistills_stages_start_unfrozen_and_without_hooks(recorder):
    teacher = net()
    config = {"stage1": stage(**SIDES), "stage2": stage(teacher=PLAIN, student=PLAIN)}
    box = box_of(config, teacher)
    is_so = (box.current_epoch, box.stage_end_epoch, box.num_epochs, box.stage_number) == (0, 1, 2, 1)
    holds("torchdistill", is_so, "a box of stages counts current_epoch up to stage_end_epoch", "a resumed run")
    frozen = not any(parameter.requires_grad for parameter in teacher.parameters())
    epoch_of(box)
    holds("torchdistill", box.stage_number == 2, "the end of an epoch goes on to the next stage", "the runner")
    is_so = frozen and all(parameter.requires_grad for parameter in teacher.parameters())
    holds(
        "torchdistill",
        is_so,
        "a stage unfreezes what it does not freeze itself",
        "`rkd check`, which asks every stage,",
    )
    epoch_of(box)
    is_so = set(recorder.calls[-1][0][0]) == {"."}
    holds("torchdistill", is_so, "a stage has only its own hooks", "`rkd check`, which looks at each stage's,")


def test_torchdistill_executes_tags_while_loading_and_imports_dependencies_later(tmp_path):
    (tmp_path / "recipe.yaml").write_text("a: !import_call {key: builtins.dict, init: {kwargs: {b: 1}}}")
    is_so = yaml_util.load_yaml_file(str(tmp_path / "recipe.yaml")) == {"a": {"b": 1}}
    holds("torchdistill", is_so, "!import_call calls what it names", "every recipe's data sets, and `rkd check`")
    for dependencies in ("json", ["json"], [{"name": "json"}], [["json"]], None):
        import_dependencies(dependencies)
    with pytest.raises(ModuleNotFoundError):
        import_dependencies(["rkd_plugin.nowhere"])


class Folder:
    """Creates a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_torchdistill_unpickles_checkpoints_and_ignores_a_missing_one(tmp_path):
    torch.save({"model": net().state_dict(), "args": Folder(tmp_path / "made")}, tmp_path / "mine.pt")
    load_ckpt(str(tmp_path / "mine.pt"), model=net())
    is_so = (tmp_path / "made").is_dir()
    holds("torchdistill", is_so, "load_ckpt executes what a file holds", "Experiment, which reads weights itself,")
    is_so = load_ckpt(str(tmp_path / "none.pt"), model=net()) == (None, None)
    holds("torchdistill", is_so, "a missing checkpoint is no error", "Experiment, which makes it one,")


def test_torchdistills_own_loss_names_its_arguments_and_flattens_maps():
    names = {"student_output_path", "teacher_output_path", "dist_factor", "angle_factor"}
    is_so = names <= set(inspect.signature(RKDLoss).parameters)
    holds("torchdistill", is_so, f"RKDLoss takes {names}", "the hints for moving to RKDDALoss")
    maps = torch.randn(6, 4, 5, 5), torch.randn(6, 3, 5, 5)
    loss = RKDLoss("a", "a", 1.0, 2.0, "mean")
    values = [
        loss(*({"a": {"output": part}} for part in parts)) for parts in (maps, [part.flatten(1) for part in maps])
    ]
    holds("torchdistill", torch.equal(*values), "RKDLoss flattens maps", "the documentation of `pool`")


def test_torchdistills_simple_loss_wrapper_passes_two_tensors():
    sides = yaml.safe_load(
        "{input: {is_from_teacher: False, module_path: a, io: output}, "
        "target: {is_from_teacher: True, module_path: b, io: input}}"
    )
    wrapper = {"key": "SimpleLossWrapper", "kwargs": sides}
    term = {"weight": 2, "criterion": {"key": "MSELoss", "kwargs": {}}, "criterion_wrapper": wrapper}
    config = {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"term": term}}}
    io = {"student": {"a": {"output": torch.ones(2)}}, "teacher": {"b": {"input": torch.zeros(2)}}}
    holds(
        "torchdistill",
        get_high_level_loss(config)(io, {}, None) == 2,
        "SimpleLossWrapper(student, teacher)",
        "the guide to torchdistill",
    )


# pytorch-metric-learning

PML = "pytorch-metric-learning"


class Spy(losses.BaseMetricLossFunction):
    def __init__(self, reduction_type="element", **kwargs):
        super().__init__(**kwargs)
        self.reduction_type = reduction_type

    def compute_loss(self, *args):
        self.args = args
        each = args[0].double().pow(2).sum(1)
        return {
            name: {"losses": each, "indices": c_f.torch_arange_from_size(each), "reduction_type": "element"}
            for name in self._sub_loss_names()
        }


def test_pml_passes_a_loss_the_reference_or_the_batch():
    loss, x, teacher, labels = Spy(), torch.randn(4, 2), torch.randn(4, 3), torch.arange(4)
    loss(x, labels, None, teacher)
    embeddings, given_labels, tuples, ref_emb, ref_labels = loss.args
    is_so = embeddings is x and torch.equal(given_labels, labels) and tuples is None
    is_so = is_so and ref_emb is teacher and ref_labels is None
    holds(
        PML, is_so, "compute_loss(embeddings, labels, tuples, ref_emb, ref_labels), widths free", "the losses' forward"
    )
    loss(x)
    holds(PML, loss.args[3] is x, "without ref_emb it is the batch itself", "the losses, which raise for it,")


def test_pml_reduces_a_loss_per_anchor_in_the_dtype_of_the_embeddings():
    x = torch.randn(4, 2)
    each = x.double().pow(2).sum(1)
    is_so = torch.allclose(Spy(reducer=reducers.MeanReducer())(x).double(), each.mean())
    holds(PML, is_so, "an 'element' loss is a vector, whose mean MeanReducer takes", "the losses' terms")
    given = Spy(reducer=reducers.DoNothingReducer())(x)
    is_so = set(given["loss"]) == {"losses", "indices", "reduction_type"}
    holds(PML, is_so, "DoNothingReducer gives the dictionary back", "the losses' documented reducers")
    zero = Spy().zero_loss()
    is_so = zero == {"losses": 0, "indices": None, "reduction_type": "already_reduced"}
    holds(PML, is_so, "zero_loss() is a loss of no tuples", "a term of weight 0")


def test_pmls_distance_normalises_by_default():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    is_so = torch.allclose(LpDistance().maybe_normalize(x)[0], torch.tensor([0.6, 0.8]))
    is_so = is_so and torch.equal(LpDistance(normalize_embeddings=False).maybe_normalize(x), x)
    holds(PML, is_so, "LpDistance scales rows to length 1 by default", "get_default_distance")
    is_so = (LpDistance().p, LpDistance().power) == (2, 1)
    holds(PML, is_so, "its p is 2 and its power 1", "the check of a loss's distance")
    distance = LpDistance(collect_stats=True)
    distance.set_default_stats(x, x, x, x)
    holds(PML, distance.initial_avg_query_norm == 2.5, "set_default_stats(query, ref, both again)", "compute_loss")


def test_pmls_tuples_convert_as_documented():
    a, p, n = torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([4, 5])
    pairs = lmu.convert_to_pairs((a, p, n), None)
    is_so = all(x is y for x, y in zip(pairs, (a, p, a, n), strict=True))
    holds(PML, is_so, "triplets (a, p, n) are the pairs (a, p) and (a, n)", "mined tuples")
    triplets = lmu.convert_to_triplets((a, p, torch.tensor([1, 1]), n), None)
    is_so = [t.tolist() for t in triplets] == [[1, 1], [3, 3], [4, 5]]
    holds(PML, is_so, "pairs that share their first are triplets", "mined tuples")


def test_pml_records_no_statistics_by_default():
    quiet, loud = Spy(), Spy(collect_stats=True)
    for loss in (quiet, loud):
        loss.add_to_recordable_attributes(list_of_names=["share"], is_stat=True)
    is_so = not hasattr(quiet, "share") and loud.share == 0 and "share" in loud._record_these_stats
    holds(PML, is_so, "statistics are kept where collect_stats is set", "the losses' statistics")


def test_pmls_multiple_losses_add_the_losses_of_the_same_embeddings():
    first, second, miner = Spy(), Spy(), nn.Identity()
    miner.forward = lambda *_: "mined"
    both = losses.MultipleLosses({"a": first, "b": second}, miners={"b": miner}, weights={"a": 2, "b": 1})
    x, labels = torch.ones(4, 2), torch.arange(4)
    is_so = both(x, labels) == 6 and first.args[0] is x and (first.args[2], second.args[2]) == (None, "mined")
    holds(PML, is_so, "MultipleLosses(losses, miners, weights) is a weighted sum", "the documented use of a trunk")


def trainer_of(**changes):
    trunk, loss = nn.Linear(3, 2), Spy()
    options = {
        "models": {"trunk": trunk},
        "optimizers": {"trunk_optimizer": torch.optim.SGD(trunk.parameters(), 0.1)},
        "batch_size": 4,
        "loss_funcs": {"metric_loss": loss},
        "dataset": c_f.EmbeddingDataset(torch.randn(8, 3), torch.arange(8)),
        "dataloader_num_workers": 0,
        "data_device": "cpu",
    }
    return trainers.MetricLossOnly(**{**options, **changes})


def test_pmls_trainer_has_no_teacher_and_trains_all_its_models():
    with pytest.raises(AssertionError, match="models keys must be one of trunk, embedder"):
        trainer_of(models={"trunk": nn.Linear(3, 2), "teacher": nn.Linear(3, 2)})
    trainer = trainer_of()
    for module in (*trainer.models.values(), *trainer.loss_funcs.values()):
        module.eval()
    trainer.set_to_train()
    is_so = all(module.training for module in (*trainer.models.values(), *trainer.loss_funcs.values()))
    holds(PML, is_so, "set_to_train() sets every model and loss to training mode", "RKDTrainerMixin")
    keys = {name: trainer.schema[name].keys for name in ("models", "loss_funcs")}
    is_so = keys == {"models": ["trunk", "embedder"], "loss_funcs": ["metric_loss"]}
    holds(
        PML,
        is_so and trainer.schema["models"].essential == ["trunk"],
        f"its schema lists names, got {keys}",
        "RKDTrainerMixin",
    )


def test_pmls_trainer_checks_the_schema_first_and_calls_a_loss_with_three(capsys):
    order = []

    class Trainer(trainers.MetricLossOnly):
        def modify_schema(self):
            order.append("schema")

        def initialize_models(self):
            order.append("models")
            super().initialize_models()

        def update_loss_weights(self):
            order.append("weights")

        def get_trunk_output(self, data):
            order.append(output := super().get_trunk_output(data))
            return output

        def get_final_embeddings(self, base_output):
            order.append(base_output)
            return super().get_final_embeddings(base_output)

    base = trainer_of()
    made = Trainer(
        base.models, base.optimizers, 4, base.loss_funcs, base.dataset, dataloader_num_workers=0, data_device="cpu"
    )
    holds(PML, order == ["schema", "models"], "modify_schema(), then initialize_models()", "RKDTrainerMixin")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the bar formats a loss that has its graph
        made.train()
    args = made.loss_funcs["metric_loss"].args
    is_so = args[0].shape == (4, 2) and args[1].shape == (4,) and args[2] is None
    holds(PML, is_so, "a loss is called with embeddings, labels and tuples", "TeacherStudentTrunk")
    is_so = order[2] == "weights" and order[3] is order[4]
    holds(
        PML,
        is_so,
        "update_loss_weights(), then get_final_embeddings of what get_trunk_output gave",
        "RKDTrainerMixin.calculate_loss",
    )
    is_so = set(made.losses) == {"metric_loss", "total_loss"}
    holds(PML, is_so, "losses are kept by name", "RKDTrainerMixin.calculate_loss")


def test_pmls_distributed_wrapper_accepts_only_its_own_losses():
    with pytest.raises(TypeError, match="must extend BaseMetricLossFunction"):
        DistributedLossWrapper(nn.MSELoss())
    is_so = inspect.isfunction(DistributedLossWrapper.forward)
    holds(PML, is_so, "its forward is a function of Python, which a call stack shows", "gather, which raises for it,")
    wrapper, x, teacher = DistributedLossWrapper(Spy()), torch.randn(4, 2), torch.randn(4, 3)
    with pytest.warns(UserWarning, match="non-distributed"):
        wrapper(x, ref_emb=teacher)
    holds(PML, wrapper.loss.args[3] is teacher, "outside of a process group it calls the loss as it is", "the losses")
    holds(PML, not wrapper.efficient, "efficient is False by default", "the losses, which need all rows,")
