"""Judging features by classification: every (layer, level) at once, chosen on validation, reported on test."""

from diffrep.probe.logistic import LogisticPath
from diffrep.probe.neighbours import knn_scores
from diffrep.probe.run import run_probe
from diffrep.probe.split import stratified_split
from diffrep.probe.sweep import Cell, Score, Task, judge, make_task, sweep

__all__ = [
    "Cell",
    "LogisticPath",
    "Score",
    "Task",
    "judge",
    "knn_scores",
    "make_task",
    "run_probe",
    "stratified_split",
    "sweep",
]
