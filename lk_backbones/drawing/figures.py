"""What pictures of a task look like: one class for each kind of task, which knows its batches and its outputs."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchmetrics.functional.classification import multiclass_jaccard_index

from lk_backbones.drawing.canvas import (
    draw_objects,
    draw_panels,
    fit_size,
    label_map_image,
    overlay,
    to_rgb,
)
from lk_backbones.drawing.classes import draw_best_classes
from lk_backbones.drawing.palette import Color
from lk_backbones.metrics.masks import decode_masks

__all__ = ["ClassificationFigures", "DetectionFigures", "Figures", "SegmentationFigures"]


class Figures(ABC):
    """Draws what a task does.

    Args:
        task: The task.
        opacity: Of the classes' colours over the image, 0 to 1.
        score_threshold: Least score of a detection that is drawn.
    """

    def __init__(self, task: Any, opacity: float, score_threshold: float) -> None:
        self.task = task
        self.opacity = opacity
        self.score_threshold = score_threshold

    @abstractmethod
    def paths(self, batch: Any, unnamed: str) -> list[str]:
        """Return a path or name for every picture of a batch; those that have none are numbered after ``unnamed``."""

    @abstractmethod
    def compared(self, batch: Any, outputs: Any, i: int, path: str) -> Image.Image:
        """Picture ``i`` of a validation or test batch beside truth and prediction."""

    @abstractmethod
    def predicted(self, batch: Any, outputs: Any, i: int, path: str) -> dict[str, Image.Image]:
        """Pictures to write of picture ``i`` of a prediction batch, by the folder that they belong in."""


class SegmentationFigures(Figures):
    """Label maps over the image, with the classes that occur, most frequent first."""

    def paths(self, batch: Any, unnamed: str) -> list[str]:
        """See `Figures.paths`."""
        paths = batch.get("path") or [f"{unnamed}_{i}" for i in range(len(batch["image"]))]
        return [str(path) for path in paths]

    def compared(self, batch: Any, outputs: Any, i: int, path: str) -> Image.Image:
        """See `Figures.compared`."""
        maps = {"Truth": batch["mask"][i], "Prediction": outputs["label_map"][i]}
        return self._figure(batch["image"][i], maps, path)

    def predicted(self, batch: Any, outputs: Any, i: int, path: str) -> dict[str, Image.Image]:
        """See `Figures.predicted`."""
        label_map = outputs["label_map"][i]
        return {
            "label_maps": label_map_image(label_map, self.task.hparams["num_classes"]),
            "overlays": self._figure(batch["image"][i], {"Prediction": label_map}, path),
        }

    def _figure(self, image: torch.Tensor, maps: dict[str, torch.Tensor], path: str) -> Image.Image:
        height, width = next(iter(maps.values())).shape
        picture = to_rgb(image).resize(fit_size((width, height)), Image.Resampling.BICUBIC)
        colors, names = self.task.class_colors, self.task.class_names
        drawn = [(title, overlay(picture, labels, colors, self.opacity)) for title, labels in maps.items()]
        labels = torch.cat([label_map.flatten().cpu().long() for label_map in maps.values()])
        is_class = (labels >= 0) & (labels < len(names))
        counts = torch.bincount(labels[is_class], minlength=len(names))
        order = [c for c in counts.argsort(descending=True).tolist() if counts[c]]
        ious: list[float] | None = None
        if "Truth" in maps:
            counted = (maps["Truth"] >= 0) & (maps["Truth"] < len(names))
            truth, prediction = (maps[title][counted].cpu().long() for title in ("Truth", "Prediction"))
            ious = multiclass_jaccard_index(prediction, truth, len(names), "none", validate_args=False).tolist()
        legend = [(names[c] if ious is None else f"{names[c]}  {100 * ious[c]:.0f} %", colors[c]) for c in order]
        # first, so that it is not cut off a long legend
        entries: list[tuple[str, Any]] = [*legend] if is_class.all() else [("ignored", None), *legend]
        caption = f"{Path(path).name}, {width} x {height}" + (
            ", IoU in this picture by class" if ious is not None else ""
        )
        return draw_panels([("Image", picture), *drawn], entries, caption)


class ClassificationFigures(Figures):
    """The picture as the network sees it, beside its five best classes."""

    def paths(self, batch: Any, unnamed: str) -> list[str]:
        """See `Figures.paths`."""
        paths = batch.get("path") or [f"{unnamed}_{i}" for i in range(len(batch["image"]))]
        return [str(path) for path in paths]

    def compared(self, batch: Any, outputs: Any, i: int, path: str) -> Image.Image:
        """See `Figures.compared`; the true class is marked."""
        return self.cell(batch, outputs, i, path, (320, 320))

    def predicted(self, batch: Any, outputs: Any, i: int, path: str) -> dict[str, Image.Image]:
        """See `Figures.predicted`; none, as `ClassificationResults` puts many pictures on a sheet."""
        return {}

    def cell(self, batch: Any, outputs: Any, i: int, path: str, size: tuple[int, int] = (160, 160)) -> Image.Image:
        """Picture ``i`` of a batch with its best classes.

        Args:
            batch: The batch.
            outputs: What a step of the task returned for it.
            i: Which picture.
            path: Its path or name, of which the file name is written.
            size: Width and height that the picture is fitted into.
        """
        names, colors = self.task.class_names, self.task.class_colors
        classes = outputs["classes"][i].tolist()
        best = [
            (names[c], float(p), colors[c]) for c, p in zip(classes, outputs["probabilities"][i].tolist(), strict=True)
        ]
        truth = names[int(batch["label"][i])] if "label" in batch else None
        picture = to_rgb(batch["image"][i])
        scale = min(size[0] / picture.width, size[1] / picture.height)
        fitted = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
        return draw_best_classes(picture.resize(fitted, Image.Resampling.BICUBIC), size, best, Path(path).name, truth)


class DetectionFigures(Figures):
    """Boxes, masks, class names and scores over the image."""

    def paths(self, batch: Any, unnamed: str) -> list[str]:
        """See `Figures.paths`."""
        if isinstance(batch, dict):
            return [str(path) for path in batch["path"]]
        return [str(target.get("path", f"{unnamed}_{i}")) for i, target in enumerate(batch[1])]

    def compared(self, batch: Any, outputs: Any, i: int, path: str) -> Image.Image:
        """See `Figures.compared`."""
        image, target = batch[0][i], batch[1][i]
        crowds = target.get("iscrowd", torch.zeros_like(target["labels"]))
        truth = self._drawn(image, target["boxes"], target["labels"], None, target.get("masks"), crowds)
        return self._figure(
            image, {"Truth": truth, "Prediction": self._detections(image, outputs["predictions"][i])}, path
        )

    def predicted(self, batch: Any, outputs: Any, i: int, path: str) -> dict[str, Image.Image]:
        """See `Figures.predicted`."""
        image = batch["image"][i] if isinstance(batch, dict) else batch[0][i]
        prediction = self._detections(image, outputs[i], outputs[i]["original_size"])
        return {"overlays": self._figure(image, {"Prediction": prediction}, path)}

    def _figure(self, image: torch.Tensor, panels: dict[str, Image.Image], path: str) -> Image.Image:
        height, width = image.shape[1:]
        picture = _enlarged(image)
        caption = (
            f"{Path(path).name}, {width} x {height}, detections with a score of {self.score_threshold:.0%} or more"
        )
        return draw_panels([("Image", picture), *panels.items()], [], caption)

    def _detections(
        self, image: torch.Tensor, prediction: dict[str, Any], size: tuple[int, int] | None = None
    ) -> Image.Image:
        """Draw detections, which refer to a picture of ``size``, by default that of the image."""
        chosen = torch.nonzero(prediction["scores"] >= self.score_threshold).flatten()
        height, width = size or image.shape[1:]
        masks = None
        if "segmentation" in prediction:
            masks = decode_masks([prediction["segmentation"][i] for i in chosen.tolist()], (height, width))
        scale = torch.tensor([image.shape[2] / width, image.shape[1] / height]).repeat(2)
        boxes, labels, scores = (prediction[key][chosen] for key in ("boxes", "labels", "scores"))
        return self._drawn(image, boxes * scale, labels, scores, masks)

    def _drawn(
        self,
        image: torch.Tensor,
        boxes: torch.Tensor,
        labels: torch.Tensor,
        scores: torch.Tensor | None,
        masks: torch.Tensor | None,
        crowds: torch.Tensor | None = None,
    ) -> Image.Image:
        names, colors = self.task.class_names, self.task.class_colors
        texts: list[str] = []
        chosen: list[Color] = []
        for i, label in enumerate(labels.tolist()):
            crowd = " (crowd)" if crowds is not None and crowds[i] else ""
            texts.append(names[label - 1] + (crowd if scores is None else f" {100 * float(scores[i]):.0f}"))
            chosen.append(colors[label - 1])
        picture = _enlarged(image)
        scale = torch.tensor([picture.width / image.shape[2], picture.height / image.shape[1]]).repeat(2)
        return draw_objects(picture, boxes.cpu() * scale, texts, chosen, masks, self.opacity)


def _enlarged(image: torch.Tensor) -> Image.Image:
    height, width = image.shape[1:]
    return to_rgb(image).resize(fit_size((width, height)), Image.Resampling.BICUBIC)
