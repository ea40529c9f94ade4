"""Hand every registered encoder to segmentation-models-pytorch under its own name.

smp also reaches them, as any timm model, under ``tu-<name>``. Both names build the same modules; only the ``tu-`` name
passes keyword arguments on to the encoder (``smp.Unet("tu-replknet_31b", drop_path_rate=0.3)``), because smp drops
them for encoders of its own; ours then warn.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
from segmentation_models_pytorch.encoders.timm_universal import TimmUniversalEncoder

from lk_backbones._private.smp import EncoderMixin
from lk_backbones.encoders._names import elsewhere, timm_model, translate
from lk_backbones.encoders._registry import list_encoders
from lk_backbones.weights.catalogue import find_published, list_published
from lk_backbones.weights.download import fetch_from_hub
from lk_backbones.weights.errors import WeightsError
from lk_backbones.weights.report import check_values
from lk_backbones.weights.sources import NAMESPACE_VARIABLE, default_namespace, split_hub_id

__all__ = ["LargeKernelEncoder", "register_with_smp"]


class LargeKernelEncoder(TimmUniversalEncoder, EncoderMixin):
    """A registered encoder in smp's protocol: images ``(N, C, H, W)`` to a list of maps at strides 1, 2, 4, … 32.

    A family whose first map has stride 4 gives one without channels at stride 2, which smp's decoders pass over
    (Linknet and Unet++ from smp 0.6 on).

    Args:
        name: Registered timm name, such as ``"replknet_31b"``.
        depth: Number of maps after the image itself, 3 to 5 for most decoders.
        output_stride: Stride of the last map, 8, 16 or 32.
    """

    def __init__(self, name: str, depth: int = 5, output_stride: int = 32) -> None:
        _warn_of_dropped_arguments(name)
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

        Raises:
            WeightsError: If it holds NaN or infinity, or numbers of another kind than the encoder's.
        """
        own = self.state_dict()
        if not state_dict.keys() <= own.keys():
            full = timm_model(self)
            renamed = translate(state_dict, self, full)
            left_out = elsewhere(renamed, own, full)
            state_dict = {key: value for key, value in renamed.items() if key not in left_out}
        check_values(state_dict, own, f"the state dict for {self.name}")
        return super().load_state_dict(state_dict, **kwargs)


def _warn_of_dropped_arguments(name: str) -> None:
    """Warn if smp's ``get_encoder``, which is building the encoder, was given arguments that it passes on to nobody.

    It calls the encoder's class without a trace of them, so that its own frame is the only place to see them.
    """
    caller = sys._getframe(2)
    if caller.f_code is not getattr(smp.encoders.get_encoder, "__code__", None):
        return
    dropped = caller.f_locals.get("kwargs")
    if dropped:
        listed = ", ".join(f"{key}={value!r}" for key, value in dropped.items())
        warnings.warn(
            f"segmentation-models-pytorch drops {listed}: it passes arguments on only to encoders under a universal "
            f"name, here 'tu-{name}'",
            stacklevel=3,
        )


class _PretrainedSettings(Mapping[str, dict[str, Any]]):
    """smp's table of an encoder's weights: ``encoder_weights`` to repository and revision.

    It has the key ``"imagenet"``, which is smp's default, one for every published tag, and any ``hf-hub:owner/name``.
    Looking one up fetches and verifies the files, so that smp then finds them in the cache, or says what to do instead.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __iter__(self) -> Iterator[str]:
        yield "imagenet"
        yield from (w.name.partition(".")[2] for w in list_published(f"{self.name}.*"))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, key: object) -> bool:
        return key in list(iter(self)) or str(key).startswith("hf-hub:")

    def __getitem__(self, key: str) -> dict[str, Any]:
        if key not in self:
            raise KeyError(key)
        return _RepositorySettings(self.name, key)


class _RepositorySettings(dict[str, Any]):
    """``repo_id`` and ``revision``, found out when smp reads them: it also copies and lists what it never uses."""

    def __init__(self, name: str, key: str) -> None:
        super().__init__()
        self.name, self.key = name, key

    def __deepcopy__(self, memo: dict[int, Any]) -> _RepositorySettings:
        return self

    def __missing__(self, key: str) -> Any:
        if key not in ("repo_id", "revision"):
            raise KeyError(key)
        repo, revision = self._repository()
        try:
            file = fetch_from_hub(repo, "model.safetensors", revision)
            fetch_from_hub(repo, "config.json", file.commit)
        except WeightsError as error:
            raise type(error)(
                f"the weights of '{self.name}' (encoder_weights='{self.key}') could not be loaded. {error}\n"
                f"encoder_weights=None builds the encoder with random weights"
            ) from None  # it says what there is to say; before it stood pages of what network libraries raised
        self.update(repo_id=repo, revision=file.commit)  # with a commit, smp's own look-up stays in the cache
        return self[key]

    def _repository(self) -> tuple[str, str | None]:
        if self.key.startswith("hf-hub:"):
            repo, _, revision = split_hub_id(self.key)
            return repo, revision
        published = find_published(self.name if self.key == "imagenet" else f"{self.name}.{self.key}")
        namespace = default_namespace()
        if published is not None and namespace is not None:
            return f"{namespace}/{published.name}", None
        advice = (
            "nobody published weights for it"
            if published is None
            else (
                f"smp.Unet('tu-{published.name}', encoder_weights=True), or any other architecture, takes them from "
                f"where they were published, lk_backbones.hub.load_weights(model, '{published.name}') loads them in a "
                f"second step, and "
                f"{NAMESPACE_VARIABLE} names a Hub user or organisation that mirrors them"
            )
        )
        raise WeightsError(
            f"{self.name} has no weights on the Hugging Face Hub in smp's layout (smp's default is "
            f"encoder_weights='imagenet'). Pass encoder_weights=None for random weights, or 'hf-hub:owner/name' for a "
            f"repository that lk_backbones wrote; {advice}."
        )


def _preprocessing(name: str, pretrained: str) -> dict[str, Any]:
    """Return what `smp.encoders.get_preprocessing_params` returns, from timm's configuration of the weights."""
    config: Any = timm.get_pretrained_cfg(name if pretrained == "imagenet" else f"{name}.{pretrained}")
    return {"input_space": "RGB", "input_range": [0, 1], "mean": list(config.mean), "std": list(config.std)}


def _answer_for_ours(params: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """smp's ``get_preprocessing_params``, but what timm knows of our encoders is not looked for on the Hub.

    Args:
        params: smp's function, which asks the Hub for any encoder but a ``tu-`` one.

    Returns:
        A function that does the same for all encoders but ours.
    """

    @wraps(params)
    def get_preprocessing_params(encoder_name: str, pretrained: str = "imagenet") -> dict[str, Any]:
        entry = smp.encoders.encoders.get(encoder_name, {})
        settings = entry.get("pretrained_settings")
        if isinstance(settings, _PretrainedSettings) and pretrained in list(settings):
            return _preprocessing(settings.name, pretrained)
        return params(encoder_name, pretrained)

    return get_preprocessing_params


def register_with_smp() -> None:
    """Add every encoder of `list_encoders` to smp, leaving names that smp already has alone; repeatable."""
    for name in list_encoders():
        smp.encoders.encoders.setdefault(
            name,
            {
                "encoder": LargeKernelEncoder,
                "params": {"name": name},
                "pretrained_settings": _PretrainedSettings(name),
            },
        )

    # smp has no place to register such values: it fetches them from the repository of the weights, published or not.
    # Its get_preprocessing_fn calls this one by its name in the module.
    if not hasattr(smp.encoders.get_preprocessing_params, "__wrapped__"):
        smp.encoders.get_preprocessing_params = _answer_for_ours(smp.encoders.get_preprocessing_params)
