"""The public functions with every kernel: results, invariances and errors."""

from __future__ import annotations

import inspect
import json
import math
import re
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from relations import RELATIONS
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck

from rkd_plugin import RKDAngleLoss, RKDDALoss, RKDDistanceLoss
from rkd_plugin.functional import relation_terms, rkd_angle_loss, rkd_da_loss, rkd_distance_loss
from rkd_plugin.kernels import chunked, native
from rkd_plugin.options import Options

GOLDEN = json.loads((Path(__file__).parent / "golden" / "rkd.json").read_text())
LOSSES = [rkd_distance_loss, rkd_angle_loss, rkd_da_loss]
ORDER = {rkd_distance_loss: 2, rkd_angle_loss: 3} | {loss: loss.order for loss in RELATIONS}
INVARIANT = {"shift", "scale", "rotation"}
REDUCTIONS = ["mean", "tuple_mean", "sum", "anchor"]
KERNELS = ["chunked", "reference"]  # fused has its own tests

every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
every_term = pytest.mark.parametrize("loss", [rkd_distance_loss, rkd_angle_loss], ids=lambda f: f.__name__)
every_relation = pytest.mark.parametrize("loss", [*LOSSES, *RELATIONS], ids=lambda f: f.__name__)
several_rows = pytest.mark.parametrize(
    "loss", [loss for loss in [*LOSSES, *RELATIONS] if ORDER.get(loss) != 1], ids=lambda f: f.__name__
)
one_relation = pytest.mark.parametrize("loss", list(ORDER), ids=lambda f: f.__name__)  # without sums of losses
# The others are multiples of "mean", see test_reductions; "anchor" has other weights in the backward pass.
both_weightings = pytest.mark.parametrize("reduction", ["mean", "anchor"])
every_kernel = pytest.mark.parametrize("impl", KERNELS)


def batch(rows=7, student_width=3, teacher_width=5, dtype=torch.float64, device="cpu"):
    """A student with a gradient, and a teacher; drawn on the CPU, so that all devices get the same numbers."""
    student, teacher = (torch.randn(rows, width, dtype=dtype) for width in (student_width, teacher_width))
    return student.to(device).requires_grad_(), teacher.to(device)


def mined(loss, rows=7):
    """Index tuples of a miner as keyword arguments: one of them occurs twice, and one has a row twice."""
    pairs = (torch.tensor([0, 2, 2, 5, 0, 3]), torch.tensor([1, 4, 0, 6, 1, 3]) % rows)
    triplets = (torch.tensor([0, 2, 2, 5, 0, 3]), torch.tensor([1, 4, 0, 6, 1, 3]), torch.tensor([2, 1, 5, 3, 2, 1]))
    by_order = {1: {}, 2: {"pairs": pairs}, 3: {"triplets": triplets}}
    return by_order[ORDER[loss]] if loss in ORDER else {"pairs": pairs, "triplets": triplets}


def value_and_gradient(loss, student, teacher, **options):
    student = student.detach().requires_grad_()
    value = loss(student, teacher, **options)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    return value.detach(), gradient


@every_relation
@every_kernel
def test_smoke(loss, impl, dtype, device):
    student, teacher = batch(dtype=dtype, device=device)
    value = loss(student, teacher, impl=impl)
    value.backward()
    assert value.dtype == torch.promote_types(dtype, torch.float32)
    assert value.device == student.device
    assert value > 0
    assert student.grad.dtype == dtype
    assert student.grad.isfinite().all()
    assert student.grad.any()


@every_relation
@every_kernel
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_cardinality(loss, impl, rows):
    student, teacher = batch(rows)
    shapes = [loss(student, teacher, reduction=reduction, impl=impl).shape for reduction in REDUCTIONS]
    assert shapes == [(), (), (), (rows,)]


@every_term
@every_kernel
@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"N{len(c['student'])}")
def test_golden(loss, impl, case):
    student, teacher = (torch.tensor(case[side], dtype=torch.float64) for side in ("student", "teacher"))
    golden = case["distance" if loss is rkd_distance_loss else "angle"]
    # Two float64 evaluations of one formula, of order 1.
    assert float(loss(student, teacher, impl=impl)) == pytest.approx(golden, rel=1e-11, abs=1e-13)


@every_loss
@pytest.mark.parametrize("rows", [4, 17, 64])
def test_torchdistill(loss, rows):
    """The same as torchdistill's own loss in float64, for distinct rows and the mean over all entries."""
    import torchvision  # noqa: F401  # before torchdistill, whose registries look for it in sys.modules
    from torchdistill.losses.mid_level import RKDLoss

    student, teacher = batch(rows)
    factors = {rkd_distance_loss: (1.0, 0.0), rkd_angle_loss: (0.0, 1.0), rkd_da_loss: (1.0, 2.0)}[loss]
    host = RKDLoss("s", "t", *factors, reduction="mean")
    theirs = host({"s": {"output": student}}, {"t": {"output": teacher}})
    (their_gradient,) = torch.autograd.grad(theirs, student)
    ours, our_gradient = value_and_gradient(loss, student, teacher)
    # It computes distances from a Gram matrix, which keeps the first ten digits of float64.
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=0, atol=1e-10 * float(their_gradient.abs().max()))


@every_kernel
def test_duplicates_enter_the_mean_distance(impl):
    """By hand: the student's distances 0, 1, 1 have mean 2/3; the mean of the positive ones is 1."""
    student = torch.tensor([[0.0], [0.0], [1.0]])
    teacher = torch.tensor([[0.0], [1.0], [2.0]])
    # Normalised: 0, 3/2, 3/2 and 3/4, 3/2, 3/4; two pairs differ by 3/4, each counts twice, divided by 9.
    assert float(rkd_distance_loss(student, teacher, impl=impl)) == pytest.approx(4 * 0.75**2 / 2 / 9, rel=1e-6)


def rotation(width):
    q, _ = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))
    return q


@one_relation
@every_kernel
@pytest.mark.parametrize("narrow", [False, True], ids=["float64", "float32"])
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(2, 20),
    width=st.integers(1, 6),
    shift=st.sampled_from([0, -1000, 1000]),
    scale=st.sampled_from([1e-4, 1e-2, 1, 1e2, 1e4]),
    on_student=st.booleans(),
)
def test_invariance(loss, impl, narrow, seed, rows, width, shift, scale, on_student):
    torch.manual_seed(seed)
    dtype, limit = (torch.float32, 2e-6) if narrow else (torch.float64, 1e-9)
    # Multiples of 2**-12, so that a shift by 1000 rounds nothing even in float32.
    student, teacher = ((torch.randn(rows, w) * 2**12).round().to(dtype) / 2**12 for w in (width, 4))
    before, gradient = value_and_gradient(loss, student, teacher, impl=impl)
    side = student if on_student else teacher
    turned = (side.double() @ rotation(side.shape[1])).to(dtype)
    order = torch.randperm(rows)
    for kind, new, factor, wanted in (
        ("shift", side + shift, 1, gradient),
        ("scale", side * scale, scale if on_student else 1, gradient),
        ("rotation", turned, 1, None),
    ):
        if kind not in getattr(loss, "invariant", INVARIANT):
            continue
        pair = (new, teacher) if on_student else (student, new)
        value, moved = value_and_gradient(loss, *pair, impl=impl)
        torch.testing.assert_close(value, before, rtol=0, atol=limit)
        if wanted is not None:
            torch.testing.assert_close(
                moved * factor, wanted, rtol=0, atol=100 * limit * float(wanted.abs().max()) + limit
            )
    value, permuted = value_and_gradient(loss, student[order], teacher[order], impl=impl)
    torch.testing.assert_close(value, before, rtol=0, atol=limit)
    torch.testing.assert_close(permuted, gradient[order], rtol=0, atol=limit * (1 + float(gradient.abs().max())))


@one_relation
@every_kernel
@pytest.mark.parametrize("tuples", ["all", "mined"])
@pytest.mark.parametrize(("reduction", "huber_delta"), [("mean", 1.0), ("anchor", 0.1)])
def test_gradcheck(loss, impl, reduction, tuples, huber_delta):
    student, teacher = batch(dtype=torch.float64)
    options = {} if tuples == "all" else mined(loss)
    assert gradcheck(
        lambda x: loss(x, teacher, reduction=reduction, impl=impl, huber_delta=huber_delta, **options), (student,)
    )


@every_kernel
@every_loss
def test_gradient_flows_through_the_mean_distance(loss, impl):
    """The gradient of a loss that is invariant to scaling is orthogonal to its input (Euler's theorem)."""
    student, teacher = batch()
    _, gradient = value_and_gradient(loss, student, teacher, impl=impl)
    products = gradient * student.detach()
    # float64 rounds each of them by 1e-16.
    assert abs(products.sum()) < 1e-12 * products.abs().sum()


@one_relation
@every_kernel
@pytest.mark.parametrize("rows", [3, 7])
def test_reductions(loss, impl, rows):
    student, teacher = batch(rows)
    mean, tuple_mean, total, anchor = (loss(student, teacher, reduction=r, impl=impl) for r in REDUCTIONS)
    entries, tuples = rows ** ORDER[loss], math.perm(rows, ORDER[loss])
    torch.testing.assert_close(anchor.mean(), mean)
    torch.testing.assert_close(total, mean * entries)
    if getattr(loss, "repeats_add_nothing", True):
        torch.testing.assert_close(tuple_mean, total / tuples)


@pytest.mark.parametrize("loss", [loss for loss in ORDER if ORDER[loss] > 1], ids=lambda f: f.__name__)
@every_kernel
def test_all_tuples_as_indices(loss, impl):
    """All tuples as indices give the loss without indices; a mean is over the given tuples."""
    student, teacher = batch()
    tuples = torch.cartesian_prod(*[torch.arange(len(student))] * ORDER[loss])
    distinct = tuples[[len(set(t.tolist())) == ORDER[loss] for t in tuples]]
    key = "pairs" if ORDER[loss] == 2 else "triplets"
    every = loss(student, teacher, reduction="sum", impl=impl, **{key: tuple(tuples.T)})
    torch.testing.assert_close(every, loss(student, teacher, reduction="sum", impl=impl))
    named = {r: loss(student, teacher, reduction=r, impl=impl, **{key: tuple(distinct.T)}) for r in REDUCTIONS}
    torch.testing.assert_close(named["tuple_mean"], loss(student, teacher, reduction="tuple_mean", impl=impl))
    torch.testing.assert_close(named["mean"], named["tuple_mean"])
    torch.testing.assert_close(named["anchor"].mean(), named["mean"])


@every_relation
@both_weightings
def test_mined_tuples_agree_between_kernels(loss, reduction):
    student, teacher = batch()
    ours, truth = (
        value_and_gradient(loss, student, teacher, reduction=reduction, impl=impl, **mined(loss))
        for impl in ("chunked", "reference")
    )
    torch.testing.assert_close(ours, truth)
    assert truth[1].any()


@every_kernel
def test_tuples_that_name_a_row_twice_add_nothing(impl):
    """Even if an arm has length 0 on one side, so that the formula gives 0 there and 1 on the other side."""
    student, teacher = batch()
    student = student.detach().index_copy(0, torch.tensor([1]), student.detach()[:1])
    twice = torch.tensor([[0, 1, 1], [0, 0, 1], [3, 3, 3]])
    assert rkd_angle_loss(student, teacher, impl=impl, reduction="sum", triplets=tuple(twice.T)) == 0
    assert rkd_distance_loss(student, teacher, impl=impl, reduction="sum", pairs=tuple(twice[1:, :2].T)) == 0


@several_rows
@every_kernel
def test_no_tuples(loss, impl):
    student, teacher = batch()
    empty = torch.empty(0, dtype=torch.long)
    options = {key: tuple(empty for _ in index) for key, index in mined(loss).items()}
    value, gradient = value_and_gradient(loss, student, teacher, impl=impl, **options)
    assert value == 0
    assert not gradient.any()


@every_kernel
@both_weightings
def test_da_is_the_weighted_sum(impl, reduction):
    student, teacher = batch()
    options = {"impl": impl, "reduction": reduction}
    both = value_and_gradient(rkd_da_loss, student, teacher, distance_weight=25, angle_weight=50, **options)
    terms = [value_and_gradient(loss, student, teacher, **options) for loss in (rkd_distance_loss, rkd_angle_loss)]
    torch.testing.assert_close(both, tuple(25 * d + 50 * a for d, a in zip(*terms, strict=True)))


@pytest.mark.parametrize(("skipped", "weights"), [("distance", (0, 2)), ("angle", (3, 0))])
def test_weight_of_zero_skips_the_term(monkeypatch, skipped, weights):
    student, teacher = batch()
    kept, weight = (rkd_angle_loss, 2) if skipped == "distance" else (rkd_distance_loss, 3)
    expected = weight * kept(student, teacher)

    original = native.relations

    def relations(squares, delta, dtype, distance, angle, needs_gradient):
        if {"distance": distance, "angle": angle}[skipped] is not None:
            raise AssertionError(f"{skipped} is computed although its weight is 0")
        return original(squares, delta, dtype, distance, angle, needs_gradient)

    monkeypatch.setattr(native, "relations", relations)
    options = {"distance_weight": weights[0], "angle_weight": weights[1]}
    torch.testing.assert_close(rkd_da_loss(student, teacher, **options), expected)
    with pytest.raises(AssertionError, match="is computed"):
        rkd_da_loss(student, teacher)


@every_kernel
def test_both_weights_zero(impl):
    student, teacher = batch()
    value, gradient = value_and_gradient(rkd_da_loss, student, teacher, distance_weight=0, angle_weight=0, impl=impl)
    assert value == 0
    assert not gradient.any()


@every_relation
@every_kernel
def test_teacher_gets_no_gradient(loss, impl):
    student, teacher = batch()
    teacher.requires_grad_()
    loss(student, teacher, impl=impl).backward()
    assert teacher.grad is None
    assert not loss(student.detach(), teacher, impl=impl).requires_grad


@every_relation
@every_kernel
def test_no_grad(loss, impl):
    student, teacher = batch()
    expected = loss(student, teacher, impl=impl)
    with torch.no_grad():
        value = loss(student, teacher, impl=impl)
    assert not value.requires_grad
    torch.testing.assert_close(value, expected.detach(), rtol=0, atol=0)


@every_kernel
def test_gradient_accumulation(impl):
    (student, teacher), other = batch(), batch(4)[1]
    halves = ((slice(None), teacher), (slice(4), other))
    gradients = [value_and_gradient(rkd_da_loss, student[rows], t, impl=impl)[1] for rows, t in halves]
    for rows, t in halves:
        (rkd_da_loss(student[rows], t, impl=impl) / 2).backward()
    expected = gradients[0] / 2
    expected[:4] += gradients[1] / 2
    torch.testing.assert_close(student.grad, expected)


@pytest.mark.parametrize(
    ("loss", "impl", "backward_too"),
    # PyTorch recommends the backward pass outside of autocast; ``reference`` needs this.
    [(rkd_da_loss, "reference", False), *((loss, "chunked", True) for loss in [rkd_da_loss, *RELATIONS])],
)
def test_autocast(loss, impl, backward_too, dtype, device):
    """The same bits with autocast on, for inputs of every dtype."""
    student, teacher = batch(dtype=dtype, device=device)
    plain = value_and_gradient(loss, student, teacher, impl=impl)
    with torch.autocast(device.type, torch.bfloat16):
        assert (torch.ones(2, 2, device=device) @ torch.ones(2, 2, device=device)).dtype == torch.bfloat16
        value = loss(student, teacher, impl=impl)
        if backward_too:
            value.backward()
    if not backward_too:
        value.backward()
    torch.testing.assert_close((value.detach(), student.grad), plain, rtol=0, atol=0)


def at_seed(f, *args, **options):
    torch.manual_seed(1)  # of the anchors
    return f(*args, **options)


def sum_of_relations(student, teacher, **options):
    return sum(loss(student, teacher, **options) for loss in RELATIONS if loss.order > 1 or "neighbours" not in options)


@every_kernel
@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (rkd_da_loss, {"reduction": "tuple_mean"}),
        (rkd_da_loss, {"reduction": "anchor", "huber_delta": 0.3, **mined(rkd_da_loss)}),
        (rkd_da_loss, {"reduction": "sum", "anchors": 0.5, "pairs": mined(rkd_distance_loss)["pairs"]}),
        (sum_of_relations, {"reduction": "tuple_mean"}),
        (sum_of_relations, {"reduction": "anchor", "neighbours": 3}),
    ],
    ids=["all", "mined", "anchors", "relations", "neighbours"],
)
def test_dynamo(impl, loss, options):
    student, teacher = batch(dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours, eager = (at_seed(value_and_gradient, f, student, teacher, impl=impl, **options) for f in (compiled, loss))
    torch.testing.assert_close(ours, eager)


def test_indices_are_checked_in_a_compiled_function():
    student, teacher = batch(dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(rkd_distance_loss, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="expected pairs to name rows from 0 to 6, got 7"):
        compiled(student, teacher, pairs=(torch.tensor([0]), torch.tensor([7])))


@pytest.mark.slow
def test_inductor(device):
    """The default backend of torch.compile."""
    torch._dynamo.reset()
    student, teacher = batch(dtype=torch.float32, device=device)
    compiled = torch.compile(rkd_da_loss, fullgraph=True)
    ours, eager = (value_and_gradient(f, student, teacher) for f in (compiled, rkd_da_loss))
    torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize(
    ("impl", "options"),
    [
        ("chunked", {}),
        *(
            pytest.param(impl, options, marks=pytest.mark.slow)
            for impl, options in (
                ("chunked", {"reduction": "tuple_mean", "anchors": 0.5}),
                ("chunked", {"reduction": "anchor", **mined(rkd_da_loss)}),
                ("reference", {}),
                ("reference", mined(rkd_da_loss)),
            )
        ),
    ],
)
def test_one_compilation_serves_every_batch_size(impl, options, device):
    torch._dynamo.reset()
    compiled = torch.compile(rkd_da_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (7, 12, 30, 8):
        student, teacher = batch(rows, dtype=torch.float32, device=device)
        eager = at_seed(value_and_gradient, rkd_da_loss, student, teacher, impl=impl, **options)
        with torch.compiler.set_stance("default" if rows == 7 else "fail_on_recompile"):
            ours = at_seed(value_and_gradient, compiled, student, teacher, impl=impl, **options)
        torch.testing.assert_close(ours, eager)


@every_kernel
def test_export(impl):
    """One program for batches of any size."""
    options = {"impl": impl, "anchors": 3, "pairs": mined(rkd_distance_loss)["pairs"]}

    class Model(torch.nn.Module):
        def forward(self, student, teacher):
            return rkd_da_loss(student, teacher, **options)

    rows = torch.export.Dim("rows", min=7)
    shapes = {"student": {0: rows}, "teacher": {0: rows}}
    exported = torch.export.export(Model(), tuple(x.detach() for x in batch()), dynamic_shapes=shapes).module()
    for other in (7, 12):
        student, teacher = (x.detach() for x in batch(other))
        torch.testing.assert_close(
            at_seed(exported, student, teacher), at_seed(rkd_da_loss, student, teacher, **options)
        )


@every_kernel
def test_in_ddp(impl, tmp_path):
    """DistributedDataParallel with one process does not change the gradient."""
    student, teacher = batch(dtype=torch.float32)
    model = torch.nn.Linear(3, 2)
    rkd_da_loss(model(student.detach()), teacher, impl=impl).backward()
    expected = model.weight.grad.clone()
    model.zero_grad()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        rkd_da_loss(parallel(student.detach()), teacher, impl=impl).backward()
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(model.weight.grad, expected)


# One computation of the relations, and no state between calls


@every_loss
def test_relations_are_computed_once_and_not_kept(loss, monkeypatch):
    """Also for the same teacher tensor, whose values may have changed."""
    computed, original = [], chunked.forward_squares

    def forward_squares(x, found):
        squares = original(x, found)
        computed.append((x.shape[1], weakref.ref(squares)))
        return squares

    monkeypatch.setattr(chunked, "forward_squares", forward_squares)
    (student, teacher), options = batch(), {"impl": "chunked"}
    with torch.no_grad():
        first = loss(student, teacher, **options)
        assert first == loss(student, teacher, **options)
    assert [width for width, _ in computed] == [3, 5] * 2
    assert [squares() for _, squares in computed] == [None] * 4


@every_kernel
def test_terms(impl):
    """Both vectors with their weights; None where the weight is 0."""
    student, teacher = batch()
    for reduction in REDUCTIONS:
        options = {"reduction": reduction, "impl": impl}
        terms = relation_terms("loss", student, teacher, Options(3.0, 5.0, **options))
        for term, loss, weight in ((terms.distance, rkd_distance_loss, 3), (terms.angle, rkd_angle_loss, 5)):
            assert term.shape == (7,)
            expected = weight * loss(student, teacher, **options)
            torch.testing.assert_close(term if reduction == "anchor" else term.sum(), expected)
    assert relation_terms("loss", student, teacher, Options(0, 1)).distance is None
    assert relation_terms("loss", student, teacher, Options(1, 0)).angle is None


@every_kernel
def test_all_rows_as_anchors_change_nothing(impl):
    """Also for pairs, which still name the same rows."""
    student, teacher = batch()
    options = {"impl": impl, "pairs": mined(rkd_distance_loss)["pairs"], "reduction": "anchor"}
    ours, expected = (value_and_gradient(rkd_da_loss, student, teacher, **options, **a) for a in ({"anchors": 7}, {}))
    torch.testing.assert_close(ours, expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # sizes are constants of a traced program
@every_kernel
def test_traced(impl):
    """No value of a batch is a constant of the traced program."""
    student, teacher = (x.detach() for x in batch())
    rkd_da_loss(student, teacher, impl=impl)
    traced = torch.jit.trace(lambda s, t: rkd_da_loss(s, t, impl=impl), (student, teacher))
    other_student, other_teacher = (x.detach() for x in batch())
    for s, t in ((other_student, teacher), (student, other_teacher)):
        torch.testing.assert_close(traced(s, t), rkd_da_loss(s, t, impl=impl))


@every_kernel
def test_fake_and_meta_tensors(impl):
    """FakeTensorMode and the meta device: shapes and dtypes only; several losses with one teacher."""
    student, teacher = batch(dtype=torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake, fake_teacher = mode.from_tensor(student), mode.from_tensor(teacher)
        loss = sum(f(fake, fake_teacher, impl=impl) for f in LOSSES)
        loss.backward()
    assert (loss.shape, loss.dtype, fake.grad.shape) == ((), torch.float32, student.shape)
    meta = rkd_da_loss(student.to("meta"), teacher.to("meta"), impl=impl, anchors=3, reduction="anchor")
    assert (meta.shape, meta.dtype, meta.device.type) == ((7,), torch.float32, "meta")


# Errors are one sentence

X = torch.zeros(4, 2)
NO_NUMBERS = ["1e-4", None, True, torch.ones(())]


@pytest.mark.parametrize(
    ("student", "teacher", "error", "message"),
    [
        ([[0.0]], X, TypeError, "expected student to be a tensor, got list"),
        (X, None, TypeError, "expected teacher to be a tensor, got NoneType"),
        (X.long(), X, TypeError, "got torch.int64; pass student.float()"),
        (X, X.to(torch.float8_e4m3fn), TypeError, "got torch.float8_e4m3fn; pass teacher.float()"),
        (X, X.to(torch.complex64), TypeError, "pass torch.view_as_real(teacher).flatten(1), which has the same distan"),
        (X.to_sparse(), X, TypeError, "got torch.sparse_coo; pass student.to_dense()"),
        (X, X.to_mkldnn(), TypeError, "got torch._mkldnn; pass teacher.to_dense()"),
        (X[0], X, ValueError, "expected student to have shape (N, D), got (2,)"),
        (X, X.view(2, 2, 2), ValueError, "expected teacher to have shape (N, D), got (2, 2, 2)"),
        (X, X[:3], ValueError, "expected one row per example in student and teacher, got 4 and 3 rows"),
        (X, X.to("meta"), ValueError, "expected student and teacher on one device, got cpu and meta"),
    ],
)  # fmt: skip
def test_invalid_batches(student, teacher, error, message):
    for loss in LOSSES:
        with pytest.raises(error) as caught:
            loss(student, teacher)
        assert str(caught.value).startswith(f"{loss.__name__}: expected ")
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch, of its prototypes
@pytest.mark.parametrize("kind", ["nested", "jagged", "quantized", "MaskedTensor", "DTensor"])
def test_unsupported_kinds_of_tensors(kind, tmp_path):
    if kind == "quantized":
        tensor, message = torch.quantize_per_tensor(X, 0.1, 0, torch.qint8), "got torch.qint8; pass teacher.dequantize"
    elif kind == "MaskedTensor":
        tensor, message = torch.masked.masked_tensor(X, X == 0), "got MaskedTensor; pass teacher.get_data()"
    elif kind == "DTensor":
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        tensor = torch.distributed.tensor.distribute_tensor(X, mesh, [torch.distributed.tensor.Shard(0)])
        message = "got DTensor; pass teacher.full_tensor()"
    else:
        layout = torch.jagged if kind == "jagged" else torch.strided
        tensor, message = torch.nested.nested_tensor([X[0], X[1]], layout=layout), "got a nested tensor; pass one"
    try:
        with pytest.raises(TypeError, match=re.escape(message)):
            rkd_da_loss(X, tensor)
    finally:
        if kind == "DTensor":
            torch.distributed.destroy_process_group()


def test_subclasses_of_tensor():
    """A parameter and a subclass, with the gradient of the original tensor."""
    student, teacher = batch()
    expected = value_and_gradient(rkd_da_loss, student, teacher)
    parameter = torch.nn.Parameter(student.detach())
    torch.testing.assert_close(value_and_gradient(rkd_da_loss, parameter, teacher), expected)
    rkd_da_loss(student.as_subclass(Rows), teacher.as_subclass(Rows)).backward()
    torch.testing.assert_close(student.grad, expected[1])


class Rows(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        *(
            ({option: value}, TypeError, f"expected {option} to be a number, got {value!r}")
            for option in ("distance_weight", "angle_weight", "huber_delta", "anchors")
            for value in NO_NUMBERS
            if (option, value) != ("anchors", None)
        ),
        *(
            ({option: value}, ValueError, f"expected {option} to be a finite number, got {value!r}")
            for option in ("distance_weight", "angle_weight")
            for value in (math.nan, -math.inf, 10**400)
        ),
        *(
            ({"huber_delta": value}, ValueError, f"expected huber_delta to be positive and finite, got {value!r}")
            for value in (0, -1.0, math.nan, math.inf, 10**400)
        ),
        *(
            ({"anchors": value}, ValueError, "expected anchors to be a number of rows, an integer of at least 1, or ")
            for value in (0, -1, 0.0, 1.5, math.nan)
        ),
        ({"reduction": "none"}, ValueError, "expected reduction to be one of ('mean', 'tuple_mean', 'sum', 'anchor')"),
        ({"impl": "fast"}, ValueError, "expected impl to be one of ('auto', 'reference', 'chunked', 'fused'), got 'f"),
        ({"gather": "all"}, TypeError, "expected gather to be True, False or a process group, got 'all'"),
        ({"gather": None}, TypeError, "expected gather to be True, False or a process group, got None"),
    ],
)  # fmt: skip
def test_invalid_options(options, error, message):
    """In a call of the function, and in the constructor of the module."""
    for name, call in (("rkd_da_loss", lambda **o: rkd_da_loss(X, X, **o)), ("RKDDALoss", RKDDALoss)):
        with pytest.raises(error) as caught:
            call(**options)
        assert str(caught.value).startswith(f"{name}: {message}")


def test_every_option_is_checked_everywhere():
    for make in (*LOSSES, RKDDistanceLoss, RKDAngleLoss, RKDDALoss):
        names = set(inspect.signature(make).parameters) - {"student", "teacher"}
        for option in names:
            with pytest.raises((TypeError, ValueError), match=rf"{make.__name__}: expected {option} to be "):
                make(*([X, X] if make in LOSSES else []), **{option: object()})


def test_a_string_that_yaml_does_not_read_as_a_number():
    with pytest.raises(TypeError, match=r"got '1e-4'; a number in YAML has a point, as in 1.0e-4$"):
        RKDDALoss(distance_weight="1e-4")


def test_numbers_of_other_libraries():
    student, teacher = batch()
    narrow = rkd_da_loss(student, teacher, huber_delta=np.float32(0.5), angle_weight=np.int64(2), anchors=np.int64(7))
    torch.testing.assert_close(narrow, rkd_da_loss(student, teacher, huber_delta=0.5))


FIRST = torch.tensor([0])


@pytest.mark.parametrize("number", [2, 3], ids=["pairs", "triplets"])
@pytest.mark.parametrize(
    ("last", "error", "message"),
    [
        (torch.tensor([4]), ValueError, "to name rows from 0 to 3, got 4"),
        (torch.tensor([-1]), ValueError, "to name rows from 0 to 3, got -1"),
        (torch.tensor([0, 1]), ValueError, "index vectors of one length, got shapes [(1,), "),
        (torch.tensor(0), ValueError, "index vectors of one length, got shapes [(1,), "),
        (torch.tensor([True]), TypeError, "to be int64 or int32, got torch.bool"),
        (torch.tensor([0.0]), TypeError, "to be int64 or int32, got torch.float32"),
        (torch.tensor([0], device="meta"), ValueError, "on the student's device cpu, got meta"),
        ([0], TypeError, "index vectors, got ['Tensor', "),
    ],
)  # fmt: skip
def test_invalid_indices(number, last, error, message):
    loss, option = {2: (rkd_distance_loss, "pairs"), 3: (rkd_angle_loss, "triplets")}[number]
    for tuples in ((*[FIRST] * (number - 1), last), (last, *[FIRST] * (number - 1))):
        with pytest.raises(error) as caught:
            loss(X, X, **{option: tuples})
        assert str(caught.value).startswith(f"{loss.__name__}: expected {option} ")
    for impl in KERNELS:
        with pytest.raises(error) as caught:
            rkd_da_loss(X, X, impl=impl, **{option: (*[FIRST] * (number - 1), last)})
        assert message in str(caught.value)
    for tuples in (FIRST, torch.zeros(number, 1), (FIRST,), [FIRST] * (number + 1)):
        with pytest.raises((TypeError, ValueError), match=f"expected {option} to be .*{number} index vectors"):
            loss(X, X, **{option: tuples})


def test_indices_in_int32():
    student, teacher = batch()
    options = mined(rkd_da_loss)
    narrow = {name: [index.int() for index in tuples] for name, tuples in options.items()}
    assert rkd_da_loss(student, teacher, **narrow) == rkd_da_loss(student, teacher, **options)


def test_tuples_together_with_anchors_or_gather():
    pair, triplet = (FIRST, FIRST), (FIRST, FIRST, FIRST)
    with pytest.raises(ValueError, match="expected triplets or anchors, got both; triplets name their own vertices"):
        rkd_angle_loss(X, X, triplets=triplet, anchors=2)
    for loss, tuples in ((rkd_angle_loss, {"triplets": triplet}), (rkd_distance_loss, {"pairs": pair})):
        with pytest.raises(ValueError, match="expected gather=False with pairs or triplets, which name rows of this"):
            loss(X, X, gather=True, **tuples)


@pytest.mark.parametrize("far", [0, 3])
def test_distances_that_count_as_zero_are_warned_of(far):
    rows = torch.randn(6, 3, dtype=torch.float64)
    rows[far] = 1e300
    match = "rkd_angle_loss: expected teacher rows whose distances differ by less than a factor of 2.500, got others"
    with pytest.warns(UserWarning, match=match):
        rkd_angle_loss(torch.randn(6, 3, dtype=torch.float64), rows)
    rows[far] = 1e100  # no warning, which would be an error
    assert rkd_angle_loss(rows, torch.randn(6, 3, dtype=torch.float64)).isfinite()
