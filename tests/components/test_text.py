"""Texts: their data sets, the networks from tokens to embeddings, and their metrics."""

from __future__ import annotations

import gzip
import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import normalize
from torch.utils.data import ConcatDataset

from rkd_plugin.components.datasets import ParallelTexts, ScoredPairs
from rkd_plugin.components.datasets.texts import encoder_folder
from rkd_plugin.components.models import sentence_network
from rkd_plugin.components.models.sentences import principal
from rkd_plugin.experiments.running.cosines import cosine_error, spearman, unrelated_cosine
from rkd_plugin.experiments.running.metrics import retrieval, texts
from tests.adapters.test_sentence_transformers import SPECIAL, TEXTS, WORDS, library, with_the_library, write_model

__all__ = ["library"]  # a fixture
CAPTIONS = {"a.1": ["a man runs", "the dog sleeps on the sofa"], "a.2": ["the man sits", "a dog"]}


@pytest.fixture
def encoder(tmp_path):
    """The folder of an encoder without its layers: a vocabulary, and a vector of 3 numbers for each word."""
    pytest.importorskip("tokenizers", reason="needs rkd-plugin[text]")
    folder = tmp_path / "encoder"
    folder.mkdir()
    special = [{"id": i, "content": word, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False} for i, word in enumerate(SPECIAL)]  # fmt: skip
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "added_tokens": special, "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
    }))  # fmt: skip
    (folder / "modules.json").write_text("[]")
    words = torch.randn(len(WORDS), 3)
    save_file({"embeddings.word_embeddings.weight": words}, folder / "model.safetensors")
    return folder


@pytest.fixture
def captions(tmp_path):
    for name, lines in CAPTIONS.items():
        with gzip.open(tmp_path / f"{name}.gz", "wt", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
    return tmp_path


def words_of(tokens):
    return [WORDS[token] for token in tokens.tolist() if WORDS[token] not in SPECIAL]


def test_line_n_of_every_file_is_class_n(captions, encoder):
    data = ParallelTexts(captions, "a.*.gz", str(encoder))
    assert data.targets == [0, 0, 1, 1]
    assert data.class_count == 2
    assert [words_of(data[index][0]) for index in range(4)] == [
        ["a", "man", "runs"], ["the", "man", "sits"], ["the", "dog", "sleeps", "on", "the", "sofa"], ["a", "dog"]
    ]  # fmt: skip
    assert data.tokens.shape == (4, 64)
    assert ParallelTexts(captions, "a.*.gz", str(encoder), max_length=4, classes=1).tokens.shape == (2, 4)


def test_sentences_of_a_pair_are_neighbours(tmp_path, encoder):
    (tmp_path / "pairs.csv").write_text('"a man, runs",a man sits,2.5\nthe dog,the cat,1\n')
    data = ScoredPairs(tmp_path, "pairs.csv", str(encoder))
    assert data.scores == [2.5, 1.0]
    assert data.targets == [0, 0, 1, 1]
    assert words_of(data[1][0]) == ["a", "man", "sits"]


@pytest.mark.parametrize(
    ("files", "error", "words"),
    [
        ({}, FileNotFoundError, "expected files b.* in .*, found none"),
        ({"b.1": "a\n\na", "b.2": "a\na\na"}, ValueError, "got an empty line 2 in .*b.1$"),
        ({"b.1": "a", "b.2": "a\na"}, ValueError, "got 1 in b.1, 2 in b.2"),
    ],
)
def test_wrong_parallel_files(tmp_path, encoder, files, error, words):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(error, match=f"^ParallelTexts: .*{words}"):
        ParallelTexts(tmp_path, "b.*", str(encoder))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a,b,1\na,b", r"in line 2 of .*, got \['a', 'b'\]"),
        ("a,b,high", "in line 1 of"),
        ("a, ,1", "expected two texts in line 1"),
        (None, "expected a file .*c.csv, found none"),
    ],
)
def test_wrong_pairs(tmp_path, encoder, content, words):
    if content is not None:
        (tmp_path / "c.csv").write_text(content)
    with pytest.raises(ValueError if content else FileNotFoundError, match=f"^ScoredPairs: .*{words}"):
        ScoredPairs(tmp_path, "c.csv", str(encoder))


def test_wrong_encoders(encoder):
    with pytest.raises(FileNotFoundError, match=r"^expected a folder of .*, got 'no_such_encoder'"):
        encoder_folder("no_such_encoder")
    with pytest.raises(ValueError, match="expected embedding_dim from 1 to 3, the width of the vectors, got 4"):
        sentence_network(str(encoder), layers=0, embedding_dim=4)


@pytest.mark.parametrize("package", ["tokenizers", "sentence_transformers"])
def test_a_missing_extra(tmp_path, encoder, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)  # an import then fails
    (tmp_path / "b.1").write_text("a")
    with pytest.raises(ModuleNotFoundError, match=r"found none; install rkd-plugin\[text\]$"):
        ParallelTexts(tmp_path, "b.*", str(encoder)) if package == "tokenizers" else sentence_network(str(encoder))


def test_an_encoder_of_a_package(tmp_path, encoder, monkeypatch):
    (tmp_path / "some_encoder").mkdir()
    (tmp_path / "some_encoder" / "__init__.py").write_text("raise RuntimeError('not to be executed')")
    encoder.rename(tmp_path / "some_encoder" / "model")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert encoder_folder("some_encoder") == tmp_path / "some_encoder" / "model"


def test_a_table_starts_as_the_mean_of_the_words(captions, encoder):
    data = ParallelTexts(captions, "a.*.gz", str(encoder))
    network = sentence_network(str(encoder), layers=0)
    expected = torch.stack([network.words[row[row > 4]].mean(0) for row in data.tokens])
    torch.testing.assert_close(network(data.tokens), expected)
    assert network(torch.zeros(1, 3, dtype=torch.int64)).eq(0).all()
    network(data.tokens).sum().backward()
    assert network.words.grad[: len(SPECIAL)].eq(0).all()
    narrow = sentence_network(str(encoder), layers=0, embedding_dim=2)
    centred = network.words.detach() - network.words.detach().mean(0)
    # The best plane keeps the sum of the two largest eigenvalues.
    kept = torch.linalg.eigvalsh(centred.T @ centred)[1:].sum()
    torch.testing.assert_close(narrow.words.detach().square().sum(), kept)


def test_principal_directions_are_those_of_numpy():
    rows = torch.randn(50, 6) @ torch.randn(6, 6)
    mean, directions = principal(rows, 3)
    _, _, expected = np.linalg.svd(rows.numpy() - rows.numpy().mean(0), full_matrices=False)
    cosines = (directions.T.numpy() * expected[:3]).sum(1)
    np.testing.assert_allclose(np.abs(cosines), 1.0, rtol=1e-5)
    torch.testing.assert_close(mean, rows.mean(0))


# Metrics


def test_metrics_of_cosines_are_those_of_their_definitions():
    vectors, teacher = normalize(torch.randn(9, 4)), normalize(torch.randn(9, 7))
    labels = torch.tensor([3, 3, 0, 0, 0, 7, 7, 7, 7])
    ours, theirs = (x.numpy() @ x.numpy().T for x in (vectors, teacher))
    different = labels.numpy()[:, None] != labels.numpy()
    assert unrelated_cosine(vectors, labels) == pytest.approx(ours[different].mean(), abs=1e-6)
    assert cosine_error(vectors, teacher) == pytest.approx(np.abs(ours - theirs).sum() / 72, rel=1e-5)
    assert spearman(torch.tensor([0.1, 0.9, 0.5]), [1.0, 2.0, 3.0]) == pytest.approx(0.5)


def test_texts_are_measured_part_by_part(captions, encoder):
    (captions / "pairs.csv").write_text("a man,a man sits,5\nthe dog,the cat,1\na cat,the sofa,3\n")
    parts = [ParallelTexts(captions, "a.*.gz", str(encoder)), ScoredPairs(captions, "pairs.csv", str(encoder))]
    outputs = torch.randn(10, 5) * torch.rand(10, 1)  # their lengths must not count
    rows = normalize(outputs.double())
    found = texts(outputs, torch.tensor(parts[0].targets + parts[1].targets), ConcatDataset(parts))
    expected = retrieval(rows[:4], torch.tensor(parts[0].targets))
    assert found == {
        **expected,
        "unrelated_cosine": unrelated_cosine(rows[:4], torch.tensor(parts[0].targets)),
        "spearman": 100 * spearman((rows[4::2] * rows[5::2]).sum(1), [5.0, 1.0, 3.0]),
    }


# The library


class TestWithTheLibrary:
    pytestmark = with_the_library

    def test_an_encoder_gives_what_the_library_gives(self, library, tmp_path):
        folder = write_model(tmp_path, WORDS)
        texts = [*TEXTS, "a man", "the dog sleeps on the sofa in the park"]
        (tmp_path / "texts").write_text("\n".join(texts))
        data = ParallelTexts(tmp_path, "texts", str(folder))
        network = sentence_network(str(folder)).eval()
        expected = library.SentenceTransformer(str(folder), device="cpu").encode(texts, convert_to_tensor=True)
        with torch.no_grad():
            torch.testing.assert_close(network(data.tokens), expected)
            first = sentence_network(str(folder), layers=1).eval()
            assert not torch.allclose(first(data.tokens), expected, atol=1e-3)
        assert sum(p.numel() for p in first.parameters()) < sum(p.numel() for p in network.parameters())

    def test_a_narrower_encoder_is_the_pca_of_a_bank(self, library, tmp_path):
        folder = write_model(tmp_path, WORDS)
        (tmp_path / "texts").write_text("\n".join(TEXTS))
        data = ParallelTexts(tmp_path, "texts", str(folder))
        with torch.no_grad():
            vectors = sentence_network(str(folder)).eval()(data.tokens)
            np.save(tmp_path / "bank.npy", vectors.numpy())
            narrow = sentence_network(str(folder), embedding_dim=3, pca_bank=str(tmp_path / "bank.npy")).eval()
            mean, directions = principal(vectors, 3)
            torch.testing.assert_close(narrow(data.tokens), (vectors - mean) @ directions, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="or a pca_bank for the PCA to 3, got none"):
            sentence_network(str(folder), embedding_dim=3)
