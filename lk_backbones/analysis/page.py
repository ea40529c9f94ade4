"""A page in the browser to try models on: what they say of a picture, where they look, how far they see."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image

from lk_backbones._printing import printable
from lk_backbones.analysis.activation_maps import METHODS, activation_maps, draw_activation_map
from lk_backbones.analysis.erf import effective_receptive_field
from lk_backbones.analysis.features import draw_feature_pyramid, feature_pyramid
from lk_backbones.analysis.memory import require_memory
from lk_backbones.analysis.predictions import PictureModel
from lk_backbones.drawing.canvas import to_rgb

__all__ = ["Look", "Looker", "build_page", "launch"]

_AUTOMATIC = "automatic"
_LARGEST_FILE = "20mb"
_MOST_PIXELS = 50_000_000
#: Models that are kept in memory where visitors may name them.
_MOST_MODELS = 4
#: Gradio gives up if its own page does not answer within three seconds, which on a busy machine the first one may not.
_ATTEMPTS = 3


@dataclass(frozen=True)
class Look:
    """What the page shows of a picture.

    Attributes:
        answer: The picture and what the model says of it; of an encoder without a head its feature levels.
        columns: What the cells of ``rows`` are.
        rows: As `lk_backbones.analysis.predictions.Prediction.rows`.
        inside: Activation map and effective receptive field; ``None`` where neither could be computed.
        notes: What could not be shown, and why.
    """

    answer: Image.Image
    columns: tuple[str, ...]
    rows: list[tuple[str | float | int, ...]]
    inside: Image.Image | None
    notes: list[str] = field(default_factory=list)


class Looker:
    """What stands behind the page: models by their names, and looks at pictures.

    Args:
        models: Names of models, see `lk_backbones.analysis.models.MODELS`; the first is loaded at once.
        any_model: Whether others may be named too.
        pretrained: As for `PictureModel`.
        seed: As for `PictureModel`.
        size: As for `PictureModel`.
        device: Where models are put.
    """

    def __init__(
        self,
        models: Sequence[str],
        *,
        any_model: bool = False,
        pretrained: bool = False,
        seed: int = 0,
        size: tuple[int, int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if not models:
            raise ValueError("the page needs a model")
        self.models = list(dict.fromkeys(models))
        self.any_model = any_model
        self._options: dict[str, Any] = {"pretrained": pretrained, "seed": seed, "size": size}
        self._device = device
        self._loaded: dict[str, PictureModel] = {}
        self.model(self.models[0])

    def model(self, name: str) -> PictureModel:
        """Return a model by its name.

        Raises:
            ValueError: If it is none of those that the page was started with, and others may not be named.
        """
        if name not in self.models and not self.any_model:
            raise ValueError(f"this page has the models {', '.join(self.models)}, and opens no others")
        if name not in self._loaded:
            model = PictureModel(name, **self._options)
            model.model.to(self._device)
            self._loaded[name] = model
            others = [loaded for loaded in self._loaded if loaded not in self.models]
            if len(others) > _MOST_MODELS:
                del self._loaded[others[0]]
        return self._loaded[name]

    def classes(self, name: str) -> list[str]:
        """Return what can be asked about: each class of a model, or whatever it says itself."""
        return [_AUTOMATIC, *self.model(name).class_names]

    def look(
        self,
        name: str,
        pixels: np.ndarray,
        target: str = _AUTOMATIC,
        method: str = "gradcam",
        level: str = "-1",
        with_field: bool = True,
    ) -> Look:
        """Show a model a picture.

        Args:
            name: Of the model.
            pixels: uint8 RGB ``(H, W, 3)``.
            target: Name of the class for the activation map, or ``"automatic"``.
            method: Of the activation map.
            level: Of the activation map and the receptive field, a number or the path of a module.
            with_field: Whether to measure the effective receptive field too.

        Raises:
            ValueError: If the model, class or method does not exist, or the model cannot be run on the picture.
        """
        model = self.model(name)
        if pixels.shape[0] * pixels.shape[1] > _MOST_PIXELS:
            raise ValueError(f"the picture has more than {_MOST_PIXELS // 1_000_000} million pixels")
        image = model.read(pixels)
        if model.kind == "features":
            pyramid = feature_pyramid(model.model, model.named.normalize(image))
            answer, rows = draw_feature_pyramid(to_rgb(image), pyramid, side=200), []
            columns: tuple[str, ...] = ()
            method = "eigencam"  # which asks for no answer
        else:
            prediction = model.predict(image, "picture")
            answer, columns, rows = prediction.figure, prediction.columns, prediction.rows
        notes: list[str] = []
        inside = self._inside(model, image, target, method, level, with_field, notes)
        return Look(answer, columns, rows, inside, notes)

    def _inside(
        self,
        model: PictureModel,
        image: torch.Tensor,
        target: str,
        method: str,
        level: str,
        with_field: bool,
        notes: list[str],
    ) -> Image.Image | None:
        chosen = int(level) if level.strip().lstrip("-").isdigit() else level.strip()
        measured = None
        try:
            require_memory(model.model, (image.shape[1], image.shape[2]), 3, chosen)
            number = None if target in (_AUTOMATIC, "") else model.find_class(target)
            (found,) = activation_maps(model.model, model.given(image)[None], number, chosen, method)
        except (ValueError, ModuleNotFoundError) as error:
            notes.append(f"activation map: {error}")
            return None
        if with_field:
            x = model.named.normalize(image)
            try:
                measured = effective_receptive_field(model.model, x[None], chosen)
            except ValueError as error:
                notes.append(f"effective receptive field: {error}")
        if not found.matrix.any():
            notes.append("activation map: nothing in it speaks for the class, it is 0 everywhere")
        title = found.method if found.target is None else f"{found.method}: {model.class_name(found.target)}"
        return draw_activation_map(image, found, title, model.named.name, measured)


def build_page(models: Sequence[str], **options: Any) -> Any:
    """Build the page; it is not served yet.

    Args:
        models: As for `Looker`.
        **options: Of `Looker`.

    Returns:
        Gradio's ``Blocks``.

    Raises:
        ModuleNotFoundError: If gradio is not installed.
        ValueError: If a model cannot be loaded.
    """
    gr = _import_gradio()
    looker = Looker(models, **options)

    def look(name: str, pixels: Any, target: str, method: str, level: str, with_field: bool) -> tuple[Any, ...]:
        if pixels is None:
            raise gr.Error("Drop a picture first.")
        try:
            found = looker.look(name, pixels, target, method, level, with_field)
        except (ValueError, OSError) as error:
            raise gr.Error(_as_text(str(error))) from error
        table = gr.Dataframe(value=[list(row) for row in found.rows], headers=list(found.columns))
        notes = gr.Textbox(value="\n".join(found.notes), visible=bool(found.notes))
        return found.answer, table, found.inside, notes

    def list_classes(name: str) -> Any:
        try:
            return gr.Dropdown(choices=looker.classes(name), value=_AUTOMATIC)
        except (ValueError, OSError) as error:
            raise gr.Error(_as_text(str(error))) from error

    with gr.Blocks(analytics_enabled=False, title="lk-backbones") as page:
        gr.Markdown("# What does it see?\nDrop a picture: what the model says of it, where it looks, how far it sees.")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                name = gr.Dropdown(
                    looker.models,
                    value=looker.models[0],
                    label="Model",
                    allow_custom_value=looker.any_model,
                    info="a checkpoint, or a Hub repository (hf-hub:owner/name)" if looker.any_model else None,
                )
                picture = gr.Image(label="Picture", type="numpy", sources=["upload", "clipboard"], elem_id="picture")
                target = gr.Dropdown(looker.classes(looker.models[0]), value=_AUTOMATIC, label="Class to explain")
                method = gr.Dropdown(list(METHODS), value="gradcam", label="Activation map")
                level = gr.Textbox("-1", label="Level", info="-1 is the last; or the path of a module")
                with_field = gr.Checkbox(True, label="Effective receptive field")
                button = gr.Button("Look", variant="primary", elem_id="look")
            with gr.Column(scale=3):
                # the figures have titles of their own; Gradio's third button would upload them
                shown: dict[str, Any] = {
                    "show_label": False,
                    "interactive": False,
                    "buttons": ["download", "fullscreen"],
                }
                answer = gr.Image(label="Answer", format="png", elem_id="answer", **shown)
                table = gr.Dataframe(label="Classes and areas", interactive=False, elem_id="table")
                inside = gr.Image(label="Inside", format="png", elem_id="inside", **shown)
                notes = gr.Textbox(label="Notes", visible=False, elem_id="notes")
        inputs = [name, picture, target, method, level, with_field]
        outputs = [answer, table, inside, notes]
        # one after the other: models are not made to be looked at by two at once
        button.click(look, inputs, outputs, concurrency_limit=1, concurrency_id="model", api_name="look")
        picture.upload(look, inputs, outputs, concurrency_limit=1, concurrency_id="model", api_visibility="private")
        name.change(list_classes, name, target, concurrency_limit=1, concurrency_id="model", api_visibility="private")
    return page


def launch(page: Any, host: str = "127.0.0.1", port: int | None = None, share: bool = False, block: bool = True) -> str:
    """Serve a page.

    Args:
        page: What `build_page` returned.
        host: Address to listen on.
        port: ``None`` for the first free one from 7860.
        share: Whether to open a public link through Gradio's servers.
        block: Whether to go on until the process is interrupted.

    Returns:
        The page's address.

    Raises:
        OSError: If the port is taken, or none is free.
    """
    gr = _import_gradio()
    # fonts of the system: the default theme fetches its own from Google
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    options: dict[str, Any] = {
        "server_name": host,
        "server_port": port,
        "share": share,
        "prevent_thread_lock": True,
        "quiet": True,
        "show_error": False,
        "theme": theme,
        "footer_links": [],
        "max_file_size": _LARGEST_FILE,
        "enable_monitoring": False,
        "ssr_mode": False,
    }
    for attempt in range(_ATTEMPTS):
        try:
            _, url, public = page.launch(**options)
            break
        except ValueError as error:
            page.close(verbose=False)
            if attempt == _ATTEMPTS - 1:
                raise OSError(f"the page does not answer on {host}: {error}") from error
    print(printable(f"serving on {url}" + (f" and {public}" if public else "") + ", stop with Ctrl-C"), flush=True)
    if block:
        page.block_thread()
    return str(url)


def _as_text(message: str) -> str:
    """Let a message be shown as it is: Gradio's errors are HTML."""
    return html.escape(printable(message))


def _import_gradio() -> ModuleType:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # it would tell its makers of every start
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'the page is made by gradio ({error}): pip install "lk-backbones[demo]"') from error
    return gradio
