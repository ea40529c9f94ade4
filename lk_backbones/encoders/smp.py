"""Hand every registered encoder to segmentation-models-pytorch under its own name.

smp also reaches them, as any timm model, under ``tu-<name>``. Both names build the same modules; only the ``tu-`` name
passes keyword arguments on to the encoder (``smp.Unet("tu-replknet_31b", drop_path_rate=0.3)``), because smp drops
them for encoders of its own.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NoReturn

import segmentation_models_pytorch as smp
import timm
import torch
from segmentation_models_pytorch.encoders._base import EncoderMixin
from segmentation_models_pytorch.encoders.timm_universal import TimmUniversalEncoder

from lk_backbones.encoders.registry import list_encoders

__all__ = ["LargeKernelEncoder", "register_with_smp"]


class LargeKernelEncoder(TimmUniversalEncoder, EncoderMixin):
    """A registered encoder in smp's protocol: images ``(N, C, H, W)`` to a list of maps at strides 1, 2, 4, … 32.

    Args:
        name: Registered timm name, such as ``"replknet_31b"``.
        depth: Number of maps after the image itself, 3 to 5 for most decoders.
        output_stride: Stride of the last map, 8, 16 or 32.
    """

    def __init__(self, name: str, depth: int = 5, output_stride: int = 32) -> None:
        # Input channels other than 3 are patched in by smp afterwards, through EncoderMixin.
        super().__init__(name, pretrained=False, depth=depth, output_stride=output_stride)

    def make_dilated(self, output_stride: int) -> None:
        """Do nothing: the timm model was built with its ``output_stride``."""

    def load_state_dict(self, state_dict: dict[str, torch.Tensor], **kwargs: Any) -> Any:
        """Load a state dict in smp's, timm's or the published naming; a classifier in it is left out.

        Args:
            state_dict: Tensors by key.
            **kwargs: As `torch.nn.Module.load_state_dict`.

        Returns:
            What `torch.nn.Module.load_state_dict` returns.
        """
        if not any(key.startswith("model.") for key in state_dict):
            state_dict = self._from_timm(state_dict)
        return super().load_state_dict(state_dict, **kwargs)

    def _from_timm(self, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rename timm's keys to those of timm's feature extractor, which flattens ``stem.0`` to ``stem_0``."""
        with torch.device("meta"):
            model: Any = timm.create_model(self.name, num_classes=0)
        filter_fn = getattr(import_module(type(model).__module__), "checkpoint_filter_fn", None)
        if filter_fn is not None:
            state_dict = filter_fn(state_dict, model)
        own, unused = set(self.state_dict()), set(model.state_dict())
        classifier = model.pretrained_cfg["classifier"]
        out = {}
        for key, value in state_dict.items():
            candidates = (f"model.{key}", f"model.{key.replace('.', '_', 1)}")
            name = next((candidate for candidate in candidates if candidate in own), None)
            if name is not None:
                out[name] = value
            elif key not in unused and not key.startswith(f"{classifier}."):
                out[key] = value  # unknown: let the strict load name it
        return out


class _NoHubWeights(dict):
    """Settings of weights that smp cannot fetch; smp finds the key and, on reading it, the user learns what to do."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def __deepcopy__(self, memo: dict[int, Any]) -> _NoHubWeights:
        return self

    def __missing__(self, key: str) -> NoReturn:
        tags = timm.list_pretrained(f"{self.name}.*")
        hint = (
            f"smp.create_model(arch, encoder_name='tu-{tags[0]}', encoder_weights=True) downloads a mirrored copy"
            if tags
            else "nobody published weights for it"
        )
        raise ValueError(
            f"{self.name} has no weights on the Hugging Face Hub in smp's layout (smp's default is "
            f"encoder_weights='imagenet'). Pass encoder_weights=None for random weights; {hint}."
        )


def register_with_smp() -> None:
    """Add every encoder of `list_encoders` to smp, leaving names that smp already has alone."""
    for name in list_encoders():
        smp.encoders.encoders.setdefault(
            name,
            {
                "encoder": LargeKernelEncoder,
                "params": {"name": name},
                "pretrained_settings": {"imagenet": _NoHubWeights(name)},
            },
        )


register_with_smp()
