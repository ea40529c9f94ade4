"""Weights: pulled from the Hub, loaded into any of our models, pushed to the Hub.

::

    import segmentation_models_pytorch as smp
    from lk_backbones import hub

    model = smp.UPerNet("replknet_31b", encoder_weights=None, classes=19)
    print(hub.load_weights(model, "replknet_31b.in1k"))  # what was loaded, what was not and why
    hub.push(model, "you/my-model")

A source is a Hub repository (``hf-hub:owner/name``, with ``@revision`` behind it to pin it), a local folder of the same
layout, a weight file, or the name of published weights. Downloading, caching, resuming, tokens and mirrors are
huggingface_hub's, with its own settings (``HF_TOKEN``, ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``, ``HF_HOME``).
"""

import os
import re
import tempfile
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from segmentation_models_pytorch.base import SegmentationModel
from torch import nn

from lk_backbones.encoders._loading import find_encoder, kernels_of_its_own, load_encoder
from lk_backbones.repository.build import build_model
from lk_backbones.repository.folder import check_target, new_folder
from lk_backbones.repository.layout import RepositoryInfo, write_repository
from lk_backbones.tasks.base import BaseTask
from lk_backbones.tasks.openmmlab import openmmlab_state_dict
from lk_backbones.weights import (
    DownloadError,
    LoadReport,
    PublishedWeights,
    WeightMismatchError,
    Weights,
    WeightsError,
    list_published,
    pull,
)
from lk_backbones.weights.download import hub_error
from lk_backbones.weights.openmmlab import is_dense_model
from lk_backbones.weights.report import follow, load_state

__all__ = [
    "DownloadError",
    "LoadReport",
    "PublishedWeights",
    "RepositoryInfo",
    "WeightMismatchError",
    "Weights",
    "WeightsError",
    "list_published",
    "load_model",
    "load_weights",
    "pull",
    "push",
]


def load_weights(
    model: nn.Module,
    source: str | os.PathLike[str] | Weights,
    strict: bool = True,
    *,
    revision: str | None = None,
    namespace: str | None = None,
) -> LoadReport:
    """Load weights from any source into an encoder, an smp model, a detector or a task.

    What the source holds is told from its keys. A whole model goes into a whole model: one of our tasks, an smp model,
    or a checkpoint of OpenMMLab training into the task that it belongs to (`openmmlab_state_dict`). Otherwise the
    encoder inside the source goes into the encoder inside ``model``. Published names are mapped, the first convolution
    is adapted to other input channels, and a classifier of other classes is left alone, as timm does. Where ``model``
    was enlarged and the source was not, the large kernels keep their values.

    Args:
        model: What to load into.
        source: As for `pull`, or what `pull` returned.
        strict: Whether every tensor of the model (or, for encoder weights, of its encoder) must be in the source and
            the reverse. Otherwise what fits by name and shape is loaded, if it is at least half.
        revision: Branch, tag or commit of a Hub repository.
        namespace: As for `pull`.

    Returns:
        What was loaded, adapted, skipped and why; print it.

    Raises:
        DownloadError: If the weights cannot be fetched.
        WeightMismatchError: If they are another model's, with the first missing, unexpected and wrongly shaped keys and
            the name of a registered encoder that they do fit.
        WeightsError: If the source is damaged, dangerous or no weights.
        FileNotFoundError: If a file or folder does not exist.
    """
    weights = source if isinstance(source, Weights) else pull(source, revision, namespace=namespace)
    rename = _whole_model_naming(model, weights)
    if rename is None:
        kwargs = model.hparams["encoder_kwargs"] or {} if isinstance(model, BaseTask) else None
        return load_encoder(find_encoder(model), weights, kwargs, "strict" if strict else "partial")
    report = LoadReport(weights.source)
    for reason, keys in weights.skipped.items():
        report.skip(reason, keys)
    given = weights.state_dict | weights.extra
    state, origins = follow(rename, given)
    used: frozenset[str] = frozenset().union(*origins.values())
    report.skip("the model has no such part", [key for key in given if key not in used])
    hint = ". load_weights(model.encoder, …) takes the encoder alone" if hasattr(model, "encoder") else ""
    kept = kernels_of_its_own(model, state, report)
    load_state(model, state, report, "strict" if strict else "partial", _describe(model), lambda: hint, kept)
    return report


Naming = Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]


def _whole_model_naming(model: nn.Module, weights: Weights) -> Naming | None:
    """Return what renames the source's tensors to those of ``model``, if it is a whole model too, else ``None``."""
    state, extra = weights.state_dict, weights.extra
    if is_dense_model(state):
        return _from_openmmlab(model, weights) if isinstance(model, BaseTask) else None
    if isinstance(model, BaseTask):
        if any(key.startswith(("model.encoder.", "model.backbone.encoder.")) for key in state):
            return dict
        if _is_smp_model(state):
            return lambda named: {key if key in extra else f"model.{key}": value for key, value in named.items()}
    elif isinstance(model, SegmentationModel):
        if _is_smp_model(state):
            return lambda named: {key: value for key, value in named.items() if key not in extra}
        inner = {key.removeprefix("model.") for key in state if key.startswith("model.")}
        if _is_smp_model(inner):
            return lambda named: {
                key.removeprefix("model."): value for key, value in named.items() if key.startswith("model.")
            }
    elif model.state_dict().keys() == state.keys() and find_encoder(model) is not model:  # such as a detector
        return dict
    return None


def _from_openmmlab(task: BaseTask, weights: Weights) -> Naming:
    def rename(named: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        try:
            return openmmlab_state_dict(task, named)
        except Exception as error:  # keys or shapes that no published model has
            raise WeightMismatchError(
                f"'{weights.source}' is a whole OpenMMLab model, which does not fit into {_describe(task)}: "
                f"{error.args[0] if error.args else error}. load_weights(model.encoder, …) takes its backbone alone"
            ) from error

    return rename


def _is_smp_model(state: Collection[str]) -> bool:
    return any(key.startswith("encoder.") for key in state) and any(
        key.startswith(("decoder.", "segmentation_head.")) for key in state
    )


def _describe(model: nn.Module) -> str:
    if isinstance(model, BaseTask):
        described = {k: model.hparams[k] for k in ("architecture", "encoder", "num_classes") if k in model.hparams}
        return f"{type(model).__name__}({described})"
    return type(model).__name__


def load_model(
    source: str | os.PathLike[str],
    revision: str | None = None,
    *,
    namespace: str | None = None,
) -> nn.Module:
    """Build the model that a source describes, with its weights: an encoder, an smp model or a task.

    Args:
        source: As for `pull`: a repository that `push` or timm wrote, a folder of that layout, a checkpoint of one of
            our tasks, or a published file, whose model is told from its names and shapes.
        revision: Branch, tag or commit of a Hub repository.
        namespace: As for `pull`.

    Returns:
        The model, in evaluation mode.

    Raises:
        WeightsError: If the weights cannot be had, or do not say what model they are of.
    """
    weights = pull(source, revision, namespace=namespace)
    model = build_model(weights)
    load_weights(model, weights)
    return model.eval()


def push(
    model: nn.Module | str | os.PathLike[str],
    repo_id: str,
    info: RepositoryInfo | None = None,
    *,
    folder: str | os.PathLike[str] | None = None,
    dry_run: bool = False,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload weights with lk_backbones",
    report: list[LoadReport] | None = None,
) -> str:
    """Publish a model as a Hub repository that timm, smp and this package load alike.

    The layout is ``model.safetensors``, ``config.json`` and a model card. An encoder loads with
    ``timm.create_model("hf-hub:…", pretrained=True)`` and ``encoder_weights="hf-hub:…"``, an smp model and the network
    of a segmentation task with ``smp.from_pretrained``, and everything with `load_model`.

    Args:
        model: A timm model or smp encoder, an smp model, a task, or a source that `load_model` understands, such as a
            checkpoint or a published file.
        repo_id: ``owner/name``; created if it does not exist.
        info: What the model card says beside what the model itself tells.
        folder: Where to keep the files; by default a temporary folder, and with ``dry_run`` one called like the
            repository.
        dry_run: Only write the folder.
        private: Whether a new repository is private; ``None`` for the owner's default.
        revision: Branch to commit to.
        commit_message: Message of the commit.
        report: A list that gets what `load_weights` reported, if ``model`` is a source.

    Returns:
        ``hf-hub:owner/name@commit``, or with ``dry_run`` the folder.

    Raises:
        DownloadError: If the Hub refuses or cannot be reached; for instance for want of a token that may write.
        WeightsError: If the model is of no kind that can be published.
        FileExistsError: If ``folder`` is anything else than an empty folder, or one that this function wrote and nobody
            has changed since.
    """
    _check_repo_id(repo_id)
    source = None if isinstance(model, nn.Module) or not os.path.exists(model) else model
    target = (
        Path(folder if folder is not None else repo_id.rpartition("/")[2]) if dry_run or folder is not None else None
    )
    if target is not None:
        check_target(target, source)  # before anything is fetched
    weights = None
    info = info or RepositoryInfo()
    if not isinstance(model, nn.Module):
        weights = pull(model)
        model = build_model(weights, info.model, info.model_kwargs)
        loaded = load_weights(model, weights)
        if report is not None:
            report.append(loaded)
    with ExitStack() as stack:
        try:
            if target is None:
                written = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                write_repository(model, written, repo_id, info, weights)
            else:
                written = target
                with new_folder(target, source) as place:
                    write_repository(model, place, repo_id, info, weights)
        except FileExistsError:
            raise
        except (OSError, SafetensorError) as error:
            number = re.search(r"os error (\d+)", str(error))  # of safetensors, which has an error class of its own
            reason = error.strerror if isinstance(error, OSError) else number and os.strerror(int(number[1]))
            if target is None:
                what = f"the files for '{repo_id}' could not be written into a temporary folder"
                advice = "Nothing was uploaded. TMPDIR names another place for it, or folder= a folder that stays"
            else:
                what, advice = f"'{target}' could not be written", "What was there is as it was"
            raise WeightsError(f"{what}: {reason or error}. {advice}") from error
        if dry_run:
            return str(written)
        api = HfApi()
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=written, revision=revision, commit_message=commit_message
            )
        except Exception as error:
            raise hub_error(error, repo_id, revision=revision, right="write") from error
    return f"hf-hub:{repo_id}@{commit.oid}"


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise hub_error(error, repo_id) from error
    if "/" not in repo_id:
        raise WeightsError(f"'{repo_id}' is no repository name: 'owner/name' is expected")
