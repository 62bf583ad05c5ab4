"""Files: how a sparse weight lies in one, and the bundle that holds a pruned model."""

from secateur.formats.bundle import Bundle, is_bundle, read_bundle, read_surgery, write_bundle
from secateur.formats.container import read_tensors, write_tensors
from secateur.formats.layouts import CSR, LAYOUTS, Bitmask, Dense, Layout, same_bits, smallest
from secateur.formats.loading import load_into_
from secateur.formats.surgery import (
    BlockEdit,
    Selection,
    Surgery,
    fingerprint_of,
    selection_of,
    shapes_hash,
)
from secateur.formats.surgery_file import parse_surgery, surgery_text

__all__ = [
    "CSR",
    "LAYOUTS",
    "Bitmask",
    "BlockEdit",
    "Bundle",
    "Dense",
    "Layout",
    "Selection",
    "Surgery",
    "fingerprint_of",
    "is_bundle",
    "load_into_",
    "parse_surgery",
    "read_bundle",
    "read_surgery",
    "read_tensors",
    "same_bits",
    "selection_of",
    "shapes_hash",
    "smallest",
    "surgery_text",
    "write_bundle",
    "write_tensors",
]
