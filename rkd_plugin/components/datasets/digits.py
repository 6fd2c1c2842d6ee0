"""Images that need no download."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset


class Digits(Dataset[tuple[Tensor, int]]):
    """The handwritten digits of scikit-learn: 1797 grey images of 8 x 8 pixels, without a download.

    Items are ``(image (1, 8, 8) in [0, 1], digit)``. ``classes`` selects the digits, so that a model can be tested on
    digits that it was not trained on.

    Example:
        >>> image, digit = Digits(classes=[5, 6])[0]
        >>> image.shape, digit
        (torch.Size([1, 8, 8]), 5)
    """

    class_count = 10

    def __init__(self, classes: Sequence[int] = tuple(range(10))) -> None:
        unknown = [digit for digit in classes if digit not in range(10)]
        if unknown or not classes:
            raise ValueError(f"Digits: classes must name digits from 0 to 9, got {list(classes)}")
        from sklearn.datasets import load_digits  # takes seconds, which only a run needs

        digits = load_digits()
        targets = torch.as_tensor(digits.target)
        chosen = torch.isin(targets, torch.tensor(list(classes)))
        images = torch.as_tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        self.images = images[chosen]
        self.targets: list[int] = targets[chosen].tolist()

    def all_classes(self) -> Digits:
        """The same with all digits."""
        return Digits()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The image and its digit."""
        return self.images[index], self.targets[index]
