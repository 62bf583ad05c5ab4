"""The borders: the only places that know frameworks and files of models."""

from secateur.frontends.modules import discover

__all__ = ["discover"]
