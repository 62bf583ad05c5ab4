"""The borders: the only places that know frameworks and files of models."""

from secateur.frontends.modules import discover
from secateur.frontends.onnx import Exported, export_onnx
from secateur.frontends.source import Loaded, load_data, load_model

__all__ = ["Exported", "Loaded", "discover", "export_onnx", "load_data", "load_model"]
