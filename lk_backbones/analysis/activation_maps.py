"""Class activation maps: which places of a picture speak for an answer, by the methods of the grad-cam package."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import segmentation_models_pytorch as smp
import torch
from PIL import Image, ImageDraw
from torch import nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from lk_backbones.analysis.erf import EffectiveReceptiveField, observed, one_by_one, placement
from lk_backbones.analysis.levels import Level, find_map, is_detector, normalized_input, trunk_of
from lk_backbones.drawing.canvas import fit_size, to_rgb
from lk_backbones.drawing.heat_maps import draw_pictures, heat_map, heat_overlay, ratio_lines
from lk_backbones.tasks import SegmentationTask
from lk_backbones.tasks.inference import pad_to_multiple, resize

__all__ = ["METHODS", "ActivationMap", "activation_maps", "draw_activation_map"]

#: What a method is called, and its class in the grad-cam package.
METHODS = {
    "gradcam": "GradCAM",
    "gradcam++": "GradCAMPlusPlus",
    "hirescam": "HiResCAM",
    "xgradcam": "XGradCAM",
    "layercam": "LayerCAM",
    "gradcamelementwise": "GradCAMElementWise",
    "eigengradcam": "EigenGradCAM",
    "eigencam": "EigenCAM",
}

#: Positions of a map up to which its principal component is computed: grad-cam makes a matrix of their square.
_MOST_POSITIONS = 4096
_PROBE = 256


@dataclass(frozen=True, eq=False)
class ActivationMap:
    """What `activation_maps` found for a picture.

    Attributes:
        matrix: float32 ``(H, W)``, at the size of the image, 0 to 1; all 0 if nothing speaks for the answer.
        module: Path of the module whose output was looked at.
        map_size: ``(h, w)`` of that output, before it was enlarged.
        method: One of `METHODS`.
        target: The class, of a detector the label, that was asked about; ``None`` if the method asks about none.
        score: Of a classifier the logit, of a segmentation network the mean logit of the class where it is predicted,
            of a detector the score of the box; NaN if the method asks about none.
        box: Of a detector the box ``(left, top, right, bottom)`` that was asked about, in pixels of the image.
        everywhere: Of a segmentation network, whether the class is predicted nowhere, so that all pixels were asked.
    """

    matrix: np.ndarray
    module: str
    map_size: tuple[int, int]
    method: str
    target: int | None = None
    score: float = float("nan")
    box: tuple[float, float, float, float] | None = None
    everywhere: bool = False


@dataclass
class _Answer:
    """What is differentiated, and what it stands for."""

    score: torch.Tensor
    target: int
    shown: float
    box: tuple[float, float, float, float] | None = None
    everywhere: bool = False


@dataclass
class _Run:
    """A model's output, and the sizes of what its encoder saw: with the padding, and of the image within."""

    output: Any
    padded: tuple[int, int]
    used: tuple[int, int]


def activation_maps(
    model: nn.Module,
    images: torch.Tensor | Iterable[torch.Tensor],
    target: int | None = None,
    level: Level = -1,
    method: str = "gradcam",
    *,
    box: int = 0,
) -> list[ActivationMap]:
    """Compute class activation maps by a method of the grad-cam package.

    What is differentiated: of a classifier the logit of the class; of a segmentation network the sum of the class's
    logits over the pixels where it is predicted (grad-cam's ``SemanticSegmentationTarget``); of a detector the score of
    one box. The gradient is with respect to a map inside the model, not to the image. ``eigencam`` differentiates
    nothing: it shows the first principal component of the map, whatever the model answers, and works on encoders too.

    Segmentation networks are run on the whole image, also where a task's inference slides; what they pad it with, and
    what a detector resizes and pads it to, is taken into account. The model is left as it was, training mode, gradients
    and random numbers included.

    Args:
        model: A task of ours, or any classifier, segmentation network or detector of timm's, smp's or torchvision's
            kind.
        images: ``(N, C, H, W)`` or any number of ``(C, H, W)``, normalised as the model expects them; of a task of ours
            and of a detector in [0, 1].
        target: The class, of a detector the label as it returns it (from 1). ``None``: of a classifier the most
            probable, of a segmentation network the most frequent, of a detector whatever the box is taken for.
        level: Which map: as in `effective_receptive_field`, but inside the model.
        method: One of `METHODS`.
        box: Of a detector, which of its boxes (of that label), the one with the highest score first.

    Returns:
        A map for each image.

    Raises:
        ModuleNotFoundError: If the grad-cam package is not installed.
        ValueError: If there is no such method, level, class or box, the model has no spatial maps, or the answer does
            not depend on the chosen one.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r}: there are {', '.join(METHODS)}")
    if placement(model)[0].type == "meta":
        raise ValueError(f"{type(model).__name__} is on the meta device: it has no weights to look at")
    cam = _grad_cam(method)
    device, dtype = placement(model)
    found: list[ActivationMap] = []
    path, channels_last = "", False
    with observed(model):
        for image in one_by_one(images):
            x = image.detach().to(device=device, dtype=dtype)
            if not found:
                path, channels_last = _find_module(model, x, level)
            found.append(_one_map(model, x, path, channels_last, cam, method, target, box))
    if not found:
        raise ValueError("there is no image to look at")
    return found


def _grad_cam(method: str) -> Any:
    """Return a method of the grad-cam package, of which only the formula is used, so it gets no model."""
    package = _import_grad_cam()
    return getattr(package, METHODS[method])(nn.BatchNorm2d(1), [])  # any module; this one draws no random numbers


def _import_grad_cam() -> ModuleType:
    try:
        import pytorch_grad_cam
        import pytorch_grad_cam.utils.image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'activation maps are made by the grad-cam package ({error}): pip install "lk-backbones[analysis]"'
        ) from error
    return pytorch_grad_cam


def _one_map(
    model: nn.Module,
    x: torch.Tensor,
    path: str,
    channels_last: bool,
    cam: Any,
    method: str,
    target: int | None,
    box: int,
) -> ActivationMap:
    leaves: list[torch.Tensor] = []

    def start_here(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1].clone()  # what follows may change it in place

    handle = model.get_submodule(path).register_forward_hook(start_here)
    try:
        run = _run(model, x)
    finally:
        handle.remove()
    if len(leaves) != 1:
        raise ValueError(
            f"level {path!r}: {type(model).__name__} calls this module {len(leaves)} times for an image, so it has no "
            f"one map: choose another module"
        )
    activations = _planes(leaves[0], channels_last)
    map_size = (activations.shape[2], activations.shape[3])
    if cam.uses_gradients:
        answer = _answer(model, run, target, box)
        gradient = None
        if answer.score.requires_grad:
            (gradient,) = torch.autograd.grad(answer.score, leaves, allow_unused=True)
        if gradient is None:
            raise ValueError(_independent(model, path))
        gradients = _planes(gradient, channels_last).double().cpu().numpy()
    else:
        answer, gradients = None, None
    if method.startswith("eigen") and map_size[0] * map_size[1] > _MOST_POSITIONS:
        raise ValueError(
            f"{method} takes the principal component of a map of at most {_MOST_POSITIONS} positions, {path!r} has "
            f"{map_size[0]} × {map_size[1]}: choose a deeper level, smaller images or another method"
        )
    values = activations.detach().double().cpu().numpy()
    image = cam.get_cam_image(None, None, None, values, gradients, False)
    if not np.isfinite(image).all():
        raise ValueError(f"the activation map of {type(model).__name__} at {path!r} is infinite or not a number")
    matrix = _enlarged(np.asarray(image), run, (x.shape[2], x.shape[3]))
    if answer is None:
        return ActivationMap(matrix, path, map_size, method)
    return ActivationMap(
        matrix, path, map_size, method, answer.target, answer.shown, answer.box, everywhere=answer.everywhere
    )


def _enlarged(image: np.ndarray, run: _Run, size: tuple[int, int]) -> np.ndarray:
    """Bring a map ``(1, h, w)`` to the size of the image as grad-cam does, without what was padded."""
    scale = _import_grad_cam().utils.image.scale_cam_image
    padded = scale(np.maximum(image, 0), run.padded[::-1])
    inside = padded[:, : run.used[0], : run.used[1]]
    return np.asarray(scale(inside, None if run.used == size else size[::-1])[0], dtype=np.float32)


def _planes(tensor: torch.Tensor, channels_last: bool) -> torch.Tensor:
    return tensor.permute(0, 3, 1, 2) if channels_last else tensor


def _independent(model: nn.Module, path: str) -> str:
    reason = f"the answer of {type(model).__name__} does not depend on the output of {path!r}"
    if is_detector(model):
        names = [f"{_prefix(model)}{name}" for name, _ in trunk_of(model).named_children()]
        return (
            f"{reason}: a detector may read a box from one level of its pyramid alone. Choose a module of the encoder, "
            f"such as {', '.join(map(repr, names))} or one inside, or the method eigencam"
        )
    return f"{reason}: choose a level that the answer is computed from"


def _prefix(model: nn.Module) -> str:
    trunk = trunk_of(model)
    return next((f"{name}." for name, module in model.named_modules() if module is trunk and name), "")


def draw_activation_map(
    image: torch.Tensor,
    found: ActivationMap,
    title: str = "activation map",
    caption: str = "",
    field: EffectiveReceptiveField | None = None,
) -> Image.Image:
    """Draw a picture, its activation map over it, and the effective receptive field of the same model beside them.

    Args:
        image: ``(C, H, W)`` in [0, 1].
        found: What `activation_maps` found.
        title: Of the map.
        caption: A line at the bottom.
        field: What `effective_receptive_field` measured, if it is to be shown.
    """
    picture = to_rgb(image)
    picture = picture.resize(fit_size(picture.size, 320, 480), Image.Resampling.BICUBIC)
    over = heat_overlay(picture, found.matrix)
    if found.box is not None:
        scale = picture.width / image.shape[2]
        box = [side * scale for side in found.box]
        for drawn in (picture, over):
            ImageDraw.Draw(drawn).rectangle((box[0], box[1], max(box[2], box[0]), max(box[3], box[1])), outline="white")
    height, width = found.map_size
    lines = [f"{found.module}, {height} x {width}"]
    if found.everywhere:
        lines.append("predicted nowhere: asked of all pixels")
    if not found.matrix.any():
        lines.append("nothing speaks for it: 0 everywhere")
    panels: list[tuple[str, Image.Image, Sequence[str]]] = [("picture", picture, []), (title, over, lines)]
    scale_title = "activation over its maximum"
    if field is not None:
        measured = heat_map(field.matrix, picture.size)
        panels.append(("effective receptive field", measured, [field.level, *ratio_lines(field.ratios)]))
        scale_title += "; field: log10(1 + contribution) over its maximum"
    return draw_pictures(panels, caption, scale_title)


# ---- where ----


def _find_module(model: nn.Module, image: torch.Tensor, level: Level) -> tuple[str, bool]:
    """Return the path of the module that returns a level's map, and whether its channels come last."""
    part = image[:, :, :_PROBE, :_PROBE]  # the map is computed with all that its gradient needs
    if part.shape != image.shape:
        try:
            return _module_of(model, part, level)
        except ValueError:
            pass  # some models take images of one size only, and messages tell the sizes of these images' maps
    return _module_of(model, image, level)


def _module_of(model: nn.Module, image: torch.Tensor, level: Level) -> tuple[str, bool]:
    if isinstance(level, str) and (level == "output" or level.startswith("output.")):
        raise ValueError(
            f"level {level!r}: an activation map is of a map inside the model. Choose a feature level by its number "
            f"(-1 for the last), or the path of a module"
        )
    x = normalized_input(model, _padded(model, image)).detach().requires_grad_()
    # the maps are kept: memory that is given back would be taken by another map, which then looks like the same
    maps: list[tuple[str, torch.Tensor, int]] = []
    found = _recorded(model, x, level, lambda name, output: maps.append((name, output.detach(), output._version)))
    if max(found.shape[2:]) == 1:
        raise ValueError(
            f"level {level!r} of {type(model).__name__} is a single position for images of "
            f"{image.shape[2]} × {image.shape[3]}, no map: choose an earlier level, or larger images"
        )
    if isinstance(level, str):
        return level, False
    n, channels, height, width = found.shape
    shapes: dict[tuple[int, ...], bool] = {(n, height, width, channels): True, (n, channels, height, width): False}
    calls = [(name, output, version) for name, output, version in maps if output.shape in shapes]
    # the outermost module that returned it, which comes last, unless it was written over since
    same = [
        (name, shapes[output.shape])
        for name, output, version in calls
        if output.data_ptr() == found.data_ptr() and output._version == version
    ]
    alike = ", ".join(repr(name) for name, _, _ in calls[::-1])
    calls.clear()
    maps.clear()
    if not same:  # what forward_intermediates gives may be a copy

        def compare(name: str, output: torch.Tensor) -> None:
            channels_last = shapes.get(tuple(output.shape))
            if channels_last is not None and torch.equal(_planes(output, channels_last), found):
                same.append((name, channels_last))

        _recorded(model, x, level, compare)
    if same:
        return same[-1]
    raise ValueError(
        f"level {level} of {type(model).__name__} is not what one of its modules returns: give the path of a module "
        f"that returns a map (N, C, h, w)" + (f"; of the same size are those of {alike}" if alike else "")
    )


def _recorded(
    model: nn.Module, x: torch.Tensor, level: Level, see: Callable[[str, torch.Tensor], None]
) -> torch.Tensor:
    """Return the map of a level; on the way every module's map is shown to a function, with the module's path."""

    def hook(name: str) -> Callable[..., None]:
        def call(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and output.ndim == 4:
                see(name, output)

        return call

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
    try:
        return find_map(model, x, level)[0]
    finally:
        for handle in handles:
            handle.remove()


# ---- running it ----


def _padded(model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    """Pad an image where the network takes certain sizes only; of a task in [0, 1], what is added has no meaning."""
    multiple, smallest = _multiple(model)
    return pad_to_multiple(image, multiple, smallest)


def _multiple(model: nn.Module) -> tuple[int, int]:
    if isinstance(model, SegmentationTask):
        return model.size_multiple, model.smallest_size
    if isinstance(model, smp.base.SegmentationModel) and model.requires_divisible_input_shape:
        return int(model.encoder.output_stride), 1
    return 1, 1


def _run(model: nn.Module, image: torch.Tensor) -> _Run:
    size = (image.shape[2], image.shape[3])
    if is_detector(model):
        return _run_detector(model, image)
    multiple, smallest = _multiple(model)
    x = pad_to_multiple(normalized_input(model, image), multiple, smallest)
    padded = (x.shape[2], x.shape[3])
    if isinstance(model, SegmentationTask):
        output = resize(model.model(x), padded, model.align_corners)[:, :, : size[0], : size[1]]
    elif multiple > 1:
        output = resize(model(x), padded)[:, :, : size[0], : size[1]]
    else:
        output = model(image)
    return _Run(output, padded, size)


def _run_detector(model: nn.Module, image: torch.Tensor) -> _Run:
    """Run a detector, which resizes and pads the image by itself."""
    sizes: list[tuple[tuple[int, int], tuple[int, int]]] = []

    def record(_: nn.Module, __: Any, output: Any) -> None:
        images = output[0]
        sizes.append((tuple(images.tensors.shape[2:]), tuple(images.image_sizes[0])))

    transform = next(module for module in model.modules() if isinstance(module, GeneralizedRCNNTransform))
    handle = transform.register_forward_hook(record)
    try:
        output = model([image[0]])
    finally:
        handle.remove()
    return _Run(output, *sizes[0])


# ---- what is asked ----


def _answer(model: nn.Module, run: _Run, target: int | None, box: int) -> _Answer:
    output = run.output
    if isinstance(output, Sequence) and output and isinstance(output[0], Mapping) and "boxes" in output[0]:
        return _box_answer(output[0], target, box)
    if isinstance(output, Mapping):
        output = output.get("logits", output.get("out"))  # of transformers, of torchvision's segmentation networks
    output = getattr(output, "logits", output)
    headless = getattr(model, "num_classes", None) == 0
    if not isinstance(output, torch.Tensor) or output.ndim not in (2, 4) or headless:
        got = f"features {tuple(output.shape)}" if isinstance(output, torch.Tensor) else f"a {type(output).__name__}"
        raise ValueError(
            f"{type(model).__name__} returns {got}, and no logits of classes (N, classes) or (N, classes, H, W), and "
            f"no boxes: it gives no answer to be explained. The method eigencam needs none"
        )
    logits = output[0]
    if target is not None and not 0 <= target < len(logits):
        raise ValueError(f"there is no class {target}: {type(model).__name__} has {len(logits)}, from 0")
    if logits.ndim == 1:
        chosen = int(logits.argmax()) if target is None else target
        return _Answer(logits[chosen], chosen, float(logits[chosen].detach()))
    predicted = logits.argmax(0) if len(logits) > 1 else (logits[0] <= 0).long()  # one class: its logit is above 0
    chosen = int(predicted.flatten().mode().values) if target is None and len(logits) > 1 else target or 0
    mask = predicted == chosen
    everywhere = not bool(mask.any())
    values = logits[chosen].flatten() if everywhere else logits[chosen][mask]
    return _Answer(values.sum(), chosen, float(values.detach().mean()), everywhere=everywhere)


def _box_answer(detected: Mapping[str, torch.Tensor], target: int | None, box: int) -> _Answer:
    scores, labels = detected["scores"], detected["labels"]
    places = torch.nonzero(labels == target).flatten() if target is not None else torch.arange(len(scores))
    of_label = "" if target is None else f" of label {target}"
    if box < 0 or box >= len(places):
        raise ValueError(
            f"there is no box {box}{of_label}: {len(places)} were detected{of_label}, from 0. The method eigencam "
            f"needs none"
        )
    place = int(places[scores[places].argsort(descending=True)[box]])
    left, top, right, bottom = detected["boxes"][place].detach().tolist()
    return _Answer(scores[place], int(labels[place]), float(scores[place].detach()), (left, top, right, bottom))
