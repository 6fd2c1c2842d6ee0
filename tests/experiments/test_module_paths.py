"""`rkd check` finds the shapes of the modules that losses read, before data is loaded."""

import pytest
import torch
from torch import nn
from torchdistill.models.registry import MODEL_DICT

import rkd_plugin.adapters.torchdistill  # noqa: F401  registers the losses
from rkd_plugin.experiments.recipe.module_paths import check_module_paths
from rkd_plugin.experiments.recipe.specs import Walk


def pair_of(path):
    """A pair as in torchdistill's ATLoss, and the four modules of its FSPLoss."""
    return {f"{side}{end}": {"path": path, "io": "output"} for side in ("student", "teacher") for end in ("", "_first")}


def walked(model, path, loss="RKDDALoss", **kwargs):
    """The findings for a loss between two models of one kind."""
    known = {"key": model, "kwargs": {}}
    side = {"forward_hook": {"output": [path]}}
    criterion = {"key": loss, "kwargs": {"student_module_path": path, "teacher_module_path": path, **kwargs}}
    data = {
        "models": {"teacher_model": known, "student_model": known},
        "train": {
            "teacher": side,
            "student": side,
            "criterion": {"kwargs": {"sub_terms": {"rkd": {"criterion": criterion}}}},
        },
    }
    walk = Walk(data)
    check_module_paths(walk)
    return walk


def found(*args, **kwargs):
    """The problems of the student's side."""
    return [text for place, text in walked(*args, **kwargs).found if place.endswith("student_module_path")]


class Sequences(nn.Module):
    """Audio: ``(N, C, L)``."""

    def __init__(self):
        super().__init__()
        self.columns = nn.Conv2d(1, 8, (224, 1))
        self.conv = nn.Conv1d(8, 16, 3)

    def forward(self, images):
        return self.conv(self.columns(images).squeeze(2))


LAST = "expected channels in axis 1 for pool 'avg', got "
CASES = {
    ("vit_b_16", "encoder.ln", "auto"): "expected a pool for the three axes (2, 197, 768), got 'auto'; set pool to",
    ("vit_b_16", "encoder.ln", "avg"): f"{LAST}(2, 197, 768), whose channels are last; set pool to 'mean', 'cls' or",
    ("vit_b_16", "encoder.ln", "cls"): None,
    ("vit_b_16", "heads", "auto"): None,
    ("vit_b_16", "encoder.layers.encoder_layer_0.self_attention", "cls"): "expected one tensor, got tuple; name",
    ("swin_t", "features.7", "auto"): "got (2, 7, 7, 768), whose channels may be last; set pool to 'avg_channels_",
    ("swin_t", "features.7", "avg"): f"{LAST}(2, 7, 7, 768), whose channels are last; set pool to 'avg_channels_last'",
    ("swin_t", "features.7", "avg_channels_last"): None,
    ("swin_t", "permute", "auto"): None,
    ("convnext_tiny", "features", "avg"): None,
    ("resnet18", "layer4", "auto"): None,
    ("resnet18", "layer4", "avg_channels_last"): "whose channels are axis 1; set pool to 'avg'",
    ("resnet18", "layer4", "mean"): "pool 'mean': expected tokens (N, T, D), got (2, 512, 7, 7); set pool to one of",
    ("Sequences", "conv", "auto"): "expected a pool for the three axes (2, 16, 222), got 'auto'",
    ("Sequences", "conv", "avg"): None,
    ("Sequences", ".", "auto"): "expected a pool for the three axes (2, 16, 222), got 'auto'",
}


@pytest.mark.parametrize(("model", "path", "pool"), CASES)
def test_a_pool_that_does_not_fit_a_module_is_known_before(model, path, pool, monkeypatch):
    monkeypatch.setitem(MODEL_DICT, "Sequences", Sequences)
    expected = CASES[model, path, pool]
    problems = found(model, path, pool=pool)
    assert len(problems) == (expected is not None), problems
    assert expected is None or expected in problems[0]


ON_MAPS = {
    ("vit_b_16", "encoder.ln"): "expected a map (N, C, H, W), got (2, 197, 768), whose channels are last; name another",
    ("swin_t", "features.7"): "expected a map (N, C, H, W), got (2, 7, 7, 768), whose channels are last; name another",
    ("swin_t", "flatten"): "expected a map (N, C, H, W), got (2, 768); name another",
    ("swin_t", "permute"): None,
    ("resnet18", "layer4"): None,
}


@pytest.mark.parametrize(("loss", "pairs"), [("ATLoss", "at"), ("FSPLoss", "fsp"), ("ChSimLoss", "feature")])
@pytest.mark.parametrize(("model", "path"), ON_MAPS)
def test_losses_of_torchdistill_on_maps_whose_channels_are_last(model, path, loss, pairs):
    """They take axis 1 for the channels, and give a number for any map."""
    walk = walked(model, path, loss, **{f"{pairs}_pairs": {"one": pair_of(path)}})
    found = [(place, text) for place, text in walk.found if f"{pairs}_pairs" in place]
    expected = ON_MAPS[model, path]
    places = {place.removeprefix("train.criterion.kwargs.sub_terms.rkd.criterion.kwargs.") for place, _ in found}
    ends = (f"{side}{end}.path" for side in ("student", "teacher") for end in ("", "_first"))
    assert places == ({f"{pairs}_pairs.one.{end}" for end in ends} if expected else set())
    assert all(expected in text for _, text in found)


def test_a_map_that_torchdistill_would_flatten_is_noted():
    for path, pool, count in (("layer4", "auto", 2), ("layer4", "avg", 0), ("avgpool", "auto", 0)):
        walk = walked("resnet18", path, pool=pool)
        assert not walk.found
        assert len(walk.notes) == count
        assert all(text.endswith("RKDLoss flattens it; set pool to 'avg' or 'flatten'") for _, text in walk.notes)


def test_a_model_that_takes_no_images_is_not_guessed_at(monkeypatch):
    monkeypatch.setitem(MODEL_DICT, "Rows", lambda: nn.Sequential(nn.Linear(5, 5)))
    walk = walked("Rows", "0")
    assert not walk.found
    assert all("as the model does not run on images" in text for _, text in walk.unchecked)
    assert len(walk.unchecked) == 2


def test_the_arguments_of_torchdistills_loss_are_translated():
    from rkd_plugin.adapters.torchdistill import RKDDALoss, RKDDistanceLoss
    from rkd_plugin.experiments.recipe.signatures import bind

    problems = {}
    old = {"student_output_path": "a", "teacher_output_path": "b", "dist_factor": 1.0, "angle_factor": 2.0}
    bind(problems.__setitem__, "it", "RKDDALoss", RKDDALoss, {**old, "reduction": "mean"})
    assert [text.rpartition("; ")[2] for text in problems.values()] == [
        "use student_module_path", "use teacher_module_path", "use distance_weight", "use angle_weight",
    ]  # fmt: skip
    bind(problems.__setitem__, "it", "RKDDistanceLoss", RKDDistanceLoss, old)
    assert problems["it.kwargs.dist_factor"].endswith("; use the term's weight")


def test_the_meta_pass_changes_nothing(monkeypatch):
    """The model is cached, so that the next check would call hooks that remain."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    monkeypatch.setitem(MODEL_DICT, "Kept", lambda: model)
    state = torch.get_rng_state()
    assert found("Kept", "0") == []
    assert not model[0]._forward_hooks
    assert torch.equal(torch.get_rng_state(), state)
