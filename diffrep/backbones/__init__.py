"""Frozen networks that can be read, and how to load them."""

from diffrep.backbones.backbone import Backbone
from diffrep.backbones.codec import Posterior
from diffrep.backbones.layer import Layer
from diffrep.backbones.registry import load_backbone
from diffrep.backbones.sources import list_backbones

__all__ = ["Backbone", "Layer", "Posterior", "list_backbones", "load_backbone"]
