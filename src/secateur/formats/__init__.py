"""Files: how a sparse weight lies in one, and the bundle that holds a pruned model."""

from secateur.formats.bundle import Bundle, is_bundle, read_bundle, write_bundle
from secateur.formats.container import read_tensors, write_tensors
from secateur.formats.layouts import CSR, LAYOUTS, Bitmask, Dense, Layout, same_bits, smallest
from secateur.formats.loading import load_into_

__all__ = [
    "CSR",
    "LAYOUTS",
    "Bitmask",
    "Bundle",
    "Dense",
    "Layout",
    "is_bundle",
    "load_into_",
    "read_bundle",
    "read_tensors",
    "same_bits",
    "smallest",
    "write_bundle",
    "write_tensors",
]
