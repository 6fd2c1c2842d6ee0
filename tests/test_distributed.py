"""The losses of the global batch: three real processes (gloo) compared with one process that has all rows."""

from __future__ import annotations

import itertools
import queue
import traceback
from datetime import timedelta

import pytest
import torch
from relations import entropy, spread, turn
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from rkd_plugin import RelationMemory, relational_loss, rkd_angle_loss, rkd_da_loss, rkd_distance_loss
from rkd_plugin import distributed as global_batch
from rkd_plugin.kernels import chunked, native

PROCESSES = 3
RELATIONS = {
    "similarity preserving": {"potential": "dot", "penalty": "mse"},
    "row softmax": {"potential": "cosine", "penalty": "kl", "scale": "softmax", "temperature": 0.2},
    "mean over all pairs": {"potential": "squared_distance", "penalty": "l1"},
    "single rows": {"potential": entropy, "penalty": "mse"},
    "function of two": {"potential": spread, "scale": "mean"},
    "function of three": {"potential": turn},
    "angles": {"potential": "angle", "penalty": "l1", "reduction": "tuple_mean"},
    "neighbours": {"neighbours": 3},
    "angles of neighbours": {"potential": "angle", "neighbours": 3, "reduction": "anchor"},
    "every row is a neighbour": {"potential": "angle", "neighbours": 9},
    "anchors": {"potential": "cosine", "penalty": "mse", "anchors": 1.0},
}
LOSSES = [rkd_distance_loss, rkd_angle_loss, rkd_da_loss]
SIZES = {"one": [7], "even": [5, 5], "uneven": [3, 7], "empty": [0, 4], "three": [4, 4, 4], "ragged": [6, 0, 3]}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # of the gradient

every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)


def serve(rank, folder, tasks, results):
    """The loop of each process: it runs the calls of its queue, and returns results or tracebacks."""
    torch.set_num_threads(1)
    limit = timedelta(seconds=30)  # if one process fails, the others stop waiting
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES, timeout=limit
    )
    groups = {n: distributed.new_group(list(range(n))) for n in range(1, PROCESSES)}
    groups[PROCESSES] = True
    for call, arguments in iter(tasks.get, None):
        try:
            results.put((rank, call(rank, groups, *arguments)))
        except Exception:
            results.put((rank, traceback.format_exc()))
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory):
    """Runs ``call(rank, groups, *arguments)`` on all processes -> the result of each."""
    context = multiprocessing.get_context("spawn")
    tasks, results = [context.Queue() for _ in range(PROCESSES)], context.Queue()
    folder = tmp_path_factory.mktemp("store")
    processes = [
        context.Process(target=serve, args=(rank, folder, tasks[rank], results), daemon=True)
        for rank in range(PROCESSES)
    ]
    for process in processes:
        process.start()

    def call(function, *arguments):
        for inbox in tasks:
            inbox.put((function, arguments))
        found = {}
        while len(found) < PROCESSES:
            try:
                rank, result = results.get(timeout=300)  # a busy machine needs some of it to start
            except queue.Empty:
                raise AssertionError(f"only {sorted(found)} answered: {found}") from None
            assert not isinstance(result, str), result
            found[rank] = result
        return [found[rank] for rank in range(PROCESSES)]

    yield call
    for inbox in tasks:
        inbox.put(None)
    for process in processes:
        process.join(300)  # for a busy machine
    assert [process.exitcode for process in processes] == [0] * PROCESSES


def embeddings(rows, dtype=torch.float64):
    """Inputs ``(N, 7)``, the weights ``(7, 4)`` of the student's layer, and a wider teacher ``(N, 9)``."""
    generator = torch.Generator().manual_seed(rows)
    x, weights, teacher = (
        torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((rows, 7), (7, 4), (rows, 9))
    )
    return x, weights, teacher.to(dtype)


def own_rows(rank, sizes):
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def value_and_gradient(loss, x, weights, teacher, rows=slice(None), **options):
    """Value, and gradient by the weights of a layer, summed in float64 for every dtype of the rows."""
    weights = weights.clone().requires_grad_()
    value = loss((x[rows] @ weights).to(teacher.dtype), teacher[rows], **options)
    value.double().sum().backward()
    return value.detach(), weights.grad


def share(rank, groups, loss, sizes, dtype, options):
    """On one process with its own rows: the value, and the mean of the gradients over ranks, as DDP computes it."""
    processes = len(sizes)
    if rank >= processes:
        return None
    group = groups[processes]
    value, gradient = value_and_gradient(
        loss, *embeddings(sum(sizes), dtype), own_rows(rank, sizes), gather=group, **options
    )
    distributed.all_reduce(gradient, group=None if group is True else group)
    return value, gradient / processes


def assert_as_one_process(found, loss, sizes, dtype=torch.float64, **options):
    value, gradient = value_and_gradient(loss, *embeddings(sum(sizes), dtype), **options)
    for ours in found[: len(sizes)]:
        torch.testing.assert_close(ours[0], value, rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=1e-7)
        limit = TOLERANCE[dtype] * gradient.abs().max()
        assert (ours[1] - gradient).abs().max() <= limit


@every_loss
@pytest.mark.parametrize(
    "sizes",
    [pytest.param(n, id=name, marks=[pytest.mark.processes] * (name != "uneven")) for name, n in SIZES.items()],
)
def test_as_one_process_with_all_rows(everywhere, loss, sizes):
    options = {"reduction": "anchor", "huber_delta": 0.3}
    assert_as_one_process(everywhere(share, loss, sizes, torch.float64, options), loss, sizes, **options)


@pytest.mark.processes
@pytest.mark.parametrize("reduction", ["mean", "tuple_mean", "sum"])
def test_reductions(everywhere, reduction):
    sizes, options = SIZES["ragged"], {"reduction": reduction}
    assert_as_one_process(everywhere(share, rkd_da_loss, sizes, torch.float64, options), rkd_da_loss, sizes, **options)


@pytest.mark.processes
@pytest.mark.parametrize("sizes", [SIZES["uneven"], SIZES["ragged"]], ids=["uneven", "ragged"])
@pytest.mark.parametrize("name", RELATIONS)
def test_any_relation(everywhere, name, sizes):
    options = RELATIONS[name]
    found = everywhere(share, relational_loss, sizes, torch.float64, options)
    assert_as_one_process(found, relational_loss, sizes, **options)


def with_memory(rank, groups):
    """Two steps of a loss with a memory on all processes: its rows, and the last value and gradient."""
    sizes, memory, options = SIZES["ragged"], RelationMemory(6, gather=True), {"potential": "cosine", "penalty": "mse"}
    for _ in range(2):
        found = share(rank, groups, relational_loss, sizes, torch.float64, options | {"references": memory})
        x, weights, teacher = embeddings(sum(sizes))
        rows = own_rows(rank, sizes)
        memory.update((x @ weights)[rows], teacher[rows])
    return found, [side.clone() for side in memory.references]


@pytest.mark.processes
def test_memory_is_the_same_on_every_process(everywhere):
    sizes = SIZES["ragged"]
    found = everywhere(with_memory)
    x, weights, teacher = embeddings(sum(sizes))
    last = [(x @ weights)[-6:], teacher[-6:]]
    for _, references in found:
        torch.testing.assert_close(references, last, rtol=1e-12, atol=1e-12)
    options = {"potential": "cosine", "penalty": "mse", "references": tuple(last)}
    assert_as_one_process([each for each, _ in found], relational_loss, sizes, **options)


@pytest.mark.processes
@pytest.mark.parametrize("narrow", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", [SIZES["uneven"], SIZES["ragged"]], ids=["uneven", "ragged"])
def test_narrow_embeddings(everywhere, sizes, narrow):
    assert_as_one_process(everywhere(share, rkd_da_loss, sizes, narrow, {}), rkd_da_loss, sizes, narrow)


@pytest.mark.processes
@pytest.mark.parametrize("rows", [0, 1, 2, 3])
def test_few_rows(everywhere, rows):
    sizes = [rows, 0, 0]
    assert_as_one_process(everywhere(share, rkd_da_loss, sizes, torch.float64, {}), rkd_da_loss, sizes)


def share_of_kernel(rank, groups, kernel):
    library = native._library
    if kernel == "strips":
        native._library = lambda: None
    try:
        impl = "reference" if kernel == "reference" else "chunked"
        return share(rank, groups, rkd_da_loss, SIZES["ragged"], torch.float64, {"impl": impl})
    finally:
        native._library = library


@pytest.mark.processes
@pytest.mark.parametrize("kernel", ["reference", "chunked", "strips"])
def test_every_kernel(everywhere, kernel):
    assert_as_one_process(everywhere(share_of_kernel, kernel), rkd_da_loss, SIZES["ragged"])


def through_ddp(rank, groups):
    sizes = SIZES["three"]
    x, weights, teacher = embeddings(sum(sizes))
    layer = nn.Linear(7, 4, bias=False).double()
    layer.weight.data = weights.T.clone()
    rows = own_rows(rank, sizes)
    model = DistributedDataParallel(layer)
    rkd_da_loss(model(x[rows]), teacher[rows], gather=True).backward()
    return layer.weight.grad.T.contiguous()


@pytest.mark.processes
def test_distributed_data_parallel(everywhere):
    _, gradient = value_and_gradient(rkd_da_loss, *embeddings(sum(SIZES["three"])))
    for ours in everywhere(through_ddp):
        torch.testing.assert_close(ours, gradient, rtol=1e-12, atol=1e-12)


def vertices_of(rank, groups, sizes, options):
    seen, original = [], chunked.sums

    def sums(student, teacher, huber_delta, distance, angle):
        seen.append(len(angle))
        return original(student, teacher, huber_delta, distance, angle)

    chunked.sums = sums
    try:
        share(rank, groups, rkd_angle_loss, sizes, torch.float64, options)
    finally:
        chunked.sums = original
    return seen


@pytest.mark.processes
@pytest.mark.parametrize(("options", "vertices"), [({}, [4, 3, 3]), ({"anchors": 4}, [2, 1, 1])])
def test_the_cubic_work_is_distributed_evenly(everywhere, options, vertices):
    """Even if the rows are not."""
    assert everywhere(vertices_of, [9, 0, 1], options) == [[n] for n in vertices]


def collectives_of(rank, groups):
    count = {}
    spied = [(global_batch, "_all_gather"), (global_batch, "_reduce_scatter")]
    spied += [(distributed, name) for name in ("all_reduce", "all_gather", "broadcast", "barrier")]
    originals = [getattr(module, name) for module, name in spied]

    def counted(name, original):
        def call(*args, **options):
            count[name] = count.get(name, 0) + 1
            return original(*args, **options)

        return call

    for (module, name), original in zip(spied, originals, strict=True):
        setattr(module, name, counted(name, original))
    try:
        x, weights, teacher = embeddings(12)
        student = (x[own_rows(rank, [4, 4, 4])] @ weights).requires_grad_()
        value = rkd_da_loss(student, teacher[own_rows(rank, [4, 4, 4])], gather=True)
        forward = dict(count)
        value.backward()
        return forward, count
    finally:
        for (module, name), original in zip(spied, originals, strict=True):
            setattr(module, name, original)


@pytest.mark.processes
def test_communication(everywhere):
    """An all_gather of the shapes and of each side, an all_reduce of the losses, a reduce_scatter of the gradient."""
    forward = {"_all_gather": 3, "all_reduce": 1}
    assert everywhere(collectives_of) == [(forward, forward | {"_reduce_scatter": 1})] * PROCESSES


def gathered_bytes(rank, groups, dtype):
    seen, original = [], global_batch._all_gather

    def counted(whole, own, **options):
        seen.append(whole.numel() * whole.element_size())
        return original(whole, own, **options)

    global_batch._all_gather = counted
    try:
        share(rank, groups, rkd_da_loss, [4, 4, 4], dtype, {})
    finally:
        global_batch._all_gather = original
    return seen[1:]


@pytest.mark.processes
@pytest.mark.parametrize(("sent", "size"), [(torch.float64, 8), (torch.float32, 4), (torch.bfloat16, 2)])
def test_exchanged_bytes(everywhere, sent, size):
    """Each side is sent in its own dtype."""
    assert everywhere(gathered_bytes, sent) == [[12 * 4 * size, 12 * 9 * size]] * PROCESSES


def drawn(rank, groups, sizes, options, seed):
    torch.manual_seed(seed + (1000 * rank if rank else 0))  # only the generator of rank 0 is used
    return share(rank, groups, rkd_angle_loss, sizes, torch.float64, options)


@pytest.mark.processes
@pytest.mark.parametrize("anchors", [1, 4, 0.3, 0.99999, 100])
def test_anchors_are_the_same_on_every_process(everywhere, anchors):
    sizes, options = SIZES["ragged"], {"anchors": anchors}
    found = everywhere(drawn, sizes, options, 3)
    for value, gradient in found[1:]:
        assert torch.equal(value, found[0][0])
        assert torch.equal(gradient, found[0][1])
    assert torch.equal(everywhere(drawn, sizes, options, 3)[0][0], found[0][0])
    if anchors in (0.99999, 100):  # all of them
        assert_as_one_process(found, rkd_angle_loss, sizes)
    else:
        assert any(everywhere(drawn, sizes, options, seed)[0][0] != found[0][0] for seed in (4, 5, 6))


@pytest.mark.parametrize("loss", [rkd_angle_loss, rkd_da_loss])
@pytest.mark.parametrize(("anchors", "number", "reduction"), [(1, 1, "mean"), (2, 2, "tuple_mean"), (0.5, 3, "anchor")])
def test_anchors_are_unbiased(loss, anchors, number, reduction, monkeypatch):
    """The mean over all equally likely draws is the loss of all anchors, also for the gradient."""
    case = embeddings(6)
    found = []
    for chosen in itertools.combinations(range(6), number):
        monkeypatch.setattr(torch, "randperm", lambda n, chosen=chosen, **_: torch.tensor([*chosen, *range(number, n)]))
        found.append(value_and_gradient(loss, *case, reduction=reduction, anchors=anchors))
    monkeypatch.undo()
    for ours, whole in zip(zip(*found, strict=True), value_and_gradient(loss, *case, reduction=reduction), strict=True):
        torch.testing.assert_close(torch.stack(ours).mean(0), whole, rtol=1e-12, atol=1e-13)


def test_every_row_is_an_anchor_equally_often():
    """Within five standard deviations."""
    x, weights, teacher = embeddings(6)
    draws, counts = 600, torch.zeros(6)
    torch.manual_seed(0)
    for _ in range(draws):
        counts += rkd_angle_loss(x @ weights, teacher, anchors=2, reduction="anchor") != 0
    assert counts.sum() == 2 * draws
    assert (counts - draws / 3).abs().max() < 5 * (draws * 2 / 9) ** 0.5


def test_a_single_process(monkeypatch):
    case = embeddings(6)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for ours, alone in zip(*(value_and_gradient(rkd_da_loss, *case, gather=g) for g in (True, False)), strict=True):
        assert torch.equal(ours, alone)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"expected an initialised torch.distributed for gather, got none; call"):
        value_and_gradient(rkd_da_loss, *case, gather=True)


def errors_of(rank, groups, what):
    student, teacher = torch.randn(3, 4, requires_grad=True), torch.randn(3, 9)
    group = True
    if what == "width" and rank == 1:
        teacher = torch.randn(3, 8)
    elif what == "dtype" and rank == 1:
        student = student.detach().double().requires_grad_()
    elif what == "gradient" and rank == 2:
        student = student.detach()
    elif what == "group":
        group = "all"
    elif what == "outside":
        group = groups[1]
    try:
        return [f"{rkd_da_loss(student, teacher, gather=group).item() > 0}"]
    except (TypeError, ValueError, RuntimeError) as error:
        return [f"{type(error).__name__}: {error}"]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "width",
            "ValueError: rkd_da_loss: expected the teacher's width to be the same on all ranks, got [9, 8, 9] by rank",
        ),
        (
            "dtype",
            "ValueError: rkd_da_loss: expected the student's dtype to be the same on all ranks, got ['torch.float32', "
            "'torch.float64', 'torch.float32'] by rank",
        ),
        (
            "gradient",
            "ValueError: rkd_da_loss: expected the need of a gradient to be the same on all ranks, got [1, 1, 0] by "
            "rank",
        ),
        ("group", "TypeError: rkd_da_loss: expected gather to be True, False or a process group, got 'all'"),
    ],
    ids=lambda x: x.split(":")[0],
)
def test_disagreement_is_an_error_on_every_rank(everywhere, what, message):
    assert everywhere(errors_of, what) == [[message]] * PROCESSES


@pytest.mark.processes
def test_a_group_in_which_a_process_has_no_rank(everywhere):
    error = (
        "RuntimeError: rkd_da_loss: expected a group in which this process has a rank for gather, got another; pass "
        "one of its groups"
    )
    assert everywhere(errors_of, "outside") == [["True"], [error], [error]]


def adapter_share(rank, groups, adapter, options):
    sizes = SIZES["uneven"]
    if rank >= len(sizes):
        return None
    loss = ADAPTERS[adapter](gather=groups[len(sizes)], **options)
    value, gradient = value_and_gradient(loss, *embeddings(sum(sizes)), own_rows(rank, sizes))
    distributed.all_reduce(gradient, group=groups[len(sizes)])
    return value, gradient / len(sizes)


# The hosts are imported where they are used: the processes of the fast tests start without them.


def torchdistill_loss(**options):
    from rkd_plugin.adapters import torchdistill

    loss = torchdistill.RKDDALoss(student_module_path="fc", teacher_module_path=".", **options)
    return lambda student, teacher: loss({"fc": {"output": student}}, {".": {"output": teacher}})


def pml_loss(**options):
    from pytorch_metric_learning.reducers import MeanReducer, MultipleReducers

    from rkd_plugin.adapters import pml

    reducer = MultipleReducers({"distance_loss": MeanReducer(), "angle_loss": MeanReducer()})
    loss = pml.RKDDALoss(reducer=reducer, **options)
    return lambda student, teacher: loss(student, ref_emb=teacher)


ADAPTERS = {"torchdistill": torchdistill_loss, "pml": pml_loss}


@pytest.mark.processes
@pytest.mark.parametrize("options", [{}, {"anchors": 1.0}], ids=["all", "anchors"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters(everywhere, adapter, options):
    assert_as_one_process(everywhere(adapter_share, adapter, options), rkd_da_loss, SIZES["uneven"])


def pml_empty(rank, groups):
    from rkd_plugin.adapters import pml

    return share(
        rank, groups, lambda s, t, gather: pml.RKDDALoss(gather=gather)(s, ref_emb=t), [0, 4], torch.float64, {}
    )


@pytest.mark.processes
def test_pml_on_a_process_without_rows(everywhere):
    assert_as_one_process(everywhere(pml_empty), rkd_da_loss, [0, 4])


@pytest.mark.parametrize("nested", [False, True])
def test_a_reducer_that_needs_all_labels_raises(nested):
    from pytorch_metric_learning.reducers import ClassWeightedReducer, MeanReducer, MultipleReducers

    from rkd_plugin.adapters import pml

    reducer = ClassWeightedReducer(torch.ones(2))
    if nested:
        reducer = MultipleReducers({"distance_loss": reducer, "angle_loss": MeanReducer()})
    pml.RKDDALoss(reducer=reducer)
    with pytest.raises(ValueError, match=r"RKDDALoss: expected a reducer .*, got ClassWeightedReducer.*Distributed"):
        pml.RKDDALoss(reducer=reducer, gather=True)


def compiled_step(rank, groups):
    x, weights, teacher = embeddings(12)
    rows = own_rows(rank, SIZES["three"])

    @torch.compile(backend="aot_eager")
    def step(weights):
        return rkd_da_loss(x[rows] @ weights, teacher[rows], gather=True)

    weights = weights.requires_grad_()
    value = step(weights)
    value.backward()
    distributed.all_reduce(weights.grad)
    return value.detach(), weights.grad / PROCESSES


@pytest.mark.processes
def test_inside_a_compiled_step(everywhere):
    """With a graph break at the collective calls."""
    assert_as_one_process(everywhere(compiled_step), rkd_da_loss, SIZES["three"])


def second_derivatives_of(rank, groups, impl):
    """The gradient without and with ``create_graph``, and the error of a second derivative, or None."""
    x, weights, teacher = embeddings(12)
    rows = own_rows(rank, SIZES["three"])

    def loss(weights):
        return rkd_da_loss(torch.tanh(x[rows] @ weights), teacher[rows], gather=True, impl=impl)

    weights.requires_grad_()
    (plain,) = torch.autograd.grad(loss(weights), weights)
    (gradient,) = torch.autograd.grad(loss(weights), weights, create_graph=True)
    try:
        torch.autograd.grad(gradient.sum(), weights)
    except RuntimeError as error:
        return plain, gradient.detach(), str(error)
    return plain, gradient.detach(), None


@pytest.mark.processes
@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_a_second_derivative_is_an_error_on_every_rank(everywhere, impl):
    for plain, gradient, error in everywhere(second_derivatives_of, impl):
        assert torch.equal(plain, gradient)
        assert error.startswith("rkd_da_loss: ")
        assert error.endswith("use impl='reference'" if impl == "chunked" else "use gather=False")
        assert "expected a first derivative in reverse mode, got a second one" in error
