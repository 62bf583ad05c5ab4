"""Structural pruning: what is removed, how much of it, the cut, and the repair."""
