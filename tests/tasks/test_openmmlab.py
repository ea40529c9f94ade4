"""The published segmentation checkpoints fit into a task, every key of them."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from lk_backbones.tasks import SegmentationTask
from lk_backbones.tasks.openmmlab import openmmlab_state_dict

FIXTURES = Path(__file__).parents[1] / "fixtures"
PUBLISHED = {
    "replknet_31b_ade20k": ("replknet_31b", {}),
    "replknet_31b_cityscapes": ("replknet_31b", {}),
    "replknet_31l_ade20k": ("replknet_31l", {}),
    "replknet_xl_ade20k": ("replknet_xl", {"norm_features": True}),
    "unireplknet_t_ade20k": ("unireplknet_t", {"norm_features": True}),
    "unireplknet_s_ade20k": ("unireplknet_s", {"norm_features": True}),
    "unireplknet_b_ade20k": ("unireplknet_b", {"norm_features": True}),
    "unireplknet_l_ade20k": ("unireplknet_l", {"norm_features": True}),
    "unireplknet_xl_ade20k": ("unireplknet_xl", {"norm_features": True}),
    "slak_tiny_ade20k": ("slak_tiny", {"norm_features": True}),
    "slak_small_ade20k": ("slak_small", {"norm_features": True}),
    "slak_base_ade20k": ("slak_base", {"norm_features": True}),
}


def read_manifest(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    content = gzip.decompress((FIXTURES / f"keys_upernet_{name}.json.gz").read_bytes())
    manifest = json.loads(content)
    with torch.device("meta"):
        return manifest["config"], {key: torch.empty(shape) for key, shape in manifest["state_dict"].items()}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("auxiliary_weight", [0.4, 0.0])
def test_every_key_of_every_published_checkpoint_has_a_place(name: str, auxiliary_weight: float) -> None:
    encoder, encoder_kwargs = PUBLISHED[name]
    config, state = read_manifest(name)
    with torch.device("meta"):
        task = SegmentationTask(
            "upernet_openmmlab",
            encoder,
            encoder_kwargs=encoder_kwargs,
            architecture_kwargs={"align_corners": config["align_corners"]},
            num_classes=config["num_classes"],
            auxiliary_weight=auxiliary_weight,
        )
    renamed = openmmlab_state_dict(task, state)
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in task.state_dict().items()}
    auxiliary = sum(key.startswith("auxiliary_head.") for key in state)
    assert auxiliary == 8
    assert len(renamed) == len(state) - (0 if auxiliary_weight else auxiliary)


def test_an_unknown_part_is_refused() -> None:
    task = SegmentationTask("upernet_openmmlab", "replknet_31n", num_classes=4)
    with pytest.raises(KeyError, match=r"'neck\.conv\.weight' is in no part"):
        openmmlab_state_dict(task, {"neck.conv.weight": torch.ones(1)})
