"""Every detector by name: protocol, labels, gradients, precision, folding, published keys, errors."""

import copy
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import distributed, nn
from torch.multiprocessing import start_processes
from torchvision.models import detection
from torchvision.ops import box_iou

import lk_backbones
from lk_backbones.heads import DETECTORS, build_detector
from lk_backbones.heads.pyramid import EncoderPyramid
from tests.conftest import FIXTURES, load_golden, load_manifest, randomize_norms
from tests.heads.conftest import Maps, TinyEncoder

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SMALL = {
    "rcnn": {
        "box_head_channels": 16,
        "box_head_fc_channels": 32,
        "box_batch_size_per_image": 32,
        "rpn_post_nms_top_n_train": 100,
        "rpn_post_nms_top_n_test": 100,
    },
    "mask": {"mask_head_channels": 16},
    "fcos": {"head_channels": 64},
}
MASKS = ("mask_rcnn", "cascade_mask_rcnn")
DENSE = ("fcos", "retinanet")
RCNN_LOSSES = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
LOSSES = {
    "fcos": {"classification", "bbox_regression", "bbox_ctrness"},
    "retinanet": {"classification", "bbox_regression"},
}


def small_detector(architecture, encoder=None, num_classes=4, **kwargs):
    settings = {"fpn_channels": 16, "min_size": 96, "max_size": 160, "mean": MEAN, "std": STD}
    for part, values in SMALL.items():
        if part in architecture:
            settings |= values
    torch.manual_seed(0)
    return build_detector(architecture, encoder or TinyEncoder(), num_classes, **{**settings, **kwargs})


def pictures(channels=3, sizes=((96, 130), (110, 96))):
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(channels, *size, generator=generator) for size in sizes]


def objects(images, counts=(2, 1)):
    boxes = torch.tensor([[10.0, 12.0, 60.0, 80.0], [30.0, 20.0, 90.0, 90.0]])
    targets = []
    for count, image in zip(counts, images, strict=True):
        masks = torch.zeros(count, *image.shape[1:], dtype=torch.uint8)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=False):
            mask[y0:y1, x0:x1] = 1
        targets.append({"boxes": boxes[:count], "labels": torch.tensor([4, 1])[:count], "masks": masks})
    return targets


def score_threshold(architecture):
    return "score_thresh" if architecture in DENSE else "box_score_thresh"


# --- protocol ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("counts", [(2, 1), (0, 2), (0, 0)])
@pytest.mark.parametrize("architecture", DETECTORS)
def test_training_step(architecture, counts, precision) -> None:
    model = small_detector(architecture).train()
    images = pictures()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        losses = model(images, objects(images, counts))
    expected = LOSSES.get(architecture, RCNN_LOSSES) | ({"loss_mask"} if architecture in MASKS else set())
    assert {name.partition("_stage")[0] for name in losses} == expected
    assert all(loss.ndim == 0 and loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    sum(losses.values()).backward()
    # DistributedDataParallel waits for every gradient, whatever is in the images
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert [n for n, p in model.backbone.encoder.named_parameters() if not p.grad.abs().sum()] == []


@pytest.mark.parametrize("architecture", DETECTORS)
def test_detections(architecture) -> None:
    model = small_detector(architecture, **{score_threshold(architecture): 0.0}).eval()
    images = pictures()
    with torch.no_grad():
        found = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(images)
    for image, result, other in zip(images, found, rough, strict=True):
        height, width = image.shape[1:]
        assert 0 < len(result["boxes"]) <= 100
        assert result["boxes"].dtype == other["boxes"].dtype == other["scores"].dtype == torch.float32
        assert (result["boxes"] >= 0).all()
        assert (result["boxes"] <= torch.tensor([width, height, width, height]) + 1e-3).all()
        assert set(result["labels"].tolist()) <= {1, 2, 3, 4}
        assert result["scores"].equal(result["scores"].sort(descending=True).values)
        assert ("masks" in result) == (architecture in MASKS)
        if "masks" in result:
            assert result["masks"].shape == (len(result["boxes"]), 1, height, width)
            assert result["masks"].min() >= 0
            assert result["masks"].max() <= 1


@pytest.mark.parametrize("architecture", DETECTORS)
def test_nothing_found(architecture) -> None:
    model = small_detector(architecture, **{score_threshold(architecture): 1.0}).eval()
    with torch.no_grad():
        found = model(pictures())
    for image, result in zip(pictures(), found, strict=True):
        assert result["boxes"].shape == (0, 4)
        assert len(result["labels"]) == len(result["scores"]) == 0
        if architecture in MASKS:
            assert result["masks"].shape == (0, 1, *image.shape[1:])


@pytest.mark.parametrize("architecture", DETECTORS)
def test_learns_an_object(architecture) -> None:
    """It is found with its own label, at its own place; a dense detector that counted labels from 0 would not."""
    settings = {"rpn_allowed_border": None} if "cascade" in architecture else {}
    model = small_detector(architecture, min_size=64, max_size=96, **settings)
    if architecture == "retinanet":  # its weights start so small that towers this narrow hear nothing
        for tower in (model.head.classification_head.conv, model.head.regression_head.conv):
            for conv in tower:
                nn.init.kaiming_normal_(conv[0].weight)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    image = torch.zeros(3, 64, 96)
    image[:, 16:48, 20:70] = 1
    box = torch.tensor([[20.0, 16.0, 70.0, 48.0]])
    target = {"boxes": box, "labels": torch.tensor([4]), "masks": image[:1].byte()}
    for _ in range(120 if architecture in DENSE else 40):
        loss = sum(model([image], [target]).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        (found,) = model.eval()([image])
    assert found["labels"][0] == 4
    assert box_iou(found["boxes"][:1], box) > 0.6
    if architecture in MASKS:
        best = found["masks"][0] > 0.5
        assert (best & (image[:1] > 0)).sum() > 0.6 * (best | (image[:1] > 0)).sum()


@pytest.mark.parametrize("architecture", DETECTORS)
def test_resizes_in_evaluation_only(architecture) -> None:
    model = small_detector(architecture)
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    images = pictures(sizes=((70, 50),))
    model.train()(images, objects(images, (0,)))
    model.eval()(images)
    assert seen[0].shape == (1, 3, 96, 64)  # padded only
    normalized = (images[0] - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(seen[0][0, :, :70, :50], normalized)
    assert seen[0][0, :, 70:].abs().sum() == seen[0][0, :, :, 50:].abs().sum() == 0
    assert seen[1].shape == (1, 3, 160, 96)  # 134 x 96, then padded


# --- encoders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "channels", "kwargs"),
    [
        ("resnet18", 4, {}),
        ("tu-convnext_atto", 3, {}),  # no map of stride 2
        (
            "tu-replknet_31n",
            1,
            {"kernel_sizes": 3, "depths": (1, 1, 1, 1), "norm_features": True},
        ),  # norms of the maps, one of them unused
    ],
)
@pytest.mark.parametrize("architecture", ["cascade_rcnn", "fcos"])
def test_any_encoder_and_channels(architecture, name, channels, kwargs) -> None:
    encoder = smp.encoders.get_encoder(name, in_channels=channels, depth=5, weights=None, **kwargs)
    model = small_detector(architecture, encoder, mean=[0.5] * channels, std=[0.2] * channels)
    assert model.backbone.encoder is encoder
    images = pictures(channels)
    sum(model(images, objects(images)).values()).backward()
    # timm's maps of stride 2 are no part of a pyramid: what only they need stays out
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    with torch.no_grad():
        assert len(model.eval()(images)) == 2


@pytest.mark.parametrize(
    ("architecture", "kwargs", "norm"),
    [
        ("faster_rcnn", {"fpn_batch_norm": True, "box_head_convs": 4}, nn.BatchNorm2d),
        ("cascade_rcnn", {"fpn_batch_norm": True}, nn.BatchNorm2d),
        ("retinanet", {"fpn_channels": 64, "head_group_norm": True}, nn.GroupNorm),
    ],
)
def test_norms_on_request(architecture, kwargs, norm) -> None:
    def norms(model):
        return sum(isinstance(module, norm) for module in model.modules())

    plain, model = small_detector(architecture), small_detector(architecture, **kwargs)
    # eight in the pyramid, four in a new box head or in each of two towers
    assert norms(model) - norms(plain) == {"faster_rcnn": 12, "cascade_rcnn": 8, "retinanet": 8}[architecture]
    images = pictures()
    assert all(loss.isfinite() for loss in model(images, objects(images)).values())


@pytest.mark.parametrize("architecture", DETECTORS)
def test_folding_keeps_the_detections(architecture) -> None:
    encoder = smp.encoders.get_encoder("tu-replknet_31n", depth=5, weights=None, kernel_sizes=7, depths=(1, 1, 1, 1))
    # in float64, where rounding does not swap detections of nearly the same score
    model = small_detector(architecture, encoder, **{score_threshold(architecture): 0.0}).eval().double()
    randomize_norms(encoder)
    images = [image.double() for image in pictures()]
    folded = lk_backbones.reparameterize(model)
    assert sum(p.numel() for p in folded.parameters()) < sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        for before, after in zip(model(images), folded(images), strict=True):
            assert len(before["boxes"]) > 0
            assert before["boxes"].dtype == torch.float64
            torch.testing.assert_close(before, after, rtol=1e-7, atol=1e-7)


# --- several processes ------------------------------------------------------------------------------------------------


def _train_in_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    images = pictures(sizes=((96, 128), (96, 128)))
    targets = objects(images, (2, 0))
    for architecture in DETECTORS:
        model = nn.parallel.DistributedDataParallel(small_detector(architecture))
        # the second process has no object at all; a parameter without a gradient would make the second step fail
        for _ in range(2):
            model.zero_grad()
            sum(model(images[rank : rank + 1], targets[rank : rank + 1]).values()).backward()
        if rank == 0:
            gradients = {name: parameter.grad for name, parameter in model.module.named_parameters()}
            torch.save(gradients, f"{folder}/{architecture}.pt")
    distributed.destroy_process_group()


def test_two_real_processes(tmp_path: Path) -> None:
    start_processes(_train_in_process, (str(tmp_path),), nprocs=2, start_method="spawn")
    images = pictures(sizes=((96, 128), (96, 128)))
    model = small_detector("fcos")
    sum(model(images, objects(images, (2, 0))).values()).backward()
    found = torch.load(tmp_path / "fcos.pt", weights_only=True)
    # FCOS draws nothing at random and averages over the positions of all processes: the gradients of one process
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6)
    assert {path.stem for path in tmp_path.glob("*.pt")} == set(DETECTORS)


# --- torchvision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["faster_rcnn", "mask_rcnn", "retinanet"])
def test_equals_torchvision(architecture) -> None:
    """Same weights and seed, on a size where torchvision guesses the strides rightly."""
    torch.manual_seed(0)
    settings = {"min_size": 128, "max_size": 192, score_threshold(architecture): 0.02}
    if architecture != "retinanet":
        settings["box_batch_size_per_image"] = 64
    ours = build_detector(architecture, TinyEncoder(), 4, MEAN, STD, fpn_channels=16, **settings)
    theirs_class = {
        "faster_rcnn": detection.FasterRCNN,
        "mask_rcnn": detection.MaskRCNN,
        "retinanet": detection.RetinaNet,
    }[architecture]
    first = 0 if architecture == "retinanet" else 1
    if architecture == "retinanet":
        nn.init.constant_(ours.head.classification_head.cls_logits.bias, -1.0)
        settings["detections_per_img"] = 100
    theirs = theirs_class(
        copy.deepcopy(ours.backbone),
        4 + first,
        image_mean=list(MEAN),
        image_std=list(STD),
        _skip_resize=True,  # it would draw a random number
        **settings,
    )
    theirs.load_state_dict(ours.state_dict(), strict=True)

    images = pictures(sizes=((128, 192), (128, 192)))
    targets = objects(images)
    results = []
    for model, labels_from in ((ours, 1), (theirs, first)):
        torch.manual_seed(1)
        losses = model.train()(images, [{**t, "labels": t["labels"] - 1 + labels_from} for t in targets])
        with torch.no_grad():
            results.append((losses, model.eval()(images)))
    (losses, found), (their_losses, their_found) = results
    torch.testing.assert_close(losses, their_losses)
    for one, other in zip(found, their_found, strict=True):
        assert len(one["boxes"]) > 20
        torch.testing.assert_close(one, {**other, "labels": other["labels"] - first + 1})


# --- published checkpoints --------------------------------------------------------------------------------------------


def published_parts(name):
    manifest = load_manifest(name)
    tensors = {key: torch.empty(shape, device="meta") for key, shape in manifest["state_dict"].items()}
    backbone = {k.removeprefix("backbone."): v for k, v in tensors.items() if k.startswith("backbone.")}
    return manifest["config"], backbone, {k: v for k, v in tensors.items() if not k.startswith("backbone.")}


PUBLISHED = sorted(
    path.name.removeprefix("keys_").removesuffix(".json.gz")
    for kind in ("cascade", "fcos")
    for path in FIXTURES.glob(f"keys_{kind}_*_coco.json.gz")
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_key_has_a_place(name) -> None:
    config, _, heads = published_parts(name)
    architecture = "fcos" if name.startswith("fcos") else "cascade_mask_rcnn"
    with torch.device("meta"):
        model = build_detector(architecture, Maps(config["in_channels"]), config["num_classes"], MEAN, STD)
    renamed = model.openmmlab_state_dict(heads)
    assert len(renamed) == len(heads) > 40
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in model.state_dict().items()}
    if architecture == "cascade_mask_rcnn":
        with torch.device("meta"):
            model = build_detector("cascade_rcnn", Maps(config["in_channels"]), config["num_classes"], MEAN, STD)
        assert model.openmmlab_state_dict(heads).keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", ["cascade_replknet_31b_coco", "fcos_replknet_31b_coco"])
def test_whole_published_detector(name) -> None:
    config, backbone, heads = published_parts(name)
    architecture = "fcos" if name.startswith("fcos") else "cascade_mask_rcnn"
    with torch.device("meta"):
        encoder = smp.encoders.get_encoder("replknet_31b", depth=5, weights=None)
        model = build_detector(architecture, encoder, config["num_classes"], MEAN, STD)
    encoder.load_state_dict(backbone, strict=True)  # the family's own renaming
    encoder_keys = {f"backbone.encoder.{key}" for key in encoder.state_dict()}
    assert model.openmmlab_state_dict(heads).keys() | encoder_keys == model.state_dict().keys()


def test_background_moves_to_the_front() -> None:
    model = build_detector("cascade_mask_rcnn", Maps([8, 16, 32, 64]), 5, MEAN, STD, fpn_channels=16)
    state = load_golden("cascade_tiny")["state"]
    renamed = model.openmmlab_state_dict(state)
    theirs, ours = "roi_head.bbox_head.1.", "roi_heads.stages.1.box_predictor."
    assert torch.equal(renamed[ours + "cls_score.bias"][0], state[theirs + "fc_cls.bias"][5])
    assert torch.equal(renamed[ours + "cls_score.bias"][1:], state[theirs + "fc_cls.bias"][:5])
    assert torch.equal(renamed[ours + "bbox_pred.weight"][4:], state[theirs + "fc_reg.weight"])
    assert not renamed[ours + "bbox_pred.weight"][:4].any()

    agnostic = build_detector("cascade_rcnn", Maps([8, 16, 32, 64]), 5, MEAN, STD, class_agnostic=True)
    key = "roi_head.bbox_head.0.fc_reg.weight"
    (value,) = agnostic.openmmlab_state_dict({key: torch.ones(4, 32)}).values()
    assert torch.equal(value, torch.ones(4, 32))


@pytest.mark.parametrize("architecture", ["cascade_rcnn", "fcos"])
@pytest.mark.parametrize(
    "key", ["neck.mystery.0.conv.weight", "neck.fpn_convs.0.weight", "roi_head.mystery", "backbone.x"]
)
def test_unknown_published_key_is_refused(architecture, key) -> None:
    model = small_detector(architecture)
    with pytest.raises(KeyError, match=key):
        model.openmmlab_state_dict({key: torch.ones(1)})


def test_no_weights_are_published_for_others() -> None:
    with pytest.raises(ValueError, match="Cascade R-CNN and FCOS"):
        small_detector("retinanet").openmmlab_state_dict({})


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"architecture": "mask_rccn"}, "unknown detector 'mask_rccn'.*did you mean 'mask_rcnn'"),
        ({"box_score_tresh": 0.1}, "'cascade_rcnn' has no argument 'box_score_tresh'.*did you mean 'box_score_thresh'"),
        ({"masks": True}, "has no argument 'masks'"),
        ({"num_classes": 0}, "num_classes=0 must be at least 1"),
        ({"mean": (0.5,)}, "mean and std need 3 values"),
        ({"stage_iou_thresh": (0.5, 0.6)}, "every stage needs"),
        ({"box_loss": "iou"}, "box_loss='iou' must be one of giou, smooth_l1"),
        ({"anchor_sizes": ((32,),)}, "anchor sizes are needed for 5 maps"),
        ({"architecture": "fcos", "head_channels": 48}, "head_channels=48 must be divisible by 32"),
    ],
)
def test_bad_arguments(arguments, message) -> None:
    settings = {"architecture": "cascade_rcnn", "num_classes": 4, "mean": MEAN, "std": STD, **arguments}
    encoder = smp.encoders.get_encoder("resnet18", depth=5, weights=None)
    with pytest.raises(ValueError, match=message):
        build_detector(encoder=encoder, **settings)


@pytest.mark.parametrize("kwargs", [{"depth": 4}, {"depth": 5, "output_stride": 16}])
def test_encoder_without_the_maps(kwargs) -> None:
    with pytest.raises(ValueError, match="maps at strides 4, 8, 16 and 32"):
        EncoderPyramid(smp.encoders.get_encoder("resnet18", weights=None, **kwargs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([0, 1])}, "labels must be 1 to 4 .*got 0 to 4"),
        ({"labels": torch.tensor([1, 5])}, "labels must be 1 to 4 .*got 1 to 5"),
        ({"labels": torch.tensor([1])}, r"targets\[0\] has boxes \(2, 4\) and labels \(1,\)"),
        ({"masks": torch.ones(2, 5, 5)}, r"targets\[0\] has masks \(2, 5, 5\), expected \(2, 96, 130\)"),
        ({"masks": None}, r"targets\[0\] has no 'masks'"),
    ],
)
def test_bad_targets(change, message) -> None:
    model, images = small_detector("cascade_mask_rcnn"), pictures()
    targets = objects(images)
    targets[0] = {key: value for key, value in {**targets[0], **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        model(images, targets)


def test_bad_images() -> None:
    model = small_detector("fcos")
    with pytest.raises(ValueError, match="one target for every image, got 2 images and no targets"):
        model(pictures())
    with pytest.raises(ValueError, match=r"images\[0\] has shape \(1, 96, 130\), expected \(3, H, W\)"):
        model.eval()(pictures(channels=1))
