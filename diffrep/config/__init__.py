"""Schemas and their loader. No torch in here: the command answers `--help` and config errors without it."""

from diffrep.config.correspond import AggregateConfig, CorrespondConfig, MatchConfig, WarpConfig
from diffrep.config.feedback import FeedbackConfig, FeedbackHeadConfig, SparseConfig
from diffrep.config.loader import digest, load_config, to_plain, to_yaml, validate
from diffrep.config.pairs import PairsConfig
from diffrep.config.probe import LowDataConfig, ProbeConfig, SGDConfig, TrainedConfig
from diffrep.config.protocol import Protocol, get_protocol
from diffrep.config.results import read_results, write_results
from diffrep.config.schema import BackboneConfig, DataConfig, ExtractConfig, FeatureRequest, LevelSpec
from diffrep.config.search import SearchConfig
from diffrep.config.train import AdapterConfig, DistillConfig, ModelConfig, ScheduleConfig, TrainConfig
from diffrep.config.vtab import VtabConfig

__all__ = [
    "AggregateConfig",
    "CorrespondConfig",
    "MatchConfig",
    "PairsConfig",
    "Protocol",
    "WarpConfig",
    "get_protocol",
    "AdapterConfig",
    "BackboneConfig",
    "DataConfig",
    "DistillConfig",
    "ExtractConfig",
    "FeatureRequest",
    "FeedbackConfig",
    "FeedbackHeadConfig",
    "LevelSpec",
    "LowDataConfig",
    "ModelConfig",
    "ProbeConfig",
    "SGDConfig",
    "ScheduleConfig",
    "SearchConfig",
    "SparseConfig",
    "TrainConfig",
    "TrainedConfig",
    "VtabConfig",
    "digest",
    "load_config",
    "read_results",
    "to_plain",
    "to_yaml",
    "validate",
    "write_results",
]
