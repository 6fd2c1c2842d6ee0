"""The public functions: what they return, refuse and are invariant to, whichever kernel runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from rkd_plugin.functional import rkd_angle_loss, rkd_da_loss, rkd_distance_loss
from rkd_plugin.kernels import chunked
from rkd_plugin.kernels.choose import _KERNELS

GOLDEN = json.loads((Path(__file__).parent / "golden" / "rkd.json").read_text())
LOSSES = [rkd_distance_loss, rkd_angle_loss, rkd_da_loss]
ORDER = {rkd_distance_loss: 2, rkd_angle_loss: 3}
REDUCTIONS = ["mean", "tuple_mean", "sum", "anchor"]
IMPLS = ["auto", *sorted(_KERNELS)]  # fused has tests of its own

every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
every_term = pytest.mark.parametrize("loss", list(ORDER), ids=lambda f: f.__name__)
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
every_impl = pytest.mark.parametrize("impl", IMPLS)
every_kernel = pytest.mark.parametrize("impl", sorted(_KERNELS))


def batch(rows=7, student_width=3, teacher_width=5, dtype=torch.float64, device="cpu"):
    """The student learns; drawn on the CPU, so that the numbers do not depend on the device."""
    student, teacher = (torch.randn(rows, width, dtype=dtype) for width in (student_width, teacher_width))
    return student.to(device).requires_grad_(), teacher.to(device)


def mined(loss, rows=7):
    """Index tuples of a miner, one of them twice and one that names a row twice, as keyword arguments."""
    pairs = (torch.tensor([0, 2, 2, 5, 0, 3]), torch.tensor([1, 4, 0, 6, 1, 3]) % rows)
    triplets = (torch.tensor([0, 2, 2, 5, 0, 3]), torch.tensor([1, 4, 0, 6, 1, 3]), torch.tensor([2, 1, 5, 3, 2, 1]))
    return {rkd_distance_loss: {"pairs": pairs}, rkd_angle_loss: {"triplets": triplets}}.get(
        loss, {"pairs": pairs, "triplets": triplets}
    )


def value_and_gradient(loss, student, teacher, **options):
    student = student.detach().requires_grad_()
    value = loss(student, teacher, **options)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    return value.detach(), gradient


@every_loss
@every_impl
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


X = torch.zeros(4, 2)


@every_loss
@pytest.mark.parametrize(
    ("student", "teacher", "options", "error", "message"),
    [
        ([[0.0]], X, {}, TypeError, "student must be a tensor, got list"),
        (X, None, {}, TypeError, "teacher must be a tensor, got NoneType"),
        (X.long(), X, {}, TypeError, "student must be floating point, got torch.int64"),
        (X, X.to(torch.complex64), {}, TypeError, "teacher must be floating point, got torch.complex64"),
        (X[0], X, {}, ValueError, "student must have shape (N, D), got (2,)"),
        (X, X.view(2, 2, 2), {}, ValueError, "teacher must have shape (N, D), got (2, 2, 2)"),
        (X, X[:3], {}, ValueError, "student and teacher must have one row per example, got 4 and 3 rows"),
        (X, X.to("meta"), {}, ValueError, "student and teacher must be on one device, got cpu and meta"),
        (
            X, X, {"reduction": "none"}, ValueError,
            "reduction must be one of ('mean', 'tuple_mean', 'sum', 'anchor'), got 'none'",
        ),
        (
            X, X, {"impl": "fast"}, ValueError,
            "impl must be one of ('auto', 'reference', 'chunked', 'fused'), got 'fast'",
        ),
        (X, X, {"huber_delta": 0}, ValueError, "huber_delta must be positive, got 0"),
        (X, X, {"huber_delta": math.nan}, ValueError, "huber_delta must be positive, got nan"),
    ],
)  # fmt: skip
def test_exception(loss, student, teacher, options, error, message):
    with pytest.raises(error) as caught:
        loss(student, teacher, **options)
    assert str(caught.value) == f"{loss.__name__}: {message}"


@every_loss
@every_impl
@every_reduction
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_cardinality(loss, impl, reduction, rows):
    student, teacher = batch(rows)
    assert loss(student, teacher, reduction=reduction, impl=impl).shape == ((rows,) if reduction == "anchor" else ())


@every_term
@every_impl
@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"N{len(c['student'])}")
def test_golden(loss, impl, case):
    student, teacher = (torch.tensor(case[side], dtype=torch.float64) for side in ("student", "teacher"))
    golden = case["distance" if loss is rkd_distance_loss else "angle"]
    # Two float64 evaluations of one formula, of order 1.
    assert float(loss(student, teacher, impl=impl)) == pytest.approx(golden, rel=1e-11, abs=1e-13)


@every_loss
@pytest.mark.parametrize("rows", [4, 17, 64])
def test_torchdistill(loss, rows):
    """torchdistill's own loss, where it is right: float64, distinct rows, the mean over all entries."""
    import torchvision  # noqa: F401  # before torchdistill, whose registries look for it in sys.modules
    from torchdistill.losses.mid_level import RKDLoss

    student, teacher = batch(rows)
    factors = {rkd_distance_loss: (1.0, 0.0), rkd_angle_loss: (0.0, 1.0), rkd_da_loss: (1.0, 2.0)}[loss]
    host = RKDLoss("s", "t", *factors, reduction="mean")
    theirs = host({"s": {"output": student}}, {"t": {"output": teacher}})
    (their_gradient,) = torch.autograd.grad(theirs, student)
    ours, our_gradient = value_and_gradient(loss, student, teacher)
    # Its distances come from a Gram matrix, which loses some digits of float64 and none of the first ten.
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=0, atol=1e-10 * float(their_gradient.abs().max()))


@every_kernel
def test_duplicates_enter_the_mean_distance(impl):
    """Worked by hand: the student's distances 0, 1, 1 have mean 2/3; over the positive ones it would be 1."""
    student = torch.tensor([[0.0], [0.0], [1.0]])
    teacher = torch.tensor([[0.0], [1.0], [2.0]])
    # Normalised: 0, 3/2, 3/2 against 3/4, 3/2, 3/4; two pairs that are 3/4 apart, each of them twice, over 9.
    assert float(rkd_distance_loss(student, teacher, impl=impl)) == pytest.approx(4 * 0.75**2 / 2 / 9, rel=1e-6)


def rotation(width):
    q, _ = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))
    return q


@every_loss
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
    for new, factor, wanted in (
        (side + shift, 1, gradient),
        (side * scale, scale if on_student else 1, gradient),
        (turned, 1, None),
    ):
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


@every_loss
@every_kernel
@every_reduction
@pytest.mark.parametrize("tuples", ["all", "mined"])
@pytest.mark.parametrize("huber_delta", [1.0, 0.1])
def test_gradcheck(loss, impl, reduction, tuples, huber_delta):
    student, teacher = batch(dtype=torch.float64)
    options = {} if tuples == "all" else mined(loss)
    assert gradcheck(
        lambda x: loss(x, teacher, reduction=reduction, impl=impl, huber_delta=huber_delta, **options), (student,)
    )


@every_kernel
@every_loss
def test_gradient_flows_through_the_mean_distance(loss, impl):
    """A loss that scaling does not change has a gradient at right angles to its input (Euler's theorem)."""
    student, teacher = batch()
    _, gradient = value_and_gradient(loss, student, teacher, impl=impl)
    products = gradient * student.detach()
    # float64 rounds each of them by 1e-16.
    assert abs(products.sum()) < 1e-12 * products.abs().sum()


@every_term
@every_impl
@pytest.mark.parametrize("rows", [3, 7])
def test_reductions(loss, impl, rows):
    student, teacher = batch(rows)
    mean, tuple_mean, total, anchor = (loss(student, teacher, reduction=r, impl=impl) for r in REDUCTIONS)
    entries, tuples = rows ** ORDER[loss], math.perm(rows, ORDER[loss])
    torch.testing.assert_close(anchor.mean(), mean)
    torch.testing.assert_close(total, mean * entries)
    torch.testing.assert_close(tuple_mean, total / tuples)


@every_term
@every_impl
def test_all_tuples_as_indices(loss, impl):
    """Naming every tuple of distinct rows is the same as naming none; ``mined`` means are over what is named."""
    student, teacher = batch()
    tuples = torch.cartesian_prod(*[torch.arange(len(student))] * ORDER[loss])
    distinct = tuples[[len(set(t.tolist())) == ORDER[loss] for t in tuples]]
    key = "pairs" if ORDER[loss] == 2 else "triplets"
    named = {r: loss(student, teacher, reduction=r, impl=impl, **{key: tuple(distinct.T)}) for r in REDUCTIONS}
    torch.testing.assert_close(named["sum"], loss(student, teacher, reduction="sum", impl=impl))
    torch.testing.assert_close(named["tuple_mean"], loss(student, teacher, reduction="tuple_mean", impl=impl))
    torch.testing.assert_close(named["mean"], named["tuple_mean"])
    torch.testing.assert_close(named["anchor"].mean(), named["mean"])


@every_loss
@every_reduction
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
    """Even where one side's arm has no length, so that its formula says 0 and the other side's 1."""
    student, teacher = batch()
    student = student.detach().index_copy(0, torch.tensor([1]), student.detach()[:1])
    twice = torch.tensor([[0, 1, 1], [0, 0, 1], [3, 3, 3]])
    assert rkd_angle_loss(student, teacher, impl=impl, reduction="sum", triplets=tuple(twice.T)) == 0
    assert rkd_distance_loss(student, teacher, impl=impl, reduction="sum", pairs=tuple(twice[1:, :2].T)) == 0


@every_loss
@every_kernel
def test_no_tuples(loss, impl):
    student, teacher = batch()
    empty = torch.empty(0, dtype=torch.long)
    options = {key: tuple(empty for _ in index) for key, index in mined(loss).items()}
    value, gradient = value_and_gradient(loss, student, teacher, impl=impl, **options)
    assert value == 0
    assert not gradient.any()


@every_impl
@every_reduction
def test_da_is_the_weighted_sum(impl, reduction):
    student, teacher = batch()
    options = {"impl": impl, "reduction": reduction}
    both = value_and_gradient(rkd_da_loss, student, teacher, distance_weight=25, angle_weight=50, **options)
    terms = [value_and_gradient(loss, student, teacher, **options) for loss in ORDER]
    torch.testing.assert_close(both, tuple(25 * d + 50 * a for d, a in zip(*terms, strict=True)))


@pytest.mark.parametrize(("skipped", "weights"), [("distance", (0, 2)), ("angle", (3, 0))])
def test_weight_of_zero_skips_the_term(monkeypatch, skipped, weights):
    student, teacher = batch()
    kept, weight = (rkd_angle_loss, 2) if skipped == "distance" else (rkd_distance_loss, 3)
    expected = weight * kept(student, teacher)

    def fail(*_):
        raise AssertionError(f"{skipped} is computed although its weight is 0")

    monkeypatch.setattr(chunked, skipped, fail)
    options = {"distance_weight": weights[0], "angle_weight": weights[1]}
    torch.testing.assert_close(rkd_da_loss(student, teacher, **options), expected)
    with pytest.raises(AssertionError, match="is computed"):
        rkd_da_loss(student, teacher)


@every_kernel
def test_no_term_at_all(impl):
    student, teacher = batch()
    value, gradient = value_and_gradient(rkd_da_loss, student, teacher, distance_weight=0, angle_weight=0, impl=impl)
    assert value == 0
    assert not gradient.any()


@every_loss
@every_kernel
def test_teacher_gets_no_gradient(loss, impl):
    student, teacher = batch()
    teacher.requires_grad_()
    loss(student, teacher, impl=impl).backward()
    assert teacher.grad is None
    assert not loss(student.detach(), teacher, impl=impl).requires_grad


@every_loss
@every_kernel
def test_no_grad(loss, impl):
    student, teacher = batch()
    expected = loss(student, teacher, impl=impl)
    with torch.no_grad():
        value = loss(student, teacher, impl=impl)
    assert not value.requires_grad
    torch.testing.assert_close(value, expected.detach(), rtol=0, atol=0)


@every_loss
@every_kernel
def test_gradient_accumulation(loss, impl):
    (student, teacher), other = batch(), batch(4)[1]
    gradients = [
        value_and_gradient(loss, student[rows], t, impl=impl)[1]
        for rows, t in ((slice(None), teacher), (slice(4), other))
    ]
    for rows, t in ((slice(None), teacher), (slice(4), other)):
        (loss(student[rows], t, impl=impl) / 2).backward()
    expected = gradients[0] / 2
    expected[:4] += gradients[1] / 2
    torch.testing.assert_close(student.grad, expected)


@every_loss
@pytest.mark.parametrize(
    ("impl", "backward_too"),
    # PyTorch wants backward outside of autocast; the readable kernel keeps to that.
    [("reference", False), ("chunked", False), ("chunked", True)],
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


@every_loss
@every_kernel
@pytest.mark.parametrize("tuples", ["all", "mined"])
@pytest.mark.parametrize("reduction", ["mean", "anchor"])
def test_dynamo(loss, impl, tuples, reduction):
    options = {"impl": impl, "reduction": reduction} | ({} if tuples == "all" else mined(loss))
    student, teacher = batch(dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours, eager = (value_and_gradient(f, student, teacher, **options) for f in (compiled, loss))
    torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize(("backend", "sizes"), [("aot_eager", (7, 12)), ("inductor", (7,))])
def test_compile_backends(backend, sizes, device):
    """With the batch size left open, and once through the backend that users get."""
    torch._dynamo.reset()
    compiled = torch.compile(rkd_da_loss, fullgraph=True, backend=backend, dynamic=len(sizes) > 1)
    for rows in sizes:
        student, teacher = batch(rows, dtype=torch.float32, device=device)
        ours, eager = (value_and_gradient(f, student, teacher) for f in (compiled, rkd_da_loss))
        torch.testing.assert_close(ours, eager)


@every_kernel
def test_in_ddp(impl, tmp_path):
    """Inside DistributedDataParallel the gradient is the plain one; what crosses ranks is another matter."""
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
