"""The numerical contract: every kernel compared with `reference` in float64, also on difficult batches.

The allowed error is the error of the published formula in the same dtype, without numerical care, plus the small
constant in conftest.py.
"""

from __future__ import annotations

import functools
import itertools
import sys

import oracle
import pytest
import torch
from conftest import TOLERANCE
from hypothesis import given, settings
from hypothesis import strategies as st
from relations import RELATIONS
from torch.autograd import functional as autograd_functional
from torch.autograd import gradgradcheck
from torch.nn import functional as F

from rkd_plugin.bench import Case, batch, peak_growth
from rkd_plugin.functional import rkd_angle_loss, rkd_da_loss, rkd_distance_loss
from rkd_plugin.kernels import functions, native, strips
from rkd_plugin.kernels.choose import _KERNELS

# Numbers of float64 at both ends of its range are among the cases.
pytestmark = pytest.mark.filterwarnings("ignore:.*distances differ by less than a factor:UserWarning")

SIZES = [0, 1, 2, 3, 17, 64, 129]
LOSSES = [rkd_distance_loss, rkd_angle_loss]
KERNELS = [*sorted(_KERNELS), "strips"]

every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
every_kernel = pytest.mark.parametrize("impl", KERNELS, indirect=True)
# `reference` of any relation is what the others are compared with.
CASES = [*itertools.product(LOSSES, KERNELS), *((loss, "chunked") for loss in RELATIONS)]
every_relation = pytest.mark.parametrize(
    ("loss", "impl"), CASES, ids=lambda x: getattr(x, "__name__", x), indirect=["impl"]
)


@pytest.fixture
def impl(request, monkeypatch):
    """The name of a kernel; "strips" is `chunked` without a C++ compiler."""
    if request.param != "strips":
        return request.param
    monkeypatch.setattr(native, "_library", lambda: None)
    return "chunked"


def evaluate(loss, student, teacher, **options):
    """Value per anchor and gradient of the mean."""
    student = student.detach().requires_grad_()
    value = loss(student, teacher, **{"reduction": "anchor", **options})
    if options.get("reduction", "anchor") == "anchor" and not len(value):
        return value.detach(), torch.zeros_like(student)
    value.mean().backward()
    return value.detach(), student.grad


def plain(loss):
    """The published formula without scaling or numerical care; right only if all rows differ."""

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
    """The largest entry, or loss / length, which has the same unit, if symmetry makes it 0: angles on a line."""
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
    if loss in LOSSES and len(student) > 1 and all(len(x.unique(dim=0)) == len(x) for x in (student, teacher)):
        naive = evaluate(plain(loss), student.to(value.dtype), teacher.to(value.dtype))
        budget = [float((x - y).abs().max()) for x, y in zip(naive, truth, strict=True)]
    # A value is rounded to float32 or better, for every input.
    value_limit = budget[0] + min(tolerance, 1e-6)
    gradient_limit = budget[1] + tolerance * gradient_scale(student.double(), *truth)
    info = torch.finfo(dtype)
    gradient_limit += info.tiny * info.eps  # the smallest number of the gradient's dtype
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


@pytest.mark.parametrize(
    ("loss", "impl", "rows"),
    [(*case, rows) for case in CASES for rows in SIZES if rows <= 17 or case[0] in LOSSES],
    ids=lambda x: getattr(x, "__name__", x),
    indirect=["impl"],
)
def test_error_budget(loss, impl, rows, dtype, tolerance, device):
    student, teacher = torch.randn(rows, 5), torch.randn(rows, 8)
    assert_within_budget(loss, impl, student, teacher, dtype, tolerance, device)


@every_kernel
@every_loss
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])  # narrower inputs are computed in float32, see below
@pytest.mark.parametrize("case", HARD)
def test_error_budget_of_hard_batches(loss, impl, case, wide, device):
    assert_within_budget(loss, impl, *HARD[case](), wide, TOLERANCE[wide], device)


def one_row(factor, which=0):
    def case():
        student, teacher = torch.randn(6, 3), torch.randn(6, 4)
        (student if which == 0 else teacher)[0] *= factor
        return student, teacher

    return case


def distances_of_all_sizes():
    """Rows with smaller and smaller distances, down to the limit of float32, and one row far away."""
    student = torch.zeros(6, 3)
    for row in range(5):
        student[row] = torch.randn(3) * 10.0 ** (-7 * row)
    student[5] = 1e10 * torch.randn(3)
    return student, torch.randn(6, 4)


def near_duplicates():
    student, teacher = torch.randn(6, 3).double(), torch.randn(6, 4)
    student[1] = student[0] + 1e-9 * torch.randn(3)
    student[2] = student[0] + 1e-12 * torch.randn(3)
    return student, teacher


MAGNITUDES = {
    "a-row-1e6-away": one_row(1e6),
    "a-row-1e11-away": one_row(1e11),
    "a-row-1e30-away": one_row(1e30),
    "a-teacher-row-1e11-away": one_row(1e11, 1),
    "distances-of-all-sizes": distances_of_all_sizes,
    "near-duplicates": near_duplicates,
    "an-offset-of-1e12": lambda: (torch.randn(6, 3).double() + 1e12, torch.randn(6, 4).double() - 1e12),
    "a-column-of-1e300": lambda: (F.pad(torch.randn(6, 2).double(), (1, 0), value=1e300), torch.randn(6, 4)),
    "huge": lambda: (1e37 * torch.randn(6, 3), 1e300 * torch.randn(6, 4).double()),
    "subnormal": lambda: (5e-324 * (100 * torch.randn(6, 3).double()).round(), torch.randn(6, 4)),
}


@functools.cache
def magnitude(case, loss):
    """A batch, and its exact value and gradient."""
    torch.manual_seed(0)
    student, teacher = MAGNITUDES[case]()
    psi = oracle.distances if loss is rkd_distance_loss else oracle.cosines
    return student, teacher, *oracle.value_and_gradient(psi, student, teacher)


def assert_right(loss, impl, student, teacher, value, gradient):
    ours = student.clone().requires_grad_()
    found = loss(ours, teacher, impl=impl)
    found.backward()
    found = found.detach()
    limit = 1e-9 if student.dtype == torch.float64 else 1e-6
    assert abs(float(found) - value) < limit
    largest = torch.finfo(student.dtype).max
    wanted = gradient.clamp(-largest, largest)
    assert float((ours.grad.double() - wanted).abs().max()) <= 3 * limit * float(wanted.abs().max())


@every_kernel
@every_loss
@pytest.mark.parametrize("case", MAGNITUDES)
def test_any_magnitude(loss, impl, case):
    assert_right(loss, impl, *magnitude(case, loss))


@every_loss
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    powers=st.lists(st.integers(-30, 30), min_size=4, max_size=4),
    offset=st.sampled_from([0, 1, 1e5, 1e13]),
    wide=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_magnitudes_of_rows(loss, seed, powers, offset, wide):
    torch.manual_seed(seed)
    student, teacher = torch.randn(4, 2).double(), torch.randn(4, 3).to(wide)
    student = (student * 10.0 ** torch.tensor(powers).double().unsqueeze(1) + offset).to(wide)
    if len(student.unique(dim=0)) < 4:  # equal rows have no derivative
        return
    psi = oracle.distances if loss is rkd_distance_loss else oracle.cosines
    right = oracle.value_and_gradient(psi, student, teacher)
    for impl in ("reference", "chunked"):
        assert_right(loss, impl, student, teacher, *right)


@every_kernel
@pytest.mark.parametrize("distance", [1e-103, 1e-149])
def test_the_gradient_between_rows_that_nearly_count_as_equal(impl, distance):
    """It grows with the inverse of the distance, up to the limit 2^-500 = 3e-151."""

    def at(distance):
        student[1, 0] = distance
        return distance * evaluate(rkd_angle_loss, student, teacher, impl=impl)[1]

    student, teacher = torch.randn(5, 3).double(), torch.randn(5, 4).double()
    student[:2] = 0
    near = at(1e-50)
    # Along the difference the angles do not change, up to the rounding of the terms that cancel.
    torch.testing.assert_close(at(distance), near, rtol=1e-10, atol=1e-12 * float(near.abs().max()))


@every_kernel
@pytest.mark.parametrize("which", [0, 1])
def test_index_tuples_of_rows_far_apart(impl, which):
    """All tuples as indices, which is the loss itself."""
    student, teacher = one_row(1e14, which)()
    every = tuple(torch.cartesian_prod(*[torch.arange(6)] * 3).T)
    pair = [
        evaluate(rkd_angle_loss, student, teacher, impl=kernel, **options)
        for kernel, options in ((impl, {"triplets": every}), ("reference", {}))
    ]
    for ours, truth in zip(*pair, strict=True):
        torch.testing.assert_close(ours, truth, rtol=0, atol=1e-6 * float(truth.abs().max()))


@every_kernel
@every_loss
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_thresholds_of_any_size(loss, impl, wide):
    student, teacher = (x.to(wide) for x in distinct(12))
    quadratic = evaluate(loss, student, teacher, impl=impl, huber_delta=1e3)
    torch.testing.assert_close(evaluate(loss, student, teacher, impl=impl, huber_delta=1e300), quadratic)
    # Where the Huber function is linear, the loss is proportional to it; float32 ends at 1e-45.
    small, smaller = (evaluate(loss, student, teacher, impl=impl, huber_delta=d)[0] for d in (1e-20, 1e-30))
    torch.testing.assert_close(small, 1e10 * smaller, rtol=1e-5, atol=0)
    assert small.all()
    assert not evaluate(loss, student.float(), teacher, impl=impl, huber_delta=1e-300)[0].any()


def through_a_network(loss, **options):
    """The loss as a function of a layer's weights, and such weights."""
    x, teacher = torch.randn(7, 4).double(), torch.randn(7, 5).double()
    return lambda weights: loss(torch.tanh(x @ weights), teacher, **options), torch.randn(4, 3).double()


@pytest.mark.parametrize("loss", [*LOSSES, *RELATIONS], ids=lambda f: f.__name__)
@pytest.mark.parametrize("huber_delta", [1.0, 0.1])
def test_second_derivatives_of_the_reference(loss, huber_delta):
    function, weights = through_a_network(loss, impl="reference", huber_delta=huber_delta)
    assert gradgradcheck(function, weights.requires_grad_())
    weights = weights.detach()
    hessian = torch.func.hessian(function)(weights)
    assert hessian.any()
    torch.testing.assert_close(autograd_functional.hessian(function, weights), hessian)
    for outer, inner in ((torch.func.jacfwd, torch.func.jacfwd), (torch.func.jacrev, torch.func.jacfwd)):
        torch.testing.assert_close(outer(inner(function))(weights), hessian)


@pytest.mark.parametrize("loss", [*LOSSES, *RELATIONS], ids=lambda f: f.__name__)
def test_transforms_of_the_reference(loss):
    function, weights = through_a_network(loss, impl="reference")
    leaf = weights.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(function)(weights), gradient)
    torch.testing.assert_close(torch.func.jacrev(function)(weights), gradient)
    tangent = torch.randn_like(weights)
    torch.testing.assert_close(torch.func.jvp(function, (weights,), (tangent,))[1], (gradient * tangent).sum())
    with torch.autograd.forward_ad.dual_level():
        dual = function(torch.autograd.forward_ad.make_dual(weights, tangent))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, (gradient * tangent).sum())
    several = torch.stack([weights, tangent])
    torch.testing.assert_close(torch.func.vmap(function)(several), torch.stack([function(w) for w in several]))
    per_sample = torch.func.vmap(torch.func.grad(function))(several)
    torch.testing.assert_close(per_sample[0], gradient)


def twice(function, x):
    """A Hessian-vector product by two calls of autograd."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(x), x, create_graph=True)
    return torch.autograd.grad(gradient, x, torch.ones_like(x))


def forward_mode(function, x):
    with torch.autograd.forward_ad.dual_level():
        return function(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


DERIVATIVES = {
    "hessian-vector product": twice,
    "autograd.functional.hessian": autograd_functional.hessian,
    "autograd.functional.hvp": lambda f, x: autograd_functional.hvp(f, x, x),
    "autograd.functional.jvp": lambda f, x: autograd_functional.jvp(lambda y: twice(f, y)[0], x, x),
    "forward_ad": forward_mode,
    "func.grad": lambda f, x: torch.func.grad(f)(x),
    "func.jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "func.vmap": lambda f, x: torch.func.vmap(f)(x.unsqueeze(0)),
    "func.hessian": lambda f, x: torch.func.hessian(f)(x),
}


def assert_raises_for(derivative, impl, loss=rkd_da_loss, name="rkd_da_loss"):
    function, weights = through_a_network(loss, impl=impl)
    with pytest.raises(RuntimeError) as caught:
        DERIVATIVES[derivative](function, weights)
    message = str(caught.value)
    assert message.startswith(f"{name}: impl '{impl}': expected a first derivative in reverse mode, got ")
    assert message.endswith("; use impl='reference'")


@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_derivatives_that_a_fast_kernel_does_not_have(derivative):
    """Without the check, each is silently 0 or wrong, or ends in an error of PyTorch."""
    assert_raises_for(derivative, "chunked")
    for loss in RELATIONS:
        assert_raises_for(derivative, "chunked", loss, "relational_loss")


@every_kernel
def test_a_gradient_in_a_graph(impl):
    """``create_graph=True`` alone changes nothing, and the student may be overwritten before the backward pass."""
    student, teacher = distinct()
    plain = evaluate(rkd_da_loss, student, teacher, impl=impl)[1]
    leaf = student.clone().requires_grad_()
    hidden = leaf * 1
    value = rkd_da_loss(hidden, teacher, reduction="anchor", impl=impl).mean()
    hidden.zero_()
    (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
    torch.testing.assert_close(gradient.detach(), plain, rtol=0, atol=0)


@every_relation
def test_half_precision_is_computed_in_float32(loss, impl, dtype, device):
    """The value has the same bits as the float32 computation with the same numbers."""
    student, teacher = (x.to(device, dtype) for x in distinct())
    wide = torch.promote_types(dtype, torch.float32)
    value, gradient = evaluate(loss, student, teacher, impl=impl)
    expected, wide_gradient = evaluate(loss, student.to(wide), teacher.to(wide), impl=impl)
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    # The gradient is rounded once; through float32, as here, it may be twice.
    torch.testing.assert_close(gradient, wide_gradient.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0)


@every_kernel
@every_loss
@pytest.mark.parametrize("magnitude", ["huge", "largest", "tiny", "smallest", "tiny-and-large", "zero-and-large"])
def test_extremes_stay_finite(loss, impl, magnitude, dtype, device):
    info = torch.finfo(dtype)
    student, teacher = (x.clamp(-2.9, 2.9).to(device) for x in distinct())
    expected = None
    if magnitude.endswith("and-large"):
        student[:5] *= 1e-30 if magnitude.startswith("tiny") else 0
    else:
        expected = evaluate(loss, student, teacher, impl="reference")[0].mean()
        if magnitude == "smallest":
            student = (100 * student).round()
        student *= {"huge": info.max / 100, "largest": info.max / 3, "tiny": 1e-6, "smallest": info.tiny * info.eps}[
            magnitude
        ]
    student, teacher = student.to(dtype), teacher.to(dtype)
    value, gradient = evaluate(loss, student, teacher, impl=impl)
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    assert gradient.any() or magnitude in (
        "huge",
        "largest",
    )  # there the gradient may underflow
    if expected is not None:
        # A scale only changes how many bits of the student are left: 3 or 4 near 1e-6 in float16.
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


@every_relation
@pytest.mark.parametrize("which", ["student", "teacher", "both"])
def test_duplicates_keep_the_gradient_small(loss, impl, which, dtype, device):
    with_copy, without = duplicated(which)
    value, gradient = evaluate(loss, *(x.to(device, dtype) for x in with_copy), impl=impl)
    _, usual = evaluate(loss, *(x.to(device, dtype) for x in without), impl=impl)
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    assert gradient.any()
    assert gradient.abs().max() <= 10 * usual.abs().max()


@every_relation
@pytest.mark.parametrize(
    ("constant", "rows", "kind"),
    [(0, 2, torch.float32), (1 / 3, 3, torch.float64), (1000, 17, torch.float16), (1 / 3, 17, torch.bfloat16)],
)
def test_collapsed_batch(loss, impl, constant, rows, kind, device):
    """All student rows are equal: the loss is finite, and the gradient of what a shift does not change is 0."""
    student = torch.full((rows, 4), constant, dtype=kind, device=device)
    value, gradient = evaluate(loss, student, torch.randn(rows, 3).to(device, kind), impl=impl)
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    if loss in LOSSES:
        assert value.any() == (loss is rkd_distance_loss or rows > 2)
    if loss in LOSSES or "shift" in loss.invariant:
        assert not gradient.any()


@every_relation
@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_rows(loss, impl, rows, device):
    student, teacher = torch.randn(rows, 4).to(device).requires_grad_(), torch.randn(rows, 3).to(device)
    for reduction in ("mean", "tuple_mean", "sum", "anchor"):
        value = loss(student, teacher, reduction=reduction, impl=impl)
        (gradient,) = torch.autograd.grad(value.sum(), student)
        assert gradient.shape == (rows, 4)
        for x in (value, gradient):
            assert x.isfinite().all()
            if rows == 0 or loss in LOSSES:
                assert not x.any()
            elif loss.order > 1:  # a row related to itself alone; a cosine of 1 is rounded
                assert (x.abs() < 1e-12).all()


@every_kernel
def test_two_rows_span_no_angle(impl, dtype, device):
    student, teacher = (x.to(device, dtype) for x in distinct(2))
    value, gradient = evaluate(rkd_angle_loss, student, teacher, impl=impl)
    assert not value.any()
    assert not gradient.any()


@every_relation
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(
    ("rows", "bad", "kind"),
    [
        (1, "nan", torch.float32),
        (2, "inf", torch.float64),
        (3, "-inf", torch.float16),
        (17, "nan", torch.bfloat16),
        (17, "inf", torch.float32),
    ],
)
def test_nan_in_gives_nan_out(loss, impl, side, rows, bad, kind, device):
    batch = [x.to(device, kind) for x in distinct(rows)]
    batch[side][-1, 0] = float(bad)
    assert loss(*batch, impl=impl).isnan()


@every_relation
def test_memory_layout_does_not_matter(loss, impl, dtype, device):
    student, teacher = (x.to(device, dtype) for x in distinct())
    expected = evaluate(loss, student, teacher, impl=impl)
    for view in (lambda x: x.mT.contiguous().mT, lambda x: x.repeat_interleave(2, 1)[:, ::2]):
        views = [view(x) for x in (student, teacher)]
        assert not any(x.is_contiguous() for x in views)
        torch.testing.assert_close(evaluate(loss, *views, impl=impl), expected)


@every_relation
def test_sides_of_different_dtypes(loss, impl, dtype, device):
    """The student's dtype decides; stored teacher vectors are often float64 or float16."""
    student, teacher = distinct()
    expected = evaluate(loss, student.to(device, dtype), teacher.half().to(device, dtype), impl=impl)
    for other in (torch.float64, torch.float16):
        ours = evaluate(loss, student.to(device, dtype), teacher.half().to(device, other), impl=impl)
        assert [x.dtype for x in ours] == [x.dtype for x in expected]
        if dtype != torch.bfloat16:  # which cannot hold the teacher's numbers
            torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("rows", [strips.STRIP - 1, strips.STRIP, strips.STRIP + 1, 2 * strips.STRIP + 5])
@pytest.mark.parametrize("elements", [1, 200, 5000, 10**6])
def test_strips_and_chunks(monkeypatch, rows, elements):
    """Complete and incomplete strips; one vertex, some vertices and all vertices at a time."""
    monkeypatch.setattr(strips, "ELEMENTS", elements)
    student, teacher = distinct(rows)
    ours = evaluate(rkd_angle_loss, student, teacher, impl="chunked")
    torch.testing.assert_close(ours, evaluate(rkd_angle_loss, student, teacher, impl="reference"))


@pytest.mark.parametrize("loss", RELATIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "options", [{}, {"reduction": "tuple_mean"}, {"anchors": 1.0}], ids=["all", "distinct", "drawn"]
)
@pytest.mark.parametrize("elements", [1, 150])
def test_strips_of_any_relation(loss, options, elements, monkeypatch):
    """One row, or some rows, at a time: the value and the gradient of one strip."""
    student, teacher = distinct()
    expected = evaluate(loss, student, teacher, impl="reference", **options)
    monkeypatch.setattr(functions, "ELEMENTS", elements)
    torch.testing.assert_close(evaluate(loss, student, teacher, **options), expected)


@every_relation
def test_upstream_weights(loss, impl):
    """A weight per anchor: different ones, for which the gradient is computed again, equal ones, and zeros."""
    student, teacher = distinct(40)
    for weights in (torch.rand(40).double() - 0.3, torch.full((40,), 2.5).double(), torch.zeros(40).double()):
        gradients = []
        for name in (impl, "reference"):
            leaf = student.clone().requires_grad_()
            (loss(leaf, teacher, reduction="anchor", impl=name) * weights).sum().backward()
            gradients.append(leaf.grad)
        torch.testing.assert_close(*gradients)
        assert gradients[0].any() == weights.any()


@every_relation
@pytest.mark.parametrize("rows", [17, 129])
def test_deterministic(loss, impl, rows, dtype):
    """The same bits twice, on a CPU."""
    student, teacher = (x.to(dtype) for x in distinct(rows))
    once, again = (evaluate(loss, student, teacher, impl=impl) for _ in range(2))
    torch.testing.assert_close(once, again, rtol=0, atol=0)


@pytest.mark.parametrize("threads", [2, 5])
@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
def test_every_number_of_threads_gives_the_loss(monkeypatch, threads, wide):
    """Also with more threads than rows, and tiles that are not full; the bits depend on nothing else."""
    monkeypatch.setattr(native, "SHARE", 1)
    before = torch.get_num_threads()
    try:
        for rows in (3, 33, 70):
            student, teacher = (x if wide else x.float() for x in distinct(rows))
            torch.set_num_threads(1)
            expected = evaluate(rkd_da_loss, student, teacher)
            torch.set_num_threads(threads)
            found = evaluate(rkd_da_loss, student, teacher)
            torch.testing.assert_close(found, expected)
            torch.testing.assert_close(evaluate(rkd_da_loss, student, teacher), found, rtol=0, atol=0)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_inside_a_compiled_step(backend):
    student, teacher = (x.float() for x in distinct(12))
    expected = evaluate(rkd_da_loss, student, teacher)
    torch._dynamo.reset()
    step = torch.compile(rkd_da_loss, fullgraph=True, backend=backend)
    for _ in range(2):
        torch.testing.assert_close(evaluate(step, student, teacher), expected)


@pytest.mark.parametrize("compiler", ["missing", "broken", "cache"])
def test_without_a_compiler_strips_are_used_without_a_warning(compiler, monkeypatch, recwarn, tmp_path):
    """Also without a folder for the library; it is tried once in a process."""
    student, teacher = (x.float() for x in distinct(12))
    expected = evaluate(rkd_da_loss, student, teacher)
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    if compiler == "cache":
        cache.write_text("a file in its place")
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setenv("CXX", sys.executable if compiler == "broken" else "none")
    monkeypatch.setattr(native, "FAILURES", [])
    native._library.cache_clear()
    try:
        for _ in range(2):
            torch.testing.assert_close(evaluate(rkd_da_loss, student, teacher), expected)
    finally:
        native._library.cache_clear()
    assert len(native.FAILURES) == 1
    assert not recwarn.list


def test_the_library_is_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = native._compiled()
    assert list(tmp_path.rglob("*")) == [tmp_path / "rkd_plugin", library]
    monkeypatch.setattr(native.subprocess, "run", None)
    assert native._compiled() == library


def test_peak_memory():
    """1024 rows, teacher of width 512, student of width 128, forward and backward; the N^3 form needs 17 GB."""
    assert peak_growth("chunked", Case(1024)) < 64e6  # 8 matrices of N^2 float64; measured: under 7
    # The measurement sees N^3 tensors: one in float32 has 67 MB at N = 256, and the formula needs several.
    assert peak_growth("reference", Case(256)) > 200e6


def test_many_rows(device):
    """1024 rows: some vertices of ``chunked`` compared with the plain formula, one vertex at a time."""
    student, teacher = batch(Case(1024, device=str(device)))
    value, gradient = evaluate(rkd_angle_loss, student, teacher, impl="chunked")
    for vertex in (0, 31, 32, 500, 1023):
        units = (F.normalize(x.double() - x[vertex], dim=1) for x in (student, teacher))
        expected = F.smooth_l1_loss(*(u @ u.mT for u in units), reduction="sum") / 1024**2
        torch.testing.assert_close(value[vertex].double(), expected, rtol=1e-6, atol=0)
    # The loss is invariant to shifting and scaling the student, so its gradient is orthogonal to both.
    for products in (gradient, gradient * student):
        assert abs(products.double().sum()) < 1e-5 * products.double().abs().sum()


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_equal_relations_have_nothing_to_learn(impl):
    """Value and gradient are exactly 0: an optimizer would scale up rounding errors."""
    teacher = torch.randn(40, 8)
    student = (4 * teacher).requires_grad_()
    loss = rkd_da_loss(student, teacher, impl=impl)
    loss.backward()
    assert loss == 0
    assert not student.grad.any()
