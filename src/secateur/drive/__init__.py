"""The loops that put the five words together."""
