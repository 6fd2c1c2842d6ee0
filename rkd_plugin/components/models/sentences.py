"""Networks from tokens to the embedding of a text: a sentence encoder, its first layers, or a table of its words."""

from __future__ import annotations

import json

import torch
import torchvision  # noqa: F401  before torchdistill, whose registries look for it in sys.modules
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import embedding_bag
from torchdistill.models.registry import register_model

from rkd_plugin.components.datasets.texts import encoder_folder
from rkd_plugin.teacher_bank import Bank

PADDING = 0  # the token that fills up
ROWS = 32  # texts in a forward pass


@register_model  # type: ignore[untyped-decorator]
def sentence_network(
    encoder: str, layers: int | None = None, embedding_dim: int | None = None, pca_bank: str | None = None
) -> nn.Module:
    """A sentence encoder, or a smaller network made of it.

    Args:
        encoder: a folder of sentence-transformers, or a package with one; see `encoder_folder`.
        layers: number of the encoder's first layers; None for all of them; 0 for its words alone, `WordTable`.
        embedding_dim: width of the embedding, by PCA: of the words with ``layers=0``, else of ``pca_bank``; None for
            the encoder's own width.
        pca_bank: a teacher bank of the encoder, for its PCA.

    Raises:
        FileNotFoundError: if there is no such encoder or bank.
        ModuleNotFoundError: if the extra ``rkd-plugin[text]`` is not installed.
        ValueError: if a width is given without vectors for the PCA.
    """
    if layers == 0:
        return WordTable(encoder, embedding_dim)
    network = SentenceEncoder(encoder, layers)
    if embedding_dim is None:
        return network
    if pca_bank is None:
        raise ValueError(
            f"sentence_network: expected embedding_dim=None, or a pca_bank for the PCA to {embedding_dim}, got none"
        )
    bank = Bank(pca_bank)
    mean, directions = principal(bank.read(range(bank.count))[0], embedding_dim)
    projection = nn.Linear(*directions.shape)
    projection.weight.data, projection.bias.data = directions.T.contiguous(), -mean @ directions
    return nn.Sequential(network, projection)


class WordTable(nn.Module):
    """The mean of the embeddings of a text's words, which start as the PCA of an encoder's word embeddings.

    Args:
        encoder: see `encoder_folder`.
        embedding_dim: width; None for the encoder's own.
    """

    is_word: Tensor

    def __init__(self, encoder: str, embedding_dim: int | None) -> None:
        super().__init__()
        folder = encoder_folder(encoder)
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            (name,) = (name for name in file.keys() if name.endswith("word_embeddings.weight"))  # noqa: SIM118
            words = file.get_tensor(name).float()
        if embedding_dim is not None:
            mean, directions = principal(words, embedding_dim)
            words = (words - mean) @ directions
        self.words = nn.Parameter(words)
        known = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
        is_word = torch.ones(len(words))
        is_word[[token["id"] for token in known if token["special"]]] = 0.0  # padding, unknown words, separators
        self.register_buffer("is_word", is_word, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(N, L) -> (N, embedding_dim)``; zeros for a text without words."""
        tokens = tokens[:, : max(int((tokens != PADDING).sum(1).amax()), 1)]
        counted = self.is_word[tokens]
        sums = embedding_bag(tokens, self.words, per_sample_weights=counted, mode="sum")
        return sums / counted.sum(1, keepdim=True).clamp(min=1.0)


class SentenceEncoder(nn.Module):
    """An encoder of sentence-transformers, or its first layers with its pooling.

    Args:
        encoder: see `encoder_folder`.
        layers: number of layers; None for all.
    """

    def __init__(self, encoder: str, layers: int | None = None) -> None:
        super().__init__()
        folder = encoder_folder(encoder)
        if torch.get_default_device().type == "meta":
            raise RuntimeError("an encoder is loaded with its weights")
        try:
            from sentence_transformers import SentenceTransformer
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "expected sentence-transformers for a sentence encoder, found none; install rkd-plugin[text]"
            ) from error
        self.encoder = SentenceTransformer(str(folder), device="cpu")
        blocks = next(module for module in self.encoder.modules() if isinstance(module, nn.ModuleList))
        if layers is not None:
            del blocks[layers:]

    def forward(self, tokens: Tensor) -> Tensor:
        """``(N, L) -> (N, D)``, in parts of texts of about one length, without their padding."""
        lengths = (tokens != PADDING).sum(1)
        order = lengths.argsort(stable=True)
        parts = [tokens[rows, : int(lengths[rows[-1]])] for rows in torch.split(order, ROWS)]
        outputs = [
            self.encoder({"input_ids": part, "attention_mask": (part != PADDING).long()})["sentence_embedding"]
            for part in parts
        ]
        return torch.cat(outputs)[order.argsort()]


def principal(rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The mean ``(D,)`` of rows ``(N, D)``, and their ``width`` principal directions ``(D, width)``.

    Raises:
        ValueError: if ``width`` is not from 1 to D.

    Example:
        >>> mean, directions = principal(torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 0.1]]), 1)
        >>> mean, directions.abs().round(decimals=2)
        (tensor([2.0000, 0.0333]), tensor([[1.],
                [0.]]))
    """
    if not 1 <= width <= rows.shape[1]:
        raise ValueError(
            f"sentence_network: expected embedding_dim from 1 to {rows.shape[1]}, the width of the vectors, got {width}"
        )
    mean = rows.mean(0)
    centred = (rows - mean).double()
    _, directions = torch.linalg.eigh(centred.T @ centred)  # in ascending order
    return mean, directions.flip(1)[:, :width].to(rows.dtype)
