"""From a request over a plan to features, for a batch or for a whole data set."""

from diffrep.extract.extractor import Extractor, extract
from diffrep.extract.features import Features
from diffrep.extract.plan import Leg, Plan, make_plan
from diffrep.extract.trajectory import Guidance, Step, walk

__all__ = ["Extractor", "Features", "Guidance", "Leg", "Plan", "Step", "extract", "make_plan", "walk"]
