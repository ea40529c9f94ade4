"""Semantic segmentation: any smp architecture on any encoder, trained and measured as the papers do."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import segmentation_models_pytorch as smp
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from rich.table import Table
from torchmetrics import MeanMetric

from lk_backbones.drawing.figures import Figures, SegmentationFigures
from lk_backbones.heads import FCNHead, OpenMMLabUPerNet
from lk_backbones.metrics.segmentation import SegmentationMetrics
from lk_backbones.metrics.tables import iou_table
from lk_backbones.tasks.architecture import AUXILIARY_LEVEL, build_auxiliary_head, build_model, check_arguments
from lk_backbones.tasks.base import BaseTask
from lk_backbones.tasks.inference import augmented_probabilities, pad_to_multiple, resize, sliding_window
from lk_backbones.tasks.losses import SegmentationLoss
from lk_backbones.tasks.openmmlab import openmmlab_encoder
from lk_backbones.weights.openmmlab import rename_upernet, split_backbone

__all__ = ["SegmentationTask"]


class SegmentationTask(BaseTask):
    """Train, measure and apply a segmentation network.

    Batches are dictionaries: ``image`` float32 ``(N, C, h, w)`` in [0, 1] (RGB, not normalised), ``mask`` int64
    ``(N, H, W)`` with 0 … num_classes - 1 or ``ignore_index``, ``path`` a list of names. For evaluation the mask may
    have another size than the image (a resized image): logits are resized to the mask. For prediction
    ``original_size``, a list of ``(H, W)``, says what size the label maps shall have.

    Logged: ``train/loss`` (and ``train/auxiliary_loss``), then for ``val`` and ``test`` ``loss``, ``mean_iou``,
    ``pixel_accuracy`` and ``iou/<class name>``, all over the whole data set and all processes (see
    `SegmentationMetrics`); classes that occur nowhere are NaN.

    All arguments are plain values and are saved as hyper-parameters, so that `load_from_checkpoint` needs nothing but
    the checkpoint.

    Args:
        architecture: ``"upernet_openmmlab"`` (UPerNet as published) or an smp architecture such as ``"unet"``.
        encoder: One of ours (``"replknet_31b"``), one of smp's (``"resnet18"``), or any timm model (``"tu-…"``).
        encoder_weights: ``None`` (random), ``True`` or ``"pretrained"``, a timm tag, a name of smp's
            (``"imagenet"``), or a local ``.safetensors`` / ``.pth`` file.
        encoder_kwargs: Keyword arguments of the timm model, such as ``{"drop_path_rate": 0.5}``.
        architecture_kwargs: Further arguments of the architecture, such as ``{"decoder_channels": 256}``.
        num_classes: Number of classes.
        in_channels: Channels of the images.
        class_names: Names of the classes; ``None`` takes the data module's.
        class_colors: RGB colours (0-255) of the classes for pictures; ``None`` takes the data module's.
        ignore_index: Label of pixels that do not count, or ``None``.
        mean: Mean of every channel in [0, 1]; ``None`` takes that of the encoder's weights, else ImageNet's.
        std: Standard deviation of every channel, likewise.
        loss: ``"ce"``, ``"dice"``, ``"focal"``, ``"lovasz"``, or a sum: ``"ce+dice"`` or a list.
        class_weights: Weight of every class in ``ce``.
        auxiliary_weight: Weight of the loss of an auxiliary FCN head on the encoder's third stage (0.4 in the published
            UPerNets), 0 for none.
        auxiliary_channels: Width of that head.
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
        power: Exponent of the polynomial decay over all steps.
        min_lr: Learning rate at the end (of parameters with scale 1).
        freeze_encoder: Train only decoder and heads; the encoder's batch norms are frozen too.
        gradient_checkpointing: Recompute the encoder's blocks in the backward pass, to save memory (timm models only).
        enlarge_kernels: Enlarge the encoder's depthwise kernels to this odd size once its weights are loaded, see
            `lk_backbones.enlarge_kernels`; or its keyword arguments, such as ``{"kernel_size": 31, "stages": [2]}``.
        inference: ``"whole"`` image at once, or ``"slide"`` a window over it and average.
        slide_crop: Height and width of the window.
        slide_stride: Vertical and horizontal step of the window.
        tta_scales: Scales of test-time augmentation; ``(0.5, 0.75, 1.0, 1.25, 1.5, 1.75)`` for the papers' "ms". It
            applies to test, predict and separate validation runs, not to the validation during training. Our data
            modules make every copy from the original picture, as published; other loaders give ``image`` in its
            original size for that.
        tta_flip: Add the mirror image at every scale.
        predict_probabilities: Let predictions hold the class probabilities too.

    Raises:
        ValueError: If a name, weight or combination of arguments is impossible; the message says what would be right.
    """

    def __init__(
        self,
        architecture: str = "upernet_openmmlab",
        encoder: str = "replknet_31n",
        encoder_weights: bool | str | None = None,
        encoder_kwargs: dict[str, Any] | None = None,
        architecture_kwargs: dict[str, Any] | None = None,
        num_classes: int = 19,
        in_channels: int = 3,
        class_names: list[str] | None = None,
        class_colors: list[tuple[int, int, int]] | None = None,
        ignore_index: int | None = 255,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        loss: str | list[str] = "ce",
        class_weights: list[float] | None = None,
        auxiliary_weight: float = 0.0,
        auxiliary_channels: int = 256,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        lr: float = 2e-4,
        momentum: float = 0.9,
        weight_decay: float = 0.05,
        bias_weight_decay: float | None = None,
        layer_decay: float = 1.0,
        layer_decay_type: Literal["layer_wise", "stage_wise"] = "layer_wise",
        encoder_lr_scale: float = 1.0,
        warmup_steps: int = 0,
        warmup_ratio: float = 1e-6,
        power: float = 1.0,
        min_lr: float = 0.0,
        freeze_encoder: bool = False,
        gradient_checkpointing: bool = False,
        enlarge_kernels: int | dict[str, Any] | None = None,
        inference: Literal["whole", "slide"] = "whole",
        slide_crop: tuple[int, int] = (512, 512),
        slide_stride: tuple[int, int] = (341, 341),
        tta_scales: list[float] | None = None,
        tta_flip: bool = False,
        predict_probabilities: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        check_arguments(self.hparams)
        spec = self.resolve_encoder()
        self.model: Any = build_model(architecture, spec, in_channels, num_classes, architecture_kwargs or {})
        self.auxiliary_head: FCNHead | None = None
        if auxiliary_weight > 0:
            self.auxiliary_head = build_auxiliary_head(self.model, num_classes, auxiliary_channels)
        self.align_corners = bool(getattr(self.model, "align_corners", False))
        stride: int = self.model.encoder.output_stride
        self.size_multiple = 1 if isinstance(self.model, OpenMMLabUPerNet) else stride
        # the feature pyramid attention of PAN halves the encoder's last map three times
        self.smallest_size = 8 * stride if isinstance(self.model, smp.PAN) else 1
        self.prepare_encoder(spec)

        self.loss = SegmentationLoss(loss, num_classes, class_weights, ignore_index)
        self.val_metrics = SegmentationMetrics(num_classes, ignore_index)
        self.test_metrics = SegmentationMetrics(num_classes, ignore_index)
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()

    @property
    def encoder(self) -> torch.nn.Module:
        """The smp encoder inside the network."""
        return self.model.encoder

    # --- networks ---------------------------------------------------------------------------------------------------

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Segment images, whole or in sliding windows as ``inference`` says.

        Args:
            image: float ``(N, in_channels, H, W)`` in [0, 1], of any size.

        Returns:
            Logits ``(N, num_classes, H, W)``.
        """
        image = self.normalize(image)
        if self.hparams["inference"] == "slide":
            return sliding_window(self._segment, image, self.hparams["slide_crop"], self.hparams["slide_stride"])
        return self._segment(image)

    def _pad(self, image: torch.Tensor) -> torch.Tensor:
        return pad_to_multiple(image, self.size_multiple, self.smallest_size)

    def _segment(self, image: torch.Tensor) -> torch.Tensor:
        """Logits of normalised images of any size, at their size."""
        padded = self._pad(image)
        logits = resize(self.model(padded), _size(padded), self.align_corners)
        return logits[:, :, : image.shape[2], : image.shape[3]]

    def predict_scores(
        self,
        image: torch.Tensor,
        size: tuple[int, int],
        augment: bool = True,
        scaled: Sequence[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Class scores whose softmax over the classes is the predicted probability.

        Args:
            image: float ``(N, in_channels, h, w)`` in [0, 1]; with test-time augmentation over scales in its original
                size, unless ``scaled`` is given.
            size: Height and width of the result.
            augment: Whether to apply the test-time augmentation that the task is configured with.
            scaled: The images at every one of ``tta_scales``, in [0, 1] or 8 bits, as our data modules make them from
                the original pictures; ``None`` to scale ``image``.

        Returns:
            ``(N, num_classes, *size)``: logits, or the logarithm of the probabilities averaged by the augmentation.
        """
        scales, flip = self._test_scales or [1.0], self.hparams["tta_flip"]
        if augment and (flip or self._test_scales):
            probabilities = augmented_probabilities(self, image, size, scales, flip, self.align_corners, scaled)
            return probabilities.clamp(min=torch.finfo(torch.float32).tiny).log()
        return resize(self(image), size, self.align_corners)

    @property
    def _test_scales(self) -> list[float]:
        """Scales of test-time augmentation; none if there is only the image as it is."""
        scales = list(self.hparams["tta_scales"] or [])
        return [] if scales == [1.0] else scales

    def _scores(self, batch: dict[str, Any], places: slice, size: tuple[int, int], augment: bool) -> torch.Tensor:
        """`predict_scores` of some images of a batch."""
        image, scaled = batch["image"][places], batch.get("scaled")
        if not (augment and self._test_scales):
            scaled = None
        elif scaled is None and _size(image) != size:
            rank_zero_warn(
                f"test-time augmentation scales images that were resized before, from {size[0]}x{size[1]} to "
                f"{image.shape[2]}x{image.shape[3]} pixels, which blurs them: give the trainer a data module of ours, "
                "which makes copies from the original pictures, or images in their original size"
            )
        return self.predict_scores(image, size, augment, scaled and [copies[places] for copies in scaled])

    # --- training ---------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        """Compute the loss of one batch; Lightning calls it.

        Raises:
            ValueError: If a label is neither a class nor ``ignore_index``, images and masks differ in size, or the
                batch is too small for the batch norms of pyramid pooling.
        """
        image, mask = batch["image"], self._checked_mask(batch)
        if image.shape[2:] != mask.shape[1:]:
            raise ValueError(
                f"image and mask differ in size in training: {_size(image)} and {tuple(mask.shape[1:])} "
                f"(heights and widths) in a batch with '{_paths(batch, 0)[0]}'"
            )
        height, width = mask.shape[1:]
        padded = self._pad(self.normalize(image))
        try:
            if self.auxiliary_head is None:
                outputs = [self.model(padded)]
            else:
                features = self.model.encoder(padded)
                auxiliary = self.auxiliary_head(features[AUXILIARY_LEVEL])
                outputs = [self.model.segmentation_head(self.model.decoder(features)), auxiliary]
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ValueError(
                f"'{self.hparams['architecture']}' cannot train on {len(image)} image of {width}x{height} pixels per "
                "process: its batch norms would see a single value per channel. Use a batch size of at least 2 with "
                "drop_last=True, or larger images"
            ) from error
        outputs = [resize(logits, _size(padded), self.align_corners)[:, :, :height, :width] for logits in outputs]
        loss = self.loss(outputs[0], mask)
        if self.auxiliary_head is not None:
            auxiliary_loss = self.loss(outputs[1], mask)
            self.log("train/auxiliary_loss", auxiliary_loss.detach(), batch_size=len(image))
            loss = loss + self.hparams["auxiliary_weight"] * auxiliary_loss
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(image))
        return loss

    # --- validation and test ----------------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, torch.Tensor]:
        """Add a batch to the validation metrics; returns ``{"label_map": (N, H, W)}`` for callbacks."""
        # "ms" takes a dozen passes per image, too much for the validations within a training
        return self._evaluate(
            batch, self.val_metrics, self.val_loss, augment=self.trainer.state.fn != TrainerFn.FITTING
        )

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, torch.Tensor]:
        """Add a batch to the test metrics; returns ``{"label_map": (N, H, W)}`` for callbacks."""
        return self._evaluate(batch, self.test_metrics, self.test_loss, augment=True)

    def _evaluate(
        self, batch: dict[str, Any], metrics: SegmentationMetrics, loss: MeanMetric, augment: bool
    ) -> dict[str, torch.Tensor]:
        mask = self._checked_mask(batch)
        scores = self._scores(batch, slice(None), (mask.shape[1], mask.shape[2]), augment)
        label_map = scores.argmax(dim=1)
        loss.update(self.loss(scores, mask), weight=len(mask))
        metrics.update(label_map, mask)
        return {"label_map": label_map}

    def _log_metrics(self, stage: str, metrics: SegmentationMetrics, loss: MeanMetric) -> None:
        # The metrics have gathered all processes by themselves; sync_dist then only averages equal numbers, and keeps
        # Lightning from warning that they might differ.
        computed = metrics.compute()
        self.log(f"{stage}/loss", loss.compute(), sync_dist=True, prog_bar=True)
        self.log(f"{stage}/mean_iou", computed["mean_iou"], sync_dist=True, prog_bar=True)
        self.log(f"{stage}/pixel_accuracy", computed["pixel_accuracy"], sync_dist=True)
        per_class = zip(self.class_names, computed["iou"], strict=True)
        self.log_dict({f"{stage}/iou/{name}": iou for name, iou in per_class}, sync_dist=True)

    def on_validation_epoch_start(self) -> None:
        """Forget the previous validation."""
        self.val_metrics.reset()
        self.val_loss.reset()

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics of all processes."""
        self._log_metrics("val", self.val_metrics, self.val_loss)

    def on_test_epoch_start(self) -> None:
        """Forget the previous test."""
        self.test_metrics.reset()
        self.test_loss.reset()

    def on_test_epoch_end(self) -> None:
        """Log the test metrics of all processes."""
        self._log_metrics("test", self.test_metrics, self.test_loss)

    # --- prediction -------------------------------------------------------------------------------------------------

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, list[Any]]:
        """Predict label maps at the pictures' original sizes.

        Returns:
            Lists with one entry per picture: ``path``, ``label_map`` ``(H, W)`` (uint8, or int64 beyond 256 classes)
            and, with ``predict_probabilities``, ``probabilities`` float32 ``(num_classes, H, W)``.
        """
        image = batch["image"]
        sizes = [(int(h), int(w)) for h, w in batch.get("original_size", [_size(image)] * len(image))]
        if len(set(sizes)) == 1:
            scores = list(self._scores(batch, slice(None), sizes[0], augment=True))
        else:
            scores = [self._scores(batch, slice(i, i + 1), size, augment=True)[0] for i, size in enumerate(sizes)]
        dtype = torch.uint8 if self.hparams["num_classes"] <= 256 else torch.int64
        result: dict[str, list[Any]] = {
            "path": _paths(batch, batch_idx),
            "label_map": [score.argmax(dim=0).to(dtype) for score in scores],
        }
        if self.hparams["predict_probabilities"]:
            result["probabilities"] = [score.float().softmax(dim=0) for score in scores]
        return result

    # --- what callbacks ask -----------------------------------------------------------------------------------------

    def openmmlab_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rename a published UPerNet to the keys of this task, see `lk_backbones.tasks.openmmlab_state_dict`."""
        backbone, heads = split_backbone(state_dict)
        for key in heads:
            if not key.startswith(("decode_head.", "auxiliary_head.")):
                raise KeyError(
                    f"'{key}' is in no part of an OpenMMLab segmentation model: backbone, decode_head, auxiliary_head"
                )
        encoder = openmmlab_encoder(self.encoder, self.hparams["encoder_kwargs"], backbone)
        renamed = {f"model.encoder.{key}": value for key, value in encoder.items()}
        for key, value in rename_upernet(heads).items():
            if not key.startswith("auxiliary_head."):
                renamed[f"model.{key}"] = value
            elif self.auxiliary_head is not None:
                renamed[key] = value
        return renamed

    def figures(self, opacity: float = 0.6, score_threshold: float = 0.3) -> Figures:
        """See `BaseTask.figures`."""
        return SegmentationFigures(self, opacity, score_threshold)

    def results_table(self, metrics: Mapping[str, Any], stage: str) -> Table:
        """See `BaseTask.results_table`; the IoU of every class, mean IoU and pixel accuracy."""
        return iou_table(metrics, self.class_names, stage)

    # --- data -------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Compare the data module with the task, and ask it for the copies of test-time augmentation.

        Args:
            stage: What the trainer is about to do.

        Raises:
            ValueError: If the numbers of classes or the ignored labels differ.
        """
        super().setup(stage)
        data: Any = getattr(self.trainer, "datamodule", None)
        ignore_index = getattr(data, "ignore_index", self.hparams["ignore_index"])
        if ignore_index != self.hparams["ignore_index"]:
            raise ValueError(
                f"{type(data).__name__} has ignore_index={ignore_index}, but the task was built with "
                f"ignore_index={self.hparams['ignore_index']}: make them equal"
            )
        check_arguments(self.hparams)
        if hasattr(data, "set_test_scales"):  # only who reads the pictures can scale the originals
            data.set_test_scales([] if stage == "fit" else self._test_scales)

    def _checked_mask(self, batch: dict[str, Any]) -> torch.Tensor:
        """Return the batch's labels, int64 ``(N, H, W)``; on a GPU a wrong one would end the process without a word."""
        mask: torch.Tensor = batch["mask"]
        num_classes, ignore_index = self.hparams["num_classes"], self.hparams["ignore_index"]
        wrong = (mask < 0) | (mask >= num_classes)
        if ignore_index is not None:
            wrong &= mask != ignore_index
        if wrong.any():
            i = int(wrong.flatten(1).any(dim=1).nonzero()[0])
            labels = mask[i][wrong[i]].unique().tolist()
            raise ValueError(
                f"the mask of '{_paths(batch, 0)[i]}' holds labels {labels[:10]}, but the classes are "
                f"0 to {num_classes - 1} and ignore_index is {ignore_index}"
            )
        return mask.long()


def _size(image: torch.Tensor) -> tuple[int, int]:
    return image.shape[2], image.shape[3]


def _paths(batch: dict[str, Any], batch_idx: int) -> list[str]:
    return [str(path) for path in batch.get("path") or [f"batch_{batch_idx}_{i}" for i in range(len(batch["image"]))]]
