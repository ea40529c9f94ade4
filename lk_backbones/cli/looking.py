"""``lk-backbones cam``, ``features`` and ``demo``: what a model makes of a picture."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lk_backbones._files import OutputNames, write_atomically
from lk_backbones._printing import printable
from lk_backbones.cli.arguments import add_common, choose_device, level_of, positive, require_new, size_of, tracked

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from lk_backbones.analysis import ActivationMap, EffectiveReceptiveField
    from lk_backbones.analysis.predictions import PictureModel

__all__ = ["cam", "demo", "features"]


def cam(args: Sequence[str]) -> None:
    """Run ``cam``: draw class activation maps over pictures.

    Args:
        args: What follows the command.

    Raises:
        ValueError: If a model, level, class or picture is impossible.
        OSError: If something cannot be read, or would be written over.
        ModuleNotFoundError: If the grad-cam package is not installed.
    """
    from lk_backbones.analysis.activation_maps import METHODS
    from lk_backbones.analysis.models import MODELS

    parser = argparse.ArgumentParser(
        prog="lk-backbones cam",
        description="Draw class activation maps: which places of a picture speak for a class, by the methods of the "
        "grad-cam package. Of a classifier the logit of the class is explained, of a segmentation network its logits "
        "where it is predicted, of a detector the score of one box. Writes for every picture the map over it (.png), "
        "and the map itself (.npy).",
        epilog=f"MODEL is {MODELS}.",
    )
    _add_pictures(parser)
    parser.add_argument(
        "--class",
        dest="target",
        metavar="NAME",
        help="name or number of the class; by default the most probable, of a segmentation the most frequent",
    )
    parser.add_argument(
        "--box", type=int, default=0, help="of a detector, which box; 0, the default, has the best score"
    )
    parser.add_argument(
        "--level",
        "--layer",
        default="-1",
        help="which map: a feature level (-1, the last), or the path of a module (stages.3)",
    )
    parser.add_argument("--method", default="gradcam", choices=list(METHODS))
    parser.add_argument(
        "--with-erf",
        action="store_true",
        help="put the effective receptive field of the level beside it, measured on the same picture",
    )
    add_common(parser, "cam")
    _run_cam(parser.parse_args(args))


def _run_cam(arguments: argparse.Namespace) -> None:
    from lk_backbones.analysis import activation_maps, effective_receptive_field
    from lk_backbones.analysis.memory import require_memory
    from lk_backbones.drawing.canvas import save_png

    folder = Path(arguments.to)
    names = _picture_names(arguments)
    written = [folder / f"{name}{ending}" for name in names.values() for ending in (".png", ".npy")]
    require_new(written, arguments.overwrite)
    model = _picture_model(arguments)
    target = None if arguments.target is None else model.find_class(arguments.target)
    level = level_of(arguments.level)
    for path, name in tracked(list(names.items()), arguments.model):
        image = _read(model, path)
        given = model.given(image)
        try:
            require_memory(model.model, (image.shape[1], image.shape[2]), 3, level)
            (found,) = activation_maps(model.model, given[None], target, level, arguments.method, box=arguments.box)
            field = None
            if arguments.with_erf:
                x = model.named.normalize(image)
                field = effective_receptive_field(model.model, x[None], level)
        except ValueError as error:
            raise ValueError(f"{arguments.model}, {path}: {error}") from error
        save_png(_cam_figure(model, path, image, found, field), folder / f"{name}.png")
        with write_atomically(folder / f"{name}.npy") as file:
            np.save(file, found.matrix)
        print(printable(f"{path}: {_told(model, found)}"))
    print(printable(f"written: {folder / '*.png'}, and the maps ({folder / '*.npy'})"))


def _cam_figure(
    model: PictureModel,
    path: Path,
    image: torch.Tensor,
    found: ActivationMap,
    field: EffectiveReceptiveField | None,
) -> Image.Image:
    from lk_backbones.analysis.activation_maps import draw_activation_map

    title = found.method if found.target is None else f"{found.method}: {model.class_name(found.target)}"
    return draw_activation_map(image, found, title, _caption(model, path), field)


def _told(model: PictureModel, found: ActivationMap) -> str:
    """Tell in a line what was asked, and where."""
    where = f"output of {found.module}, {found.map_size[0]}×{found.map_size[1]}"
    if found.target is None:
        return f"{found.method} of the {where}, whatever the answer"
    name = model.class_name(found.target)
    scores = {"classification": "logit", "segmentation": "mean logit", "detection": "score"}
    told = f"{found.method} for {name!r}, {scores[model.kind]} {found.score:.2f}, {where}"
    if found.everywhere:
        told += "; it is predicted nowhere, so all pixels were asked"
    if not found.matrix.any():
        told += "; nothing in it speaks for the class, the map is 0 everywhere"
    return told


def features(args: Sequence[str]) -> None:
    """Run ``features``: draw all feature levels of an encoder.

    Args:
        args: What follows the command.

    Raises:
        ValueError: If a model or picture is impossible.
        OSError: If something cannot be read, or would be written over.
    """
    from lk_backbones.analysis.models import MODELS

    parser = argparse.ArgumentParser(
        prog="lk-backbones features",
        description="Draw the feature levels of an encoder, every position of each as a coloured rectangle: its first "
        "three principal components as red, green and blue, or the mean magnitude over the channels.",
        epilog=f"MODEL is {MODELS}.",
    )
    _add_pictures(parser)
    parser.add_argument("--show", choices=["pca", "mean"], default="pca", help="principal components, or magnitudes")
    add_common(parser, "features")
    _run_features(parser.parse_args(args))


def _run_features(arguments: argparse.Namespace) -> None:
    from lk_backbones.analysis import draw_feature_pyramid, feature_pyramid
    from lk_backbones.analysis.memory import require_memory
    from lk_backbones.drawing.canvas import save_png, to_rgb

    folder = Path(arguments.to)
    names = _picture_names(arguments)
    require_new([folder / f"{name}.png" for name in names.values()], arguments.overwrite)
    model = _picture_model(arguments)
    for path, name in tracked(list(names.items()), arguments.model):
        image = _read(model, path)
        try:
            require_memory(model.model, (image.shape[1], image.shape[2]), 3)
            pyramid = feature_pyramid(model.model, model.named.normalize(image))
        except ValueError as error:
            raise ValueError(f"{arguments.model}, {path}: {error}") from error
        figure = draw_feature_pyramid(to_rgb(image), pyramid, arguments.show, _caption(model, path))
        save_png(figure, folder / f"{name}.png")
        print(printable(f"{path}: {', '.join(_level(*item) for item in pyramid.items())}"))
    print(printable(f"written: {folder / '*.png'}"))


def _level(name: str, features: torch.Tensor) -> str:
    channels, height, width = features.shape
    return f"{name} ({height}×{width}, {channels} channels)"


def demo(args: Sequence[str]) -> None:
    """Run ``demo``: serve a page to try models on.

    Args:
        args: What follows the command.

    Raises:
        ValueError: If a model is impossible.
        OSError: If something cannot be read, or there is no free port.
        ModuleNotFoundError: If gradio is not installed.
    """
    from lk_backbones.analysis.models import MODELS

    parser = argparse.ArgumentParser(
        prog="lk-backbones demo",
        description="Serve a page in the browser: drop a picture, and see what a model says of it, where it looks, and "
        "how far. It listens on this machine alone, and opens the models named here and no others.",
        epilog=f"MODEL is {MODELS}.",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, help="by default the first free one from 7860")
    parser.add_argument("--share", action="store_true", help="open a public link through Gradio's servers")
    parser.add_argument(
        "--any-model",
        action="store_true",
        help="let visitors name models themselves: whatever this process can read or download",
    )
    parser.add_argument("--size", type=size_of, metavar="PIXELS", help=_SIZE)
    parser.add_argument("--pretrained", action="store_true", help="default weights for bare names (else random ones)")
    parser.add_argument("--seed", type=int, default=0, help="of random weights (default: 0)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one)")
    _run_demo(parser.parse_args(args))


def _run_demo(arguments: argparse.Namespace) -> None:
    from lk_backbones.analysis.page import build_page, launch

    page = build_page(
        arguments.models,
        any_model=arguments.any_model,
        pretrained=arguments.pretrained,
        seed=arguments.seed,
        size=arguments.size,
        device=choose_device(arguments.device),
    )
    launch(page, arguments.host, arguments.port, arguments.share)


# ---- what they have in common ----

_SIZE = (
    "512, or 512x1024 (high, wide): of a classifier's pictures, what those of others are fitted into (default: that of "
    "the model's evaluation, else as they are, up to 1024)"
)


def _add_pictures(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help="pictures, and folders of pictures")
    parser.add_argument("--model", required=True, metavar="MODEL")
    parser.add_argument("--num", type=positive, default=math.inf, help="of the pictures the first ones (default: all)")
    parser.add_argument("--size", type=size_of, metavar="PIXELS", help=_SIZE)


def _picture_names(arguments: argparse.Namespace) -> dict[Path, str]:
    """Return the pictures that are asked for, and of each the name of what is written, without ending."""
    from lk_backbones.data.checks import require_files, require_folders
    from lk_backbones.data.reading import IMAGE_EXTENSIONS, find_files

    found: dict[Path, None] = {}
    for text in arguments.pictures:
        path = Path(text)
        if path.is_dir():
            files = find_files(path, IMAGE_EXTENSIONS)
            require_files(files, path)
            found.update(dict.fromkeys(files))
        elif path.is_file():
            found[path] = None
        else:
            require_folders(path.parent, [], "pictures")
            raise FileNotFoundError(f"The image {path} does not exist.")
    paths = list(found)[: None if arguments.num == math.inf else arguments.num]
    names = OutputNames([str(path) for path in paths], alone=True)
    return {path: names[str(path)] for path in paths}


def _picture_model(arguments: argparse.Namespace) -> PictureModel:
    from lk_backbones.analysis.predictions import PictureModel

    model = PictureModel(arguments.model, arguments.pretrained, arguments.seed, arguments.size)
    model.model.to(choose_device(arguments.device))
    return model


def _read(model: PictureModel, path: Path) -> Any:
    from lk_backbones.data.reading import read_image

    return model.read(read_image(path))


def _caption(model: PictureModel, path: Path) -> str:
    name, weights = model.named.name, model.named.weights
    name = Path(name).name if Path(name).exists() else name
    whose = ", random weights" if weights == "random" else "" if weights.startswith("of ") else f", weights {weights}"
    return f"{name}{whose}; {path.name}"
