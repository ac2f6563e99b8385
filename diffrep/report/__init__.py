"""From results.json to a page a person can read. Reads only run folders; knows nothing of networks."""

from diffrep.report.page import PICTURES, write_report
from diffrep.report.pca import pca_rgb

__all__ = ["PICTURES", "pca_rgb", "write_report"]
