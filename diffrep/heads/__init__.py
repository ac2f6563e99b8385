"""What reads features."""

from diffrep.heads.attention import AttentionPool
from diffrep.heads.linear import LinearHead

__all__ = ["AttentionPool", "LinearHead"]
