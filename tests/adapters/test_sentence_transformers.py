"""The losses for sentence-transformers: alone with a small stand-in for its models, then with the library itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from rkd_plugin import relational_loss, rkd_angle_loss, rkd_da_loss, rkd_distance_loss
from rkd_plugin.adapters.sentence_transformers import RelationalLoss, RKDAngleLoss, RKDDALoss, RKDDistanceLoss
from rkd_plugin.adapters.sentence_transformers.columns import Terms

LOSSES = {RKDDistanceLoss: rkd_distance_loss, RKDAngleLoss: rkd_angle_loss, RKDDALoss: rkd_da_loss}
every_loss = pytest.mark.parametrize(("loss", "function"), LOSSES.items(), ids=lambda x: getattr(x, "__name__", ""))


class Encoder(nn.Module):
    """It takes and returns what a model of the library does, which adds its output to its input."""

    def __init__(self, width=4, dropout=0.0, dtype=torch.float32):
        super().__init__()
        self.table = nn.Embedding(50, width, dtype=dtype)
        self.layer = nn.Sequential(nn.Linear(width, width, dtype=dtype), nn.Dropout(dropout), nn.GELU())
        self.rows = []  # of each forward pass

    def forward(self, features):
        self.rows.append(len(features["input_ids"]))
        features["sentence_embedding"] = self.layer(self.table(features["input_ids"]).mean(1))
        return features


def columns(count, rows=6):
    return [{"input_ids": torch.randint(50, (rows, 3))} for _ in range(count)]


def embedded(model, features):
    return torch.cat([model(dict(column))["sentence_embedding"] for column in features])


@every_loss
@pytest.mark.parametrize("scaled", [True, False])
def test_columns_are_joined_to_one_batch(loss, function, scaled):
    model, texts, teacher = Encoder(), columns(2), torch.randn(6, 2, 7)
    terms = loss(model, normalize=scaled, weight=3.0)(texts, teacher)
    student, target = embedded(model, texts), torch.cat([teacher[:, 0], teacher[:, 1]])
    expected = function(normalize(student), normalize(target)) if scaled else function(student, target)
    assert list(terms) == [
        name for name in ("rkd_distance", "rkd_angle") if "da" in function.__name__ or name == function.__name__[:-5]
    ]
    torch.testing.assert_close(sum(terms.values()), 3.0 * expected)


def test_any_relation_is_the_general_loss():
    model, texts, teacher = Encoder(), columns(2), torch.randn(6, 2, 7)
    options = {"potential": "cosine", "penalty": "kl", "scale": "softmax", "temperature": 0.1, "neighbours": 3}
    terms = RelationalLoss(model, **options, weight=2.0)(texts, teacher)
    target = torch.cat([teacher[:, 0], teacher[:, 1]])
    expected = relational_loss(normalize(embedded(model, texts)), normalize(target), **options)
    torch.testing.assert_close(terms, Terms(relational=2.0 * expected))


@pytest.mark.parametrize("count", [1, 2])
def test_columns_can_share_a_target(count):
    model, texts, teacher = Encoder(), columns(count), torch.randn(6, 7)
    (term,) = RKDDistanceLoss(model)(texts, teacher).values()
    expected = rkd_distance_loss(normalize(embedded(model, texts)), normalize(teacher).repeat(count, 1))
    torch.testing.assert_close(term, expected)


def test_a_live_teacher_gives_what_its_vectors_as_labels_give():
    model, teacher, texts = Encoder(), Encoder(width=7, dropout=0.5), columns(2)
    loss = RKDDALoss(model, teacher)
    found = loss(texts)
    vectors = torch.stack([teacher(dict(column))["sentence_embedding"] for column in texts], 1)
    torch.testing.assert_close(found, RKDDALoss(model)(texts, vectors))
    sum(found.values()).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert {name.partition(".")[0] for name, _ in loss.named_parameters()} == {"model"}
    assert set(texts[0]) == {"input_ids"}


@pytest.mark.parametrize("size", [2, 4, 6, 100])
def test_parts_of_a_batch_have_the_gradient_of_the_whole(size):
    model, texts, teacher = Encoder(dropout=0.3, dtype=torch.float64), columns(2), torch.randn(6, 2, 7)
    losses, gradients = [], []
    for whole in (False, True):
        torch.manual_seed(1)
        model.zero_grad()
        if whole:
            parts = [{"input_ids": part} for column in texts for part in column["input_ids"].split(size)]
            terms = RKDDALoss(model).compute_loss_from_embeddings(list(embedded(model, parts).chunk(2)), teacher)
        else:
            model.rows.clear()
            terms = RKDDALoss(model, mini_batch_size=size)(texts, teacher)
            forward = len(model.rows)
        sum(terms.values()).backward()
        losses.append(sum(terms.values()).item())
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        if not whole:
            assert max(model.rows) == min(size, 6)
            assert len(model.rows) - forward == forward - 2  # all but the first part of each column, once more
    assert losses[0] == losses[1]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-12)


def test_options_and_citation_of_the_model_card():
    loss = RKDDALoss(Encoder(), angle_weight=3.0, anchors=0.5, weight=100.0, mini_batch_size=8)
    config = json.loads(json.dumps(loss.get_config_dict()))
    assert config["angle_weight"] == 3.0
    assert config["anchors"] == 0.5
    assert config["weight"] == 100.0
    assert config["mini_batch_size"] == 8
    assert "teacher" not in config
    relational = RelationalLoss(Encoder(), potential=lambda x: x, penalty="mse", scale=None).get_config_dict()
    assert json.loads(json.dumps(relational))["potential"] == "<lambda>"
    teacher = Encoder()
    assert RKDDALoss(Encoder(), teacher).get_config_dict()["teacher"] is teacher
    assert "Relational Knowledge Distillation" in loss.citation


def test_half_precision():
    model, texts = Encoder(dtype=torch.bfloat16), columns(2)
    terms = RKDDALoss(model)(texts, torch.randn(6, 2, 7))
    sum(terms.values()).backward()
    assert {term.dtype for term in terms.values()} == {torch.float32}
    assert model.table.weight.grad.isfinite().all()


class Unpooled(Encoder):
    def forward(self, features):
        return {"token_embeddings": self.table(features["input_ids"])}


class Decoder:
    """A tokenizer."""

    def get_vocab(self):
        return {"a": 0}


@pytest.mark.parametrize(
    ("labels", "error", "words"),
    [
        (None, ValueError, "expected the teacher's vectors as labels, got none"),
        (torch.randn(5, 2, 7), ValueError, r"of shape \(6, 2, D\) or \(6, D\), got \(5, 2, 7\)"),
        (torch.randn(6, 3, 7), ValueError, r"got \(6, 3, 7\)"),
        (torch.randn(6), ValueError, r"got \(6,\)"),
        (torch.arange(6), TypeError, "expected the teacher's vectors as labels, got torch.int64"),
    ],
)
def test_labels_that_are_no_vectors_of_the_batch(labels, error, words):
    with pytest.raises(error, match=f"^RKDDALoss: .*{words}[^.]*$"):
        RKDDALoss(Encoder())(columns(2), labels)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: RKDDALoss(Encoder())([], torch.randn(6, 7)), "got no column"),
        (lambda: RKDDALoss(Encoder())([*columns(1), {"input_ids": torch.zeros(0)}], torch.randn(6, 2, 7)),
         "got one of 2 columns without a token"),
        (lambda: RKDDALoss(Unpooled())(columns(1), torch.randn(6, 7)),
         "expected a model that returns 'sentence_embedding', got 'token_embeddings'; add a Pooling module"),
        (lambda: RKDDALoss(Encoder(), mini_batch_size=0), "expected mini_batch_size to be at least 1, got 0"),
        (lambda: RKDDALoss(Encoder(), reduction="anchor"), "expected a scalar for the Trainer"),
        (lambda: RKDDALoss(Encoder(), huber_delta=-1), "expected huber_delta to be positive"),
    ],
)  # fmt: skip
def test_a_wrong_call(call, words):
    with pytest.raises(ValueError, match=f"^RKDDALoss: .*{words}"):
        call()


def test_a_student_whose_tokens_cannot_be_decoded_for_the_teacher():
    model, teacher = Encoder(), Encoder()
    model.tokenizer, teacher.tokenizer = Decoder(), None
    with pytest.raises(ValueError, match="got Decoder; compute the teacher's vectors once, as labels"):
        RKDDALoss(model, teacher)


# Two processes


def batch():
    generator = torch.Generator().manual_seed(3)
    return (
        [torch.randint(50, (8, 3), generator=generator) for _ in range(2)],
        torch.randn(8, 2, 7, generator=generator, dtype=torch.float64),
    )


def gradients(loss, texts, labels):
    terms = loss([{"input_ids": ids} for ids in texts], labels)
    sum(terms.values()).backward()
    return {name: term.item() for name, term in terms.items()}


def work(rank, folder, size, results):
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=limit)
    torch.manual_seed(0)
    model = Encoder(dtype=torch.float64)
    loss = RKDDALoss(model, mini_batch_size=size, gather_across_devices=True)
    loss.model = DistributedDataParallel(model)  # as the Trainer does
    (texts, labels), own = batch(), slice(rank * 3, 3 + rank * 5)  # 3 and 5 rows
    terms = gradients(loss, [ids[own] for ids in texts], labels[own])
    results.put((terms, [parameter.grad.tolist() for parameter in model.parameters()]))
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.mark.processes
@pytest.mark.parametrize("size", [None, 2])
def test_two_processes_train_as_one_with_the_whole_batch(tmp_path, size):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=work, args=(rank, tmp_path, size, results), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=300) for _ in processes]
    for process in processes:
        process.join(300)
    model = Encoder(dtype=torch.float64)
    expected = gradients(RKDDALoss(model), *batch())
    for terms, grads in found:
        assert terms == pytest.approx(expected, rel=1e-9)
        for grad, parameter in zip(grads, model.parameters(), strict=True):
            torch.testing.assert_close(torch.tensor(grad, dtype=torch.float64), parameter.grad, rtol=1e-6, atol=1e-12)


# The library


@pytest.fixture(scope="module")
def library():
    """The library, without its network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield pytest.importorskip("sentence_transformers", reason="needs rkd-plugin[text]")


# Warnings of the library and of what it imports are not about this package.
with_the_library = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, *"a man woman dog cat runs sits sleeps in on the park sofa".split()]  # noqa: SIM905
TEXTS = [f"a {who} {does} {where}" for who in ("man", "woman", "dog", "cat") for does in ("runs", "sits", "sleeps")
         for where in ("in the park", "on the sofa")]  # fmt: skip


def write_model(root, words):
    """A model of two small layers as the library writes it, of width 8, with dropout."""
    from sentence_transformers import SentenceTransformer, models
    from tokenizers import Tokenizer, processors
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {f"{word.strip('[]').lower()}_token": word for word in SPECIAL}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(root / "bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(words), hidden_dropout_prob=0.2, **sizes)).save_pretrained(root / "bert")
    encoder = models.Transformer(str(root / "bert"), max_seq_length=12)
    SentenceTransformer(modules=[encoder, models.Pooling(8)], device="cpu").save(str(root / "whole"))
    return root / "whole"


@pytest.fixture(scope="module")
def folder(library, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"), WORDS)


@pytest.fixture
def model(library, folder):
    return library.SentenceTransformer(str(folder), device="cpu")


@pytest.fixture
def table(library, model):
    from sentence_transformers.models import StaticEmbedding

    return library.SentenceTransformer(modules=[StaticEmbedding(model.tokenizer, embedding_dim=6)], device="cpu")


def pairs(teacher):
    """A data set of two columns, with the vectors of a teacher."""
    from datasets import Dataset

    anchors, positives = TEXTS[::2], TEXTS[1::2]
    vectors = torch.stack([teacher.encode(texts, convert_to_tensor=True) for texts in (anchors, positives)], 1)
    return Dataset.from_dict({"anchor": anchors, "positive": positives, "label": vectors.tolist()})


def trained(model, data, loss, folder, steps=3, learning_rate=0.01, batch_size=6):
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    arguments = SentenceTransformerTrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=batch_size, learning_rate=learning_rate,
        logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(model, arguments, train_dataset=data, loss=loss)
    trainer.train()
    return trainer.state.log_history


class TestWithTheLibrary:
    pytestmark = with_the_library

    @pytest.mark.parametrize("student", ["model", "table"])
    def test_a_model_trains_is_saved_and_loaded(self, library, request, student, folder, tmp_path):
        teacher, model = library.SentenceTransformer(str(folder), device="cpu"), request.getfixturevalue(student)
        history = trained(model, pairs(teacher), RKDDALoss(model, weight=10.0), tmp_path / "run")
        for log in history[:3]:
            assert log["loss"] == pytest.approx(log["rkd_distance"] + log["rkd_angle"], abs=1e-3)
        model.save(str(tmp_path / "saved"))
        again = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
        torch.testing.assert_close(again.encode(TEXTS), model.encode(TEXTS))
        card = (tmp_path / "saved" / "README.md").read_text()
        assert "park2019relational" in card
        assert '"weight": 10.0' in card
        assert "loss:RKDDALoss" in card

    def test_training_lowers_the_loss(self, library, table, tmp_path):
        from sentence_transformers.models import StaticEmbedding

        teacher = library.SentenceTransformer(modules=[StaticEmbedding(table.tokenizer, embedding_dim=9)], device="cpu")
        loss, data = RKDDistanceLoss(table), pairs(teacher)
        batch = [table.preprocess(data[name][:]) for name in ("anchor", "positive")], torch.tensor(data["label"][:])
        before = loss(*batch)["rkd_distance"].item()
        trained(table, data, loss, tmp_path, steps=60, learning_rate=0.1)
        assert loss(*batch)["rkd_distance"].item() < 0.3 * before

    def test_beside_a_contrastive_loss_on_the_same_batch(self, model, tmp_path):
        from sentence_transformers.losses import MultipleNegativesRankingLoss

        class Both(nn.Module):
            def __init__(self, model):
                super().__init__()
                self.model = model
                self.contrastive = MultipleNegativesRankingLoss(model)
                self.rkd = RKDDALoss(model, weight=100)

            def forward(self, sentence_features, labels):
                embeddings = [self.model(features)["sentence_embedding"] for features in sentence_features]
                contrastive = self.contrastive.compute_loss_from_embeddings(embeddings, labels)
                return {"contrastive": contrastive, **self.rkd.compute_loss_from_embeddings(embeddings, labels)}

        first = trained(model, pairs(model), Both(model), tmp_path)[0]
        assert {"contrastive", "rkd_distance", "rkd_angle"} <= set(first)

    def test_in_multi_task_training(self, model, tmp_path):
        from sentence_transformers.losses import MultipleNegativesRankingLoss

        data = pairs(model)
        losses = {"contrastive": MultipleNegativesRankingLoss(model), "rkd": RKDDistanceLoss(model)}
        sets = {"contrastive": data.remove_columns("label"), "rkd": data}
        history = trained(model, sets, losses, tmp_path, steps=4)
        assert any("rkd_distance" in log for log in history)

    @pytest.mark.parametrize("width", [8, 5])  # of the teacher; 8 is the student's too, so that labels are cut
    def test_matryoshka_compares_every_width_with_the_whole_teacher(self, model, width, tmp_path):
        from sentence_transformers.losses import MatryoshkaLoss

        model.eval()
        features, labels = model.preprocess(TEXTS[:6]), torch.randn(6, width)
        student = model(dict(features))["sentence_embedding"]
        expected = {"rkd_distance": 0.0, "rkd_angle": 0.0}
        for dim, weight in ((8, 1.0), (4, 0.5), (2, 0.25)):
            for name, function in (("rkd_distance", rkd_distance_loss), ("rkd_angle", rkd_angle_loss)):
                factor = 1.0 if name == "rkd_distance" else 2.0
                expected[name] += weight * factor * function(normalize(student[:, :dim]), normalize(labels)).item()
        for rows in (labels, torch.cat([labels, labels])[:6]):  # a view, as a process gets of a shared batch
            loss = MatryoshkaLoss(model, RKDDALoss(model), [8, 4, 2], [1.0, 0.5, 0.25])
            found = loss([dict(features)], rows)
            assert {name: term.item() for name, term in found.items()} == pytest.approx(expected, rel=1e-5)
        history = trained(model, pairs(model), loss, tmp_path)
        assert {"rkd_distance", "rkd_angle"} <= set(history[0])
        with pytest.raises(ValueError, match=r"expected mini_batch_size=None in MatryoshkaLoss"):
            MatryoshkaLoss(model, RKDDALoss(model, mini_batch_size=2), [8, 4])([dict(features)], labels)

    @pytest.mark.processes
    def test_the_trainer_on_two_processes_trains_as_on_one(self, folder, tmp_path):
        weights = {}
        for count in (1, 2):
            out = tmp_path / f"{count}.pt"
            command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", f"--nproc-per-node={count}"]
            command += ["--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", __file__]
            subprocess.run([*command, str(folder), str(out)], check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
            weights[count] = torch.load(out)
        torch.testing.assert_close(
            weights[1], weights[2], rtol=1e-4, atol=1e-5
        )  # after Adam, which divides by the gradient
        assert not torch.equal(weights[1], torch.load(tmp_path / "1.pt.start"))

    def test_parts_of_a_batch_train_as_the_whole(self, model):
        features, labels = [model.preprocess(TEXTS[i : i + 6]) for i in (0, 6)], torch.randn(6, 2, 5)
        found = {}
        for checkpointed in (True, False):
            model.train()
            model.zero_grad()
            torch.manual_seed(2)  # of the dropout
            loss = RKDDALoss(model, mini_batch_size=2 if checkpointed else None)
            if checkpointed:
                terms = loss(features, labels)
            else:
                places = [(column, slice(i, i + 2)) for column in features for i in (0, 2, 4)]
                cut = [{key: column[key][rows] for key in ("input_ids", "attention_mask")} for column, rows in places]
                terms = loss.compute_loss_from_embeddings(list(embedded(model, cut).chunk(2)), labels)
            sum(terms.values()).backward()
            found[checkpointed] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert len(found[True]) > 20
        for name, gradient in found[True].items():
            torch.testing.assert_close(gradient, found[False][name], rtol=1e-6, atol=1e-7)

    def test_a_live_teacher_with_another_vocabulary(self, library, model, tmp_path):
        folder = write_model(tmp_path, [*SPECIAL, *reversed(WORDS[len(SPECIAL) :])])
        teacher, texts = library.SentenceTransformer(str(folder), device="cpu"), TEXTS[:6]
        vectors = teacher.encode(texts, convert_to_tensor=True)
        assert not torch.equal(vectors, model.encode(texts, convert_to_tensor=True))  # the weights are the same
        features = [model.eval().preprocess(texts)]
        expected = RKDDistanceLoss(model)(features, vectors)
        torch.testing.assert_close(RKDDistanceLoss(model, teacher)(features), expected)

    def test_a_table_has_no_live_teacher(self, model, table):
        with pytest.raises(ValueError, match=r"got Tokenizer; compute the teacher's vectors once, as labels$"):
            RKDDALoss(table, model)

    def test_empty_texts_of_a_table(self, table):
        with pytest.raises(ValueError, match="got one of 1 columns without a token; remove empty texts"):
            RKDDALoss(table)([table.preprocess(["", ""])], torch.randn(2, 5))

    def test_a_model_without_pooling(self, library, model):
        unpooled = library.SentenceTransformer(modules=[model[0]], device="cpu")
        with pytest.raises(ValueError, match=r"got 'input_ids', .*'token_embeddings'.*; add a Pooling module"):
            RKDDALoss(unpooled)([unpooled.preprocess(TEXTS[:3])], torch.randn(3, 5))


def test_terms_need_the_same_names():
    with pytest.raises(KeyError, match="a"):
        Terms(a=torch.tensor(1.0)) + Terms(b=torch.tensor(1.0))


def train_in_each_process(folder, out):
    """Train an embedding table, with a batch of 6 over all processes."""
    import sentence_transformers
    from sentence_transformers.models import StaticEmbedding

    teacher = sentence_transformers.SentenceTransformer(folder, device="cpu")
    torch.manual_seed(0)
    table = sentence_transformers.SentenceTransformer(
        modules=[StaticEmbedding(teacher.tokenizer, embedding_dim=6)], device="cpu"
    )
    weight = table[0].embedding.weight
    torch.save(weight.detach().clone(), f"{out}.start")
    loss = RKDDistanceLoss(table, gather_across_devices=True)
    count = int(os.environ["WORLD_SIZE"])
    trained(table, pairs(teacher), loss, f"{out}.run", batch_size=6 // count)
    if int(os.environ["RANK"]) == 0:
        torch.save(weight.detach(), out)


if __name__ == "__main__":
    train_in_each_process(*sys.argv[1:])
