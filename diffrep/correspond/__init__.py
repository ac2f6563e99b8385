"""Matching points between images: descriptors, matchers, protocols, an aggregation network, video."""

from diffrep.correspond.matching import Side, mutual_nearest_neighbours, prepare
from diffrep.correspond.pck import PCK, pck
from diffrep.correspond.pose import partners_of, pose_distance
from diffrep.correspond.predict import Question, predict, predict_all
from diffrep.correspond.soft import soft_argmax

__all__ = [
    "PCK",
    "Question",
    "Side",
    "mutual_nearest_neighbours",
    "partners_of",
    "pck",
    "pose_distance",
    "predict",
    "predict_all",
    "prepare",
    "soft_argmax",
]
