"""The fused kernel on a GPU: checks against `reference` and `chunked`, then time and memory, then one table.

Run by gpu_check.sh; needs torch and triton alone. A measurement that fails prints why and the next one runs; the exit
status tells of the checks only. With ``TRITON_INTERPRET=1`` it runs on a CPU, for whoever changes this file:
``gpu_check.sh --check-rows 5 --rows 4 8``.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import subprocess
import sys
import time

import torch
from torch.nn import functional as F

from rkd_plugin import rkd_angle_loss, rkd_da_loss, rkd_distance_loss
from rkd_plugin.kernels import choose

# Floating point operations of a triple with b < c, forward and backward, of which there are N^3 / 2: about 30, of them
# 10 for the two cosines, 7 for the Huber loss, the rest for its slope and the sums U, Q and M. The fused kernel does 61
# for a pair and a third row, of which there are as many: three angles for one, and numerators in two parts.
USEFUL, EXECUTED = 30, 61
NAIVE_SHARE = 0.8  # of the free memory that the plain formula may ask for
CHUNKED_ROWS = 1024  # above this, plain PyTorch launches so many small kernels that it is not worth the wait
SECONDS = 2.0  # of repetitions for a row of the table

failures = 0


def check(name, condition, detail=""):
    global failures
    failures += not condition
    print(f"{'ok  ' if condition else 'FAIL'} {name}{f': {detail}' if detail else ''}", flush=True)


def attempt(name, function):
    """Run; a failure is a failed check, or the reason why a measurement is missing, and never the end."""
    try:
        return function()
    except Exception as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        if name.startswith("check"):
            check(name, False, text)
        else:
            print(f"--   {name}: {text}", flush=True)
        return None


def draw(rows, width, dtype=torch.float64, device="cuda", seed=0):
    generator = torch.Generator().manual_seed(seed + 1000 * width)
    return torch.randn(rows, width, dtype=torch.float64, generator=generator).to(device, dtype)


def evaluate(loss, student, teacher, **options):
    """Value per anchor, or of a reduction, and gradient of its sum."""
    student = student.detach().requires_grad_()
    value = loss(student, teacher, **{"reduction": "anchor", **options})
    (gradient,) = torch.autograd.grad(value.sum(), student)
    return value.detach(), gradient


def off(x, truth):
    """The largest error, relative to the largest entry; NaN counts as infinitely far."""
    if not truth.numel():
        return 0.0
    error = float((x.double() - truth.double()).abs().max())
    scale = float(truth.abs().max())
    return math.inf if math.isnan(error) else error / scale if scale else error


def agree(name, loss, student, teacher, limit, truth_impl="reference", **options):
    truth = evaluate(loss, student.double(), teacher.double(), impl=truth_impl, **options)
    ours = evaluate(loss, student, teacher, impl="fused", **options)
    errors = [off(x, y) for x, y in zip(ours, truth, strict=True)]
    limits = (min(limit, 1e-5), limit)  # a value is float32 at least
    detail = f"value off by {errors[0]:.1e}, gradient by {errors[1]:.1e}"
    check(f"{name}", all(e <= m for e, m in zip(errors, limits, strict=True)), detail)


def limit_of(dtype):
    return {torch.float64: 1e-9, torch.float32: 5e-6}.get(dtype, torch.finfo(dtype).eps)


def check_sizes(rows, device):
    for n, dtype in itertools.product(rows, (torch.float64, torch.float32, torch.float16, torch.bfloat16)):
        student, teacher = draw(n, 19, dtype, device), draw(n, 33, dtype, device)
        for loss in (rkd_distance_loss, rkd_angle_loss):
            name = f"{loss.__name__} N={n} {str(dtype).removeprefix('torch.')}"
            arguments = name, loss, student, teacher, limit_of(dtype)
            attempt(f"check {name}", lambda a=arguments: agree(*a))


def check_options(n, device):
    student, teacher = draw(n, 6, device=device), draw(n, 9, device=device)
    for reduction, delta in itertools.product(("mean", "tuple_mean", "sum", "anchor"), (1.0, 0.1)):
        options = {"reduction": reduction, "huber_delta": delta}
        agree(f"reduction {reduction}, huber_delta {delta}", rkd_da_loss, student, teacher, 1e-10, **options)
    weights = draw(n, 1, device=device)[:, 0]

    def weighted(student, teacher, reduction, impl):
        return rkd_da_loss(student, teacher, reduction=reduction, impl=impl) * weights.to(student.dtype)

    agree("a weight per anchor, float64", weighted, student, teacher, 1e-10)
    agree("a weight per anchor, float32", weighted, student.float(), teacher.float(), 1e-5)

    def some(student, teacher, **options):
        torch.manual_seed(0)
        return rkd_angle_loss(student, teacher, anchors=0.3, **options)

    agree("some anchors, float64", some, student, teacher, 1e-10)
    agree("some anchors, float32", some, student.float(), teacher.float(), 1e-5)
    strided = student.repeat_interleave(2, 1)[:, ::2], teacher.mT.contiguous().mT
    agree("strided inputs", rkd_da_loss, *strided, 1e-10)


def check_hard_batches(n, device):
    teacher = draw(n, 12, device=device)
    for spread in (1e-1, 1e-3, 1e-5):
        centres = draw(-(-n // 4), 8, device=device).repeat_interleave(4, 0)[:n]
        student = centres + spread * draw(n, 8, device=device, seed=1)
        for dtype, limit in ((torch.float32, 5e-6), (torch.float64, 1e-9)):
            name = f"clusters of {spread:g}, {str(dtype).removeprefix('torch.')}"
            agree(name, rkd_angle_loss, student.to(dtype), teacher.to(dtype), limit)
    student = draw(n, 8, device=device)
    short = student.clone()
    short[1] = short[0] + 1e-4 * draw(1, 8, device=device, seed=2)[0]
    agree("a short arm beside long ones", rkd_da_loss, short.float(), teacher.float(), 5e-6)
    agree("an offset of 1000", rkd_da_loss, student + 1000, teacher + 1000, 1e-9)
    for scale in (1e-4, 1e4):
        agree(f"a scale of {scale:g}", rkd_da_loss, (student * scale).float(), teacher.float(), 5e-6)
    for which in ("student", "teacher", "both"):
        pair = [student.clone(), teacher.clone()]
        for side, name in zip(pair, ("student", "teacher"), strict=True):
            if which in (name, "both"):
                side[1] = side[0]
        agree(f"a duplicate in {which}", rkd_da_loss, *(x.float() for x in pair), 5e-6)
    for constant in (0.0, 1 / 3):
        value, gradient = evaluate(
            rkd_da_loss, torch.full_like(student, constant).float(), teacher.float(), impl="fused"
        )
        check(f"all rows {constant:.2g}", bool(value.isfinite().all() and not gradient.any()))
    for bad in (math.nan, math.inf, -math.inf):
        poor = student.clone()
        poor[-1, 0] = bad
        values = [rkd_da_loss(*pair, impl="fused") for pair in ((poor, teacher), (teacher, poor))]
        check(f"{bad} in the input is NaN in the loss", all(bool(v.isnan()) for v in values))
    for dtype in (torch.float32, torch.float64):
        value, gradient = evaluate(rkd_da_loss, (4 * teacher).to(dtype), teacher.to(dtype), impl="fused")
        name = f"equal relations have loss and gradient 0, {str(dtype).removeprefix('torch.')}"
        check(name, not value.any() and not gradient.any(), f"{float(value.sum()):.1e}")


def check_same_bits(n, device):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        pair = draw(n, 64, dtype, device), draw(n, 96, dtype, device)
        first, *others = (evaluate(rkd_da_loss, *pair, impl="fused") for _ in range(4))
        same = all(torch.equal(x, y) for other in others for x, y in zip(first, other, strict=True))
        check(f"the same bits every time, N={n} {str(dtype).removeprefix('torch.')}", same)


def check_against_chunked(n, device):
    for dtype in (torch.float64, torch.float32):
        pair = draw(n, 64, dtype, device), draw(n, 96, dtype, device)
        agree(f"against chunked, N={n} {dtype}", rkd_da_loss, *pair, limit_of(dtype), truth_impl="chunked")


def check_auto():
    check(
        "auto takes the fused kernel",
        choose.choose("check", "auto", torch.device("cuda")).__name__.endswith("fused"),
    )


def check_compile(n, device):
    pair = draw(n, 16, torch.float32, device), draw(n, 24, torch.float32, device)
    compiled = torch.compile(rkd_da_loss, fullgraph=True)
    ours, eager = (evaluate(f, *pair, impl="fused", reduction="mean") for f in (compiled, rkd_da_loss))
    check("torch.compile without a graph break", max(off(x, y) for x, y in zip(ours, eager, strict=True)) < 5e-6)


def check_cuda_graph(n):
    student, teacher = draw(n, 16, torch.float32).requires_grad_(), draw(n, 24, torch.float32)
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
    with torch.no_grad():
        student.copy_(draw(n, 16, torch.float32, seed=7))
    graph.replay()
    expected = evaluate(rkd_da_loss, student, teacher, impl="fused", reduction="mean")
    errors = [off(x, y) for x, y in zip((value.detach(), gradient), expected, strict=True)]
    check("a CUDA graph, replayed on other numbers", max(errors) < 1e-6, f"off by {max(errors):.1e}")


def check_second_device(n):
    if torch.cuda.device_count() < 2:
        print("--   a second device: there is none")
        return
    pair = draw(n, 6, torch.float32, "cpu"), draw(n, 9, torch.float32, "cpu")
    values = [rkd_da_loss(*(x.to(d) for x in pair), impl="fused").cpu() for d in ("cuda:0", "cuda:1")]
    check("a second device", off(*values) < 1e-6)


def plain(student, teacher):
    """The paper's formula as one would type it: what the loss costs without any care."""

    def angles(x):
        units = F.normalize(x.unsqueeze(0) - x.unsqueeze(1), dim=2)
        return (units @ units.mT).flatten()

    def distances(x):
        d = torch.cdist(x, x)
        return d / d[d > 0].mean()

    student, teacher = student.float(), teacher.float()
    with torch.no_grad():
        wanted = angles(teacher), distances(teacher)
    return 2 * F.smooth_l1_loss(angles(student), wanted[0]) + F.smooth_l1_loss(distances(student), wanted[1])


def milliseconds(function, device, seconds=SECONDS):
    """The median of as many calls as fit in the time, after three that do not count."""
    for _ in range(3):
        function()
    if device == "cuda":
        torch.cuda.synchronize()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 100):
        if device == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
        else:
            begin = time.perf_counter()
            function()
            times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times)


def both(loss, student, teacher):
    return torch.autograd.grad(loss(student, teacher), student)


def growth(function, device):
    """Megabytes by which the call raises the peak."""
    if device != "cuda":
        return math.nan
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def peak_rate():
    """float32 operations a second: multiprocessors, lanes, two for a fused multiply-add, the highest clock."""
    command = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    megahertz = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0])
    properties = torch.cuda.get_device_properties(0)
    lanes = 64 if (properties.major, properties.minor) in ((7, 0), (7, 5), (8, 0)) else 128
    return properties.multi_processor_count * lanes * 2 * megahertz * 1e6


def measure(n, width, dtype, device, rate):
    student, teacher = draw(n, width, dtype, device).requires_grad_(), draw(n, 2 * width, dtype, device)
    row = {"N": n, "D": width, "dtype": str(dtype).removeprefix("torch.")}

    def fused():
        both(lambda s, t: rkd_da_loss(s, t, impl="fused"), student, teacher)

    row["ms"] = milliseconds(fused, device)
    with torch.no_grad():
        row["forward ms"] = milliseconds(lambda: rkd_da_loss(student, teacher, impl="fused"), device, SECONDS / 2)
    row["MB"] = growth(fused, device)
    if rate:
        row["useful %"], row["executed %"] = (
            100 * flops * n**3 / 2 / (row["ms"] / 1000) / rate for flops in (USEFUL, EXECUTED)
        )
    if dtype == torch.float32:
        if n <= CHUNKED_ROWS:
            row["chunked ms"] = attempt(
                f"chunked N={n}",
                lambda: milliseconds(
                    lambda: both(lambda s, t: rkd_da_loss(s, t, impl="chunked"), student, teacher), device
                ),
            )
        free = torch.cuda.mem_get_info()[0] if device == "cuda" else 1e9
        # 5 cubes at the peak, and for every side difference and unit vectors with their gradient.
        if 4 * (5 * n**3 + 4 * n**2 * 3 * width) < NAIVE_SHARE * free:
            row["plain ms"] = attempt(
                f"plain N={n}", lambda: milliseconds(lambda: both(plain, student, teacher), device)
            )
            row["plain MB"] = attempt(f"plain N={n}", lambda: growth(lambda: both(plain, student, teacher), device))
    return row


def replayed(n, width):
    """Milliseconds of forward and backward in a CUDA graph, where the host has no part."""
    student, teacher = draw(n, width, torch.float32).requires_grad_(), draw(n, 2 * width, torch.float32)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            both(lambda s, t: rkd_da_loss(s, t, impl="fused"), student, teacher)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        both(lambda s, t: rkd_da_loss(s, t, impl="fused"), student, teacher)
    print(f"     N={n} in a CUDA graph: {milliseconds(graph.replay, 'cuda'):.3f} ms")


def profile(n, width):
    """Where the time of one call goes."""
    student, teacher = draw(n, width, torch.float32).requires_grad_(), draw(n, 2 * width, torch.float32)
    both(lambda s, t: rkd_da_loss(s, t, impl="fused"), student, teacher)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as recorded:
        both(lambda s, t: rkd_da_loss(s, t, impl="fused"), student, teacher)
        torch.cuda.synchronize()
    kernels = [e for e in recorded.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels.sort(key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in kernels)
    print(f"     N={n}, D={width}: {total / 1000:.3f} ms in {sum(e.count for e in kernels)} kernels, of which")
    for e in kernels[:6]:
        print(f"     {100 * e.self_device_time_total / total:5.1f} %  {e.count:4d} x  {e.key[:90]}")


def training_step(device):
    """What RKD-DA of 128 rows adds to a ResNet-50's step."""
    import torchvision

    model = torchvision.models.resnet50().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    features = {}
    model.avgpool.register_forward_hook(lambda module, inputs, output: features.update(x=output.flatten(1)))
    images = torch.randn(128, 3, 224, 224, device=device).to(memory_format=torch.channels_last)
    labels, teacher = torch.randint(1000, (128,), device=device), draw(128, 2048, torch.float32, device)

    def step(weight):
        with torch.autocast(device, torch.bfloat16):
            loss = F.cross_entropy(model(images), labels)
        if weight:
            loss = loss + weight * rkd_da_loss(features["x"], teacher, impl="fused")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    # In turns, since a card that grows warm slows down.
    times = {0: [], 1: []}
    for _ in range(3):
        for weight in times:
            times[weight].append(milliseconds(lambda w=weight: step(w), device, SECONDS))
    alone, with_rkd = (statistics.median(times[weight]) for weight in (0, 1))
    print(f"     ResNet-50, 128 images, bfloat16: {alone:.2f} ms a step; with RKD-DA {with_rkd:.2f} ms,", end=" ")
    print(f"{with_rkd - alone:+.2f} ms, {100 * (with_rkd / alone - 1):+.1f} %")


def exponent(rows):
    """Of time over N, by least squares on logarithms, where the cubic part is all that counts."""
    points = [(math.log(r["N"]), math.log(r["ms"])) for r in rows if r["N"] >= 1024]
    if len(points) < 2:
        return math.nan
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def table(rows):
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def cell(value):
        if not isinstance(value, float):
            return "-" if value is None else str(value)
        return "-" if math.isnan(value) else f"{value:.3g}" if value < 1000 else f"{value:.0f}"

    lines = [columns, ["---"] * len(columns), *([cell(row.get(c)) for c in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="*", default=[128, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--check-rows", type=int, nargs="*", default=[0, 1, 2, 3, 5, 17, 33, 64, 129, 200])
    arguments = parser.parse_args()
    import triton

    from rkd_plugin.kernels import fused

    device = "cpu" if fused.INTERPRETED else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print(
            "gpu_check: a CUDA device is needed, PyTorch finds none; set TRITON_INTERPRET=1 to try the checks on a CPU"
        )
        return 1
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU, interpreted"
    print(f"{name}, torch {torch.__version__}, triton {triton.__version__}, python {sys.version.split()[0]}")
    some = max(arguments.check_rows, default=5)
    large = 777 if device == "cuda" else some
    attempt("check sizes", lambda: check_sizes(arguments.check_rows, device))
    attempt("check options", lambda: check_options(min(some, 40), device))
    attempt("check hard batches", lambda: check_hard_batches(min(max(some, 8), 80), device))
    attempt("check same bits", lambda: check_same_bits(large, device))
    attempt("check chunked", lambda: check_against_chunked(large, device))
    if device == "cuda":
        attempt("check auto", check_auto)
        attempt("check compile", lambda: check_compile(100, device))
        attempt("check CUDA graph", lambda: check_cuda_graph(100))
        attempt("check second device", lambda: check_second_device(50))
    print(f"{failures} checks failed" if failures else "all checks passed", flush=True)
    rate = attempt("rate of the card", peak_rate) if device == "cuda" else None
    rows = []
    for n in arguments.rows:
        for width, dtype in itertools.product((384, 768), (torch.float32, torch.bfloat16)):
            row = attempt(f"N={n} D={width} {dtype}", lambda a=(n, width, dtype, device, rate): measure(*a))
            if row:
                rows.append(row)
                print(f"     {row}", flush=True)
            if device == "cuda":
                torch.cuda.empty_cache()
    if device == "cuda":
        for n in (128, 1024):
            attempt(f"CUDA graph N={n}", lambda n=n: replayed(n, 384))
        for n in (128, 4096):
            attempt(f"profile N={n}", lambda n=n: profile(n, 768))
        attempt("ResNet-50 step", lambda: training_step(device))
    print(f"\nRKD-DA, forward and backward, student of width D, teacher of 2 D, on {name}")
    print(table(rows))
    if rate:
        print(
            f"useful: {USEFUL} operations for each of N^3 / 2 triples, forward and backward; executed: {EXECUTED}, as"
        )
        print(f"each cosine is computed thrice; in percent of {rate / 1e12:.1f} TFLOP/s, float32 at the highest clock")
    for width, dtype in itertools.product((384, 768), ("float32", "bfloat16")):
        power = exponent([r for r in rows if r["D"] == width and r["dtype"] == dtype])
        print(f"time grows as N^{power:.2f} from N = 1024 on, D={width} {dtype}")
    print(f"{failures} checks failed" if failures else "all checks passed")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
