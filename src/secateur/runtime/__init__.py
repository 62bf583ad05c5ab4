"""The sparse runtime: models that skip their zeros, in ONNX Runtime and in PyTorch."""

from secateur.runtime.bench import bench
from secateur.runtime.compiler.compile import compile_onnx
from secateur.runtime.compiler.sample import Sample
from secateur.runtime.library import available, library_path
from secateur.runtime.session import session
from secateur.runtime.torch_layers import accelerate, restore

__all__ = [
    "Sample",
    "accelerate",
    "available",
    "bench",
    "compile_onnx",
    "library_path",
    "restore",
    "session",
]
