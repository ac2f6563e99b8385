"""From results.json to a page a person can read. Reads only run folders; knows nothing of networks."""

from diffrep.report.page import ARRAYS, PICTURES, picture_file, write_report
from diffrep.report.pca import pca_rgb

__all__ = ["ARRAYS", "PICTURES", "pca_rgb", "picture_file", "write_report"]
