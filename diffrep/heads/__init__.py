"""What reads features."""

from diffrep.heads.aggregation import AggregationHead, AggregationNetwork
from diffrep.heads.attention import AttentionHead, AttentionPool
from diffrep.heads.conv import ConvHead
from diffrep.heads.difformer import DifFormer
from diffrep.heads.feedback import FeedbackHead, FeedbackNetwork
from diffrep.heads.head import Head, load_head, pool_features, save_head
from diffrep.heads.linear import LinearHead, MLPHead
from diffrep.heads.matryoshka import MatryoshkaHead, matryoshka_loss
from diffrep.heads.sparse import TopKSAE

__all__ = [
    "AggregationHead",
    "AggregationNetwork",
    "AttentionHead",
    "AttentionPool",
    "ConvHead",
    "DifFormer",
    "FeedbackHead",
    "FeedbackNetwork",
    "Head",
    "LinearHead",
    "MLPHead",
    "MatryoshkaHead",
    "TopKSAE",
    "load_head",
    "matryoshka_loss",
    "pool_features",
    "save_head",
]
