"""`relational_loss` beyond the contract: other people's losses, neighbours, references, sets, memory and errors."""

from __future__ import annotations

import functools
import io

import numpy as np
import pytest
import torch
from relations import RELATIONS, spread, turn
from torch.nn import functional as F

from rkd_plugin import (
    RelationalLoss,
    RelationMemory,
    relational_loss,
    rkd_angle_loss,
    rkd_distance_loss,
)
from rkd_plugin.kernels import functions
from rkd_plugin.kernels.potentials import POTENTIALS

REDUCTIONS = ["mean", "tuple_mean", "sum", "anchor"]
every_impl = pytest.mark.parametrize("impl", ["chunked", "reference"])


def batch(*shape, student_width=3, teacher_width=5):
    student, teacher = (torch.randn(*shape, width, dtype=torch.float64) for width in (student_width, teacher_width))
    return student.requires_grad_(), teacher


def value_and_gradient(loss, student, teacher, *args, **options):
    student = student.detach().requires_grad_()
    value = loss(student, teacher, *args, **options)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    return value.detach(), gradient


def assert_equal(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


# RKD


@every_impl
@pytest.mark.parametrize("narrow", [torch.float64, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "tuple_mean", "huber_delta": 0.3},
        {"reduction": "anchor"},
        {"neighbours": 8},
        {"neighbours": 99},
    ],
)
@pytest.mark.parametrize(("name", "loss"), [("distance", rkd_distance_loss), ("angle", rkd_angle_loss)])
def test_rkd_bit_by_bit(name, loss, options, narrow, impl):
    """Also for every other row as neighbour."""
    student, teacher = (x.to(narrow) for x in batch(9))
    plain = {key: value for key, value in options.items() if key != "neighbours"}
    ours = value_and_gradient(relational_loss, student, teacher, name, impl=impl, **options)
    assert_equal(ours, value_and_gradient(loss, student, teacher, impl=impl, **plain))


@pytest.mark.parametrize(("name", "loss"), [("distance", rkd_distance_loss), ("angle", rkd_angle_loss)])
def test_mse_is_twice_the_huber_loss_of_a_large_threshold(name, loss):
    student, teacher = batch(9)
    ours = value_and_gradient(relational_loss, student, teacher, name, "mse")
    expected = value_and_gradient(loss, student, teacher, huber_delta=100.0)
    torch.testing.assert_close(ours, tuple(2 * x for x in expected))
    exact = value_and_gradient(relational_loss, student, teacher, name, lambda s, t: (s - t) ** 2, impl="reference")
    torch.testing.assert_close(ours, exact)


# torchdistill and ten lines of NumPy


def theirs(name, student, teacher):
    """torchdistill's loss, and its factor to ours."""
    import torchvision  # noqa: F401  # before torchdistill, whose registries look for it in sys.modules
    from torchdistill.losses import mid_level

    loss = getattr(mid_level, name)
    outputs = ({"x": {"output": student}}, {"x": {"output": teacher}})
    if name == "PKTLoss":
        return loss("x", "output", "x", "output")(*outputs)
    if name == "ChSimLoss":
        pair = {side: {"path": "x", "io": "output"} for side in ("student", "teacher")}
        return loss({"pair": pair})(*outputs)
    if name == "SPKDLoss":
        return loss("x", "x", "batchmean")(*outputs)
    return loss("x", "x", {"type": name, "gamma": 0.4, "max_p": 30}, "batchmean")(*outputs)


@every_impl
@pytest.mark.parametrize(
    ("name", "args", "options", "factor"),
    [
        ("SPKDLoss", ("dot", "mse"), {"scale": "row_sum"}, lambda x: x),
        ("PKTLoss", ("cosine", "kl"), {"scale": "row_sum"}, lambda x: x),
        ("bilinear", ("dot", "mse"), {"scale": None, "reduction": "sum"}, lambda x: x.sqrt() / 8**2),
        ("gaussian", ("gaussian", "mse"), {"temperature": 1.25, "reduction": "sum"}, lambda x: x.sqrt() / 8**2),
        ("ChSimLoss", ("dot", "mse"), {}, lambda x: x * 8 / 2),
    ],
)
def test_torchdistill(name, args, options, factor, impl, monkeypatch):
    from torchdistill.losses.mid_level import CCKDLoss

    if name in ("bilinear", "gaussian"):
        monkeypatch.setattr("torchdistill.losses.mid_level." + name, CCKDLoss, raising=False)
    student, teacher = batch(2, 8, 3) if name == "ChSimLoss" else batch(8)
    if name == "ChSimLoss":  # two maps of 8 channels; ours are sets of rows
        teacher = torch.randn(2, 8, 3, 5, dtype=torch.float64)
    if name == "PKTLoss":  # it adds 1e-7 to lengths, which are large here
        student, teacher = (1000 * student.detach()).requires_grad_(), 1000 * teacher
    if name == "gaussian":  # their Taylor series is that of unit rows
        student, teacher = F.normalize(student.detach()).requires_grad_(), F.normalize(teacher)
    expected = theirs(name, student, teacher)
    (gradient,) = torch.autograd.grad(expected, student)
    flat = (x.flatten(2) if name == "ChSimLoss" else x for x in (student, teacher))
    value = factor(relational_loss(*flat, *args, **options, impl=impl))
    (ours,) = torch.autograd.grad(value, student)
    # Two float64 evaluations; the probabilities of PKT near 0 magnify the rest of the 1e-7.
    limit = 1e-7 if name == "PKTLoss" else 1e-9
    torch.testing.assert_close(value, expected, rtol=limit, atol=1e-12)
    if name != "gaussian":  # the two differ beside the sphere
        torch.testing.assert_close(ours, gradient, rtol=0, atol=limit * float(gradient.abs().max()))


def cosines(x, y):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)) @ (y / np.linalg.norm(y, axis=1, keepdims=True)).T


def rows_of(gram):
    return gram / np.linalg.norm(gram, axis=1, keepdims=True)


def softmax(x):
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def kl(s, t):
    return (t * (np.log(t) - np.log(s))).mean()


def js(s, t):
    return (kl((s + t) / 2, s) + kl((s + t) / 2, t)) / 2


def distances(x, y):
    return np.linalg.norm(x[:, None] - y[None], axis=-1)


@every_impl
@pytest.mark.parametrize(
    ("args", "options", "formula"),
    [
        (("cosine", "mse"), {}, lambda s, t, a, b: ((cosines(s, s) - cosines(t, t)) ** 2).mean()),
        (("dot", "mse"), {}, lambda s, t, a, b: ((rows_of(s @ s.T) - rows_of(t @ t.T)) ** 2).mean()),
        (
            ("cosine", "kl"),
            {"scale": "softmax", "temperature": 0.1},
            lambda s, t, a, b: kl(softmax(cosines(s, s) / 0.1), softmax(cosines(t, t) / 0.1)),
        ),
        (
            ("cosine", "kl"),  # SEED; and CLIP affinity, where the other rows are texts
            {"scale": "softmax", "temperature": 0.1, "references": True},
            lambda s, t, a, b: kl(softmax(cosines(s, a) / 0.1), softmax(cosines(t, b) / 0.1)),
        ),
        (
            ("squared_distance", "js"),
            {"scale": "softmax", "temperature": 3.0},
            lambda s, t, a, b: js(softmax(-(distances(s, s) ** 2) / 3), softmax(-(distances(t, t) ** 2) / 3)),
        ),
        (
            ("distance", "l1"),
            {"references": True},
            lambda s, t, a, b: np.abs(
                distances(s, a) / distances(s, a).mean() - distances(t, b) / distances(t, b).mean()
            ).mean(),
        ),
    ],
)  # fmt: skip
def test_numpy(args, options, formula, impl):
    student, teacher = batch(8)
    others = batch(6)
    if options.get("references"):
        options = {**options, "references": others}
    value = relational_loss(student, teacher, *args, **options, impl=impl)
    rows = (x.detach().numpy() for x in (student, teacher, *others))
    assert float(value.detach()) == pytest.approx(formula(*rows), rel=1e-12)


@every_impl
def test_margin_mse(impl):
    student, teacher = batch(9)
    triplets = torch.arange(3), torch.arange(3, 6), torch.arange(6, 9)

    def margin(query, positive, negative):
        return (query * positive).sum(-1) - (query * negative).sum(-1)

    margins = [((x[:3] * x[3:6]).sum(1) - (x[:3] * x[6:]).sum(1)) for x in (student, teacher)]
    value = relational_loss(student, teacher, margin, "mse", triplets=triplets, impl=impl)
    torch.testing.assert_close(value, F.mse_loss(*margins))


@every_impl
def test_single_rows(impl):
    student, teacher = batch(6, student_width=5)
    torch.testing.assert_close(
        relational_loss(student, teacher, "identity", "mse", impl=impl), F.mse_loss(student, teacher)
    )
    logs = [(x / 4).log_softmax(1) for x in (student, teacher)]
    value = relational_loss(student, teacher, "identity", "kl", scale="softmax", temperature=4, impl=impl)
    torch.testing.assert_close(value, F.kl_div(*logs, log_target=True, reduction="none").mean())


def test_softmax_of_far_relations_still_learns():
    """A probability of the student that is 0 in float64 has a gradient."""
    teacher = torch.eye(3).double()
    student = (100 * torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0]]).double()).requires_grad_()
    value = relational_loss(student, teacher, "dot", "kl", scale="softmax")
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()
    assert student.grad[1].any()


# Neighbours


def nearest_by_hand(teacher, k, others=None):
    squares = (teacher.unsqueeze(1) - (teacher if others is None else others)).square().sum(-1)
    if others is None:
        squares.fill_diagonal_(torch.inf)
    return squares.sort(dim=1, stable=True).indices[:, :k]


@every_impl
@pytest.mark.parametrize("elements", [1, 2**21])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("potential", ["distance", "angle", spread, turn])
def test_neighbours(potential, reduction, elements, impl, monkeypatch):
    """The same as the pairs and triplets of neighbours by hand; the mean distance is over the whole batch."""
    monkeypatch.setattr(functions, "ELEMENTS", elements)
    student, teacher = batch(9)
    near, k = nearest_by_hand(teacher, 3), 3
    options = {"impl": impl, "reduction": reduction}
    ours = value_and_gradient(relational_loss, student, teacher, potential, neighbours=k, **options)
    rows = torch.arange(9).unsqueeze(1)
    if potential in ("distance", spread):
        tuples = {"pairs": (rows.expand(9, k).flatten(), near.flatten())}
        counts = {"mean": 9 * (k + 1), "tuple_mean": 9 * k}
    else:
        arms = [near.unsqueeze(2).expand(9, k, k).flatten(), near.unsqueeze(1).expand(9, k, k).flatten()]
        start = rows.unsqueeze(2).expand(9, k, k).flatten()
        if reduction == "tuple_mean":
            kept = arms[0] != arms[1]
            start, arms = start[kept], [arm[kept] for arm in arms]
        tuples = {"triplets": (start, *arms)}
        counts = {"mean": 9 * (k + 1) ** 2, "tuple_mean": 9 * k * (k - 1)}
    # The mean of "anchor" is over the tuples that were given.
    counts["anchor"] = counts["mean"] / len(tuples.get("pairs", tuples.get("triplets"))[0])
    options["reduction"] = "anchor" if reduction == "anchor" else "sum"
    expected = value_and_gradient(relational_loss, student, teacher, potential, **tuples, **options)
    torch.testing.assert_close(ours, tuple(x / counts.get(reduction, 1) for x in expected))


def test_row_scales_are_over_the_neighbours():
    student, teacher = batch(9)
    near = nearest_by_hand(teacher, 4)
    logs = [
        (torch.einsum("id,ikd->ik", x, x[near]) / 0.1).log_softmax(1)
        for x in (F.normalize(student), F.normalize(teacher))
    ]
    value = relational_loss(
        student, teacher, "cosine", "kl", scale="softmax", temperature=0.1, neighbours=4, reduction="tuple_mean"
    )
    torch.testing.assert_close(value, F.kl_div(*logs, log_target=True, reduction="none").mean())


def test_neighbours_of_equal_distance_are_those_with_the_lowest_index():
    """A teacher of equal rows, and of rows that are not."""
    student, _ = batch(7)
    teacher = torch.ones(7, 2)
    teacher[3] = 5
    near = torch.tensor([[1, 2], [0, 2], [0, 1], [0, 1], [0, 1], [0, 1], [0, 1]])
    pairs = torch.arange(7).repeat_interleave(2), near.flatten()
    ours, expected = (
        value_and_gradient(relational_loss, student, teacher, "dot", "mse", scale=None, reduction="sum", **options)
        for options in ({"neighbours": 2}, {"pairs": pairs})
    )
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("potential", ["distance", "angle", "cosine"])
def test_all_rows_as_neighbours(potential):
    student, teacher = batch(7)
    options = {"penalty": "mse", "potential": potential}
    assert_equal(
        value_and_gradient(relational_loss, student, teacher, neighbours=6, **options),
        value_and_gradient(relational_loss, student, teacher, **options),
    )
    # One fewer gives the same up to the pairs that are missing.
    assert relational_loss(student, teacher, neighbours=5, **options) != relational_loss(student, teacher, **options)


@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.parametrize("potential", ["distance", "angle"])
def test_neighbours_of_few_rows(potential, rows):
    student, teacher = batch(rows)
    value, gradient = value_and_gradient(relational_loss, student, teacher, potential, neighbours=1)
    assert value == 0
    assert not gradient.any()


def test_neighbours_of_nan():
    student, teacher = batch(7)
    teacher[2] = torch.nan
    assert relational_loss(student, teacher, neighbours=2).isnan()


# References


@every_impl
@pytest.mark.parametrize(
    "potential", ["distance", "squared_distance", "dot", "cosine", "gaussian", "angle", spread, turn]
)
def test_references(potential, impl):
    """The batch as its own references: the loss of all entries, and both gradients together are its gradient."""
    student, teacher = batch(7)
    options = {"penalty": "l1", "scale": None, "impl": impl}
    expected = value_and_gradient(relational_loss, student, teacher, potential, **options)
    copy = student.detach().clone().requires_grad_()
    value = relational_loss(student, teacher, potential, references=(copy, teacher), **options)
    gradients = torch.autograd.grad(value, (student, copy))
    torch.testing.assert_close((value.detach(), sum(gradients)), expected)
    detached = relational_loss(student, teacher, potential, references=(copy.detach(), teacher), **options)
    torch.testing.assert_close(torch.autograd.grad(detached, student)[0], gradients[0])


def test_teacher_references_get_no_gradient():
    (student, teacher), (ours, theirs) = batch(7), batch(4)
    relational_loss(student, teacher, references=(ours, theirs.requires_grad_())).backward()
    assert theirs.grad is None
    assert ours.grad.any()


@pytest.mark.parametrize("potential", ["distance", "angle"])
def test_neighbours_among_references(potential):
    (student, teacher), (ours, theirs) = batch(7), batch(5)
    near = nearest_by_hand(teacher, 2, theirs)
    value = relational_loss(
        student, teacher, potential, "mse", scale=None, neighbours=2, references=(ours, theirs), reduction="sum"
    )
    single = [
        relational_loss(
            student[i : i + 1], teacher[i : i + 1], potential, "mse", scale=None, references=(ours[n], theirs[n]),
            reduction="sum",
        )
        for i, n in enumerate(near)
    ]  # fmt: skip
    torch.testing.assert_close(value, sum(single))


# Sets of rows


@every_impl
@pytest.mark.parametrize("options", [{}, {"neighbours": 3}], ids=["all", "neighbours"])
@pytest.mark.parametrize("loss", [relational_loss, functools.partial(relational_loss, potential="angle"), *RELATIONS])
def test_sets(loss, options, impl):
    """The mean over the sets, and the sum of their sums; relations are within a set."""
    if options and getattr(loss, "order", 2) == 1:
        options = {}
    student, teacher = batch(3, 6)
    options = {**options, "impl": impl}
    single = [value_and_gradient(loss, s, t, **options) for s, t in zip(student, teacher, strict=True)]
    value, gradient = value_and_gradient(loss, student, teacher, **options)
    torch.testing.assert_close(value, torch.stack([v for v, _ in single]).mean())
    torch.testing.assert_close(gradient, torch.stack([g for _, g in single]) / 3)
    anchor = loss(student, teacher, reduction="anchor", **options)
    assert anchor.shape == (3, 6)
    torch.testing.assert_close(anchor.mean(), value)
    total = loss(student, teacher, reduction="sum", **options)
    torch.testing.assert_close(
        total, sum(loss(s, t, reduction="sum", **options) for s, t in zip(student, teacher, strict=True))
    )


@pytest.mark.parametrize("potential", ["distance", "cosine", "angle"])
@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (2, 1)])
def test_few_sets(potential, shape):
    student, teacher = batch(*shape)
    value, gradient = value_and_gradient(relational_loss, student, teacher, potential)
    assert abs(value) < 1e-30  # a cosine of a row with itself is rounded
    assert gradient.shape == student.shape


# Memory


def test_memory():
    """First in, first out; a loss of 0 while it is empty; saved in state_dict."""
    memory = RelationMemory(5)
    student, teacher = batch(3)
    value, gradient = value_and_gradient(
        relational_loss, student, teacher, "cosine", "kl", scale="softmax", references=memory
    )
    assert value == 0
    assert not gradient.any()
    every = torch.arange(8.0)
    for part in every.split(2):
        memory.update(part.unsqueeze(1).requires_grad_(), part.unsqueeze(1).expand(2, 3))
    ours, theirs = memory.references
    assert ours.flatten().tolist() == [3, 4, 5, 6, 7]
    assert theirs.T.tolist() == [[3, 4, 5, 6, 7]] * 3
    assert not ours.requires_grad
    file = io.BytesIO()
    torch.save(memory.state_dict(), file)
    file.seek(0)
    restored = RelationMemory(5)
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert_equal(restored.references, memory.references)


def test_memory_of_a_batch_that_is_overwritten():
    memory, rows = RelationMemory(2), torch.ones(2, 3)
    memory.update(rows, rows)
    rows.zero_()
    assert all(side.all() for side in memory.references)


def test_memory_in_a_module():
    """The loss with its memory is trained, saved and restored."""
    loss = RelationalLoss("cosine", "kl", scale="softmax", references=RelationMemory(4))
    student, teacher = batch(3)
    loss.references.update(student, teacher)
    assert_equal(
        loss(student, teacher),
        relational_loss(student, teacher, "cosine", "kl", scale="softmax", references=(student.detach(), teacher)),
    )
    assert set(loss.state_dict()) == {"references.student", "references.teacher"}


# Functions


def test_a_function_is_computed_in_the_dtype_of_the_rows():
    seen = []

    def recorded(x, y):
        seen.append((x.dtype, torch.is_autocast_enabled("cpu")))
        return spread(x, y)

    student, teacher = batch(5)
    with torch.autocast("cpu", torch.bfloat16):
        for kind in (torch.float64, torch.float32, torch.bfloat16):
            relational_loss(student.to(kind), teacher.to(kind), recorded)
    kinds = [torch.float64] * 2 + [torch.float32] * 4
    assert [*dict.fromkeys(seen)] == [(kind, False) for kind in dict.fromkeys(kinds)]


def test_arguments_with_a_default_are_options_of_a_function():
    student, teacher = batch(5)
    value = relational_loss(student, teacher, lambda x, y, power=2: (x - y).norm(dim=-1) ** power, "mse", scale=None)
    torch.testing.assert_close(value, relational_loss(student, teacher, "squared_distance", "mse", scale=None))


def test_memory_of_strips():
    """What is saved for the backward pass does not grow with the number of triples."""
    saved = []
    student, teacher = batch(40)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x.numel()), x)[1], lambda x: x):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(functions, "ELEMENTS", 40 * 3 * 40)
            relational_loss(student, teacher, turn)
            strips, _ = sum(saved), saved.clear()
        relational_loss(student, teacher, turn)
    assert strips < 40**2 * 20
    assert sum(saved) > 40**3


def test_the_graph_does_not_grow_with_the_strips(monkeypatch):
    """Small blocks between those of two strips would keep the process from using freed memory again."""
    student, teacher = batch(12)
    sizes = []
    for elements in (functions.ELEMENTS, 12 * 3):
        monkeypatch.setattr(functions, "ELEMENTS", elements)
        nodes, seen = [relational_loss(student, teacher, turn).grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node is not None and node not in seen:
                seen.add(node)
                nodes += [before for before, _ in node.next_functions]
        sizes.append(len(seen))
    assert sizes[1] <= sizes[0]


@pytest.mark.parametrize("hidden", [False, True], ids=["leaf", "result"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_strips_of_a_function_with_parameters(order, hidden, monkeypatch):
    """Parameters of the function, and tensors that are computed from them, get their gradient."""
    student, teacher = batch(6, teacher_width=3)
    scale = torch.rand(3, dtype=torch.float64).requires_grad_()
    found = []
    for elements in (functions.ELEMENTS, 40):
        monkeypatch.setattr(functions, "ELEMENTS", elements)
        weights = scale.exp() if hidden else scale
        potential = {
            1: lambda x: (x * weights).sum(-1),  # noqa: B023  # called within this step
            2: lambda x, y: (x * y * weights).sum(-1),  # noqa: B023
            3: lambda x, y, z: (x * y * z * weights).sum(-1),  # noqa: B023
        }[order]
        value = relational_loss(student, teacher, potential, "mse")
        found.append((value.detach(), *torch.autograd.grad(value, (student, scale))))
    torch.testing.assert_close(*found)


def test_strips_in_a_compiled_function(monkeypatch):
    monkeypatch.setattr(functions, "ELEMENTS", 150)
    student, teacher = batch(6)
    torch._dynamo.reset()
    compiled = torch.compile(relational_loss, fullgraph=True, backend="aot_eager")
    ours, eager = (value_and_gradient(f, student, teacher, turn) for f in (compiled, relational_loss))
    torch.testing.assert_close(ours, eager)


def test_second_derivatives_of_strips(monkeypatch):
    monkeypatch.setattr(functions, "ELEMENTS", 40)
    student, teacher = batch(6)
    (gradient,) = torch.autograd.grad(relational_loss(student, teacher, turn), student, create_graph=True)
    with pytest.raises(RuntimeError, match="relational_loss: impl 'chunked': expected a first derivative"):
        torch.autograd.grad(gradient.sum(), student)


# Errors are one sentence

X = torch.zeros(4, 2)
INDEX = torch.tensor([0])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"potential": "euclid"}, ValueError, "expected potential to be one of ('identity', 'distance', "),
        ({"potential": None}, ValueError, "expected potential to be one of ('identity', 'distance', "),
        ({"penalty": "l2"}, ValueError, "expected penalty to be one of ('huber', 'mse', 'l1', 'kl', 'js') or a funct"),
        ({"potential": lambda a, b, c, d: a}, ValueError, "expected potential to be a function of 1, 2 or 3 rows, got"),
        ({"potential": lambda *rows: rows}, ValueError, "expected potential to be a function of 1, 2 or 3 rows, got"),
        ({"potential": torch.dist}, ValueError, "expected potential to be a function of 1, 2 or 3 rows, got"),
        ({"scale": "max"}, ValueError, "expected scale to be one of (None, 'mean', 'row_sum', 'row_norm', 'softmax',"),
        ({"potential": "dot", "scale": "mean"}, ValueError, "expected scale to be one of ('row_norm', None, 'row_sum'"),
        ({"penalty": "kl"}, ValueError, "expected rows that sum to 1 for penalty 'kl', got scale 'mean' w"),
        ({"temperature": 0}, ValueError, "expected temperature to be positive and finite, got 0"),
        ({"temperature": "1"}, TypeError, "expected temperature to be a number, got '1'"),
        ({"neighbours": 0}, ValueError, "expected neighbours to be None or an integer of at least 1, got 0"),
        ({"neighbours": 1.5}, TypeError, "expected neighbours to be None or an integer of at least 1, got 1.5"),
        ({"neighbours": True}, TypeError, "expected neighbours to be None or an integer of at least 1, got True"),
        ({"potential": "identity", "neighbours": 2}, ValueError, "expected neighbours and references with a potential"),
        ({"potential": "angle", "pairs": (INDEX, INDEX)}, ValueError, "expected pairs with a potential of 2 rows"),
        ({"triplets": (INDEX, INDEX, INDEX)}, ValueError, "expected triplets with a potential of 3 rows"),
        ({"references": X}, TypeError, "expected references to be (student_rows, teacher_rows) or a RelationMemory, "),
        ({"references": (X, X[:3])}, ValueError, "expected one row per example in student references and teacher ref"),
        ({"references": (X[:, :1], X)}, ValueError, "expected student references of width 2 on cpu, got width 1 on c"),
        ({"references": (X.clone().requires_grad_(), X), "gather": True}, ValueError, "expected references without a"),
        ({"impl": "fused", "potential": "dot"}, RuntimeError, "expected "),
        ({"huber_delta": 0}, ValueError, "expected huber_delta to be positive and finite, got 0"),
    ],
)  # fmt: skip
def test_invalid_options(options, error, message):
    with pytest.raises(error) as caught:
        relational_loss(X, X, **options)
    assert str(caught.value).startswith(f"relational_loss: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("student", "teacher", "options", "message"),
    [
        (X, torch.zeros(4, 3), {"potential": "identity"}, "expected rows of one width for potential 'identity', got "),
        (X[0], X[0], {}, "expected student to have shape (N, D) or (B, N, D), got (2,)"),
        (X.expand(3, 4, 2), X, {}, "expected one row per example in student and teacher, got 3x4 and 4 rows"),
        (X.expand(3, 4, 2), X.expand(3, 4, 2), {"gather": True}, "expected gather=False with sets of rows (B, N, D)"),
    ],
)  # fmt: skip
def test_invalid_batches(student, teacher, options, message):
    with pytest.raises(ValueError, match="relational_loss: ") as caught:
        relational_loss(student, teacher, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"potential": lambda x, y: x - y}, ValueError, "one number for each tuple of rows, shape (4, 4), got (4, 4,"),
        ({"potential": lambda x, y, z: x - y}, ValueError, "one number for each tuple of rows, shape (16, 4), got"),
        ({"potential": lambda x, y: 1.0}, TypeError, "expected a tensor from the function, got float"),
        ({"potential": lambda x: x}, ValueError, "expected relations of one shape from student and teacher, got (4, "),
        ({"penalty": lambda s, t: (s - t).mean()}, ValueError, "expected one loss for each relation, a tensor of sha"),
        ({"penalty": lambda s, t: 1.0}, ValueError, "expected one loss for each relation, a tensor of shape (4, 4), "),
    ],
)  # fmt: skip
def test_invalid_functions(options, error, message):
    with pytest.raises(error) as caught:
        relational_loss(X, torch.zeros(4, 3), **options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: RelationMemory(0), ValueError, "expected size to be at least 1, got 0"),
        (lambda: RelationMemory(1.0), TypeError, "expected size to be an integer, got 1.0"),
        (lambda: RelationMemory(2).update(X, X[:3]), ValueError, "expected one row per example in student and teacher"),
    ],
)
def test_invalid_memory(call, error, message):
    with pytest.raises(error, match="RelationMemory: " + message):
        call()


def test_memory_of_other_widths():
    memory = RelationMemory(2)
    memory.update(X, X)
    with pytest.raises(ValueError, match="RelationMemory: expected teacher rows of width 2, got 1"):
        memory.update(X, X[:, :1])


def test_every_named_potential_is_in_the_shared_tests():
    names = " ".join(loss.__name__ for loss in RELATIONS)
    assert [name for name in POTENTIALS if name not in names] == ["identity"]
