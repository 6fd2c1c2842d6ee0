"""The losses inside what people train with: compiled steps, functional calls, checkpointed layers, cached teachers."""

import pytest
import torch
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from rkd_plugin import functional, rkd_angle_loss, rkd_da_loss, rkd_distance_loss
from rkd_plugin.kernels import choose, chunked
from rkd_plugin.kernels.choose import _KERNELS

every_kernel = pytest.mark.parametrize("impl", sorted(_KERNELS))


def batch():
    return torch.randn(20, 6), torch.randn(20, 5)


@pytest.fixture
def student():
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))


def gradients(student, loss):
    student.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in student.parameters()]


@every_kernel
def test_in_a_compiled_training_step(student, impl):
    """Forward, loss, backward and update in one compiled function, without a graph break before backward."""
    images, teacher = batch()

    def step(images, teacher):
        return rkd_da_loss(student(images), teacher, impl=impl)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        expected = gradients(student, step(images, teacher))
        torch.testing.assert_close(gradients(student, compiled(images, teacher)), expected)
        with torch.no_grad():
            for parameter, gradient in zip(student.parameters(), expected, strict=True):
                parameter -= 0.1 * gradient


@every_kernel
def test_under_functional_call(student, impl):
    images, teacher = batch()
    expected = gradients(student, rkd_da_loss(student(images), teacher, impl=impl))
    weights = {name: value.detach().clone().requires_grad_() for name, value in student.named_parameters()}
    loss = rkd_da_loss(functional_call(student, weights, (images,)), teacher, impl=impl)
    torch.testing.assert_close(list(torch.autograd.grad(loss, list(weights.values()))), expected)


@every_kernel
@pytest.mark.parametrize("reentrant", [False, True])
def test_with_gradient_checkpointing(student, impl, reentrant):
    """Of the student, and of student and loss together."""
    images, teacher = batch()
    images.requires_grad_()  # a reentrant checkpoint needs an input that does
    expected = gradients(student, rkd_da_loss(student(images), teacher, impl=impl))
    embeddings = checkpoint(student, images, use_reentrant=reentrant)
    torch.testing.assert_close(gradients(student, rkd_da_loss(embeddings, teacher, impl=impl)), expected)

    def whole(images):
        return rkd_da_loss(student(images), teacher, impl=impl)

    torch.testing.assert_close(gradients(student, checkpoint(whole, images, use_reentrant=reentrant)), expected)


# A teacher that is given again


@pytest.fixture
def computed(monkeypatch):
    """Widths of the batches whose relations were computed."""
    seen, original = [], chunked.relations
    monkeypatch.setattr(chunked, "relations", lambda x: seen.append(x.shape[1]) or original(x))
    monkeypatch.setattr(functional, "_KEPT", [])
    return seen


def test_a_teacher_given_again_is_not_computed_again(computed):
    """Several losses, several students."""
    images, teacher = batch()
    expected = [rkd_distance_loss(images, teacher.clone()), rkd_angle_loss(images, teacher.clone())]
    computed.clear()
    assert [rkd_distance_loss(images, teacher), rkd_angle_loss(images, teacher)] == expected
    assert rkd_da_loss(images * 2, teacher) == rkd_da_loss(images * 2, teacher.clone())
    assert computed == [6, 5, 6, 6, 6, 5]  # the last is the clone


def test_a_teacher_that_was_written_to_is_computed_again(computed):
    images, teacher = batch()
    rkd_da_loss(images, teacher)
    teacher[0] += 1
    assert rkd_da_loss(images, teacher) == rkd_da_loss(images, teacher.clone())
    assert computed.count(5) == 3


def test_a_teacher_that_numpy_wrote_to_is_computed_again(computed):
    images, teacher = batch()
    rkd_da_loss(images, teacher)
    teacher.numpy()[0] += 1
    assert rkd_da_loss(images, teacher) == rkd_da_loss(images, teacher.clone())


def test_a_teacher_that_is_gone_leaves_nothing(computed):
    images, teacher = batch()
    rkd_da_loss(images, teacher)
    assert len(functional._KEPT) == 1
    del teacher
    assert functional._KEPT == []


def test_kernels_do_not_share_what_was_computed(computed):
    images, teacher = batch()
    values = [rkd_da_loss(images, teacher, impl=impl) for impl in ("chunked", "reference", "chunked")]
    torch.testing.assert_close(values[0], values[1])
    assert computed == [6, 5, 6, 5]


@pytest.mark.parametrize("of_teacher", [False, True])
def test_nothing_computed_for_inference_is_trained_with(student, computed, of_teacher):
    images, teacher = batch()
    with torch.inference_mode():
        if of_teacher:
            teacher = teacher * 1
        rkd_da_loss(images, teacher)
    rkd_da_loss(student(images), teacher.clone() if of_teacher else teacher).backward()
    assert all(parameter.grad.isfinite().all() for parameter in student.parameters())


def test_a_compiled_step_computes_its_own_teacher(student, computed):
    images, teacher = batch()
    rkd_da_loss(images, teacher)
    kept = list(functional._KEPT)
    compiled = torch.compile(lambda x, t: rkd_da_loss(student(x), t), fullgraph=True, backend="aot_eager")
    first = compiled(images, teacher)
    teacher *= 2
    teacher[0] -= 1
    assert compiled(images, teacher) != first
    assert kept == functional._KEPT


@pytest.mark.parametrize("agrees", [True, False])
def test_which_kernel_auto_takes_is_a_constant_of_a_compiled_step(monkeypatch, agrees):
    monkeypatch.setattr(choose, "_AGREES", {torch.device("cpu"): agrees})
    torch._dynamo.reset()  # a constant has no guard
    compiled = torch.compile(
        lambda x: x * 2 if choose._fused_agrees(x.device) else x, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(torch.ones(3)), torch.ones(3) * (2 if agrees else 1))
