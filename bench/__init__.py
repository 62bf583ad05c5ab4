"""Measurements of secateur on real data: ``python -m bench [study ...]``."""
