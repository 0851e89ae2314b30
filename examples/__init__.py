"""Trained example models, on real data, for the exporter and its tests."""
