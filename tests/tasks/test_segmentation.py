"""The segmentation task through real trainers."""

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torchmetrics.classification import MulticlassJaccardIndex

import lk_backbones
from lk_backbones.heads import OpenMMLabUPerNet
from lk_backbones.tasks import SegmentationTask
from lk_backbones.tasks.inference import sliding_window

from ..blocks import NUM_CLASSES, TRAIN_SIZES, UNEVEN_SIZES, Blocks, loader, trainer

SMALL = {"decoder_channels": 16}


def make(architecture: str = "unet", encoder: str = "resnet18", **kwargs: Any) -> SegmentationTask:
    return SegmentationTask(architecture, encoder, **({"num_classes": NUM_CLASSES, "lr": 1e-3} | kwargs))


def upernet(**kwargs: Any) -> SegmentationTask:
    return make("upernet_openmmlab", "replknet_31n", architecture_kwargs=SMALL, **kwargs)


# --- learning -------------------------------------------------------------------------------------------


def test_learns_four_pictures_by_heart(tmp_path: Path) -> None:
    L.seed_everything(0, verbose=False)
    task = make(
        "upernet_openmmlab", architecture_kwargs=SMALL, auxiliary_weight=0.4, loss="ce+dice", warmup_steps=5, lr=4e-3
    )
    pictures = [(32, 64)] * 4
    (before,) = trainer(tmp_path).validate(task, loader(pictures), verbose=False)
    trainer(tmp_path, max_steps=40, max_epochs=-1, limit_val_batches=0).fit(task, loader(pictures, 4))
    (after,) = trainer(tmp_path).validate(task, loader(pictures), verbose=False)
    assert before["val/mean_iou"] < 0.3
    assert after["val/mean_iou"] > 0.8
    assert after["val/pixel_accuracy"] > 0.85


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_learning_rates_of_every_step(tmp_path: Path, precision: str) -> None:
    """Warm-up and decay count optimiser steps, not batches, whatever the precision."""
    rates: list[list[float]] = []

    class Recorder(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, task: L.LightningModule, optimizer) -> None:
            rates.append([group["lr"] for group in optimizer.param_groups])

    task = make(encoder="tu-convnext_atto", layer_decay=0.9, warmup_steps=2, warmup_ratio=0.5, min_lr=1e-4)
    fitter = trainer(
        tmp_path,
        max_epochs=2,
        accumulate_grad_batches=2,
        callbacks=[Recorder()],
        precision=precision,
        gradient_clip_val=1.0,
    )
    fitter.fit(task, loader(TRAIN_SIZES, 2))  # 4 batches, so 2 optimiser steps per epoch, 4 in all
    decay = [0.9 * (1 - t / 4) + 0.1 for t in range(4)]
    expected = [1e-3 * d * r for d, r in zip(decay, [0.5, 0.75, 1, 1], strict=True)]
    assert [max(r) for r in rates] == pytest.approx(expected)
    assert [min(r) for r in rates] == pytest.approx([0.9**13 * e for e in expected])
    assert all(p.dtype == torch.float32 for p in task.parameters())
    assert math.isfinite(fitter.callback_metrics["train/loss"])


def test_sgd_and_a_frozen_encoder(tmp_path: Path) -> None:
    task = make(optimizer="sgd", freeze_encoder=True)
    before = {k: v.clone() for k, v in task.model.state_dict().items()}
    fitter = trainer(tmp_path, limit_val_batches=0)
    fitter.fit(task, loader(TRAIN_SIZES, 4))
    assert isinstance(fitter.optimizers[0], torch.optim.SGD)
    assert fitter.optimizers[0].param_groups[0]["momentum"] == 0.9
    changed = {k for k, v in task.model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert not any(k.startswith("encoder.") for k in changed)  # not even the batch norms' statistics


def test_the_auxiliary_loss_counts_by_its_weight(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = upernet(auxiliary_weight=0.4).eval()  # without dropout
    batch = next(iter(loader([(32, 48)] * 2, 2)))
    logged: dict[str, torch.Tensor] = {}
    task.log = lambda name, value, **_: logged.__setitem__(name, value)  # type: ignore[method-assign]
    loss = task.training_step(batch, 0)
    features = task.model.encoder(task.normalize(batch["image"]))
    assert features[4].shape[2:] == (2, 3)  # the third stage: stride 16
    auxiliary = F.interpolate(task.auxiliary_head(features[4]), (32, 48), mode="bilinear")
    main = F.cross_entropy(task(batch["image"]), batch["mask"], ignore_index=255)
    expected = F.cross_entropy(auxiliary, batch["mask"], ignore_index=255)
    torch.testing.assert_close(logged["train/auxiliary_loss"], expected.detach())
    torch.testing.assert_close(loss, main + 0.4 * expected)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    batch = torch.rand(2, 3, 32, 32)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        task = upernet(gradient_checkpointing=checkpointing).train()
        task(batch).square().mean().backward()
        gradients.append({n: p.grad for n, p in task.named_parameters()})
    stages = [m for m in task.encoder.modules() if getattr(m, "grad_checkpointing", False)]
    assert len(stages) == 4
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_averaged_weights_from_lightning(tmp_path: Path) -> None:
    """Lightning's EMA callback copies the task and swaps its weights for validation."""
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    if not hasattr(callbacks, "EMAWeightAveraging"):
        pytest.skip("this Lightning has no EMAWeightAveraging")
    torch.manual_seed(0)
    task = make(auxiliary_weight=0.4)
    ema = callbacks.EMAWeightAveraging(decay=0.5)
    fitter = trainer(tmp_path, max_epochs=2, callbacks=[ema])
    fitter.fit(task, loader(TRAIN_SIZES, 4), loader([(32, 48)] * 2))
    validated = fitter.callback_metrics["val/loss"].item()
    fitter.save_checkpoint(tmp_path / "ema.ckpt")
    again = SegmentationTask.load_from_checkpoint(tmp_path / "ema.ckpt")
    (metrics,) = trainer(tmp_path).validate(again, loader([(32, 48)] * 2), verbose=False)
    assert metrics["val/loss"] == pytest.approx(validated, rel=1e-5)  # the checkpoint holds what was validated


def test_synchronised_batch_norm_keeps_weights_and_outputs() -> None:
    torch.manual_seed(0)
    task = upernet(auxiliary_weight=0.4).eval()
    image = torch.rand(1, 3, 32, 32)
    expected, keys = task(image), task.state_dict().keys()
    converted = torch.nn.SyncBatchNorm.convert_sync_batchnorm(task)  # what Trainer(sync_batchnorm=True) does
    assert any(isinstance(m, torch.nn.SyncBatchNorm) for m in converted.modules())
    assert not any(type(m) is torch.nn.BatchNorm2d for m in converted.modules())
    assert converted.state_dict().keys() == keys
    torch.testing.assert_close(converted(image), expected)


def test_folding_a_task_keeps_its_outputs() -> None:
    torch.manual_seed(0)
    task = upernet(auxiliary_weight=0.4)
    with torch.no_grad():
        task.train()(torch.rand(4, 3, 64, 64))  # batch norms that do something
        image = torch.rand(1, 3, 64, 64)
        expected = task.eval()(image)
        actual = lk_backbones.reparameterize(task)(image)
    assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()


# --- architectures, sizes, channels ---------------------------------------------------------------------


ARCHITECTURES = sorted(set(smp.MODEL_ARCHITECTURES_MAPPING) - {"dpt"})  # dpt takes vision transformers only


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_takes_images_of_any_size(architecture: str, tmp_path: Path) -> None:
    weight = 0.0 if architecture == "pspnet" else 0.4
    task = make(architecture, "replknet_31n", encoder_kwargs={"depths": [1, 1, 1, 1]}, auxiliary_weight=weight)
    fitter = trainer(tmp_path, max_steps=1, max_epochs=-1)
    fitter.fit(task, loader([(65, 97)] * 2, 2), loader([(33, 50)]))
    assert math.isfinite(fitter.callback_metrics["train/loss"])
    assert math.isfinite(fitter.callback_metrics["val/loss"])
    with torch.no_grad():
        assert task.eval()(torch.rand(1, 3, 21, 40)).shape == (1, NUM_CLASSES, 21, 40)


def test_padding_is_the_mean_colour_and_is_cut_off() -> None:
    torch.manual_seed(0)
    task = make().eval()
    image = torch.rand(1, 3, 40, 50)
    mean = torch.tensor(task.hparams["mean"]).view(1, 3, 1, 1).expand(1, 3, 64, 64).clone()
    mean[:, :, :40, :50] = image
    with torch.no_grad():
        torch.testing.assert_close(task(image), task(mean)[:, :, :40, :50])


def test_the_published_upernet_is_not_padded() -> None:
    torch.manual_seed(0)
    task = upernet().eval()
    image = torch.rand(1, 3, 65, 97)
    with torch.no_grad():
        torch.testing.assert_close(task(image), task.model(task.normalize(image)))


@pytest.mark.parametrize("channels", [1, 4])
def test_other_numbers_of_channels(channels: int) -> None:
    task = make(in_channels=channels).eval()
    assert len(task.hparams["mean"]) == channels
    assert task(torch.rand(1, channels, 32, 32)).shape == (1, NUM_CLASSES, 32, 32)
    with pytest.raises(ValueError, match=f"images have 3 channels, the task in_channels={channels}"):
        task(torch.rand(1, 3, 32, 32))


def test_mean_and_std_come_from_argument_encoder_or_imagenet() -> None:
    assert make().hparams["mean"] == [0.485, 0.456, 0.406]
    assert make(mean=[0.1, 0.2, 0.3], std=[1.0, 1.0, 2.0]).hparams["std"] == [1.0, 1.0, 2.0]
    cfg = timm.get_pretrained_cfg("tf_efficientnet_lite0")
    assert cfg.mean == (0.5, 0.5, 0.5)
    task = make(encoder="tu-tf_efficientnet_lite0")
    assert task.hparams["mean"] == [0.5, 0.5, 0.5]
    torch.testing.assert_close(task.normalize(torch.full((1, 3, 2, 2), 0.75)), torch.full((1, 3, 2, 2), 0.5))


# --- measuring ------------------------------------------------------------------------------------------


def test_validation_measures_what_the_papers_measure(tmp_path: Path) -> None:
    """Masks larger than the images, batch size 1, ignored pixels: against torchmetrics fed by hand."""
    torch.manual_seed(0)
    task = make(architecture="fpn", class_names=["a", "b", "c", "d"])
    tester = trainer(tmp_path)
    data = loader(UNEVEN_SIZES, mask_scale=2)
    for _ in range(2):  # the second time must not remember the first
        (metrics,) = tester.validate(task, data, verbose=False)
    macro = MulticlassJaccardIndex(NUM_CLASSES, average="macro", ignore_index=255)
    per_class = MulticlassJaccardIndex(NUM_CLASSES, average=None, ignore_index=255)
    losses, hits, pixels = [], 0, 0
    task.eval()
    with torch.no_grad():
        for item in Blocks(UNEVEN_SIZES, mask_scale=2):
            mask = item["mask"][None]
            logits = F.interpolate(task(item["image"][None]), mask.shape[1:], mode="bilinear")
            prediction = logits.argmax(1)
            macro.update(prediction, mask)
            per_class.update(prediction, mask)
            losses.append(F.cross_entropy(logits, mask, ignore_index=255).item())
            hits += int((prediction == mask).sum())
            pixels += int((mask != 255).sum())
    assert metrics["val/mean_iou"] == pytest.approx(macro.compute().item(), abs=1e-6)
    assert metrics["val/pixel_accuracy"] == pytest.approx(hits / pixels, abs=1e-6)
    assert metrics["val/loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    for name, iou in zip("abcd", per_class.compute().tolist(), strict=True):
        assert metrics[f"val/iou/{name}"] == pytest.approx(iou, abs=1e-6)


def test_sliding_windows_and_augmentation_in_the_task(tmp_path: Path) -> None:
    torch.manual_seed(0)
    image = torch.rand(1, 3, 50, 70)
    task = upernet(inference="slide", slide_crop=(32, 32), slide_stride=(16, 20)).eval()
    with torch.no_grad():
        expected = sliding_window(task.model, task.normalize(image), (32, 32), (16, 20))
        torch.testing.assert_close(task(image), expected)

    task = upernet(tta_scales=[0.5, 1.0], tta_flip=True).eval()
    with torch.no_grad():
        probabilities = task.predict_scores(image, (50, 70)).softmax(1)
        expected = torch.zeros(1, NUM_CLASSES, 50, 70)
        for size in ((25, 35), (50, 70)):
            scaled = F.interpolate(image, size, mode="bilinear")
            for dims in ([], [3]):
                logits = F.interpolate(task(scaled.flip(dims)).flip(dims), (50, 70), mode="bilinear")
                expected += logits.softmax(1) / 4
        torch.testing.assert_close(probabilities, expected)
        torch.testing.assert_close(task.predict_scores(image, (50, 70), augment=False), task(image))

    # "ms" costs a dozen passes: separate validations use it, those during a training do not
    fitter = trainer(tmp_path, max_steps=1, max_epochs=-1)
    fitter.fit(task, loader(TRAIN_SIZES, 8), loader(UNEVEN_SIZES))
    during = fitter.callback_metrics["val/loss"].item()
    (augmented,) = trainer(tmp_path).validate(task, loader(UNEVEN_SIZES), verbose=False)
    task.hparams["tta_scales"], task.hparams["tta_flip"] = None, False
    (plain,) = trainer(tmp_path).validate(task, loader(UNEVEN_SIZES), verbose=False)
    assert during == pytest.approx(plain["val/loss"], rel=1e-5)
    assert augmented["val/loss"] != pytest.approx(plain["val/loss"], rel=1e-3)


@pytest.mark.parametrize("align_corners", [False, True])
def test_the_architecture_decides_on_align_corners(align_corners: bool) -> None:
    torch.manual_seed(0)
    task = make("upernet_openmmlab", architecture_kwargs=SMALL | {"align_corners": align_corners}).eval()
    image = torch.rand(1, 3, 33, 49)
    with torch.no_grad():
        expected = F.interpolate(task(image), (66, 98), mode="bilinear", align_corners=align_corners)
        torch.testing.assert_close(task.predict_scores(image, (66, 98)), expected)


# --- prediction -----------------------------------------------------------------------------------------


def test_predictions_have_the_original_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = make(predict_probabilities=True)
    image = torch.rand(2, 3, 32, 48)
    batches = [
        {"image": image, "path": ["a.jpg", "b.jpg"], "original_size": [(64, 96), (70, 31)]},
        {"image": image, "path": ["c.jpg", "d.jpg"]},
    ]
    data = torch.utils.data.DataLoader(batches, batch_size=None)
    first, second = trainer(tmp_path).predict(task, data)
    assert first["path"] == ["a.jpg", "b.jpg"]
    assert [tuple(m.shape) for m in first["label_map"]] == [(64, 96), (70, 31)]
    assert [tuple(m.shape) for m in second["label_map"]] == [(32, 48)] * 2
    assert first["label_map"][0].dtype == torch.uint8
    with torch.no_grad():
        logits = task.eval()(image)
    torch.testing.assert_close(second["probabilities"][1], logits[1].softmax(0))
    torch.testing.assert_close(second["label_map"][0].long(), logits[0].argmax(0))
    upsampled = F.interpolate(logits[1:], (70, 31), mode="bilinear")[0]
    torch.testing.assert_close(first["probabilities"][1], upsampled.softmax(0))


# --- checkpoints ----------------------------------------------------------------------------------------


def test_a_checkpoint_alone_rebuilds_the_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "encoder.safetensors"
    state = timm.create_model("replknet_31n").state_dict()
    save_file(state, weights)
    task = upernet(encoder_weights=str(weights), encoder_kwargs={"drop_path_rate": 0.1}, auxiliary_weight=0.4)
    torch.testing.assert_close(task.encoder.state_dict()["model.stem_0.conv.weight"], state["stem.0.conv.weight"])

    class Data(L.LightningDataModule):
        num_classes, ignore_index = NUM_CLASSES, 255
        class_names, class_colors = list("abcd"), [(i, 2 * i, 3 * i) for i in range(4)]

        def train_dataloader(self):
            return loader(TRAIN_SIZES, 8)

    fitter = trainer(tmp_path)
    fitter.fit(task, datamodule=Data())
    fitter.save_checkpoint(tmp_path / "task.ckpt")
    weights.unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    again = SegmentationTask.load_from_checkpoint(tmp_path / "task.ckpt")
    again.eval()
    assert again.class_names == list("abcd")
    assert again.class_colors == Data.class_colors
    assert again.hparams["encoder_weights"] == str(weights)
    image = torch.rand(1, 3, 40, 40)
    with torch.no_grad():
        torch.testing.assert_close(again(image), task.eval()(image), rtol=0, atol=0)
    with pytest.raises(FileNotFoundError, match="no file"):  # only a checkpoint does without the weights
        upernet(encoder_weights=str(weights))


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    task = make()
    fitter = trainer(tmp_path, limit_val_batches=0, max_steps=1)
    fitter.fit(task, loader(TRAIN_SIZES, 4))
    fitter.save_checkpoint(tmp_path / "task.ckpt")
    with pytest.raises(RuntimeError, match=r"segmentation_head\.0\.weight \(4, 16, 3, 3\) instead of \(5, 16, 3, 3\)"):
        SegmentationTask.load_from_checkpoint(tmp_path / "task.ckpt", num_classes=5)
    message = (
        r"another model than SegmentationTask\(.*'encoder': 'tu-convnext_atto'.*missing, first.*stem.*unknown, first"
    )
    with pytest.raises(RuntimeError, match=message):
        trainer(tmp_path).validate(
            make(encoder="tu-convnext_atto"), loader([(32, 32)]), ckpt_path=tmp_path / "task.ckpt"
        )
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*nothing\.ckpt"):
        SegmentationTask.load_from_checkpoint(tmp_path / "nothing.ckpt")


# --- bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"architecture": "unet++"}, "unknown architecture 'unet\\+\\+'; did you mean 'unet"),
        ({"architecture": "upernet_openmlab"}, "did you mean 'upernet_openmmlab'"),
        ({"encoder": "replknet_13n"}, "unknown encoder 'replknet_13n'; did you mean"),
        (
            {"architecture_kwargs": {"decoder_chanels": 3}},
            "'unet' has no argument 'decoder_chanels'.*did you mean 'decoder_channels'",
        ),
        ({"architecture_kwargs": {"classes": 3}}, "has no argument 'classes'"),
        (
            {"architecture": "deeplabv3", "architecture_kwargs": {"encoder_output_stride": 12}},
            "encoder_output_stride=12 must be",
        ),
        ({"num_classes": 1}, "num_classes=1 must be at least 2"),
        ({"class_names": ["a", "b"]}, "class_names has 2 entries, but num_classes=4"),
        ({"class_names": ["a", "b", "a", "c"]}, r"class_names must differ, got \['a'\]"),
        ({"class_colors": [(0, 0, 0)]}, "class_colors has 1 entries"),
        ({"loss": "dise"}, "unknown loss 'dise'.*'dice'"),
        ({"class_weights": [1.0]}, "class_weights must be 4"),
        ({"lr": 0.0}, "lr=0.0 must be positive"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0 must be at least 0"),
        ({"warmup_ratio": 2.0}, "warmup_ratio=2.0 in"),
        ({"slide_stride": (600, 1)}, "slide_stride=.* at most slide_crop"),
        ({"optimizer": "adam"}, "optimizer='adam' must be one of adamw, sgd"),
        (
            {"encoder": "replknet_31n", "encoder_kwargs": {"kernal_sizes": 3}},
            "tu-replknet_31n.* refuses.*'kernal_sizes'",
        ),
        ({"encoder": "replknet_31n", "encoder_kwargs": {"kernel_sizes": (30, 29, 27, 13)}}, "odd number, got 30"),
        (
            {"encoder": "replknet_31n", "encoder_kwargs": {"output_stride": 12}},
            "output_stride must be 8, 16 or 32, got 12",
        ),
        ({"tta_scales": [0.0]}, "tta_scales=.* must be positive"),
        ({"mean": [0.5]}, "mean=.* must have one number per channel, in_channels=3"),
        ({"std": [0.5, 0.0, 1.0]}, "std=.* must be positive"),
        ({"gradient_checkpointing": True}, "'resnet18' is an encoder of smp's own, which cannot"),
        (
            {"auxiliary_weight": 0.4, "architecture_kwargs": {"encoder_depth": 3, "decoder_channels": (8, 8, 8)}},
            "encoder_depth=3 cuts off",
        ),
    ],
)
def test_impossible_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_impossible_batches(tmp_path: Path) -> None:
    task = make()

    def fit(change) -> None:
        items = [change(item) for item in Blocks([(32, 32)] * 2)]
        trainer(tmp_path).fit(task, torch.utils.data.DataLoader(items, batch_size=2))

    def wrong_label(item):
        item["mask"][3, 4] = 7 if "block_1" in item["path"] else 0
        return item

    with pytest.raises(
        ValueError, match=r"mask of 'folder/block_1\.jpg' holds labels \[7\], but the classes are 0 to 3"
    ):
        fit(wrong_label)
    with pytest.raises(ValueError, match=r"differ in size in training: \(32, 32\) and \(16, 32\).*block_0\.jpg"):
        fit(lambda item: item | {"mask": item["mask"][:16]})
    with pytest.raises(ValueError, match=r"'upernet_openmmlab' cannot train on 1 image of 32x32 pixels"):
        trainer(tmp_path).fit(upernet(), loader([(32, 32)]))
    with pytest.raises(ValueError, match="set the trainer's max_steps or max_epochs"):
        trainer(tmp_path, max_epochs=-1).fit(task, loader([(32, 32)] * 2, 2))


def test_a_data_module_with_other_classes_is_refused(tmp_path: Path) -> None:
    class Data(L.LightningDataModule):
        num_classes, ignore_index = 7, 255

        def train_dataloader(self):
            raise AssertionError("must not be reached")

    with pytest.raises(ValueError, match="Data has num_classes=7, but the task was built with num_classes=4"):
        trainer(tmp_path).fit(make(), datamodule=Data())
    Data.num_classes, Data.ignore_index = 4, 0
    with pytest.raises(ValueError, match="Data has ignore_index=0, but the task was built with ignore_index=255"):
        trainer(tmp_path).fit(make(), datamodule=Data())


def test_a_warm_up_longer_than_the_training_is_mentioned(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="warmup_steps=100 is not shorter than the training of 2 steps"):
        trainer(tmp_path, limit_val_batches=0).fit(make(warmup_steps=100), loader(TRAIN_SIZES, 4))


def test_smp_finds_our_architecture() -> None:
    assert smp.MODEL_ARCHITECTURES_MAPPING["upernet_openmmlab"] is OpenMMLabUPerNet
