"""What a model says of one picture: classes, areas or objects, drawn as the callbacks draw them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
from PIL import Image
from timm.data import resolve_model_data_config

from lk_backbones._imagenet import imagenet_names
from lk_backbones.analysis.erf import placement
from lk_backbones.analysis.levels import is_detector
from lk_backbones.analysis.models import NamedModel, load_named_model
from lk_backbones.data.classification_transforms import PictureSettings, to_unit
from lk_backbones.data.classification_transforms import eval_transform as classification_transform
from lk_backbones.data.picture_folder import evaluation_arguments
from lk_backbones.data.transforms import eval_transform
from lk_backbones.drawing.figures import ClassificationFigures, DetectionFigures, Figures, SegmentationFigures
from lk_backbones.drawing.palette import Color, class_palette
from lk_backbones.metrics.masks import decode_masks
from lk_backbones.tasks import ClassificationTask, DetectionTask, SegmentationTask
from lk_backbones.tasks.base import BaseTask
from lk_backbones.tasks.inference import pad_to_multiple
from lk_backbones.weights.errors import WeightsError, nearest, shorten
from lk_backbones.weights.saved import read_training_checkpoint

__all__ = ["LARGEST", "PictureModel", "Prediction"]

#: Longer side that larger pictures are fitted into, where neither the user nor a checkpoint gives a size.
LARGEST = 1024


@dataclass(frozen=True)
class Prediction:
    """What a model says of a picture.

    Attributes:
        figure: The picture and the answer.
        columns: What the cells of ``rows`` are.
        rows: Of a segmentation each class that occurs, of a classification the best classes, of a detection each
            object.
    """

    figure: Image.Image
    columns: tuple[str, ...]
    rows: list[tuple[str | float | int, ...]]


class PictureModel:
    """A model, and how it is shown pictures.

    Pictures are given as in the model's own evaluation: a classifier's are resized and cropped as its configuration
    says, those of a checkpoint are fitted into its data's ``test_size``.

    Args:
        name: See `lk_backbones.analysis.models.MODELS`.
        pretrained: As for `load_named_model`.
        seed: As for `load_named_model`.
        size: Height and width of a classifier's pictures, of others what they are fitted into; ``None`` for that of the
            evaluation, else as they are, fitted into 1024 × 1024 if they are larger.

    Attributes:
        named: The model by its name.
        kind: ``"classification"``, ``"segmentation"``, ``"detection"``, or ``"features"`` of an encoder without a head.
        class_names: Names of the classes; of a detector the first one is that of label 1.
    """

    def __init__(self, name: str, pretrained: bool = False, seed: int = 0, size: tuple[int, int] | None = None) -> None:
        self.named: NamedModel = load_named_model(name, pretrained, seed)
        self.kind, number = _kind(self.named)
        self.class_names, self.class_colors = _classes(self.named, self.kind, number)
        if self.named.in_channels != 3:
            raise ValueError(f"{name}: it takes images of {self.named.in_channels} channels, pictures have 3")
        self._size = size
        self._test_size = _test_size(name) if size is None and isinstance(self.model, BaseTask) else None

    @property
    def model(self) -> Any:
        """The model."""
        return self.named.model

    def read(self, pixels: np.ndarray) -> torch.Tensor:
        """Turn a picture into what the model is shown: float ``(3, H, W)`` in [0, 1].

        Args:
            pixels: uint8 RGB ``(H, W, 3)``, as `lk_backbones.data.reading.read_image` returns it.
        """
        settings = self._picture_settings()
        if settings is not None:
            return to_unit(classification_transform(settings)(Image.fromarray(pixels)))
        size = self._size or self._test_size
        if size is None and max(pixels.shape[:2]) > LARGEST:
            size = (LARGEST, LARGEST)
        image: torch.Tensor = eval_transform(None if size is None else (max(size), min(size)))(image=pixels)["image"]
        return image

    def _picture_settings(self) -> PictureSettings | None:
        """Return how a classifier or timm model is used to see pictures."""
        model = self.model
        if isinstance(model, ClassificationTask):
            keys = ("input_size", "crop_pct", "crop_mode", "interpolation", "mean")
            settings = {key: model.hparams[key] for key in keys}
        elif self.kind == "classification" or hasattr(model, "pretrained_cfg"):
            found = resolve_model_data_config(model)
            settings = {key: found[key] for key in ("crop_pct", "crop_mode", "interpolation", "mean")}
            settings["input_size"] = found["input_size"][-2:]
        else:
            return None
        settings["input_size"] = self._size or tuple(settings["input_size"])
        return PictureSettings(**settings)

    def given(self, image: torch.Tensor) -> torch.Tensor:
        """Return an image as `activation_maps` wants it: normalised, unless the model does so by itself."""
        image = image if self.kind == "detection" else self.named.normalize(image)
        return image.to(placement(self.model)[0])

    def find_class(self, text: str) -> int:
        """Return the number of a class, of a detector its label, by its name or that number.

        Raises:
            ValueError: If there is no such class.
        """
        first = 1 if self.kind == "detection" else 0
        if text.isdigit() and first <= int(text) < first + len(self.class_names):
            return int(text)
        folded = [name.casefold() for name in self.class_names]
        if text.casefold() in folded:
            return first + folded.index(text.casefold())
        names = ", ".join(self.class_names[:20]) + (", …" if len(self.class_names) > 20 else "")
        raise ValueError(
            f"{self.named.name} has no class {shorten(text)}{nearest(text, self.class_names)}; there are "
            f"{len(self.class_names)}, from {first}: {names}"
        )

    def class_name(self, target: int) -> str:
        """Return the name of a class by its number, of a detector of a label."""
        return self.class_names[target - 1 if self.kind == "detection" else target]

    def predict(self, image: torch.Tensor, name: str, opacity: float = 0.6, score_threshold: float = 0.3) -> Prediction:
        """Ask the model about a picture.

        Args:
            image: What `read` returned.
            name: What the picture is called, for the caption.
            opacity: Of the classes' colours over the picture.
            score_threshold: Least score of an object that is shown.

        Raises:
            ValueError: If the model gives no answer, or cannot be run on such pictures.
        """
        if self.kind == "features":
            raise ValueError(f"{self.named.name} has no head: it gives features, and no answer that could be shown")
        model = self.model
        batch: dict[str, Any] = {"image": image[None].to(placement(model)[0]), "path": [name]}
        try:
            with torch.inference_mode():
                if isinstance(model, BaseTask):
                    size = (image.shape[1], image.shape[2])
                    outputs = model.predict_step(batch | {"original_size": [size], "image_id": [1]}, 0)
                else:
                    outputs = self._ask(image)
        except (RuntimeError, AssertionError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            size_ = " × ".join(map(str, image.shape[1:]))
            raise ValueError(f"{self.named.name} cannot be run on a picture of {size_}: {error}") from error
        figures, batch["image"] = self._figures(opacity, score_threshold), batch["image"].cpu()
        if self.kind == "classification":
            assert isinstance(figures, ClassificationFigures)
            figure = figures.cell(batch, outputs, 0, name, (400, 400))
            best = zip(outputs["classes"][0].tolist(), outputs["probabilities"][0].tolist(), strict=True)
            rows: list[Any] = [(self.class_names[c], round(100 * p, 2)) for c, p in best]
            return Prediction(figure, ("class", "probability in %"), rows)
        figure = figures.predicted(batch, outputs, 0, name)["overlays"]
        if self.kind == "segmentation":
            return Prediction(figure, ("class", "area in %", "pixels"), self._areas(outputs["label_map"][0]))
        rows = self._objects(outputs[0], (image.shape[1], image.shape[2]), score_threshold)
        return Prediction(figure, ("object", "score in %", "area in %"), rows)

    def _figures(self, opacity: float, score_threshold: float) -> Figures:
        """Return what draws the answer: the task's own, or that of a task of the same kind."""
        if isinstance(self.model, BaseTask):
            return self.model.figures(opacity, score_threshold)
        kinds: dict[str, type[Figures]] = {
            "classification": ClassificationFigures,
            "segmentation": SegmentationFigures,
            "detection": DetectionFigures,
        }
        task = SimpleNamespace(
            class_names=self.class_names,
            class_colors=self.class_colors,
            hparams={"num_classes": max(len(self.class_names), 2)},
        )
        return kinds[self.kind](task, opacity, score_threshold)

    def _ask(self, image: torch.Tensor) -> Any:
        """Run a model that is no task of ours; return what the task of its kind would."""
        x, model = self.given(image)[None], self.model
        if self.kind == "detection":
            (found,) = model([x[0]])
            return [
                {key: found[key].cpu() for key in ("boxes", "labels", "scores")}
                | {"original_size": (image.shape[1], image.shape[2])}
            ]
        height, width = image.shape[1:]
        if isinstance(model, smp.base.SegmentationModel):
            x = _padded(model, x)
        logits = _logits(model(x)).float()
        if self.kind == "classification":
            classes = logits.topk(min(5, logits.shape[1]), dim=1).indices
            return {"classes": classes, "probabilities": logits.softmax(1).gather(1, classes)}
        logits = torch.nn.functional.interpolate(logits, x.shape[2:], mode="bilinear")[0, :, :height, :width]
        label_map = logits.argmax(0) if len(logits) > 1 else (logits[0] > 0).long()
        return {"label_map": [label_map.cpu()]}

    def _areas(self, label_map: torch.Tensor) -> list[Any]:
        counts = torch.bincount(label_map.flatten().long(), minlength=len(self.class_names))
        order = [c for c in counts.argsort(descending=True).tolist() if counts[c]]
        return [
            (self.class_names[c], round(100 * int(counts[c]) / label_map.numel(), 2), int(counts[c])) for c in order
        ]

    def _objects(self, found: Mapping[str, Any], size: tuple[int, int], score_threshold: float) -> list[Any]:
        rows = []
        for i, score in enumerate(found["scores"].tolist()):
            if score < score_threshold:
                continue
            if "segmentation" in found:
                area = float(decode_masks([found["segmentation"][i]], size).sum())
            else:
                left, top, right, bottom = found["boxes"][i].tolist()
                area = (right - left) * (bottom - top)
            name = self.class_name(int(found["labels"][i]))
            rows.append((name, round(100 * score, 1), round(100 * area / (size[0] * size[1]), 2)))
        return rows


def _padded(model: Any, x: torch.Tensor) -> torch.Tensor:
    return pad_to_multiple(x, int(model.encoder.output_stride)) if model.requires_divisible_input_shape else x


def _logits(output: Any) -> torch.Tensor:
    if isinstance(output, Mapping):
        output = output.get("logits", output.get("out"))
    found: torch.Tensor = getattr(output, "logits", output)
    return found


def _kind(named: NamedModel) -> tuple[str, int]:
    """Tell what a model answers, and how many classes it knows."""
    model: Any = named.model
    tasks: dict[Any, str] = {
        SegmentationTask: "segmentation",
        DetectionTask: "detection",
        ClassificationTask: "classification",
    }
    for cls, kind in tasks.items():
        if isinstance(model, cls):
            return kind, int(model.hparams["num_classes"])
    if is_detector(model):
        return "detection", 0
    if getattr(model, "num_classes", None) == 0:
        return "features", 0
    # what others return tells most surely
    side = resolve_model_data_config(model)["input_size"][-2:] if hasattr(model, "pretrained_cfg") else (224, 224)
    device, dtype = placement(model)
    with torch.inference_mode():
        output = model(torch.zeros(1, named.in_channels, *side, device=device, dtype=dtype))
    logits = _logits(output)
    if not isinstance(logits, torch.Tensor) or logits.ndim not in (2, 4):
        return "features", 0
    return ("classification" if logits.ndim == 2 else "segmentation"), logits.shape[1]


def _classes(named: NamedModel, kind: str, number: int) -> tuple[list[str], list[Color]]:
    if isinstance(named.model, BaseTask):
        return named.model.class_names, named.model.class_colors
    names: list[str] = []
    library = named.name.partition(",")[0].removeprefix("torchvision:")
    if (
        not timm.is_model(library.removeprefix("timm:").partition(".")[0])
        and library in torchvision.models.list_models()
    ):
        weights: Any = torchvision.models.get_model_weights(library).DEFAULT
        names = list(weights.meta.get("categories", []))[1 if kind == "detection" else 0 :]
    elif kind == "classification" and number == 1000:
        names = imagenet_names()
    if kind == "detection":
        number = _num_labels(named.model)
    elif kind == "segmentation" and number == 1:
        number = 2  # one logit tells two classes apart
    if len(names) != number:
        names = [f"class_{i}" for i in range(1, number + 1)] if kind == "detection" else []
        names = names or [f"class_{i}" for i in range(number)]
    return names, class_palette(len(names))


def _num_labels(model: Any) -> int:
    """Return how many labels a detector of torchvision's gives, without the background."""
    predictor = getattr(getattr(model, "roi_heads", None), "box_predictor", None)
    if predictor is not None:
        return int(predictor.cls_score.out_features) - 1
    return int(model.head.classification_head.num_classes) - 1


def _test_size(name: str) -> tuple[int, int] | None:
    """Return the size at which a training checkpoint's data was evaluated."""
    if not Path(name).is_file():
        return None
    try:
        found: tuple[int, int] | None = evaluation_arguments(read_training_checkpoint(name), name).get("test_size")
    except WeightsError:
        return None  # weights without data
    return found
