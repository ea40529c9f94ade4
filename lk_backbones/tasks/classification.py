"""Image classification: any encoder with its classifier, trained and measured as timm does."""

from collections.abc import Mapping
from typing import Any, Literal

import timm
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.table import Table
from timm.data import infer_imagenet_subset, resolve_model_data_config
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn
from torchmetrics import MeanMetric

from lk_backbones._imagenet import imagenet_names
from lk_backbones._random import seeded
from lk_backbones.drawing.figures import ClassificationFigures, Figures
from lk_backbones.encoders import list_encoders
from lk_backbones.encoders._names import classifiers
from lk_backbones.metrics.classification import ClassificationMetrics
from lk_backbones.metrics.tables import accuracy_table
from lk_backbones.tasks.arguments import check_shared_arguments
from lk_backbones.tasks.base import BaseTask
from lk_backbones.tasks.encoder import EncoderSpec, load_encoder_weights
from lk_backbones.weights.config import LARGEST_SIDE
from lk_backbones.weights.sources import is_source

__all__ = ["ClassificationTask"]

#: How many of the best classes of a picture are told.
BEST = 5


class ClassificationTask(BaseTask):
    """Train, measure and apply a classifier.

    Batches are dictionaries: ``image`` float32 ``(N, C, H, W)`` in [0, 1] (RGB, not normalised), ``label`` int64
    ``(N,)`` from 0 to num_classes - 1, ``path`` a list of names.

    The network is a whole timm model, so that its checkpoint is an encoder that every other task takes as
    ``encoder_weights``. How it is used to see pictures (``input_size``, ``crop_pct``, ``crop_mode``,
    ``interpolation``, mean and standard deviation) comes from its weights, as in timm's own evaluation; the task tells
    our data modules, and the checkpoint keeps it.

    Logged: ``train/loss``, then for ``val`` and ``test`` ``loss`` (cross-entropy), ``top1`` and, of more than five
    classes, ``top5``, and with ``per_class_accuracy`` also ``accuracy/<class name>``; all over the whole data set and
    all processes (see `ClassificationMetrics`), NaN where there is nothing to measure.

    All arguments are plain values and are saved as hyper-parameters, so that `load_from_checkpoint` needs nothing but
    the checkpoint.

    Args:
        encoder: One of ours (``"replknet_31b"``) or any timm model (``"tu-resnet50"`` or ``"resnet50"``), with a tag or
            without; or a Hub repository or folder that names one (``hf-hub:owner/name``).
        encoder_weights: ``None`` (random), ``True`` or ``"pretrained"``, a timm tag, or a source as
            `lk_backbones.hub.pull` takes it. A classifier of other classes is replaced by a new one.
        encoder_kwargs: Keyword arguments of the timm model, such as ``{"drop_path_rate": 0.5}``.
        num_classes: Number of classes.
        in_channels: Channels of the images.
        class_names: Names of the classes; ``None`` takes the data module's.
        class_colors: RGB colours (0-255) of the classes for pictures; ``None`` takes the data module's.
        mean: Mean of every channel in [0, 1]; ``None`` takes that of the encoder's weights, else ImageNet's.
        std: Standard deviation of every channel, likewise.
        input_size: Height and width in evaluation, or one number for both; ``None`` takes what the weights were
            evaluated at.
        train_size: Height and width in training, likewise; ``None`` is ``input_size`` if that is given, else what the
            weights were trained at.
        crop_pct: The crop's share of the sides of the resized picture, in evaluation; ``None`` takes the weights'.
        crop_mode: ``"center"``, ``"squash"`` or ``"border"``, as timm has them; ``None`` takes the weights'.
        interpolation: Of the resizing in evaluation, such as ``"bicubic"``; ``None`` takes the weights'.
        loss: ``"ce"`` (cross-entropy) or ``"bce"`` (binary cross-entropy of every class).
        label_smoothing: Share of every label that is spread over all classes.
        mixup_alpha: Of mixup, which blends pictures; 0 for none. It needs an even batch size.
        cutmix_alpha: Of CutMix, which pastes a part of one picture into another; 0 for none. It needs an even batch
            size.
        mixup_prob: Probability that a batch is mixed.
        mixup_switch_prob: Probability of CutMix where both are on.
        mixup_mode: Whether a ``"batch"``, a ``"pair"`` or every picture (``"elem"``) is mixed by shares of its own.
        random_erasing: Probability that a part of a training picture is erased.
        random_erasing_mode: What it is filled with: noise of every ``"pixel"``, one random colour (``"rand"``) or the
            mean (``"const"``).
        per_class_accuracy: Log the accuracy of every class too.
        optimizer: ``"adamw"`` or ``"sgd"``.
        lr: Learning rate of the classifier, and of everything else if ``layer_decay`` is 1.
        momentum: Momentum of ``sgd``.
        weight_decay: Weight decay; none on norms, nor on what the encoder's model exempts (position biases).
        bias_weight_decay: Weight decay of biases outside of norms. ``None`` for ``weight_decay``, as RepLKNet's authors
            train; 0 to exempt them, as timm and the authors of SLaK and UniRepLKNet do.
        layer_decay: Factor of the learning rate from one layer of the encoder to the next one below.
        layer_decay_type: What is a layer: ``"layer_wise"``, some blocks, as the encoder's family counts them, or
            ``"stage_wise"``, a whole stage, as ConvNeXt and SLaK train on ADE20K.
        warmup_steps: Optimiser steps of linear warm-up.
        warmup_ratio: Factor of the learning rate at the first step of the warm-up.
        schedule: What follows the warm-up: ``"cosine"``, or ``"poly"``, a polynomial decay over all steps.
        power: Exponent of the polynomial decay.
        min_lr: Learning rate at the end (of parameters with scale 1).
        freeze_encoder: Train only the classifier; batch norms are frozen too.
        gradient_checkpointing: Recompute the encoder's blocks in the backward pass, to save memory.
        enlarge_kernels: Enlarge the encoder's depthwise kernels to this odd size once its weights are loaded, see
            `lk_backbones.enlarge_kernels`; or its keyword arguments, such as ``{"kernel_size": 31, "stages": [2]}``.

    Raises:
        ValueError: If a name, weight or combination of arguments is impossible; the message says what would be right.
    """

    def __init__(
        self,
        encoder: str = "replknet_31n",
        encoder_weights: bool | str | None = None,
        encoder_kwargs: dict[str, Any] | None = None,
        num_classes: int = 1000,
        in_channels: int = 3,
        class_names: list[str] | None = None,
        class_colors: list[tuple[int, int, int]] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        input_size: int | tuple[int, int] | None = None,
        train_size: int | tuple[int, int] | None = None,
        crop_pct: float | None = None,
        crop_mode: Literal["center", "squash", "border"] | None = None,
        interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"] | None = None,
        loss: Literal["ce", "bce"] = "ce",
        label_smoothing: float = 0.0,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        mixup_prob: float = 1.0,
        mixup_switch_prob: float = 0.5,
        mixup_mode: Literal["batch", "pair", "elem"] = "batch",
        random_erasing: float = 0.0,
        random_erasing_mode: Literal["pixel", "rand", "const"] = "pixel",
        per_class_accuracy: bool = False,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        lr: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.05,
        bias_weight_decay: float | None = None,
        layer_decay: float = 1.0,
        layer_decay_type: Literal["layer_wise", "stage_wise"] = "layer_wise",
        warmup_steps: int = 0,
        warmup_ratio: float = 1e-6,
        schedule: Literal["cosine", "poly"] = "cosine",
        power: float = 1.0,
        min_lr: float = 0.0,
        freeze_encoder: bool = False,
        gradient_checkpointing: bool = False,
        enlarge_kernels: int | dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.hparams["encoder"] = _timm_name(encoder)
        _check_arguments(self.hparams)
        spec = self.resolve_encoder()
        self.model, is_new = build_classifier(spec, in_channels, num_classes)
        is_published = bool(spec.weights) or (spec.source is not None and not is_source(spec.source))
        self._published_classes = infer_imagenet_subset(self.model) if is_published and not is_new else None
        self.prepare_encoder(spec)
        self._classifier = classifiers(self.model)
        if freeze_encoder:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name.startswith(self._classifier))
        self._take_picture_settings()
        # What a new classifier began with: as long as it has these values, there is nothing to be measured.
        self._untrained = (is_new, self._classifier_weight().detach().clone()) if is_new else None

        self.loss = _make_loss(self.hparams)
        self.mixup = _make_mixup(self.hparams)
        self.val_metrics = ClassificationMetrics(num_classes)
        self.test_metrics = ClassificationMetrics(num_classes)
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()
        #: What the last validation or test has measured, for the pictures at its end; see `ClassificationMetrics`.
        self.measured: dict[str, torch.Tensor] = {}

    @property
    def encoder(self) -> nn.Module:
        """The timm model, its classifier included."""
        return self.model

    @property
    def class_names(self) -> list[str]:
        """Names of the classes: the argument's, else the data module's, else ImageNet's if the weights are its."""
        if self.hparams["class_names"] is None and self._published_classes is not None:
            return imagenet_names(self._published_classes)
        return super().class_names

    def _classifier_weight(self) -> torch.Tensor:
        return next(p for name, p in self.model.named_parameters() if name.startswith(self._classifier))

    def _take_picture_settings(self) -> None:
        """Complete the arguments that say how to read a picture, from the weights' configuration, as timm does."""
        hparams: Any = self.hparams
        test = resolve_model_data_config(self.model, use_test_size=True)
        train = resolve_model_data_config(self.model)
        given = _size(hparams.input_size)
        sizes = {
            "input_size": given or tuple(test["input_size"][-2:]),
            "train_size": _size(hparams.train_size) or given or tuple(train["input_size"][-2:]),
        }
        self.hparams.update(sizes)
        for key in ("crop_pct", "crop_mode", "interpolation"):
            self.hparams[key] = test[key] if self.hparams[key] is None else self.hparams[key]
        # whoever gets the model gets to know it too, such as a repository that it is pushed to
        self.model.pretrained_cfg = {
            **self.model.pretrained_cfg,
            "num_classes": hparams.num_classes,
            "input_size": (hparams.in_channels, *hparams.train_size),
            "test_input_size": (hparams.in_channels, *hparams.input_size),
            "test_crop_pct": None,
            **{key: self.hparams[key] for key in ("crop_pct", "crop_mode", "interpolation")},
            **{key: tuple(self.hparams[key]) for key in ("mean", "std")},
        }

    # --- networks ---------------------------------------------------------------------------------------------------

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Classify images.

        Args:
            image: float ``(N, in_channels, H, W)`` in [0, 1].

        Returns:
            Logits ``(N, num_classes)``.
        """
        logits: torch.Tensor = self.model(self.normalize(image))
        return logits

    # --- training ---------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        """Compute the loss of one batch; Lightning calls it.

        Raises:
            ValueError: If a label is no class, or an odd batch is to be mixed.
        """
        label: torch.Tensor = self._checked_label(batch)
        image = self.normalize(batch["image"])
        if self.mixup is not None and len(image) % 2:
            raise ValueError(_odd(len(image)))
        if self.mixup is not None or self.hparams["random_erasing"] > 0:
            # timm draws from Python's and NumPy's generators too: all follow torch's, which ReproducibleSteps seeds
            with seeded(int(torch.randint(2**62, ()))):
                if self.hparams["random_erasing"] > 0:
                    erase = RandomErasing(
                        self.hparams["random_erasing"], mode=self.hparams["random_erasing_mode"], device=image.device
                    )
                    image = erase(image)
                if self.mixup is not None:
                    image, label = self.mixup(image, label)
        loss: torch.Tensor = self.loss(self.model(image).float(), label)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(image))
        return loss

    # --- validation and test ----------------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, torch.Tensor]:
        """Add a batch to the validation metrics; returns ``classes`` and ``probabilities`` as `predict_step`."""
        return self._evaluate(batch, self.val_metrics, self.val_loss)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, torch.Tensor]:
        """Add a batch to the test metrics; returns ``classes`` and ``probabilities`` as `predict_step`."""
        return self._evaluate(batch, self.test_metrics, self.test_loss)

    def _evaluate(
        self, batch: dict[str, Any], metrics: ClassificationMetrics, loss: MeanMetric
    ) -> dict[str, torch.Tensor]:
        label = self._checked_label(batch)
        logits = self(batch["image"])
        best = self._best(logits)
        metrics.update(best["classes"], label)
        loss.update(nn.functional.cross_entropy(logits.float(), label), weight=len(label))
        return best

    def _best(self, logits: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the best classes ``(N, k)`` and their probabilities, the best first."""
        # of the logits: probabilities of classes that are as good as sure would be equal
        classes = logits.topk(min(BEST, logits.shape[1]), dim=1).indices
        scores = logits.float()
        probabilities = scores.sigmoid() if self.hparams["loss"] == "bce" else scores.softmax(dim=1)
        return {"classes": classes, "probabilities": probabilities.gather(1, classes)}

    def _log_metrics(self, stage: str, metrics: ClassificationMetrics, loss: MeanMetric) -> None:
        # The metrics have gathered all processes by themselves; sync_dist then only averages equal numbers, and keeps
        # Lightning from warning that they might differ.
        self.measured = metrics.compute()
        self.log(f"{stage}/loss", loss.compute(), sync_dist=True, prog_bar=True)
        for key in ("top1", "top5") if self.hparams["num_classes"] > BEST else ("top1",):
            self.log(f"{stage}/{key}", self.measured[key].float(), sync_dist=True, prog_bar=True)
        if self.hparams["per_class_accuracy"]:
            per_class = zip(self.class_names, self.measured["per_class"].float(), strict=True)
            self.log_dict({f"{stage}/accuracy/{name}": value for name, value in per_class}, sync_dist=True)

    def on_validation_epoch_start(self) -> None:
        """Forget the previous validation."""
        self._require_trained_classifier()
        self.val_metrics.reset()
        self.val_loss.reset()

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics of all processes."""
        self._log_metrics("val", self.val_metrics, self.val_loss)

    def on_test_epoch_start(self) -> None:
        """Forget the previous test."""
        self._require_trained_classifier()
        self.test_metrics.reset()
        self.test_loss.reset()

    def on_test_epoch_end(self) -> None:
        """Log the test metrics of all processes."""
        self._log_metrics("test", self.test_metrics, self.test_loss)

    # --- prediction -------------------------------------------------------------------------------------------------

    def on_predict_epoch_start(self) -> None:
        """Refuse to predict by chance."""
        self._require_trained_classifier()

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Predict the best classes of pictures.

        Returns:
            ``path``, a list; ``classes`` int64 ``(N, k)``, the five best classes of each picture (or all, if there are
            fewer), the best first; and their ``probabilities`` float32 ``(N, k)``.
        """
        return {"path": _paths(batch, f"batch_{batch_idx}"), **self._best(self(batch["image"]))}

    def _require_trained_classifier(self) -> None:
        if self._untrained is None or self.trainer.state.fn == TrainerFn.FITTING:
            return
        why, before = self._untrained
        if torch.equal(self._classifier_weight().detach().cpu(), before.cpu()):
            raise ValueError(
                f"the classifier is new and was never trained, so there is nothing to measure: {why}. Give the data of "
                "the weights' own classes, weights of a model that was trained on these, or train first (fit)"
            )
        self._untrained = None

    # --- what callbacks ask -----------------------------------------------------------------------------------------

    def figures(self, opacity: float = 0.6, score_threshold: float = 0.3) -> Figures:
        """See `BaseTask.figures`."""
        return ClassificationFigures(self, opacity, score_threshold)

    def results_table(self, metrics: Mapping[str, Any], stage: str) -> Table:
        """See `BaseTask.results_table`; top-1, top-5 and, if it is logged, the accuracy of every class."""
        return accuracy_table(metrics, self.class_names, stage)

    def classified(self, batch: dict[str, Any], outputs: dict[str, Any], unnamed: str) -> list[dict[str, Any]]:
        """Return the best classes of every picture of a batch, for `ClassificationResults`.

        Args:
            batch: The batch.
            outputs: What a step returned for it.
            unnamed: What pictures without a path are numbered after.

        Returns:
            A dictionary for each: ``path``, ``classes`` and ``probabilities``, lists with the best first, and, if the
            batch has labels, ``label``.
        """
        rows = zip(_paths(batch, unnamed), outputs["classes"].tolist(), outputs["probabilities"].tolist(), strict=True)
        found: list[dict[str, Any]] = [{"path": p, "classes": c, "probabilities": s} for p, c, s in rows]
        if "label" in batch:
            for row, label in zip(found, batch["label"].tolist(), strict=True):
                row["label"] = label
        return found

    # --- data -------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Compare the data module with the task, and tell it how the model is used to see pictures.

        Args:
            stage: What the trainer is about to do.

        Raises:
            ValueError: If the numbers or the order of the classes differ, or odd batches are to be mixed.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        known, found = self.hparams["class_names"], getattr(data, "class_names", None)
        super().setup(stage)
        _check_arguments(self.hparams)
        if known and found and list(known) != list(found):
            place = next(i for i, names in enumerate(zip(known, found, strict=True)) if names[0] != names[1])
            told = f"class {place} is {known[place]!r} in the task, but {found[place]!r} in the {type(data).__name__}"
            if sorted(known) == sorted(found):
                raise ValueError(f"the classes come in another order: {told}")
            rank_zero_warn(f"the names of the classes differ, and the task's are kept: {told}")
        batch_size = getattr(data, "batch_size", None)
        if stage == "fit" and self.mixup is not None and isinstance(batch_size, int) and batch_size % 2:
            raise ValueError(_odd(batch_size))
        if hasattr(data, "set_picture_settings"):
            keys = ("input_size", "train_size", "crop_pct", "crop_mode", "interpolation", "mean")
            data.set_picture_settings(**{key: self.hparams[key] for key in keys})

    def _checked_label(self, batch: dict[str, Any]) -> torch.Tensor:
        """Return the batch's labels; on a GPU a wrong one would end the process without a word."""
        label: torch.Tensor = batch["label"]
        wrong = (label < 0) | (label >= self.hparams["num_classes"])
        if wrong.any():
            i = int(wrong.nonzero()[0])
            raise ValueError(
                f"the label of '{_paths(batch, 'picture')[i]}' is {int(label[i])}, but the classes are 0 to "
                f"{self.hparams['num_classes'] - 1}"
            )
        return label.long()


def build_classifier(spec: EncoderSpec, in_channels: int, num_classes: int) -> tuple[Any, str]:
    """Build a timm model with a classifier.

    Args:
        spec: The encoder.
        in_channels: Channels of the images.
        num_classes: Number of classes.

    Returns:
        The model, with its weights; and, if weights were loaded but the classifier is a new one, why.

    Raises:
        ValueError: If the model refuses its arguments, or has no classifier.
        WeightsError: If its weights cannot be had or do not fit.
    """
    if not spec.is_timm:
        raise ValueError(f"'{spec.name}' is an encoder of smp's own, without a classifier: use a timm model ('tu-…')")
    name = spec.name.removeprefix("tu-")
    try:
        model: Any = timm.create_model(
            name, pretrained=bool(spec.weights), num_classes=num_classes, in_chans=in_channels, **spec.kwargs
        )
    except TypeError as error:
        raise ValueError(f"'{name}' refuses its arguments (encoder_kwargs={spec.kwargs}): {error}") from error
    except RuntimeError as error:
        if "Invalid pretrained tag" not in str(error):
            raise
        architecture = name.partition(".")[0]
        known = [f"{architecture}.{tag}" for tag in timm.models.list_pretrained(f"{architecture}.*")]
        raise ValueError(f"nobody published weights '{name}'; there are {', '.join(known) or 'none'}") from error
    heads = classifiers(model)
    if not any(key.startswith(heads) for key, _ in model.named_parameters()):
        raise ValueError(f"'{name}' has no classifier that could be trained: use another timm model")
    report = load_encoder_weights(model, spec)
    if report is not None:
        lacks = not any(key.startswith(heads) for key in report.loaded)
        why = f"'{report.source}' has no classifier of num_classes={num_classes}" if lacks else ""
        return model, why
    published = model.pretrained_cfg.get("num_classes")
    if spec.weights and published != num_classes:
        why = f"the weights of '{name}' have a classifier of {published} classes, not of num_classes={num_classes}"
        rank_zero_info(f"The classifier is new: {why}.")
        return model, why
    return model, ""


def _timm_name(encoder: str) -> str:
    """Return an encoder's name as the other tasks write it: a timm model's begins with ``tu-``, but for our own.

    What smp and timm both know is timm's here: smp's encoders have no classifier.
    """
    architecture = encoder.partition(".")[0]
    is_path = encoder.startswith(("tu-", "hf-hub:", "local-dir:"))
    if is_path or not timm.is_model(architecture) or architecture in list_encoders():
        return encoder
    return f"tu-{encoder}"


def _check_arguments(hparams: Any) -> None:
    """Refuse arguments that contradict each other, before anything is built.

    Raises:
        ValueError: With the argument's name and what would be right.
    """
    check_shared_arguments(hparams, 2, "a picture is one of several things")
    for key in ("input_size", "train_size"):
        size = _size(hparams[key])
        if size is not None and not (len(size) == 2 and 1 <= min(size) <= max(size) <= LARGEST_SIDE):
            raise ValueError(
                f"{key}={hparams[key]} must be height and width in pixels, or one number for both, from 1 to "
                f"{LARGEST_SIDE}"
            )
    if hparams["crop_pct"] is not None and not 0 < hparams["crop_pct"] <= 1:
        raise ValueError(f"crop_pct={hparams['crop_pct']} must be above 0 and at most 1")
    choices: dict[str, tuple[str | None, ...]] = {
        "crop_mode": (None, "center", "squash", "border"),
        "interpolation": (None, "nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"),
        "loss": ("ce", "bce"),
        "mixup_mode": ("batch", "pair", "elem"),
        "random_erasing_mode": ("pixel", "rand", "const"),
        "schedule": ("cosine", "poly"),
    }
    for key, known in choices.items():
        if hparams[key] not in known:
            raise ValueError(f"{key}='{hparams[key]}' must be one of {', '.join(filter(None, known))}")
    if not 0 <= hparams["label_smoothing"] < 1:
        raise ValueError(f"label_smoothing={hparams['label_smoothing']} must be at least 0 and below 1")
    for key in ("mixup_alpha", "cutmix_alpha"):
        if hparams[key] < 0:
            raise ValueError(f"{key}={hparams[key]} must be at least 0")
    for key in ("mixup_prob", "mixup_switch_prob", "random_erasing"):
        if not 0 <= hparams[key] <= 1:
            raise ValueError(f"{key}={hparams[key]} must be a probability in [0, 1]")


def _make_loss(hparams: Any) -> nn.Module:
    """Choose the loss as timm's training script does."""
    if hparams["loss"] == "bce":
        return BinaryCrossEntropy(smoothing=hparams["label_smoothing"])
    if hparams["mixup_alpha"] > 0 or hparams["cutmix_alpha"] > 0:
        return SoftTargetCrossEntropy()
    if hparams["label_smoothing"] > 0:
        return LabelSmoothingCrossEntropy(hparams["label_smoothing"])
    return nn.CrossEntropyLoss()


def _make_mixup(hparams: Any) -> Mixup | None:
    if not (hparams["mixup_alpha"] > 0 or hparams["cutmix_alpha"] > 0):
        return None
    return Mixup(
        mixup_alpha=hparams["mixup_alpha"],
        cutmix_alpha=hparams["cutmix_alpha"],
        prob=hparams["mixup_prob"],
        switch_prob=hparams["mixup_switch_prob"],
        mode=hparams["mixup_mode"],
        label_smoothing=hparams["label_smoothing"],
        num_classes=hparams["num_classes"],
    )


def _odd(batch_size: int) -> str:
    return (
        f"mixup and CutMix blend a batch with itself, turned around, and need an even number of pictures in it: "
        f"batch_size={batch_size} is odd. Use another, or mixup_alpha=0 and cutmix_alpha=0"
    )


def _size(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    return (value, value) if isinstance(value, int) else tuple(value)


def _paths(batch: dict[str, Any], unnamed: str) -> list[str]:
    return [str(path) for path in batch.get("path") or [f"{unnamed}_{i}" for i in range(len(batch["image"]))]]
