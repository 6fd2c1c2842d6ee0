"""RKD for sentence-transformers: losses for its ``SentenceTransformerTrainer``. This file does not import the library.

The teacher's vectors are the labels, as in the library's own ``EmbedDistillLoss``; a projection is not needed, since
student and teacher may have different widths. Compute them once::

    def add_teacher(batch):
        columns = [teacher.encode(batch[name]) for name in ("anchor", "positive")]
        return {"label": np.stack(columns, axis=1).tolist()}

    dataset = dataset.map(add_teacher, batched=True)
    loss = RKDDALoss(model)
    SentenceTransformerTrainer(model=model, train_dataset=dataset, loss=loss).train()

**The student's rows are scaled to length 1 inside the loss**, ``normalize=True``. Vectors of sentence encoders are
compared by their cosine, and most teachers return rows of length 1. Both losses ignore a shift of all rows, which the
cosine does not: a student that is not scaled learns the teacher's relations somewhere beside the origin. Unrelated
texts then have a high cosine, and a table of words, whose means cannot form a sphere, hardly learns.

**Batches need related texts.** Columns of one dataset, such as ``anchor`` and ``positive``, are joined to one batch, so
that relations are between them as well.

**Beside a contrastive loss** a weight of 1 or 2 has no effect: RKD is about 0.005, the contrastive loss about 1.
Begin with a ``weight`` of 100 to 300, and compare on your validation data; the suite ``text/captions`` has numbers.
Both losses share one forward pass in a loss of your own, as in ``GlobalOrthogonalRegularizationLoss``::

    class Both(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model
            self.contrastive = MultipleNegativesRankingLoss(model)
            self.rkd = RKDDALoss(model, weight=300)

        def forward(self, sentence_features, labels):
            embeddings = [self.model(features)["sentence_embedding"] for features in sentence_features]
            contrastive = self.contrastive.compute_loss_from_embeddings(embeddings, labels)
            return {"contrastive": contrastive, **self.rkd.compute_loss_from_embeddings(embeddings, labels)}
"""

from rkd_plugin.adapters.sentence_transformers.losses import RelationalLoss, RKDAngleLoss, RKDDALoss, RKDDistanceLoss

__all__ = ["RKDAngleLoss", "RKDDALoss", "RKDDistanceLoss", "RelationalLoss"]
