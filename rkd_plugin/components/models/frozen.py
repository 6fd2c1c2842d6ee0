"""Frozen parts of a network: no training, no backward pass, and no second computation for an image seen before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from hashlib import blake2b
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rkd_plugin.teacher_bank.fingerprint import of_weights


def freeze_until(network: nn.Module, path: str) -> list[str]:
    """Freeze a module and all that are registered before it, with the parameters of their parents.

    Nothing is stored for a backward pass through them.

    Returns:
        The names of the frozen modules, which belong in eval mode.

    Raises:
        ValueError: if there is no such module.

    Example:
        >>> network = nn.Sequential(nn.Linear(1, 1), nn.Dropout(), nn.Linear(1, 1))
        >>> freeze_until(network, "1")
        ['0', '1']
        >>> [parameter.requires_grad for parameter in network.parameters()]
        [False, False, True, True]
    """
    names = [name for name, _ in network.named_modules()]
    inside = [index for index, name in enumerate(names) if name == path or name.startswith(f"{path}.")]
    if not inside:
        known = ", ".join(name for name, _ in network.named_children())
        raise ValueError(f"frozen_until: expected a module of the network, got {path!r}; the first level is {known}")
    before = names[: inside[-1] + 1]
    for name in before:
        for parameter in network.get_submodule(name).parameters(recurse=False):
            parameter.requires_grad_(False)
    return [name for name in before if name and not path.startswith(f"{name}.")]


class Memory:
    """What a frozen network computed for each image, by the image's bytes; networks of equal weights share it.

    A process that trains several students computes their frozen part, and the outputs of their teacher, once. The
    augmentation must give few different images, such as an image and its mirror image.

    Args:
        size: number of images that are kept; further ones are computed each time.
        computed: what the network computes, besides its weights, such as its arguments.

    Example:
        >>> memory, images = Memory(100, "the mean"), torch.rand(3, 1, 2, 2)
        >>> seen = []
        >>> def mean(new):
        ...     seen.append(len(new))
        ...     return new.mean((1, 2, 3))
        >>> outputs = [memory(part, dict, mean) for part in (images[:2], images)]
        >>> bool((outputs[1] == images.mean((1, 2, 3))).all()), seen
        (True, [2, 1])
    """

    _shared: ClassVar[dict[tuple[str, str], dict[bytes, Tensor]]] = {}

    def __init__(self, size: int, computed: str) -> None:
        self.size = size
        self.computed = computed
        self._rows: dict[bytes, Tensor] | None = None

    def forget(self) -> None:
        """Find out at the next call what the weights are, as after loading them."""
        self._rows = None

    @torch.no_grad()
    def __call__(
        self, images: Tensor, weights: Callable[[], Mapping[str, Tensor]], compute: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """``(N, ...)``: ``compute(images)``, in which only new images are computed.

        Args:
            images: ``(N, C, H, W)``.
            weights: gives the weights of the network; called once.
            compute: a function of images ``(M, C, H, W)`` that treats each alone.
        """
        if self._rows is None:
            self._rows = self._shared.setdefault((self.computed, of_weights(weights())), {})
        keys = [blake2b(image.cpu().numpy().tobytes(), digest_size=16).digest() for image in images]
        new = {key: index for index, key in enumerate(keys) if key not in self._rows}
        computed = dict(zip(new, compute(images[list(new.values())]), strict=True)) if new else {}
        for key, row in computed.items():
            if len(self._rows) < self.size:
                self._rows[key] = row
        rows = torch.stack([computed[key] if key in computed else self._rows[key] for key in keys])
        is_last = rows.ndim == 4 and images.is_contiguous(memory_format=torch.channels_last)
        return rows.contiguous(memory_format=torch.channels_last) if is_last else rows


class Halves:
    """A network in two parts: up to a module, and from its output on.

    Args:
        network: a network that only passes its images through modules, in the order of their registration.
        path: of the last module of the first part.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> halves, rows = Halves(network, "1"), torch.rand(3, 2)
        >>> bool((halves.second(halves.first(rows)) == network(rows)).all())
        True
    """

    def __init__(self, network: nn.Module, path: str) -> None:
        self.network = network
        self.path = path
        self.skipped: list[nn.Module] = []
        inside = network
        for name in path.split("."):
            children = dict(inside.named_children())
            self.skipped += list(children.values())[: list(children).index(name)]
            inside = children[name]
        self.skipped.append(inside)
        self.is_checked = False

    def first(self, images: Tensor) -> Tensor:
        """The output of the module.

        Raises:
            ValueError: if the network is not such a chain, by its outputs for the first images.
        """
        found: list[Tensor] = []

        def stop(*called: Any) -> None:
            found.append(called[-1])
            raise StopIteration

        handle = self.skipped[-1].register_forward_hook(stop)
        try:
            with suppress(StopIteration):
                self.network(images)
        finally:
            handle.remove()
        if not self.is_checked:
            self.check(images, found[0])
            self.is_checked = True
        return found[0]

    @torch.no_grad()
    def check(self, images: Tensor, maps: Tensor) -> None:
        """Raise ValueError if the two parts give other outputs than the network."""
        whole = self.network(images)
        try:
            is_equal = bool((self.second(maps) - whole).abs().max() <= 1e-3 * whole.abs().max())
        except (RuntimeError, TypeError, ValueError):  # as what is left out had another kind of output
            is_equal = False
        if not is_equal:
            raise ValueError(
                f"remember: expected a network that passes images from module to module, got {self.path!r} in "
                f"{type(self.network).__name__}, which does more; set remember to 0"
            )

    def second(self, maps: Tensor) -> Tensor:
        """The output of the network, given that of the module."""
        for module in self.skipped:
            module.forward = _unchanged
        try:
            output: Tensor = self.network(maps)
        finally:
            for module in self.skipped:
                del module.forward
        return output


def _unchanged(maps: Tensor) -> Tensor:
    return maps
