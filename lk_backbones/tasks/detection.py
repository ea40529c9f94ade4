"""Object detection and instance segmentation: any detector on any encoder, trained and measured as the papers do."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import nn

from lk_backbones.drawing.figures import DetectionFigures, Figures
from lk_backbones.heads import build_detector
from lk_backbones.metrics.detection import METRIC_NAMES, DetectionMetrics
from lk_backbones.metrics.masks import encode_masks
from lk_backbones.metrics.tables import ap_table
from lk_backbones.tasks.arguments import check_shared_arguments
from lk_backbones.tasks.base import BaseTask, mean_and_std
from lk_backbones.tasks.encoder import build_encoder
from lk_backbones.tasks.openmmlab import openmmlab_encoder
from lk_backbones.weights.openmmlab import split_backbone

__all__ = ["DetectionTask"]

Target = dict[str, Any]


class DetectionTask(BaseTask):
    """Train, measure and apply a detector.

    Batches are torchvision's pair of lists, ``(images, targets)``: images float32 ``(C, h, w)`` in [0, 1] (RGB, not
    normalised), which may differ in size; targets with ``boxes`` float32 ``(N, 4)`` as x1, y1, x2, y2 in pixels,
    ``labels`` int64 ``(N,)`` from 1 to num_classes (0 is the background), ``masks`` ``(N, h, w)`` of 0 and 1 for mask
    detectors, ``image_id`` int, and, if known, ``iscrowd`` and ``area`` ``(N,)``, ``path`` and ``original_size``
    ``(H, W)``. Objects with ``iscrowd`` are left out in training and ignored in the metrics, as COCO does. For
    prediction a dictionary with ``image`` ``(N, C, h, w)``, ``path`` and ``original_size`` will do.

    In training, images enter as they come: resizing them is the data's concern. In evaluation the detector resizes them
    by ``min_size`` and ``max_size`` and gives its results at the given size.

    Logged: ``train/loss`` and every term of it, then for ``val`` and ``test`` COCO's twelve numbers of boxes,
    ``box_ap``, ``box_ap50``, ``box_ap75``, ``box_ap_small``, ``box_ap_medium``, ``box_ap_large``, ``box_ar1``,
    ``box_ar10``, ``box_ar100``, ``box_ar_small``, ``box_ar_medium``, ``box_ar_large``, for mask detectors the same of
    masks (``mask_ap`` and so on), and with ``per_class_ap`` also ``box_ap/<class name>``; all over the whole data set
    and all processes (see `DetectionMetrics`), NaN where there is nothing to measure.

    All arguments are plain values and are saved as hyper-parameters, so that `load_from_checkpoint` needs nothing but
    the checkpoint.

    Args:
        architecture: ``"faster_rcnn"``, ``"mask_rcnn"``, ``"cascade_rcnn"``, ``"cascade_mask_rcnn"``, ``"fcos"`` or
            ``"retinanet"``.
        encoder: One of ours (``"replknet_31b"``), one of smp's (``"resnet18"``), or any timm model (``"tu-…"``).
        encoder_weights: ``None`` (random), ``True`` or ``"pretrained"``, a timm tag, a name of smp's
            (``"imagenet"``), or a local ``.safetensors`` / ``.pth`` file.
        encoder_kwargs: Keyword arguments of the timm model, such as ``{"drop_path_rate": 0.5}``.
        architecture_kwargs: Further arguments of the architecture, such as ``{"fpn_channels": 128}``.
        num_classes: Number of classes, without background.
        in_channels: Channels of the images.
        class_names: Names of the classes, that of label 1 first; ``None`` takes the data module's.
        class_colors: RGB colours (0-255) of the classes for pictures; ``None`` takes the data module's.
        category_ids: Ids that results files give to the classes; ``None`` takes the data module's, else 1, 2, ….
        mean: Mean of every channel in [0, 1]; ``None`` takes that of the encoder's weights, else ImageNet's.
        std: Standard deviation of every channel, likewise.
        min_size: Length of the short side in evaluation, in pixels …
        max_size: … unless the long side would be longer than this.
        per_class_ap: Log the AP of every class too.
        optimizer: ``"adamw"`` or ``"sgd"``.
        lr: Learning rate of everything outside of the encoder; of the encoder too unless a factor below says otherwise.
        momentum: Momentum of ``sgd``.
        weight_decay: Weight decay; none on norms, nor on what the encoder's model exempts (position biases).
        bias_weight_decay: Weight decay of biases outside of norms. ``None`` for ``weight_decay``, as RepLKNet's authors
            train; 0 to exempt them, as timm and the authors of SLaK and UniRepLKNet do.
        layer_decay: Factor of the learning rate from one layer of the encoder to the next one below (timm models only).
        layer_decay_type: What is a layer: ``"layer_wise"``, some blocks, as the encoder's family counts them, or
            ``"stage_wise"``, a whole stage, as ConvNeXt and SLaK train on ADE20K.
        encoder_lr_scale: Further factor of the encoder's learning rate, 0.1 for a tenth of the heads'.
        warmup_steps: Optimiser steps of linear warm-up.
        warmup_ratio: Factor of the learning rate at the first step of the warm-up.
        milestones: Epochs after which the learning rate is multiplied by ``gamma`` (27 and 33 of 36 in the published
            "3x" schedule); ``None`` for a polynomial decay instead.
        gamma: Factor of the learning rate at every milestone.
        power: Exponent of the polynomial decay over all steps.
        min_lr: Learning rate at the end of the polynomial decay (of parameters with scale 1).
        freeze_encoder: Train only pyramid and heads; the encoder's batch norms are frozen too.
        gradient_checkpointing: Recompute the encoder's blocks in the backward pass, to save memory (timm models only).
        enlarge_kernels: Enlarge the encoder's depthwise kernels to this odd size once its weights are loaded, see
            `lk_backbones.enlarge_kernels`; or its keyword arguments, such as ``{"kernel_size": 31, "stages": [2]}``.

    Raises:
        ValueError: If a name, weight or combination of arguments is impossible; the message says what would be right.
    """

    taken_from_data = (*BaseTask.taken_from_data, "category_ids")

    def __init__(
        self,
        architecture: Literal[
            "faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn", "fcos", "retinanet"
        ] = "cascade_mask_rcnn",
        encoder: str = "replknet_31n",
        encoder_weights: bool | str | None = None,
        encoder_kwargs: dict[str, Any] | None = None,
        architecture_kwargs: dict[str, Any] | None = None,
        num_classes: int = 80,
        in_channels: int = 3,
        class_names: list[str] | None = None,
        class_colors: list[tuple[int, int, int]] | None = None,
        category_ids: list[int] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        min_size: int = 800,
        max_size: int = 1333,
        per_class_ap: bool = False,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        lr: float = 2e-4,
        momentum: float = 0.9,
        weight_decay: float = 0.05,
        bias_weight_decay: float | None = None,
        layer_decay: float = 1.0,
        layer_decay_type: Literal["layer_wise", "stage_wise"] = "layer_wise",
        encoder_lr_scale: float = 1.0,
        warmup_steps: int = 0,
        warmup_ratio: float = 1e-3,
        milestones: list[int] | None = None,
        gamma: float = 0.1,
        power: float = 1.0,
        min_lr: float = 0.0,
        freeze_encoder: bool = False,
        gradient_checkpointing: bool = False,
        enlarge_kernels: int | dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        _check_arguments(self.hparams)
        spec = self.resolve_encoder()
        built = build_encoder(spec, in_channels)
        channel_mean, channel_std = mean_and_std(built, spec, self.hparams)
        self.model: Any = build_detector(
            architecture,
            built,
            num_classes,
            channel_mean,
            channel_std,
            min_size,
            max_size,
            **(architecture_kwargs or {}),
        )
        self.prepare_encoder(spec)
        self.val_metrics = DetectionMetrics(self.has_masks, per_class_ap)
        self.test_metrics = DetectionMetrics(self.has_masks, per_class_ap)

    @property
    def encoder(self) -> nn.Module:
        """The smp encoder inside the network."""
        return self.model.backbone.encoder

    @property
    def has_masks(self) -> bool:
        """Return whether the detector predicts masks."""
        return bool(self.model.needs_masks)

    @property
    def category_ids(self) -> list[int]:
        """Ids of the classes in results files: the argument's, else the data module's, else the labels."""
        return self.hparams["category_ids"] or list(range(1, self.hparams["num_classes"] + 1))

    # --- networks ---------------------------------------------------------------------------------------------------

    def forward(self, images: Sequence[torch.Tensor] | torch.Tensor) -> list[dict[str, torch.Tensor]]:
        """Detect objects; call ``eval()`` first.

        Args:
            images: float ``(in_channels, H, W)`` each, in [0, 1], of any size.

        Returns:
            For every image ``boxes`` ``(N, 4)``, ``labels`` ``(N,)``, ``scores`` ``(N,)``, best first, and for mask
            detectors ``masks`` ``(N, 1, H, W)``, the probability of every pixel, at the image's size.
        """
        return self.model(list(images))

    def detect(
        self, images: Sequence[torch.Tensor], sizes: Sequence[tuple[int, int]] | None = None
    ) -> list[dict[str, Any]]:
        """Detect objects, with masks as run lengths, on the CPU.

        Args:
            images: As in `forward`.
            sizes: Height and width that results refer to; ``None`` for those of the images.

        Returns:
            For every image ``boxes`` float32 ``(N, 4)``, ``labels`` int64 ``(N,)``, ``scores`` float32 ``(N,)`` and,
            for mask detectors, ``segmentation``, a list of N run lengths (see `lk_backbones.metrics.masks`).
        """
        results = []
        for i, (image, detected) in enumerate(zip(images, self(images), strict=True)):
            size = (image.shape[1], image.shape[2]) if sizes is None else sizes[i]
            resized = size != (image.shape[1], image.shape[2])
            boxes = detected["boxes"].float()
            if resized:
                scale = boxes.new_tensor([size[1] / image.shape[2], size[0] / image.shape[1]])
                boxes = boxes * scale.repeat(2)
            result: dict[str, Any] = {
                "boxes": boxes.cpu(),
                "labels": detected["labels"].cpu(),
                "scores": detected["scores"].float().cpu(),
            }
            if self.has_masks:
                masks = detected["masks"]
                if resized and len(masks):
                    masks = F.interpolate(masks.float(), size, mode="bilinear", align_corners=False)
                result["segmentation"] = encode_masks(masks[:, 0] >= 0.5)
            results.append(result)
        return results

    # --- training ---------------------------------------------------------------------------------------------------

    def training_step(self, batch: tuple[list[torch.Tensor], list[Target]], batch_idx: int) -> torch.Tensor:
        """Compute the losses of one batch; Lightning calls it.

        Raises:
            ValueError: If targets do not fit the images or the detector.
        """
        images, targets = batch
        keys = ("boxes", "labels", "masks") if self.has_masks else ("boxes", "labels")
        losses: dict[str, torch.Tensor] = self.model(images, [_without_crowds(target, keys) for target in targets])
        loss = torch.stack([term.float() for term in losses.values()]).sum()
        self.log_dict({f"train/{name}": term.detach() for name, term in losses.items()}, batch_size=len(images))
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(images))
        return loss

    # --- validation and test ----------------------------------------------------------------------------------------

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Add a batch to the validation metrics; returns ``{"predictions": [...]}`` (see `detect`) for callbacks."""
        return self._evaluate(batch, self.val_metrics)

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Add a batch to the test metrics; returns ``{"predictions": [...]}`` (see `detect`) for callbacks."""
        return self._evaluate(batch, self.test_metrics)

    def _evaluate(self, batch: tuple[list[torch.Tensor], list[Target]], metrics: DetectionMetrics) -> dict[str, Any]:
        images, targets = batch
        predictions = self._detect_readable(images, targets, [(image.shape[1], image.shape[2]) for image in images])
        metrics.update(predictions, targets)
        return {"predictions": predictions}

    def _detect_readable(
        self, images: Sequence[torch.Tensor], infos: Sequence[dict[str, Any]], sizes: Sequence[tuple[int, int]]
    ) -> list[dict[str, Any]]:
        """Detect objects, but none in pictures that could not be read, which is said."""
        readable = [i for i, info in enumerate(infos) if "error" not in info]
        detected = iter(self.detect([images[i] for i in readable], [sizes[i] for i in readable]) if readable else ())
        results = []
        for info in infos:
            if "error" not in info:
                results.append(next(detected))
                continue
            warnings.warn(f"{info['error']} It is skipped: there are no detections in it.", stacklevel=2)
            nothing = {
                "boxes": torch.zeros(0, 4),
                "labels": torch.zeros(0, dtype=torch.int64),
                "scores": torch.zeros(0),
            }
            results.append(nothing | ({"segmentation": []} if self.has_masks else {}))
        return results

    def _log_metrics(self, stage: str, metrics: DetectionMetrics) -> None:
        # The metrics have gathered all processes by themselves; sync_dist then only averages equal numbers, and keeps
        # Lightning from warning that they might differ.
        computed = metrics.compute()
        for kind in ("box", "mask") if self.has_masks else ("box",):
            for name in METRIC_NAMES:
                value = float(computed[f"{kind}_{name}"])
                self.log(f"{stage}/{kind}_{name}", value, sync_dist=True, prog_bar=name == "ap")
            if self.hparams["per_class_ap"]:
                measured = dict(
                    zip(computed["classes"].tolist(), computed[f"{kind}_ap_per_class"].tolist(), strict=True)
                )
                per_class = {
                    f"{stage}/{kind}_ap/{name}": measured.get(label, torch.nan)
                    for label, name in enumerate(self.class_names, start=1)
                }
                self.log_dict(per_class, sync_dist=True)

    def on_validation_epoch_start(self) -> None:
        """Forget the previous validation."""
        self.val_metrics.reset()

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics of all processes."""
        self._log_metrics("val", self.val_metrics)

    def on_test_epoch_start(self) -> None:
        """Forget the previous test."""
        self.test_metrics.reset()

    def on_test_epoch_end(self) -> None:
        """Log the test metrics of all processes."""
        self._log_metrics("test", self.test_metrics)

    # --- prediction -------------------------------------------------------------------------------------------------

    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, Any]]:
        """Detect objects in pictures, at their original sizes.

        Returns:
            For every picture ``path``, ``image_id`` (``None`` if it has none), ``original_size`` ``(H, W)``, ``boxes``
            float32 ``(N, 4)``, ``labels`` int64 ``(N,)`` from 1, ``scores`` float32 ``(N,)``, best first, and for mask
            detectors ``segmentation``, the masks as N run lengths; `lk_backbones.metrics.masks.decode_masks` makes bool
            ``(N, H, W)`` of them. For pictures of a folder also ``file_name``. A picture that could not be read has
            no detections, and the reason as ``error``.
        """
        images, infos = _pictures(batch, batch_idx)
        detected = self._detect_readable(images, infos, [info["original_size"] for info in infos])
        return [info | found for info, found in zip(infos, detected, strict=True)]

    # --- what callbacks ask -----------------------------------------------------------------------------------------

    def openmmlab_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rename a published detector to the keys of this task, see `lk_backbones.tasks.openmmlab_state_dict`."""
        backbone, others = split_backbone(state_dict)
        encoder = openmmlab_encoder(self.encoder, self.hparams["encoder_kwargs"], backbone)
        renamed = {f"model.backbone.encoder.{key}": value for key, value in encoder.items()}
        return renamed | {f"model.{key}": value for key, value in self.model.openmmlab_state_dict(others).items()}

    def figures(self, opacity: float = 0.6, score_threshold: float = 0.3) -> Figures:
        """See `BaseTask.figures`."""
        return DetectionFigures(self, opacity, score_threshold)

    def results_table(self, metrics: Mapping[str, Any], stage: str) -> Table:
        """See `BaseTask.results_table`; COCO's twelve numbers and, if it is measured, the AP of every class."""
        return ap_table(metrics, self.class_names, stage)

    def detections(self, batch: Any, outputs: Any) -> list[dict[str, Any]]:
        """Tell what was detected in the pictures of a batch, for `CocoResults`.

        Args:
            batch: The batch.
            outputs: What `validation_step`, `test_step` or `predict_step` returned for it.

        Returns:
            For every picture what `predict_step` returns, at least ``image_id``, ``boxes``, ``labels`` and ``scores``.
        """
        if isinstance(outputs, list):
            return outputs
        predictions: list[dict[str, Any]] = outputs["predictions"]
        return [
            prediction | {"image_id": target["image_id"]}
            for target, prediction in zip(batch[1], predictions, strict=True)
        ]

    # --- data -------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Compare the data module with the task; see `BaseTask.setup`.

        Args:
            stage: What the trainer is about to do.

        Raises:
            ValueError: If the numbers of classes differ, or the detector needs masks that the data does not have.
        """
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        if self.has_masks and stage != "predict" and not getattr(data, "has_masks", True):
            architecture = self.hparams["architecture"]
            without = {"mask_rcnn": "faster_rcnn", "cascade_mask_rcnn": "cascade_rcnn"}[architecture]
            raise ValueError(
                f"architecture='{architecture}' predicts masks, but {type(data).__name__} has none: use '{without}'"
            )
        _check_arguments(self.hparams)


def _check_arguments(hparams: Any) -> None:
    check_shared_arguments(hparams, 1, "background does not count")
    ids = hparams["category_ids"]
    if ids is not None and (len(ids) != hparams["num_classes"] or len(set(ids)) != len(ids)):
        raise ValueError(f"category_ids must be {hparams['num_classes']} different numbers, one per class, got {ids}")
    if not 0 < hparams["min_size"] <= hparams["max_size"]:
        raise ValueError(f"min_size={hparams['min_size']} must be positive and at most max_size={hparams['max_size']}")


def _without_crowds(target: Target, keys: tuple[str, ...]) -> Target:
    """Return what the network sees of a target."""
    kept = {key: target[key] for key in keys if key in target}
    if "iscrowd" in target and target["iscrowd"].any():
        single = target["iscrowd"] == 0
        kept = {key: value[single] for key, value in kept.items()}
    return kept


def _pictures(batch: Any, batch_idx: int) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
    """Return the images of a batch of either form, and what is known of each: path, image_id, original_size."""
    if isinstance(batch, Mapping):
        images = list(batch["image"])
        keys = [key for key in ("path", "image_id", "original_size") if key in batch]
        targets = [{key: batch[key][i] for key in keys} for i in range(len(images))]
        for target in targets:
            target["file_name"] = str(target["path"]) if "path" in target else None
    else:
        images, targets = list(batch[0]), list(batch[1])
    infos = []
    for i, (image, target) in enumerate(zip(images, targets, strict=True)):
        size = target.get("original_size", image.shape[1:])
        info = {
            "path": str(target.get("path", f"batch_{batch_idx}_{i}")),
            "image_id": target.get("image_id"),
            "original_size": (int(size[0]), int(size[1])),
        }
        infos.append(info | {key: target[key] for key in ("file_name", "error") if target.get(key) is not None})
    return images, infos
