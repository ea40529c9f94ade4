"""What is exported: a folded network, and if wanted what comes before and after it, in one graph."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from segmentation_models_pytorch.base import SegmentationModel
from torch import nn

from lk_backbones._private.smp import EncoderMixin
from lk_backbones.analysis.levels import is_detector, trunk_of
from lk_backbones.layers import reparameterize
from lk_backbones.tasks.base import BaseTask
from lk_backbones.tasks.inference import pad_to_multiple, resize

__all__ = ["SIZE_MULTIPLE", "Deployment", "Kind", "deployment", "foldable_copy", "labels_of"]

#: What a graph gives: scores of every pixel, of every class, an encoder's maps, or one vector of a picture.
Kind = Literal["segmentation", "classification", "features", "embedding"]

#: Sizes that a graph of changing sizes takes are multiples of this, the stride of the coarsest map of almost any
#: encoder, unless the encoder tells its own.
SIZE_MULTIPLE = 32


class Deployment(nn.Module):
    """A network between the tensors that a deployed file takes and gives.

    Plain, it takes float32 images ``(N, C, H, W)``, normalised, and gives the network's own outputs: logits, or feature
    maps. With preprocessing it takes 8-bit RGB pictures ``(N, H, W, 3)`` of any size, and gives, of a segmentation
    network, the label map at that size, of a classifier the probabilities.

    Args:
        network: Takes normalised images.
        kind: What it gives.
        mean: Of every channel, in [0, 1].
        std: Likewise.
        size: ``(height, width)`` that pictures are brought to; ``None`` where images come as the network takes them.
        padding: What height and width are padded to multiples of, and what they are at least; ``(1, 1)`` for nothing.
        align_corners: How the scores of pixels are resized.
        activation: What makes probabilities of a classifier's logits.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        network: nn.Module,
        kind: Kind,
        mean: Sequence[float],
        std: Sequence[float],
        size: tuple[int, int] | None = None,
        padding: tuple[int, int] = (1, 1),
        align_corners: bool = False,
        activation: Literal["softmax", "sigmoid"] = "softmax",
    ) -> None:
        super().__init__()
        self.network, self.kind, self.size, self.padding = network, kind, size, padding
        self.align_corners, self.activation = align_corners, activation
        trunk = trunk_of(network)
        stride = getattr(getattr(trunk, "trunk", trunk), "output_stride", None)
        #: What sizes are multiples of where they may change.
        self.multiple: int = stride if isinstance(stride, int) else SIZE_MULTIPLE
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the outputs, those that `output_names` names."""
        outputs = self.scores(image)
        if self.size is None:
            return outputs
        if self.kind == "segmentation":
            height, width = image.shape[1:3]
            scores = F.interpolate(outputs[0], (height, width), mode="bilinear", align_corners=self.align_corners)
            labels = labels_of(scores)
            return (labels.to(torch.uint8) if scores.shape[1] <= 256 else labels,)
        if self.kind == "classification":
            softmax = self.activation == "softmax" and outputs[0].shape[1] > 1
            return (outputs[0].softmax(1) if softmax else outputs[0].sigmoid(),)
        return outputs

    def scores(self, image: torch.Tensor, normalized: bool = False) -> tuple[torch.Tensor, ...]:
        """Return what the network gives.

        Args:
            image: As `forward` takes them.
            normalized: Whether they are as the network takes them.
        """
        if self.size is None or normalized:
            return self._outputs(image)
        pixels = image.permute(0, 3, 1, 2).float() / 255
        # smoothed where it shrinks, as pictures are everywhere else
        pixels = F.interpolate(pixels, self.size, mode="bilinear", antialias=True)
        return self._outputs((pixels - self.mean) / self.std)

    def _outputs(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.padding == (1, 1):
            return _tensors(self.network(image))
        height, width = image.shape[2:]
        padded = pad_to_multiple(image, *self.padding)
        (logits,) = _tensors(self.network(padded))
        return (resize(logits, (padded.shape[2], padded.shape[3]), self.align_corners)[:, :, :height, :width],)

    @property
    def gives_labels(self) -> bool:
        """Whether the output is a label map rather than scores."""
        return self.kind == "segmentation" and self.size is not None

    def output_names(self, number: int) -> list[str]:
        """Return what the outputs are called.

        Args:
            number: How many there are.
        """
        if self.kind == "features":
            return [f"level_{i}" for i in range(number)]
        if self.kind == "embedding":
            return ["embedding"]
        if self.size is None:
            return ["logits"]
        return ["label_map" if self.kind == "segmentation" else "probabilities"]


def labels_of(scores: torch.Tensor) -> torch.Tensor:
    """Return the best class of scores ``(N, K, ...)`` as ``(N, ...)``; of a single one, 1 where it is above 0."""
    return scores.argmax(1) if scores.shape[1] > 1 else (scores[:, 0] > 0).long()


class _Features(nn.Module):
    """An encoder as a module that returns its maps, without the image itself and levels that have no channels."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        trunk: Any = self.trunk
        if callable(getattr(trunk, "forward_intermediates", None)):
            found = trunk.forward_intermediates(image, intermediates_only=True)
        else:
            found = trunk(image)
        maps = found.values() if isinstance(found, Mapping) else found
        if not isinstance(found, Mapping | list | tuple):
            raise ValueError(f"{type(trunk).__name__} has no feature levels: it returns a {type(found).__name__}")
        return tuple(tensor for tensor in maps if tensor.ndim == 4 and tensor.shape[1] and tensor is not image)


class _GridAverage(nn.Module):
    """`torch.nn.AdaptiveAvgPool2d` to a grid, as two matrix products, for images of sizes that change.

    ONNX has no such operator, and PyTorch's exporter writes one for a single size.
    """

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.grid = rows, columns

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, columns = (_averages(x, axis, cells) for axis, cells in zip((2, 3), self.grid, strict=True))
        return rows @ x @ columns.T


def _averages(x: torch.Tensor, axis: int, cells: int) -> torch.Tensor:
    """Return the matrix ``(cells, length)`` that averages along an axis within every cell."""
    length = x.shape[axis]
    cell = torch.arange(cells, device=x.device)[:, None]
    place = torch.arange(length, device=x.device)[None]
    start, end = (cell * length) // cells, ((cell + 1) * length + cells - 1) // cells
    inside = ((place >= start) & (place < end)).to(x.dtype)
    return inside / inside.sum(1, keepdim=True)


def deployment(
    model: nn.Module,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    features: bool = False,
    size: tuple[int, int] | None = None,
    pad: bool = False,
    channels: int = 3,
    probe: tuple[int, int] = (64, 64),
) -> Deployment:
    """Make of a model what is deployed; its parts are the model's own.

    Args:
        model: A task, an smp model, or a model of timm's or torchvision's, in evaluation mode.
        mean: Of every channel in [0, 1], for models that do not know it.
        std: Likewise.
        features: Whether to give the encoder's maps instead of the model's output.
        size: ``(height, width)``, to take pictures of 8 bits and any size and bring them to this one.
        pad: Whether images of other sizes than the network takes are padded.
        channels: Of the images.
        probe: A size that the network takes, to see what it gives.

    Raises:
        ValueError: If it is a detector, or gives nothing that is known.
    """
    network: nn.Module = model
    settings: dict[str, Any] = {}
    if isinstance(model, BaseTask):
        mean, std = model.hparams["mean"], model.hparams["std"]
        network = model.model  # type: ignore[assignment]
        if model.hparams.get("loss") == "bce":
            settings["activation"] = "sigmoid"
    features = features or isinstance(model, EncoderMixin)  # one of smp's, which gives nothing else
    if features:
        network = _Features(trunk_of(model))
    elif is_detector(model):
        raise ValueError(
            f"{type(model).__name__} is a detector. How many boxes it finds depends on the picture, which torch.export "
            "cannot follow, and the older exporter fixes the number of the example picture's proposals. --features "
            "exports its encoder, whose maps its head can be run on"
        )
    else:
        settings["align_corners"] = bool(getattr(network, "align_corners", False))
    if pad and not features:
        settings["padding"] = _padding(model, network)
    mean, std = ([values[i % len(values)] for i in range(channels)] for values in (mean, std))
    deployed = Deployment(network, "features", mean, std, None, **settings).eval()
    if not features:
        with torch.no_grad():
            output = deployed(torch.zeros(1, channels, *probe, device=next(model.parameters()).device))
        deployed.kind = _kind(network, output)
    deployed.size = size
    return deployed


def _padding(model: nn.Module, network: nn.Module) -> tuple[int, int]:
    if hasattr(model, "size_multiple"):
        return model.size_multiple, model.smallest_size  # type: ignore[return-value]
    if isinstance(network, SegmentationModel) and network.requires_divisible_input_shape:
        return network.encoder.output_stride, 1
    return 1, 1


def _kind(network: nn.Module, output: tuple[torch.Tensor, ...]) -> Kind:
    if len(output) > 1:
        return "features"
    if output[0].ndim == 4:
        return "segmentation"
    if output[0].ndim == 2:
        return "embedding" if getattr(network, "num_classes", None) == 0 else "classification"
    raise ValueError(
        f"{type(network).__name__} returns a tensor {tuple(output[0].shape)}: what is exported are scores of pixels "
        "(N, K, H, W) or of classes (N, K), and feature maps"
    )


def _tensors(output: Any) -> tuple[torch.Tensor, ...]:
    """Return what a network gives: torchvision's networks have it under a key, smp's may add an image classifier."""
    if isinstance(output, Mapping):
        output = output["out"] if "out" in output else list(output.values())
    if isinstance(output, torch.Tensor):
        return (output,)
    if not isinstance(output, list | tuple) or not all(isinstance(tensor, torch.Tensor) for tensor in output):
        raise ValueError(f"the model returns a {type(output).__name__}: tensors are exported")
    maps = tuple(tensor for tensor in output if tensor.ndim == 4 and tensor.shape[1])
    return maps if len({tensor.ndim for tensor in output}) == 1 else maps[:1]


def foldable_copy(deployed: Deployment) -> Deployment:
    """Return a copy with everything folded, and with nothing in it that a graph of changing sizes cannot hold."""
    folded: Deployment = reparameterize(copy.deepcopy(deployed)).eval()
    for module in list(folded.modules()):
        for name, child in module.named_children():
            if type(child) is nn.AdaptiveAvgPool2d:
                grid: Any = child.output_size
                rows, columns = grid if isinstance(grid, Sequence) else (grid, grid)
                if None not in (rows, columns) and (rows, columns) != (1, 1):
                    setattr(module, name, _GridAverage(rows, columns))
    return folded
