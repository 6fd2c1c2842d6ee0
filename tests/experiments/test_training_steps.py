"""The losses inside what people train with: compiled steps, functional calls, checkpointed layers."""

import pytest
import torch
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from rkd_plugin import rkd_da_loss
from rkd_plugin.kernels import choose

every_kernel = pytest.mark.parametrize("impl", ["chunked", "reference"])


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


@pytest.mark.parametrize("agrees", [True, False])
def test_which_kernel_auto_takes_is_a_constant_of_a_compiled_step(monkeypatch, agrees):
    monkeypatch.setattr(choose, "_AGREES", {torch.device("cpu"): agrees})
    torch._dynamo.reset()  # a constant has no guard
    compiled = torch.compile(
        lambda x: x * 2 if choose._fused_agrees(x.device) else x, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(torch.ones(3)), torch.ones(3) * (2 if agrees else 1))
