"""Schemas and their loader. No torch in here: the command answers `--help` and config errors without it."""

from diffrep.config.align import AlignConfig, EncoderConfig
from diffrep.config.correspond import AggregateConfig, CorrespondConfig, MatchConfig, WarpConfig
from diffrep.config.feedback import FeedbackConfig, FeedbackHeadConfig, SparseConfig
from diffrep.config.loader import digest, load_config, to_plain, to_yaml, validate
from diffrep.config.objective import DDPMConfig, EDMConfig, FlowConfig, ObjectiveConfig
from diffrep.config.pairs import PairsConfig
from diffrep.config.probe import LowDataConfig, ProbeConfig, SGDConfig, TrainedConfig
from diffrep.config.protocol import Protocol, get_protocol
from diffrep.config.results import read_results, write_results
from diffrep.config.sample import SampleConfig, SamplerConfig, WatchConfig
from diffrep.config.schema import BackboneConfig, DataConfig, ExtractConfig, FeatureRequest, LevelSpec
from diffrep.config.search import SearchConfig
from diffrep.config.train import AdapterConfig, DistillConfig, ModelConfig, TrainConfig
from diffrep.config.vtab import VtabConfig

__all__ = [
    "AggregateConfig",
    "AlignConfig",
    "CorrespondConfig",
    "MatchConfig",
    "PairsConfig",
    "Protocol",
    "WarpConfig",
    "get_protocol",
    "AdapterConfig",
    "BackboneConfig",
    "DDPMConfig",
    "DataConfig",
    "DistillConfig",
    "EDMConfig",
    "EncoderConfig",
    "ExtractConfig",
    "FeatureRequest",
    "FeedbackConfig",
    "FeedbackHeadConfig",
    "FlowConfig",
    "LevelSpec",
    "LowDataConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "ProbeConfig",
    "SGDConfig",
    "SampleConfig",
    "SamplerConfig",
    "SearchConfig",
    "SparseConfig",
    "TrainConfig",
    "TrainedConfig",
    "VtabConfig",
    "WatchConfig",
    "digest",
    "load_config",
    "read_results",
    "to_plain",
    "to_yaml",
    "validate",
    "write_results",
]
