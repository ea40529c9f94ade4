"""Taking a model away: files that run without this package, each run and compared before it is handed over."""

from lk_backbones.export.build import CheckedFile, Export, export_model
from lk_backbones.export.formats import FORMATS

__all__ = ["FORMATS", "CheckedFile", "Export", "export_model"]
