"""The adapter as torchdistill uses it: registries, boxes, hooks, wrappers, and the flow of its example scripts."""

import copy
from pathlib import Path

import pytest
import torch
import torchvision  # noqa: F401  before torchdistill
from torch import nn
from torch.utils.data import RandomSampler, SequentialSampler, TensorDataset
from torchdistill.common import yaml_util
from torchdistill.common.main_util import import_dependencies, load_ckpt, save_ckpt, set_seed
from torchdistill.core.distillation import get_distillation_box
from torchdistill.core.training import get_training_box
from torchdistill.losses import mid_level
from torchdistill.losses.registry import (
    LOSS_WRAPPER_DICT,
    MIDDLE_LEVEL_LOSS_DICT,
    get_high_level_loss,
    get_mid_level_loss,
    register_mid_level_loss,
)
from torchdistill.models.official import get_image_classification_model
from torchdistill.models.registry import get_model
from torchdistill.optim.registry import get_scheduler

import rkd_plugin
from rkd_plugin.adapters import torchdistill as adapter
from rkd_plugin.adapters.torchdistill import registering

CONFIGS = Path(__file__).parents[2] / "configs"
FUNCTIONS = {
    "RKDDistanceLoss": rkd_plugin.rkd_distance_loss,
    "RKDAngleLoss": rkd_plugin.rkd_angle_loss,
    "RKDDALoss": rkd_plugin.rkd_da_loss,
    "RelationalLoss": rkd_plugin.relational_loss,
}
every_loss = pytest.mark.parametrize("key", FUNCTIONS)


def mid_level_loss(key, **kwargs):
    return get_mid_level_loss({"key": key, "kwargs": kwargs})


@pytest.fixture
def io_dicts():
    student = {".": {"output": torch.randn(6, 3)}, "conv": {"output": torch.randn(6, 4, 5, 5)}}
    teacher = {".": {"output": torch.randn(6, 7)}, "conv": {"input": torch.randn(6, 8, 3, 3)}}
    return student, teacher


@every_loss
def test_value_is_the_functions(key, io_dicts):
    loss = mid_level_loss(
        key, student_module_path=".", teacher_module_path=".", reduction="tuple_mean", huber_delta=0.5
    )
    expected = FUNCTIONS[key](
        io_dicts[0]["."]["output"], io_dicts[1]["."]["output"], reduction="tuple_mean", huber_delta=0.5
    )
    assert torch.equal(loss(*io_dicts, torch.zeros(6)), expected)


POOLED = {
    "auto": ((6, 8, 4, 5), lambda x: x.mean((2, 3))),
    "avg": ((6, 8, 5, 5), lambda x: x.mean((2, 3))),
    "avg of (N, C, L)": ((6, 8, 5), lambda x: x.mean(2)),
    "avg of (N, C, D, H, W)": ((6, 8, 3, 4, 5), lambda x: x.mean((2, 3, 4))),
    "avg_channels_last": ((6, 5, 5, 8), lambda x: x.mean((1, 2))),
    "avg_channels_last of (N, D, H, W, C)": ((6, 3, 5, 5, 8), lambda x: x.mean((1, 2, 3))),
    "mean": ((6, 5, 8), lambda x: x.mean(1)),
    "cls": ((6, 5, 8), lambda x: x[:, 0]),
    "last": ((6, 5, 8), lambda x: x[:, 4]),
    "flatten": ((6, 8, 5, 5), lambda x: x.reshape(6, 200)),
}


@pytest.mark.parametrize("name", POOLED)
def test_pool_names(name, io_dicts):
    shape, view = POOLED[name]
    student, teacher = io_dicts[0]["."]["output"], torch.randn(shape)
    io_dicts[1]["conv"]["input"] = teacher
    loss = mid_level_loss(
        "RKDDALoss",
        student_module_path=".",
        teacher_module_path="conv",
        teacher_module_io="input",
        pool=name.split()[0],
    )
    torch.testing.assert_close(loss(*io_dicts), rkd_plugin.rkd_da_loss(student, view(teacher)))


def test_each_side_has_its_own_pool(io_dicts):
    io_dicts[1]["block"] = {"output": torch.randn(6, 5, 8)}
    loss = mid_level_loss(
        "RKDDALoss", student_module_path="conv", teacher_module_path="block", pool={"student": "avg", "teacher": "cls"}
    )
    expected = rkd_plugin.rkd_da_loss(io_dicts[0]["conv"]["output"].mean((2, 3)), io_dicts[1]["block"]["output"][:, 0])
    torch.testing.assert_close(loss(*io_dicts), expected)


def test_a_rotated_vision_transformer_is_at_distance_zero():
    # Averages of a LayerNorm's outputs over the channels are all 0: their relations are noise.
    network = get_image_classification_model({"key": "vit_b_32", "kwargs": {"image_size": 32}}).eval()
    network.encoder.layers = network.encoder.layers[:1]
    with torch.no_grad():
        tokens = network.encoder(torch.randn(8, 2, 768))
    rotation = torch.linalg.qr(torch.randn(768, 768)).Q
    io_dicts = {"ln": {"output": tokens}}, {"ln": {"output": tokens @ rotation}}
    for pool in ("mean", "cls", "last"):
        loss = mid_level_loss("RKDDALoss", student_module_path="ln", teacher_module_path="ln", pool=pool)
        assert loss(*io_dicts) < 1e-8
    loss = mid_level_loss("RKDDALoss", student_module_path="ln", teacher_module_path="ln")
    with pytest.raises(
        ValueError, match=r"the student: expected a pool for the three axes \(8, 2, 768\), got 'auto'; set"
    ):
        loss(*io_dicts)


UNFIT = {
    "auto of (6, 7, 7, 8)": r"expected a feature map .*, got \(6, 7, 7, 8\), whose channels may be last",
    "auto of (6, 7, 9, 16)": r"got \(6, 7, 9, 16\), whose channels may be last; set pool to",
    "auto of (6, 16, 16, 16)": r"got \(6, 16, 16, 16\), whose channels may be last; set pool to",
    "auto of (6, 1, 80, 300)": r"got \(6, 1, 80, 300\), whose channels may be last; set pool to",
    "auto of (6, 2, 7, 7, 8)": r"got \(6, 2, 7, 7, 8\), whose channels may be last; set pool to",
    "cls of (6, 8, 7, 7)": r"pool 'cls': expected tokens .* set pool to one of 'avg', 'avg_channels_last', 'flatten'",
    "avg_channels_last of (6, 7, 8)": r"set pool to one of 'avg', 'mean', 'cls', 'last', 'flatten'",
    "avg of (6, 2, 2, 2, 2, 8)": "pool 'avg': expected .* set pool to one of 'flatten'",
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_pool_of_another_shape_raises(name):
    pool, shape = name.split(" of ")
    with pytest.raises(ValueError, match=UNFIT[name]):
        adapter.pooled(torch.zeros(eval(shape)), pool)


SETS = {"tokens": ((6, 4, 5), lambda x: x), "channels": ((6, 4, 5, 3), lambda x: x.reshape(6, 4, 15))}


@pytest.mark.parametrize("l2_normalize", [False, True])
@pytest.mark.parametrize("pool", SETS)
def test_relations_within_the_set_of_each_example(pool, l2_normalize):
    shape, view = SETS[pool]
    maps = torch.randn(shape), torch.randn(shape)
    loss = mid_level_loss("RelationalLoss", pool=pool, l2_normalize=l2_normalize, potential="dot", penalty="mse")
    rows = [nn.functional.normalize(view(x), dim=2) if l2_normalize else view(x) for x in maps]
    torch.testing.assert_close(loss(*maps), rkd_plugin.relational_loss(*rows, "dot", "mse"))
    with pytest.raises(ValueError, match=r"RKDDALoss.*expected student to have shape \(N, D\), got"):
        mid_level_loss("RKDDALoss", pool=pool)(*maps)


MEMORY = """
memory: &memory !import_call {key: 'rkd_plugin.RelationMemory', init: {kwargs: {size: 4}}}
key: RelationalLoss
kwargs:
  potential: !import_get {key: 'NAME'}
  penalty: mse
  references: *memory
"""


def test_a_function_and_a_memory_in_yaml(tmp_path):
    (tmp_path / "loss.yaml").write_text(MEMORY.replace("NAME", f"{__name__}.gap"))
    config = yaml_util.load_yaml_file(str(tmp_path / "loss.yaml"))
    loss = get_mid_level_loss(config)
    trained = adapter.TrainedWith({"memory": config["memory"]}, student_model=nn.Identity())
    batches = [(torch.randn(3, 2), torch.randn(3, 5)) for _ in range(3)]
    assert loss(*batches[0]) == 0  # of an empty memory
    assert torch.equal(loss(*batches[1]), rkd_plugin.relational_loss(*batches[1], gap, "mse", references=batches[0]))
    last = [torch.cat(rows)[-4:] for rows in zip(*batches[:2], strict=True)]
    saved = copy.deepcopy(trained.state_dict())
    assert torch.equal(saved["trained.memory.teacher"], last[1])
    assert torch.equal(loss(*batches[2]), rkd_plugin.relational_loss(*batches[2], gap, "mse", references=tuple(last)))


def gap(x, y):
    return (x - y).abs().mean(-1)


@every_loss
def test_works_in_simple_loss_wrapper(key, io_dicts):
    wrapped = get_mid_level_loss(
        {"key": key, "kwargs": {}},
        {
            "key": "SimpleLossWrapper",
            "kwargs": {
                "input": {"is_from_teacher": False, "module_path": ".", "io": "output"},
                "target": {"is_from_teacher": True, "module_path": ".", "io": "output"},
            },
        },
    )
    assert isinstance(wrapped, LOSS_WRAPPER_DICT["SimpleLossWrapper"])
    expected = FUNCTIONS[key](io_dicts[0]["."]["output"], io_dicts[1]["."]["output"])
    assert torch.equal(wrapped(*io_dicts, None), expected)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"huber": 1.0}, TypeError, "unexpected keyword argument 'huber'"),
        ({"pool": "max"}, ValueError, r"expected pool to be one of \('auto', 'avg', .*\), got 'max'"),
        ({"pool": {"student": "avg", "teacher": "max"}}, ValueError, "expected pool to be one of .* got 'max'"),
        ({"pool": {"pupil": "avg"}}, ValueError, "expected pool for 'student' and 'teacher', got 'pupil'"),
        ({"dist_factor": 1.0}, TypeError, "got dist_factor; use distance_weight"),
        ({"angle_factor": 1.0}, TypeError, "got angle_factor; use angle_weight"),
        ({"student_output_path": "."}, TypeError, "got student_output_path; use student_module_path"),
        ({"student_module_io": "out"}, ValueError, r"expected student_module_io to be one of .*, got 'out'"),
        ({"reduction": "anchor"}, ValueError, "expected a scalar for torchdistill, got reduction 'anchor'"),
    ],
)
def test_bad_options(kwargs, error, message):
    with pytest.raises(error, match=message):
        mid_level_loss("RKDDALoss", **kwargs)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (
            "fc",
            ".",
            r"expected the student's output of module 'fc', got only '\.' \(output\), 'conv' \(output\); list it",
        ),
        (
            ".",
            "conv",
            r"expected the teacher's output of module 'conv', got only '\.' \(output\), 'conv' \(input\); list",
        ),
        (None, ".", r"expected student_module_path to be one of \['\.', 'conv'\]"),
    ],
)
def test_a_missing_hook_names_the_hooked_modules(student, teacher, message, io_dicts):
    loss = mid_level_loss("RKDAngleLoss", student_module_path=student, teacher_module_path=teacher)
    with pytest.raises(ValueError, match=message):
        loss(*io_dicts)


def test_batches_of_different_length_name_the_paths(io_dicts):
    loss = mid_level_loss("RKDDALoss", student_module_path="conv", teacher_module_path=".")
    io_dicts[1]["."]["output"] = torch.zeros(5, 7)
    with pytest.raises(ValueError, match=r"student='conv' output.* teacher='\.' output.*got 6 and 5 rows"):
        loss(*io_dicts)


def test_a_module_with_several_outputs_raises(io_dicts):
    io_dicts[0]["."]["output"] = (torch.zeros(6, 3), torch.zeros(6, 3))
    loss = mid_level_loss("RKDDALoss", student_module_path=".", teacher_module_path=".")
    with pytest.raises(TypeError, match=r"student's output of module '\.' to be one tensor, got tuple"):
        loss(*io_dicts)


def test_an_experiment_without_a_teacher_raises(io_dicts):
    loss = mid_level_loss("RKDDALoss", student_module_path=".", teacher_module_path=".")
    with pytest.raises(ValueError, match=r"expected the teacher's output of module '\.', got only nothing"):
        loss(io_dicts[0], {})


def test_registered_names_are_not_overwritten(monkeypatch):
    assert MIDDLE_LEVEL_LOSS_DICT["RKDLoss"] is mid_level.RKDLoss

    class RKDDALoss(nn.Module):
        pass

    monkeypatch.setitem(MIDDLE_LEVEL_LOSS_DICT, "RKDDALoss", RKDDALoss)
    with pytest.raises(ValueError, match=r"no other component named 'RKDDALoss', got .*RKDDALoss; register that"):
        registering.keeping_others(register_mid_level_loss, MIDDLE_LEVEL_LOSS_DICT)(adapter.RKDDALoss)
    assert MIDDLE_LEVEL_LOSS_DICT["RKDDALoss"] is RKDDALoss


def test_pml_loss_with_and_without_a_miner(io_dicts):
    from pytorch_metric_learning.losses import TripletMarginLoss
    from pytorch_metric_learning.miners import TripletMarginMiner

    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    embeddings = io_dicts[0]["."]["output"]
    loss, miner = TripletMarginLoss(margin=0.2), TripletMarginMiner(margin=0.2)
    assert torch.equal(mid_level_loss("PMLLoss", loss=loss)(*io_dicts, labels), loss(embeddings, labels))
    mined = mid_level_loss("PMLLoss", loss=loss, miner=miner)(*io_dicts, labels)
    assert torch.equal(mined, loss(embeddings, labels, miner(embeddings, labels)))


BRIDGE = """
key: WeightedSumLoss
kwargs:
  sub_terms:
    contrastive:
      criterion:
        key: PMLLoss
        kwargs:
          loss: !import_call
            key: 'pytorch_metric_learning.losses.ContrastiveLoss'
            init:
              kwargs:
                distance: !import_call {key: 'pytorch_metric_learning.distances.CosineSimilarity'}
                pos_margin: 1.0
                neg_margin: 0.1
                reducer: !import_call
                  key: 'pytorch_metric_learning.reducers.ThresholdReducer'
                  init: {kwargs: {low: 0.05}}
                embedding_regularizer: !import_call {key: 'pytorch_metric_learning.regularizers.LpRegularizer'}
                embedding_reg_weight: 0.5
          miner: !import_call {key: 'pytorch_metric_learning.miners.MultiSimilarityMiner'}
      weight: 2.0
    rkd:
      criterion:
        key: RKDDALoss
        kwargs: {student_module_path: '.', teacher_module_path: 'fc'}
      weight: 3.0
"""


def test_a_loss_of_pml_with_all_its_parts_shares_an_experiment_with_rkd(tmp_path):
    from pytorch_metric_learning import distances, losses, miners, reducers, regularizers

    (tmp_path / "criterion.yaml").write_text(BRIDGE)
    criterion = get_high_level_loss(yaml_util.load_yaml_file(str(tmp_path / "criterion.yaml")))
    student, teacher, labels = torch.randn(12, 5, requires_grad=True), torch.randn(12, 7), torch.arange(12) // 3
    io_dict = {"student": {".": {"output": student}}, "teacher": {"fc": {"output": teacher}}}
    alone = losses.ContrastiveLoss(
        distance=distances.CosineSimilarity(), pos_margin=1.0, neg_margin=0.1,
        reducer=reducers.ThresholdReducer(low=0.05), embedding_regularizer=regularizers.LpRegularizer(),
        embedding_reg_weight=0.5,
    )  # fmt: skip
    expected = 2 * alone(student, labels, miners.MultiSimilarityMiner()(student, labels))
    expected = expected + 3 * rkd_plugin.rkd_da_loss(student, teacher)
    torch.testing.assert_close(criterion(io_dict, {}, labels), expected)


def test_pml_loss_under_autocast_is_computed_in_float32():
    from pytorch_metric_learning.losses import TripletMarginLoss

    from rkd_plugin.components.baselines import DistanceWeightedNegatives

    embeddings, labels = nn.functional.normalize(torch.randn(16, 6)).bfloat16(), torch.arange(16) // 4
    term = mid_level_loss("PMLLoss", loss=TripletMarginLoss(), miner=DistanceWeightedNegatives())
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        half = term({".": {"output": embeddings}}, {}, labels)
    torch.manual_seed(0)
    assert torch.equal(half, term({".": {"output": embeddings.float()}}, {}, labels))
    assert half.dtype == torch.float32


def test_pml_loss_raises_for_parameters_that_torchdistill_does_not_train():
    from pytorch_metric_learning.losses import ProxyAnchorLoss

    with pytest.raises(ValueError, match="got ProxyAnchorLoss, whose parameters"):
        mid_level_loss("PMLLoss", loss=ProxyAnchorLoss(num_classes=2, embedding_size=3))
    with pytest.raises(TypeError, match=r"expected loss to be a module, got .*; build it with !import_call"):
        mid_level_loss("PMLLoss", loss="TripletMarginLoss")


def net_with_modes():
    """BatchNorm and dropout, which behave differently in training mode."""
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))


def train_config(**teacher):
    loader = {"dataset_id": "data", "kwargs": {"batch_size": 8, "num_workers": 0}}
    return {
        "num_epochs": 2,
        "train_data_loader": {**loader, "sampler": {"class_or_func": RandomSampler}},
        "val_data_loader": {**loader, "sampler": {"class_or_func": SequentialSampler}},
        "teacher": {"requires_grad": False, **teacher},
        "student": {"forward_proc": "forward_batch_only"},
        "optimizer": {"key": "SGD", "kwargs": {"lr": 0.1}},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {
                "sub_terms": {
                    "rkd": {
                        "criterion": {
                            "key": "RKDDALoss",
                            "kwargs": {"student_module_path": ".", "teacher_module_path": "."},
                        },
                        "weight": 1.0,
                    }
                }
            },
        },
    }


def train_as_the_example_scripts_do(box, after_epoch=lambda: None):
    device = torch.device("cpu")
    losses = []
    for epoch in range(box.num_epochs):
        box.pre_epoch_process(epoch=epoch)
        for sample_batch, targets, supp_dict in box.train_data_loader:
            loss = box.forward_process(sample_batch.to(device), targets.to(device), supp_dict)
            box.post_forward_process(loss)
            losses.append(loss.item())
        after_epoch()
        box.post_epoch_process()
    return losses


def learning_rate_falls_after(kwargs):
    """The epochs after which a recipe's MultiStepFractionLR lowers the learning rate."""
    scheduler = adapter.MultiStepFractionLR(torch.optim.SGD([torch.zeros(1)], lr=1.0), **kwargs)
    return sorted(scheduler.milestones.elements())


def build_as_the_example_scripts_do(path, seed):
    """Student, teacher and box, as torchdistill's script for image classification builds them from a YAML file."""
    set_seed(seed)
    config = yaml_util.load_yaml_file(str(path))
    import_dependencies(config["dependencies"])

    def load(side):
        if side not in config["models"]:
            return None
        described = config["models"][side]
        model = get_image_classification_model(described, False)
        if model is None:
            model = get_model(described["key"], described.get("repo_or_dir"), **described["kwargs"])
        load_ckpt(described.get("src_ckpt"), model=model, strict=True)
        return model

    teacher = load("teacher_model")
    student = load("student_model" if "student_model" in config["models"] else "model")
    common = (config["datasets"], config["train"], torch.device("cpu"), None, False, 1)
    box = get_distillation_box(teacher, student, *common) if teacher else get_training_box(student, *common)
    return student, teacher, box


def distill(forward_proc):
    teacher, student = net_with_modes(), net_with_modes()
    before = copy.deepcopy(teacher.state_dict())
    student_before = copy.deepcopy(student.state_dict())
    data = {"data": TensorDataset(torch.randn(32, 5), torch.zeros(32))}
    box = get_distillation_box(
        teacher, student, data, train_config(forward_proc=forward_proc), torch.device("cpu"), None, False, 1
    )
    train_as_the_example_scripts_do(box)
    assert any(not torch.equal(student.state_dict()[name], value) for name, value in student_before.items())
    return teacher, [name for name, value in before.items() if not torch.equal(teacher.state_dict()[name], value)]


def test_the_teacher_does_not_change_in_torchdistills_box():
    teacher, moved = distill("forward_in_eval_mode")
    assert moved == []
    assert not any(module.training for module in teacher.modules())


def test_training_mode_can_be_chosen():
    teacher, moved = distill("forward_batch_only")
    assert moved == ["1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert teacher.training


def test_a_teacher_in_eval_mode_has_no_dropout():
    teacher = net_with_modes()
    batch = torch.randn(8, 5)
    first, second = (adapter.forward_in_eval_mode(teacher, batch, None, None) for _ in range(2))
    assert torch.equal(first, second)
    teacher.eval()
    teacher[2].train()
    assert torch.equal(adapter.forward_in_eval_mode(teacher, batch), first)


def test_quickstart_runs_with_torchdistills_own_classes(tmp_path):
    """The calls of torchdistill's example script for image classification, on an unchanged recipe."""
    checkpoint = tmp_path / "teacher.pt"
    for name in ("teacher", "rkd_da"):
        text = (CONFIGS / "quickstart" / f"{name}.yaml").read_text()
        text = text.replace("runs/quickstart/teacher/last.pt", str(checkpoint)).replace(
            "runs/quickstart", str(tmp_path)
        )
        text = text.replace("num_epochs 8", "num_epochs 2").replace("samples_per_epoch 6400", "samples_per_epoch 2560")
        (tmp_path / f"{name}.yaml").write_text(text)
        student, teacher, box = build_as_the_example_scripts_do(tmp_path / f"{name}.yaml", seed=0)
        before = teacher and copy.deepcopy(teacher.state_dict())
        losses = train_as_the_example_scripts_do(box)
        assert sum(losses[-10:]) < sum(losses[:10])
        if teacher:
            assert all(torch.equal(value, teacher.state_dict()[key]) for key, value in before.items())
        else:
            save_ckpt(student, box.optimizer, box.lr_scheduler, 0.0, None, str(checkpoint))


def test_every_term_reaches_the_student(io_dicts):
    criterion = get_high_level_loss(train_config()["criterion"])
    io_dicts[0]["."]["output"].requires_grad_()
    criterion({"student": io_dicts[0], "teacher": io_dicts[1]}, {}, None).backward()
    assert io_dicts[0]["."]["output"].grad.abs().sum() > 0


def rates(key, epochs, **kwargs):
    """The learning rate of every epoch, as torchdistill builds and steps a scheduler, and one for the end."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = get_scheduler(optimizer, key, **kwargs)
    found = [optimizer.param_groups[0]["lr"]]
    for _ in range(epochs):
        optimizer.step()
        scheduler.step()
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize(
    ("num_epochs", "fractions", "milestones"),
    [
        (200, [0.3, 0.6, 0.8], [60, 120, 160]),
        (120, [0.3333, 0.6667], [40, 80]),
        (240, [0.625, 0.75, 0.875], [150, 180, 210]),
        (5, [0.01, 1.0], [1, 5]),  # a first epoch at the earliest
        (3, [0.5, 0.6], [2, 2]),  # two of them after one epoch
        (1, [0.3, 0.6, 0.8], [1, 1, 1]),  # the only epoch has the first rate
        (7, [], []),
    ],
)
def test_fractions_are_pytorchs_milestones(num_epochs, fractions, milestones):
    expected = rates("MultiStepLR", num_epochs, milestones=milestones, gamma=0.2)
    found = rates("MultiStepFractionLR", num_epochs, num_epochs=num_epochs, milestones=fractions, gamma=0.2)
    assert found == expected
    assert found[0] == 1.0


@pytest.mark.parametrize("milestones", [[0.5, 60], [0], [-0.1], [float("nan")]])
def test_a_milestone_that_is_no_fraction_raises(milestones):
    with pytest.raises(ValueError, match=r"MultiStepFractionLR: expected milestones as fractions .*, got .*; write"):
        learning_rate_falls_after({"num_epochs": 10, "milestones": milestones})


def test_a_resumed_schedule_goes_on_where_it_stopped():
    whole = rates("MultiStepFractionLR", 8, num_epochs=8, milestones=[0.25, 0.75])
    found = []
    state = None
    for _ in range(8):  # stopped after every epoch
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        scheduler = adapter.MultiStepFractionLR(optimizer, 8, [0.25, 0.75])
        if state:
            optimizer.load_state_dict(state[0])
            scheduler.load_state_dict(state[1])
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
        state = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    assert found == whole[:8]
