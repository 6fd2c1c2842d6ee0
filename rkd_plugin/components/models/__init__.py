"""Models of the recipes; importing this package registers them in torchdistill under their names."""

from rkd_plugin.components.models.backbone import BackboneEmbedding
from rkd_plugin.components.models.classifiers import ImageClassifier
from rkd_plugin.components.models.embeddings import (
    Conv4Embedding,
    ConvEmbedding,
    ResNet12Embedding,
    few_shot_encoder,
)
from rkd_plugin.components.models.sentences import sentence_network

__all__ = [
    "BackboneEmbedding",
    "Conv4Embedding",
    "ConvEmbedding",
    "ImageClassifier",
    "ResNet12Embedding",
    "few_shot_encoder",
    "sentence_network",
]
