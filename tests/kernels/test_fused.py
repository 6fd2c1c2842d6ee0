"""The Triton kernel: on a GPU with ``-m gpu``; by default interpreted on a CPU, and compiled for a GPU without one.

The interpreter takes 10 ms for one step of a GPU, so batches are tiny: most have one tile, some three. It has a process
of its own, since Triton reads the setting when a kernel is defined; in that process ``DEVICE`` is a CPU.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings

import pytest
import torch
from test_kernels import (
    HARD,
    MAGNITUDES,
    assert_raises_for,
    assert_right,
    assert_within_budget,
    clusters,
    distinct,
    duplicated,
    evaluate,
    magnitude,
)
from torch.utils.checkpoint import checkpoint

from rkd_plugin import rkd_angle_loss, rkd_da_loss, rkd_distance_loss
from rkd_plugin.kernels import choose, chunked, reference

triton = pytest.importorskip("triton")
from rkd_plugin.kernels import fused  # noqa: E402

# Numbers of float64 at both ends of its range are among the cases.
pytestmark = pytest.mark.filterwarnings("ignore:.*distances differ by less than a factor:UserWarning")

DEVICE = torch.device("cpu" if fused.INTERPRETED else "cuda")
runs_kernel = pytest.mark.interpreted if fused.INTERPRETED else pytest.mark.gpu
in_plain_process = pytest.mark.skipif(fused.INTERPRETED, reason="the process of the interpreter")

every_loss = pytest.mark.parametrize("loss", [rkd_distance_loss, rkd_angle_loss], ids=lambda f: f.__name__)
both_widths = pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=["float32", "float64"])


def slow_but(fast, cases):
    """The cases, of which all but some are in the slow tier."""
    return [case if case in fast else pytest.param(case, marks=pytest.mark.slow) for case in cases]


def short_arm():
    """Two rows at a distance of 1e-4; their directions from a third row have 3 digits in one float32."""
    student, teacher = distinct(12)
    student[1] = student[0] + 1e-4 * torch.randn(6)
    return student, teacher


CASES = {
    **{f"clusters-{spread:g}": lambda s=spread: clusters(s, 24, 6) for spread in (1e-1, 1e-3, 1e-5)},
    **{name: lambda c=case: [x[:12] for x in c()] for name, case in HARD.items() if not name.startswith("clusters")},
    "short-arm": short_arm,
}


def value_and_gradient(loss, student, *teacher, **options):
    student = student.detach().requires_grad_()
    value = loss(student, *teacher, **options)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    return value.detach(), gradient


def batch(rows=7, dtype=torch.float64, **options):
    return tuple(x.to(DEVICE, dtype) for x in distinct(rows, **options))


@in_plain_process
@pytest.mark.parametrize("tier", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_under_the_interpreter(tier):
    """All tests of this file with this mark, in one process for each tier."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", f"interpreted and {tier}", __file__]
    # NumPy warns for an input that is not finite.
    command += ["-W", "ignore::RuntimeWarning", "-p", "no:cacheprovider"]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 40  # in either tier
    assert "skipped" not in done.stdout


def angle_losses(student, teacher, vertices=None):
    """Without the public function, which raises for a CPU."""
    return fused.angle(fused.relations(student), fused.relations(teacher), 1.0, vertices=vertices)


class AbsentGPU:
    """The part of a driver that Triton needs to compile."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability  # one cache entry per capability

    def get_current_stream(self, device):
        return 0


@in_plain_process
@both_widths
@pytest.mark.parametrize(
    ("capability", "rows"), [(90, 33), *(pytest.param(c, 64, marks=pytest.mark.slow) for c in (80, 90))]
)
def test_compiles_for_a_gpu(monkeypatch, capability, rows, wide):
    """Every launch of a step, without running it: the interpreter accepts Python that the compiler does not."""
    compiled = []

    def compile_only(kernel):
        run = kernel.run
        monkeypatch.setattr(kernel, "run", lambda *a, warmup, **kw: compiled.append(run(*a, warmup=True, **kw)))

    for kernel in (fused._squares_kernel, fused._squares_backward_kernel, fused._angle_kernel):
        compile_only(kernel)
    student, teacher = (x.to(wide) for x in distinct(rows))
    monkeypatch.setattr(triton.runtime.driver, "_active", AbsentGPU(capability))
    with torch.no_grad():
        angle_losses(student, teacher)
    angle_losses(student.requires_grad_(), teacher).sum().backward()
    angle_losses(student, teacher, vertices=5).sum().backward()
    # Squares of both sides, three times, and twice their gradient. Each angle kernel has two kinds of tiles: the losses
    # only; all and some vertices with the gradient; and the last two again with weights.
    assert len(compiled) == 6 + 2 + 2 * 5
    for kernel in compiled:
        assert not re.search(r"\b(atom|red)\.", kernel.asm["ptx"])  # no atomics: the order of all sums is fixed
        # No product of two variables, such as a multiple of the number of rows, is narrower than 64 bits.
        assert narrow_products(kernel.asm["ttir"]) == []
        assert re.search(r"tensor<32x\d+xi64>", kernel.asm["ttir"])


def narrow_products(ttir):
    """Products of 32-bit integers in Triton's intermediate code, except multiples of a constant."""
    constants = set(re.findall(r"(%\w+) = arith.constant", ttir))
    spread = dict(re.findall(r"(%\w+) = tt.splat (%\w+)", ttir))
    products = re.findall(r"arith.muli (%\w+), (%\w+) : (?:tensor<[\dx]+x)?i32", ttir)
    return [pair for pair in products if not {spread.get(x, x) for x in pair} & constants]


@in_plain_process
def test_raises_where_it_cannot_run(monkeypatch):
    x = torch.randn(4, 3)
    with pytest.raises(RuntimeError) as caught:
        rkd_angle_loss(x, x, impl="fused")
    assert str(caught.value) == (
        "rkd_angle_loss: expected tensors on a CUDA device for impl 'fused', got cpu; use impl='chunked'"
    )
    monkeypatch.setattr(choose, "_HAS_TRITON", False)
    with pytest.raises(RuntimeError) as caught:
        rkd_da_loss(x, x, impl="fused")
    assert str(caught.value) == "rkd_da_loss: expected Triton for impl 'fused', found none; use impl='chunked'"


def test_auto_takes_a_kernel_that_runs(monkeypatch):
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(choose, "_AGREES", {gpu: True})
        assert choose.choose("loss", "auto", gpu) is fused
        assert choose.choose("loss", "auto", cpu) is chunked
        monkeypatch.setattr(choose, "_HAS_TRITON", False)
        assert choose.choose("loss", "auto", gpu) is chunked
        monkeypatch.setattr(choose, "_HAS_TRITON", True)
        monkeypatch.setattr(choose, "_AGREES", {gpu: False})
        assert choose.choose("loss", "auto", gpu) is chunked


@runs_kernel
@every_loss
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 17, *slow_but((), [33, 64])])
def test_error_budget(loss, rows, dtype, tolerance):
    if fused.INTERPRETED and rows == 64 and dtype in (torch.float16, torch.bfloat16):
        rows = 4  # the same as float32 after the first step; 64 rows take long
    assert_within_budget(loss, "fused", torch.randn(rows, 5), torch.randn(rows, 19), dtype, tolerance, DEVICE)


@runs_kernel
@every_loss
@both_widths
@pytest.mark.parametrize("case", slow_but(("clusters-0.001", "both-duplicate"), CASES))
def test_error_budget_of_hard_batches(loss, case, wide):
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-10}[wide]  # as in conftest.py
    assert_within_budget(loss, "fused", *CASES[case](), wide, tolerance, DEVICE)


@runs_kernel
@every_loss
@pytest.mark.parametrize("case", slow_but(("huge", "a-row-1e11-away"), MAGNITUDES))
def test_any_magnitude(loss, case):
    student, teacher, value, gradient = magnitude(case, loss)
    assert_right(loss, "fused", student.to(DEVICE), teacher.to(DEVICE), value, gradient.to(DEVICE))


@runs_kernel
@pytest.mark.slow
def test_tiles_of_rows_far_apart_and_others():
    """Two close rows in different tiles: this pair of tiles is computed from the rows, the others are not."""
    student, teacher = (torch.randn(34, width).to(DEVICE) for width in (2, 3))
    student[33] = student[2] + 1e-6
    weights = torch.rand(34).to(DEVICE)  # the gradient is then computed in the backward pass

    def weighted(*batch, impl):
        return weights @ rkd_angle_loss(*batch, reduction="anchor", impl=impl)

    ours, truth = (value_and_gradient(weighted, student, teacher, impl=impl) for impl in ("fused", "reference"))
    for x, y in zip(ours, truth, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=2e-6 * float(y.abs().max()))


@runs_kernel
@pytest.mark.parametrize("derivative", ["hessian-vector product", "func.grad", "forward_ad"])
def test_derivatives_that_it_does_not_have(derivative):
    with torch.device(DEVICE):
        assert_raises_for(derivative, "fused")


@runs_kernel
@pytest.mark.parametrize("huber_delta", [0.1, 1e300])
@pytest.mark.parametrize("reduction", ["mean", "tuple_mean", "sum", "anchor"])
def test_reductions_and_thresholds(reduction, huber_delta):
    student, teacher = batch()
    ours, truth = (
        value_and_gradient(rkd_da_loss, student, teacher, reduction=reduction, huber_delta=huber_delta, impl=impl)
        for impl in ("fused", "reference")
    )
    torch.testing.assert_close(ours, truth)


@runs_kernel
@pytest.mark.parametrize(("rows", "wide"), [(17, torch.float64), (34, torch.float32)])
def test_upstream_weights(rows, wide):
    """A weight per anchor: different ones, for which the gradient is computed again, equal ones, and zeros."""
    student, teacher = batch(rows, wide)
    leaf = student.clone().requires_grad_()
    losses = rkd_angle_loss(leaf, teacher, reduction="anchor", impl="fused")
    truth = student.double().requires_grad_()
    expected = rkd_angle_loss(truth, teacher.double(), reduction="anchor", impl="reference")
    for weights in (torch.rand(rows) - 0.3, torch.full((rows,), 2.5), torch.zeros(rows)):
        weights = weights.to(DEVICE, wide)
        (ours,) = torch.autograd.grad(losses @ weights, leaf, retain_graph=True)
        (theirs,) = torch.autograd.grad(expected @ weights.double(), truth, retain_graph=True)
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=2e-6 * float(theirs.abs().max()))
        assert ours.any() == weights.any()


@runs_kernel
@pytest.mark.parametrize("vertices", slow_but((1, 5), [0, 1, 5, 32, 33, 40]))
def test_some_vertices(vertices):
    """The first rows are vertices of angles between all rows; there are tiles before and after the last of them."""
    student, teacher = batch(40)
    leaf, truth = (student.clone().requires_grad_() for _ in range(2))
    losses = angle_losses(leaf, teacher, vertices)
    expected = reference.angle(reference.relations(truth), reference.relations(teacher), 1.0, vertices=vertices)
    torch.testing.assert_close(losses, expected)
    for weights in (torch.rand(vertices) - 0.3, torch.ones(vertices)):
        weights = weights.to(DEVICE, torch.float64)
        (ours,) = torch.autograd.grad(losses @ weights, leaf, retain_graph=True)
        (theirs,) = torch.autograd.grad(expected @ weights, truth, retain_graph=True)
        torch.testing.assert_close(ours, theirs)


@runs_kernel
@every_loss
def test_half_precision_is_computed_in_float32(loss, dtype):
    """The value has the same bits as the float32 computation with the same numbers."""
    student, teacher = batch(17, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    value, gradient = evaluate(loss, student, teacher, impl="fused")
    expected, wide_gradient = evaluate(loss, student.to(wide), teacher.to(wide), impl="fused")
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    torch.testing.assert_close(gradient, wide_gradient.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0)


@runs_kernel
@pytest.mark.parametrize("which", ["student", "teacher", "both"])
def test_duplicates_keep_the_gradient_small(which, dtype):
    with_copy, without = duplicated(which, 6)
    value, gradient = evaluate(rkd_da_loss, *(x.to(DEVICE, dtype) for x in with_copy), impl="fused")
    _, usual = evaluate(rkd_da_loss, *(x.to(DEVICE, dtype) for x in without), impl="fused")
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    assert 0 < gradient.abs().max() <= 10 * usual.abs().max()


@runs_kernel
@pytest.mark.parametrize("constant", [0, 1 / 3, 1000])
def test_collapsed_batch(constant, dtype):
    student = torch.full((9, 4), constant, dtype=dtype, device=DEVICE)
    value, gradient = evaluate(rkd_angle_loss, student, torch.randn(9, 3).to(DEVICE, dtype), impl="fused")
    assert value.isfinite().all()
    assert value.all()
    assert not gradient.any()


@runs_kernel
@every_loss
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize(("rows", "bad"), [(1, float("inf")), (2, float("nan")), (4, float("-inf"))])
def test_nan_in_gives_nan_out(loss, side, rows, bad):
    student, teacher = batch(rows, torch.float32)
    (student if side == "student" else teacher)[-1, 0] = bad
    assert loss(student, teacher, impl="fused").isnan()
    if rows > 2:
        assert angle_losses(student, teacher).isnan().any()


@runs_kernel
@every_loss
@both_widths
def test_shift_and_scale_change_nothing(loss, wide):
    # Multiples of 2**-12, so that a shift by 1000 rounds nothing even in float32.
    student, teacher = ((x * 2**12).round() / 2**12 for x in batch(9, wide))
    limit = 2e-6 if wide == torch.float32 else 1e-9
    before, gradient = value_and_gradient(loss, student, teacher, impl="fused")
    for shift, scale in ((1000, 1), (-1000, 1), (0, 1e-4), (0, 1e4)):
        moved, other = ((x + shift) * scale for x in (student, teacher))
        value, moved_gradient = value_and_gradient(loss, moved, other, impl="fused")
        torch.testing.assert_close(value, before, rtol=0, atol=limit)
        torch.testing.assert_close(moved_gradient * scale, gradient, rtol=0, atol=limit * float(gradient.abs().max()))


@runs_kernel
def test_memory_layout_does_not_matter(dtype):
    student, teacher = batch(6, dtype)
    expected = evaluate(rkd_da_loss, student, teacher, impl="fused")
    for view in (lambda x: x.mT.contiguous().mT, lambda x: x.repeat_interleave(2, 1)[:, ::2]):
        views = [view(x) for x in (student, teacher)]
        assert not any(x.is_contiguous() for x in views)
        torch.testing.assert_close(evaluate(rkd_da_loss, *views, impl="fused"), expected)


@runs_kernel
@pytest.mark.slow
def test_same_bits_every_time():
    student, teacher = batch(33 if fused.INTERPRETED else 777, torch.float32)
    once, again = (evaluate(rkd_da_loss, student, teacher, impl="fused") for _ in range(2))
    torch.testing.assert_close(once, again, rtol=0, atol=0)


@runs_kernel
@both_widths
def test_equal_relations_have_nothing_to_learn(wide):
    """Value and gradient are exactly 0: an optimizer would scale up rounding errors."""
    teacher = torch.randn(20 if fused.INTERPRETED else 300, 8).to(DEVICE, wide)
    value, gradient = value_and_gradient(rkd_da_loss, 4 * teacher, teacher, impl="fused")
    assert value == 0
    assert not gradient.any()


@runs_kernel
@pytest.mark.parametrize("span", [1, 5, 100])
def test_spans(monkeypatch, span):
    """The rows between two sums in float64: one at a time, an incomplete last span, all at once."""
    student, teacher = batch(13)
    monkeypatch.setattr(fused, "SPAN", span)
    ours = evaluate(rkd_angle_loss, student, teacher, impl="fused")
    torch.testing.assert_close(ours, evaluate(rkd_angle_loss, student, teacher, impl="reference"))


@runs_kernel
def test_index_tuples():
    student, teacher = batch()
    options = {"pairs": ([0, 2, 2, 5], [1, 4, 0, 6]), "triplets": ([0, 2, 2, 3], [1, 4, 0, 3], [2, 1, 5, 1])}
    options = {key: tuple(torch.tensor(index, device=DEVICE) for index in value) for key, value in options.items()}
    ours, truth = (
        value_and_gradient(rkd_da_loss, student, teacher, impl=impl, **options) for impl in ("fused", "reference")
    )
    torch.testing.assert_close(ours, truth)


@runs_kernel
def test_under_pytorch(dtype):
    """Without a gradient, autocast, checkpointing, a functional call: the same bits as the plain call."""
    student, teacher = batch(5, dtype)
    model = torch.nn.Linear(6, 4).to(DEVICE, dtype)

    def loss(x):
        return rkd_da_loss(x, teacher, impl="fused")

    plain = value_and_gradient(loss, student)
    with torch.no_grad():
        assert torch.equal(loss(student), plain[0])
    with torch.autocast(DEVICE.type, torch.bfloat16):
        value, gradient = value_and_gradient(loss, student)
    assert torch.equal(value, plain[0])
    assert torch.equal(gradient, plain[1])
    value, gradient = value_and_gradient(lambda x: checkpoint(loss, x, use_reentrant=False), student)
    assert torch.equal(gradient, plain[1])
    loss(model(student)).backward()
    weights = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    loss(torch.func.functional_call(model, weights, (student,))).backward()
    assert torch.equal(weights["weight"].grad, model.weight.grad)
    # Twice in one graph: the sum of both gradients.
    twice = value_and_gradient(lambda x: loss(x) + loss(x), student)
    torch.testing.assert_close(twice[1], 2 * plain[1])


@runs_kernel
@pytest.mark.parametrize("reduction", ["mean", "anchor"])
def test_dynamo(reduction):
    student, teacher = batch(5, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(rkd_da_loss, fullgraph=True, backend="aot_eager" if fused.INTERPRETED else "inductor")
    ours, eager = (
        value_and_gradient(f, student, teacher, impl="fused", reduction=reduction) for f in (compiled, rkd_da_loss)
    )
    torch.testing.assert_close(ours, eager)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [129, 1000])
@pytest.mark.parametrize("anchors", [None, 0.3])
def test_agrees_with_chunked(rows, anchors, dtype):
    student, teacher = batch(rows, dtype)
    weights = torch.rand(rows, device=DEVICE)  # the gradient is then computed in the backward pass

    def weighted(*batch, reduction, impl):
        torch.manual_seed(0)
        return rkd_da_loss(*batch, reduction=reduction, anchors=anchors, impl=impl) * weights

    for loss in (rkd_da_loss, weighted):
        ours, theirs = (evaluate(loss, student, teacher, impl=impl) for impl in ("fused", "chunked"))
        for x, y in zip(ours, theirs, strict=True):
            limit = {torch.float64: 1e-12, torch.float32: 5e-6}.get(x.dtype, torch.finfo(x.dtype).eps)
            torch.testing.assert_close(x, y, rtol=0, atol=limit * float(y.abs().max()))


@pytest.mark.gpu
def test_auto_takes_it_on_this_gpu():
    """Its values agree here."""
    choose._AGREES.pop(DEVICE, None)
    assert choose.choose("loss", "auto", DEVICE) is fused


@pytest.mark.gpu
def test_cuda_graph():
    """Forward and backward captured once, and replayed with new numbers."""
    student, teacher = (x.cuda().float() for x in distinct(100))
    student.requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(rkd_da_loss(student, teacher, impl="fused"), student)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = rkd_da_loss(student, teacher, impl="fused")
        (gradient,) = torch.autograd.grad(value, student)
    for _ in range(2):
        with torch.no_grad():
            student.copy_(torch.randn_like(student))
            teacher.copy_(torch.randn_like(teacher))
        graph.replay()
        expected = value_and_gradient(rkd_da_loss, student, teacher, impl="fused")
        torch.testing.assert_close((value.detach(), gradient), expected, rtol=0, atol=0)


@pytest.mark.gpu
def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    student, teacher = distinct()
    values = [rkd_da_loss(student.to(d), teacher.to(d), impl="fused").cpu() for d in ("cuda:0", "cuda:1")]
    torch.testing.assert_close(*values)


@pytest.mark.gpu
def test_memory_growth():
    """N = 4096: the matrices need 110 bytes per entry at the peak; the N^3 form needs 200,000."""
    student, teacher = (torch.randn(4096, width, device="cuda") for width in (128, 512))
    student.requires_grad_()
    torch.autograd.grad(rkd_da_loss(student[:64], teacher[:64], impl="fused"), student)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(rkd_da_loss(student, teacher, impl="fused"), student)
    assert torch.cuda.max_memory_allocated() - before < 160 * 4096**2


@runs_kernel
@pytest.mark.parametrize("fault", slow_but(("gradient", "error"), [None, "value", "gradient", "error"]))
def test_auto_does_not_take_a_kernel_that_fails_on_this_device(monkeypatch, fault):
    """With an error of a hundredth, or an exception; one warning."""
    right = fused.angle

    def wrong(*args):
        if fault == "error":
            raise OSError("no such instruction")
        losses = right(*args)
        return losses * 1.01 if fault == "value" else losses.detach() + 1.01 * (losses - losses.detach())

    monkeypatch.setattr(choose, "_AGREES", {})
    if fault is None:
        assert choose._fused_agrees(DEVICE)
        return
    monkeypatch.setattr(fused, "angle", wrong)
    reason = "OSError: no such instruction" if fault == "error" else "its values differ"
    with pytest.warns(UserWarning, match=rf"impl 'fused' cannot be used on {DEVICE} \({reason}\); 'auto' uses"):
        assert not choose._fused_agrees(DEVICE)
    assert not choose._fused_agrees(DEVICE)  # silent, or the warning would be an error
