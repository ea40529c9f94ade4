"""COCO annotation files (https://cocodataset.org/#format-data), read and checked."""

from lk_backbones.data.coco_format.file import CocoFile, CocoImage, PackedList
from lk_backbones.data.coco_format.reading import read_coco

__all__ = ["CocoFile", "CocoImage", "PackedList", "read_coco"]
