"""From a request over a plan to features, for a batch or for a whole data set."""

from diffrep.extract.extractor import Extractor, extract
from diffrep.extract.features import Features
from diffrep.extract.plan import Plan, make_plan

__all__ = ["Extractor", "Features", "Plan", "extract", "make_plan"]
