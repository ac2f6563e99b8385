"""diffrep: read representations out of frozen diffusion models.

The public names load on first use, so that `import diffrep` and `diffrep --help` do not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import Any

from diffrep._version import __version__

_HOMES = {
    "Backbone": "backbones",
    "Layer": "backbones",
    "list_backbones": "backbones",
    "load_backbone": "backbones",
    "convert": "backbones.convert",
    "open_encoder": "backbones.encoders",
    "AggregateConfig": "config",
    "AlignConfig": "config",
    "BackboneConfig": "config",
    "CorrespondConfig": "config",
    "DDPMConfig": "config",
    "DataConfig": "config",
    "DistillConfig": "config",
    "EDMConfig": "config",
    "EncoderConfig": "config",
    "ExtractConfig": "config",
    "FeatureRequest": "config",
    "FeedbackConfig": "config",
    "FlowConfig": "config",
    "MatchConfig": "config",
    "ModelConfig": "config",
    "PairsConfig": "config",
    "ProbeConfig": "config",
    "SampleConfig": "config",
    "SamplerConfig": "config",
    "SearchConfig": "config",
    "SparseConfig": "config",
    "TrainConfig": "config",
    "TrainedConfig": "config",
    "VtabConfig": "config",
    "WarpConfig": "config",
    "WatchConfig": "config",
    "load_config": "config",
    "open_images": "data",
    "open_pairs": "data.correspondences",
    "pck": "correspond.pck",
    "run_aggregate": "correspond.aggregate",
    "run_evaluate": "correspond.evaluate",
    "run_match": "correspond.match",
    "run_propagation": "correspond.propagate",
    "run_warp": "correspond.geometric",
    "Extractor": "extract",
    "Features": "extract",
    "Plan": "extract",
    "ExtractJob": "extract.job",
    "run_extract": "extract.job",
    "fit_pca": "extract.projection",
    "DiffrepFeatures": "extract.transformer",
    "AggregationHead": "heads",
    "AggregationNetwork": "heads",
    "AttentionHead": "heads",
    "AttentionPool": "heads",
    "ConvHead": "heads",
    "DifFormer": "heads",
    "Head": "heads",
    "LinearHead": "heads",
    "MLPHead": "heads",
    "MatryoshkaHead": "heads",
    "TopKSAE": "heads",
    "FeedbackNetwork": "heads",
    "load_head": "heads",
    "save_head": "heads",
    "FeatureStatistics": "metrics",
    "cka": "metrics",
    "cknna": "metrics",
    "frechet_distance": "metrics",
    "mutual_knn": "metrics",
    "Probe": "probe",
    "run_probe": "probe",
    "train_sparse": "probe",
    "describe_latents": "probe",
    "run_feedback": "probe",
    "run_search": "probe",
    "run_vtab": "probe",
    "write_report": "report",
    "DiscreteSchedule": "noise",
    "FlowSchedule": "noise",
    "SigmaSchedule": "noise",
    "FeatureStore": "store",
    "load_adapters": "train",
    "run_train": "train",
    "AlignmentTerm": "train.alignment",
    "import_repa": "train.imported",
    "run_sample": "train.sample",
    "generate": "train.sampler",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"diffrep.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'diffrep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
