"""The choice of the kernel: the requested one, or the fastest one that agrees with the others on this device."""

from __future__ import annotations

import importlib.util
import warnings
from types import ModuleType

import torch
from torch import Tensor

from rkd_plugin.kernels import chunked, reference
from rkd_plugin.kernels.derivatives import first_only

_KERNELS: dict[str, ModuleType] = {"chunked": chunked, "reference": reference}  # those that run anywhere
_HAS_TRITON = importlib.util.find_spec("triton") is not None  # looked up, not imported


def choose(name: str, impl: str, device: torch.device) -> ModuleType:
    """The kernel file: the requested one, or for ``"auto"`` the fastest one that works on ``device``.

    Args:
        name: of the loss, for error messages.
        impl: ``"auto"``, ``"reference"``, ``"chunked"`` or ``"fused"``.
        device: of the embeddings.

    Raises:
        RuntimeError: if ``"fused"`` is requested and cannot run here.
    """
    if impl == "auto":
        impl = "fused" if device.type == "cuda" and _HAS_TRITON and _fused_agrees(device) else "chunked"
    if impl != "fused":
        return _KERNELS[impl]
    if not _HAS_TRITON:
        raise RuntimeError(f"{name}: expected Triton for impl 'fused', found none; use impl='chunked'")
    from rkd_plugin.kernels import fused

    if device.type != "cuda" and not (device.type == "cpu" and fused.INTERPRETED):
        raise RuntimeError(
            f"{name}: expected tensors on a CUDA device for impl 'fused', got {device}; use impl='chunked'"
        )
    return fused


def differentiable(name: str, kernel: ModuleType, student: Tensor) -> Tensor:
    """``student`` as input of ``kernel``: unchanged for ``reference``; for the others a second derivative raises.

    Raises:
        RuntimeError: as `first_only`.
    """
    if kernel is reference:
        return student
    where = f"{name}: impl '{kernel.__name__.rpartition('.')[2]}'"
    return first_only(student, where, "use impl='reference'")


_AGREES: dict[torch.device, bool] = {}


def _fused_agrees(device: torch.device) -> bool:
    """Whether ``fused`` agrees with ``chunked`` on this device, tested once with a small batch.

    Triton compiles separately for each kind of GPU, and ``"auto"`` must not fail or be wrong on an untested one.
    """
    if device in _AGREES:
        return _AGREES[device]
    try:
        from rkd_plugin.kernels import fused

        generator = torch.Generator().manual_seed(0)
        student, teacher = (torch.randn(40, width, generator=generator) for width in (3, 5))
        student[0] *= 1e6  # tiles with this row use the path for distances of very different lengths
        found = []
        for kernel in (fused, chunked):
            with torch.inference_mode(False), torch.enable_grad():
                leaf = student.detach().clone().to(device).requires_grad_()
                sums = kernel.angle(kernel.relations(leaf), kernel.relations(teacher.to(device)), 0.5)
                found.append((sums.detach(), *torch.autograd.grad(sums.sum(), leaf)))
        # float32 rounds by 6e-8; sums of 1600 terms lose less than two digits of that.
        agrees = all(bool((x - y).abs().max() < 1e-5 * y.abs().max()) for x, y in zip(*found, strict=True))
        reason = "its values differ"
    except Exception as error:  # Triton and drivers raise many types
        agrees, reason = False, f"{type(error).__name__}: {error}"
    if not agrees:
        warnings.warn(f"impl 'fused' cannot be used on {device} ({reason}); 'auto' uses 'chunked'", stacklevel=2)
    _AGREES[device] = agrees
    return agrees


# The effect of torch.compiler.assume_constant_result, which would import the compiler with the package.
_fused_agrees._dynamo_marked_constant = True  # type: ignore[attr-defined]
