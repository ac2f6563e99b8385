"""Matching points between images: descriptors, matchers, protocols, an aggregation network, video."""
