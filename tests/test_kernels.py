"""Every kernel against `reference` in float64: the numerical contract, on batches that are known to be hard.

The budget of an error is what the published formula, written plainly, makes in the same dtype, plus the small constant
of conftest.py.
"""

from __future__ import annotations

import pytest
import torch
from torch._inductor.utils import fresh_cache
from torch.nn import functional as F

from rkd_plugin.bench import Case, batch, peak_growth
from rkd_plugin.kernels.choose import _KERNELS
from rkd_plugin.functional import rkd_angle_loss, rkd_da_loss, rkd_distance_loss
from rkd_plugin.kernels import chunked, compiled

SIZES = [0, 1, 2, 3, 17, 64, 129]
LOSSES = [rkd_distance_loss, rkd_angle_loss]

every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
every_kernel = pytest.mark.parametrize("impl", [*sorted(_KERNELS), "compiled"], indirect=True)
every_size = pytest.mark.parametrize("rows", SIZES)


@pytest.fixture
def impl(request, monkeypatch):
    """A kernel's name; "compiled" is what `chunked` does with large batches, here with all of them."""
    if request.param != "compiled":
        return request.param
    monkeypatch.setattr(compiled, "ROWS", 1)
    return "chunked"


def evaluate(loss, student, teacher, **options):
    """Value per anchor and gradient of the mean."""
    student = student.detach().requires_grad_()
    value = loss(student, teacher, reduction="anchor", **options)
    if not len(value):
        return value.detach(), torch.zeros_like(student)
    value.mean().backward()
    return value.detach(), student.grad


def plain(loss):
    """The published formula as one would type it: no scaling, no care; right only where all rows differ."""

    def psi(x):
        if loss is rkd_distance_loss:
            d = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
            return d / d[d > 0].mean()
        units = F.normalize(x.unsqueeze(0) - x.unsqueeze(1), dim=2)
        return units @ units.mT

    def anchors(student, teacher, reduction):
        losses = F.smooth_l1_loss(psi(student), psi(teacher), reduction="none")
        return losses.flatten(1).mean(1)

    return anchors


def gradient_scale(student, value, gradient):
    """The largest entry, or loss / length, as the units ask for, where symmetry makes that 0: angles on a line."""
    if not len(student):
        return 0.0
    length = (student - student.mean(0)).square().sum(1).mean().sqrt()
    by_units = (value.mean() / length / len(student)).nan_to_num(0, 0, 0)
    return float(torch.maximum(gradient.abs().max(), by_units))


def assert_within_budget(loss, impl, student, teacher, dtype, tolerance, device):
    student, teacher = student.to(device, dtype), teacher.to(device, dtype)
    truth = evaluate(loss, student.double(), teacher.double(), impl="reference")
    value, gradient = evaluate(loss, student, teacher, impl=impl)
    assert value.dtype == torch.promote_types(dtype, torch.float32)
    assert gradient.dtype == dtype
    budget = [0.0, 0.0]
    if len(student) > 1 and all(len(x.unique(dim=0)) == len(x) for x in (student, teacher)):
        naive = evaluate(plain(loss), student.to(value.dtype), teacher.to(value.dtype))
        budget = [float((x - y).abs().max()) for x, y in zip(naive, truth, strict=True)]
    # A value has been rounded to float32 at most, whatever the input.
    value_limit = budget[0] + min(tolerance, 1e-6)
    gradient_limit = budget[1] + tolerance * gradient_scale(student.double(), *truth)
    assert ((value - truth[0]).abs() <= value_limit).all()
    assert ((gradient - truth[1]).abs() <= gradient_limit).all()


def clusters(spread, rows=80, groups=16, width=8):
    """Student rows in tight groups, a random teacher."""
    centres = torch.randn(groups, width, dtype=torch.float64).repeat_interleave(rows // groups, 0)
    return centres + spread * torch.randn_like(centres), torch.randn(rows, 12, dtype=torch.float64)


def distinct(rows=20):
    return torch.randn(rows, 6, dtype=torch.float64), torch.randn(rows, 9, dtype=torch.float64)


def duplicated(which, rows=20):
    """Row 1 a copy of row 0 in the student, the teacher or both; and the batch without the copy."""
    student, teacher = distinct(rows)
    without = student.clone(), teacher.clone()
    for side in (student, teacher):
        if which in ("both", "student" if side is student else "teacher"):
            side[1] = side[0]
    return (student, teacher), without


HARD = {
    **{f"clusters-{spread:g}": lambda s=spread: clusters(s) for spread in (1, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)},
    "offset": lambda: tuple(x + 1000 for x in distinct()),
    "student-duplicate": lambda: duplicated("student")[0],
    "teacher-duplicate": lambda: duplicated("teacher")[0],
    "both-duplicate": lambda: duplicated("both")[0],
    "same-student": lambda: (torch.ones(20, 6, dtype=torch.float64) / 3, distinct()[1]),
    "same-teacher": lambda: (distinct()[0], torch.ones(20, 6, dtype=torch.float64) / 3),
    "zero-student": lambda: (torch.zeros(20, 6, dtype=torch.float64), distinct()[1]),
    "one-column": lambda: (torch.randn(20, 1, dtype=torch.float64), distinct()[1]),
    "few-rows-apart": lambda: (torch.eye(20, dtype=torch.float64)[:, :1].expand(20, 6) * 1.0, distinct()[1]),
}


@every_kernel
@every_loss
@every_size
def test_error_budget(loss, impl, rows, dtype, tolerance, device):
    student, teacher = torch.randn(rows, 5), torch.randn(rows, 8)
    assert_within_budget(loss, impl, student, teacher, dtype, tolerance, device)


@every_kernel
@every_loss
@pytest.mark.parametrize("case", HARD)
def test_error_budget_of_hard_batches(loss, impl, case, dtype, tolerance, device):
    assert_within_budget(loss, impl, *HARD[case](), dtype, tolerance, device)


@every_kernel
@every_loss
def test_half_precision_is_computed_in_float32(loss, impl, dtype, device):
    """The value has the very bits of the float32 computation on the same numbers."""
    student, teacher = (x.to(device, dtype) for x in distinct())
    wide = torch.promote_types(dtype, torch.float32)
    value, gradient = evaluate(loss, student, teacher, impl=impl)
    expected, wide_gradient = evaluate(loss, student.to(wide), teacher.to(wide), impl=impl)
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    # The gradient is rounded once; through float32, as here, it may be twice.
    torch.testing.assert_close(gradient, wide_gradient.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0)


@every_kernel
@every_loss
@pytest.mark.parametrize(
    "magnitude", ["huge", "largest", "tiny", "subnormal", "tiny-beside-large", "zero-beside-large"]
)
def test_extremes_stay_finite(loss, impl, magnitude, dtype, device):
    info = torch.finfo(dtype)
    student, teacher = (x.clamp(-2.9, 2.9).to(device) for x in distinct())
    expected = None
    if magnitude.endswith("beside-large"):
        student[:5] *= 1e-30 if magnitude.startswith("tiny") else 0
    else:
        expected = evaluate(loss, student, teacher, impl="reference")[0].mean()
        student *= {"huge": info.max / 100, "largest": info.max / 3, "tiny": 1e-6, "subnormal": info.tiny / 4}[
            magnitude
        ]
    student, teacher = student.to(dtype), teacher.to(dtype)
    value, gradient = evaluate(loss, student, teacher, impl=impl)
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    assert gradient.any() or magnitude in ("huge", "largest")  # where it is smaller than the dtype holds
    if expected is not None:
        # A scale changes nothing but how many of the student's bits are left: 3 or 4 near 1e-6 in float16.
        assert abs(value.mean() - expected) < 0.05 * expected


@every_kernel
def test_float16_gradient_saturates(impl, device):
    """A gradient beyond 65504 becomes 65504, since inf would stop a training run."""
    student, teacher = (x.to(device) for x in distinct())
    student = (student * 1e-6).half()
    value = rkd_da_loss(student.requires_grad_(), teacher.half(), reduction="sum", impl=impl)
    value.backward()
    assert student.grad.isfinite().all()
    assert student.grad.abs().max() == 65504


@every_kernel
@every_loss
@pytest.mark.parametrize("which", ["student", "teacher", "both"])
def test_duplicates_keep_the_gradient_small(loss, impl, which, dtype, device):
    with_copy, without = duplicated(which)
    value, gradient = evaluate(loss, *(x.to(device, dtype) for x in with_copy), impl=impl)
    _, usual = evaluate(loss, *(x.to(device, dtype) for x in without), impl=impl)
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    assert gradient.any()
    assert gradient.abs().max() <= 10 * usual.abs().max()


@every_kernel
@every_loss
@pytest.mark.parametrize("constant", [0, 1 / 3, 1000])
@pytest.mark.parametrize("rows", [2, 3, 17])
def test_collapsed_batch(loss, impl, constant, rows, dtype, device):
    """All student rows equal: no direction to leave in, so the loss is finite and the gradient 0."""
    student = torch.full((rows, 4), constant, dtype=dtype, device=device)
    value, gradient = evaluate(loss, student, torch.randn(rows, 3).to(device, dtype), impl=impl)
    assert value.isfinite().all()
    assert value.any() == (loss is rkd_distance_loss or rows > 2)
    assert not gradient.any()


@every_kernel
@pytest.mark.parametrize("loss", [*LOSSES, rkd_da_loss], ids=lambda f: f.__name__)
@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("reduction", ["mean", "tuple_mean", "sum", "anchor"])
def test_too_few_rows(loss, impl, rows, reduction, dtype, device):
    student = torch.randn(rows, 4).to(device, dtype).requires_grad_()
    value = loss(student, torch.randn(rows, 3).to(device, dtype), reduction=reduction, impl=impl)
    assert not value.any()
    value.sum().backward()
    assert student.grad.shape == (rows, 4)
    assert not student.grad.any()


@every_kernel
def test_two_rows_span_no_angle(impl, dtype, device):
    student, teacher = (x.to(device, dtype) for x in distinct(2))
    value, gradient = evaluate(rkd_angle_loss, student, teacher, impl=impl)
    assert not value.any()
    assert not gradient.any()


@every_kernel
@pytest.mark.parametrize("loss", [*LOSSES, rkd_da_loss], ids=lambda f: f.__name__)
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rows", [1, 2, 3, 17])
def test_not_a_number_is_passed_on(loss, impl, side, bad, rows, dtype, device):
    student, teacher = (x.to(device, dtype) for x in distinct(rows))
    (student if side == "student" else teacher)[-1, 0] = bad
    for reduction in ("mean", "sum"):
        assert loss(student, teacher, impl=impl, reduction=reduction).isnan()


@every_kernel
@every_loss
def test_memory_layout_does_not_matter(loss, impl, dtype, device):
    student, teacher = (x.to(device, dtype) for x in distinct())
    expected = evaluate(loss, student, teacher, impl=impl)
    for view in (lambda x: x.mT.contiguous().mT, lambda x: x.repeat_interleave(2, 1)[:, ::2]):
        views = [view(x) for x in (student, teacher)]
        assert not any(x.is_contiguous() for x in views)
        torch.testing.assert_close(evaluate(loss, *views, impl=impl), expected)


@every_kernel
@every_loss
def test_sides_of_different_dtypes(loss, impl, dtype, device):
    """Stored teacher vectors often are float64 or float16: the student's dtype decides."""
    student, teacher = distinct()
    expected = evaluate(loss, student.to(device, dtype), teacher.half().to(device, dtype), impl=impl)
    for other in (torch.float64, torch.float16):
        ours = evaluate(loss, student.to(device, dtype), teacher.half().to(device, other), impl=impl)
        assert [x.dtype for x in ours] == [x.dtype for x in expected]
        if dtype != torch.bfloat16:  # which cannot hold the teacher's numbers
            torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("rows", [chunked.STRIP - 1, chunked.STRIP, chunked.STRIP + 1, 2 * chunked.STRIP + 5])
@pytest.mark.parametrize("elements", [1, 200, 5000, 10**6])
def test_strips_and_chunks(monkeypatch, rows, elements):
    """Whole and broken strips, one vertex at a time, some at a time, all at once."""
    monkeypatch.setattr(chunked, "ELEMENTS", elements)
    student, teacher = distinct(rows)
    ours = evaluate(rkd_angle_loss, student, teacher, impl="chunked")
    torch.testing.assert_close(ours, evaluate(rkd_angle_loss, student, teacher, impl="reference"))


@every_kernel
@every_loss
def test_upstream_weights(loss, impl):
    """A weight per anchor: unequal ones, for which the gradient is recomputed, equal ones, and none."""
    student, teacher = distinct(40)
    for weights in (torch.rand(40).double() - 0.3, torch.full((40,), 2.5).double(), torch.zeros(40).double()):
        gradients = []
        for name in (impl, "reference"):
            leaf = student.clone().requires_grad_()
            (loss(leaf, teacher, reduction="anchor", impl=name) * weights).sum().backward()
            gradients.append(leaf.grad)
        torch.testing.assert_close(*gradients)
        assert gradients[0].any() == weights.any()


@every_kernel
@pytest.mark.parametrize("rows", [17, 129])
def test_deterministic(impl, rows, dtype):
    """Twice the same bits, on a CPU."""
    student, teacher = (x.to(dtype) for x in distinct(rows))
    once, again = (evaluate(rkd_da_loss, student, teacher, impl=impl) for _ in range(2))
    torch.testing.assert_close(once, again, rtol=0, atol=0)


def angles(rows=12):
    student, teacher = distinct(rows)
    return evaluate(rkd_angle_loss, student.float(), teacher.float(), impl="chunked")


@pytest.fixture
def vertices(monkeypatch):
    """The rows of each call of what is compiled, for batches of 12 rows or more."""
    seen, original = [], compiled._compiled
    monkeypatch.setattr(compiled, "ROWS", 12)
    monkeypatch.setattr(
        compiled, "_compiled", lambda n: lambda *args: (seen.append(len(args[0])), original(n)(*args))[1]
    )
    return seen


def test_large_batches_are_compiled_and_small_ones_are_not(vertices):
    angles(11)
    assert vertices == []
    angles(12)
    assert vertices == [12] * 12
    assert compiled.FAILURES == []
    with torch.no_grad():  # of the loss alone nothing is compiled
        rkd_angle_loss(*distinct(), impl="chunked")
    assert vertices == [12] * 12


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_large_batches_inside_a_compiled_step(vertices, backend):
    student, teacher = (x.float() for x in distinct(12))
    expected = evaluate(rkd_da_loss, student, teacher)
    vertices.clear()
    torch._dynamo.reset()
    step = torch.compile(rkd_da_loss, fullgraph=True, backend=backend)
    with fresh_cache():  # compiled from within the other compilation; what is on disk may come from elsewhere
        for _ in range(2):
            torch.testing.assert_close(evaluate(step, student, teacher), expected)
    assert vertices == [12] * 24
    assert compiled.FAILURES == []


def test_large_batches_under_autocast_and_without_gradients_of_others(vertices):
    """What the surroundings switch on or off changes neither the bits nor what is compiled."""
    student, teacher = (x.float() for x in distinct(12))
    expected = evaluate(rkd_da_loss, student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(evaluate(rkd_da_loss, student, teacher), expected, rtol=0, atol=0)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        torch.testing.assert_close(evaluate(rkd_da_loss, student, teacher), expected)
    finally:
        torch.set_num_threads(threads)
    assert compiled.FAILURES == []


@pytest.mark.parametrize("after", [0, 5])
def test_without_a_compiler_all_goes_on_in_silence(vertices, monkeypatch, recwarn, after):
    """Also where it fails in the middle of a batch: nothing of it stays in the sums."""
    batch = [x.float() for x in distinct(12)]
    with torch._dynamo.config.patch(disable=True):
        expected = evaluate(rkd_angle_loss, *batch, impl="chunked")
    original = compiled._compiled(torch.get_num_threads())
    calls = []

    def broken(*args):
        calls.append(None)
        if len(calls) > after:
            raise RuntimeError("no compiler")
        return original(*args)

    monkeypatch.setattr(compiled, "FAILURES", [])
    monkeypatch.setattr(compiled, "_compiled", lambda _: broken)
    for _ in range(2):
        torch.testing.assert_close(evaluate(rkd_angle_loss, *batch, impl="chunked"), expected, rtol=0, atol=0)
    assert len(calls) == after + 1  # it is tried once
    assert [str(error) for error in compiled.FAILURES] == ["no compiler"]
    assert not recwarn.list


def test_compiling_can_be_switched_off(vertices):
    with torch._dynamo.config.patch(disable=True):
        angles()
    assert vertices == []


def test_peak_memory():
    """1024 rows, teacher 512 wide, student 128, forward and backward; the N^3 form would take 17 GB."""
    assert peak_growth("chunked", Case(1024)) < 64e6  # 8 matrices of N^2 float64; measured: under 7
    # The meter sees the cubes where there are some: N^3 of float32 is 67 MB at N = 256, and the formula needs several.
    assert peak_growth("reference", Case(256)) > 200e6


def test_many_rows(device):
    """As many rows as above: some vertices of the chunked form against the plain formula, one vertex at a time."""
    student, teacher = batch(Case(1024, device=str(device)))
    value, gradient = evaluate(rkd_angle_loss, student, teacher, impl="chunked")
    for vertex in (0, 31, 32, 500, 1023):
        units = (F.normalize(x.double() - x[vertex], dim=1) for x in (student, teacher))
        expected = F.smooth_l1_loss(*(u @ u.mT for u in units), reduction="sum") / 1024**2
        torch.testing.assert_close(value[vertex].double(), expected, rtol=1e-6, atol=0)
    # Neither shifting nor scaling the student changes the loss, so that its gradient is at right angles to both.
    for products in (gradient, gradient * student):
        assert abs(products.double().sum()) < 1e-5 * products.double().abs().sum()


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_equal_relations_have_nothing_to_learn(impl):
    """Exactly 0, value and gradient: not a rounding's worth of noise for an optimizer to scale up."""
    teacher = torch.randn(40, 8)
    student = (4 * teacher).requires_grad_()
    loss = rkd_da_loss(student, teacher, impl=impl)
    loss.backward()
    assert loss == 0
    assert not student.grad.any()
