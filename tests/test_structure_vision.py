"""Structural pruning of vision networks and hand-written ones: every cut equals its mask."""

from __future__ import annotations
