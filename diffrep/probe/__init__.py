"""Judging features by classification: every head on every layer and level, chosen on validation, scored on test."""

from diffrep.probe.feedback import open_feedback, run_feedback
from diffrep.probe.logistic import LogisticPath
from diffrep.probe.neighbours import knn_scores
from diffrep.probe.reading import Reading, readings
from diffrep.probe.run import Probe, run_probe
from diffrep.probe.search import run_search
from diffrep.probe.sgd import LinearSpec, SGDHeads
from diffrep.probe.sparse import describe_latents, measure_sparse, train_sparse
from diffrep.probe.split import stratified_split
from diffrep.probe.sweep import Judged, judge, sweep
from diffrep.probe.task import Task, make_task
from diffrep.probe.vtab import run_vtab

__all__ = [
    "Judged",
    "LinearSpec",
    "LogisticPath",
    "Probe",
    "Reading",
    "SGDHeads",
    "Task",
    "describe_latents",
    "judge",
    "knn_scores",
    "make_task",
    "measure_sparse",
    "open_feedback",
    "readings",
    "run_feedback",
    "run_probe",
    "run_search",
    "run_vtab",
    "stratified_split",
    "sweep",
    "train_sparse",
]
