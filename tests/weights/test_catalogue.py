"""The catalogue agrees with what the families say, and says of every published file how to get it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import timm

import lk_backbones
from lk_backbones.cli import main
from lk_backbones.weights import DownloadError, WeightsError, is_source, list_published, pull
from lk_backbones.weights.catalogue import find_published, identify_published
from lk_backbones.weights.sources import split_hub_id

REGISTERED = [w for w in list_published(task="classification") if w.architecture in lk_backbones.list_encoders()]


def test_every_family_and_task_is_there() -> None:
    counts = {
        (family, task): len([w for w in list_published(task=task) if w.family == family])
        for family in ("RepLKNet", "UniRepLKNet", "SLaK")
        for task in ("classification", "segmentation", "detection")
    }
    # as many as the authors' READMEs list; two RepLKNets more, of 120 epochs
    assert list(counts.values()) == [11, 5, 5, 14, 7, 6, 6, 3, 1]
    names = [w.name for w in list_published()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("published", REGISTERED, ids=lambda w: w.name)
def test_the_family_file_says_the_same(published) -> None:
    config = timm.get_pretrained_cfg(published.name)
    assert config.mean == published.mean
    assert config.std == published.std
    assert config.input_size == (3, published.input_size, published.input_size)
    assert (config.url or None) == published.url
    assert config.license == published.license
    assert config.origin_url == published.page
    assert config.paper_ids == f"arXiv:{published.arxiv}"
    assert config.num_classes == (published.num_classes or 0)
    assert (config.crop_pct, config.crop_mode) == (
        (1.0, "squash") if published.input_size == 384 else (0.875, "center")
    )
    assert config.pool_size == (published.input_size // 32,) * 2
    assert (config.first_conv, config.classifier) == ("stem.0.conv", "head.fc")


@pytest.mark.parametrize("name", lk_backbones.list_encoders())
def test_every_registered_weight_is_in_the_catalogue(name: str) -> None:
    tags = [tag for tag in timm.list_models(f"{name}.*", include_tags=True) if not tag.endswith(".untrained")]
    assert tags == sorted(w.name for w in list_published(f"{name}.*"))
    if tags:  # and the default is the same
        assert find_published(name).name == f"{name}.{timm.get_pretrained_cfg(name).tag}"


@pytest.mark.parametrize("published", list_published(), ids=lambda w: w.name)
def test_every_entry_is_usable(published) -> None:
    assert re.fullmatch(r"[a-z0-9_]+\.[a-z0-9_]+", published.name)
    assert published.page.startswith("https://github.com/")
    assert published.link.startswith("https://")
    assert all(10 < value < 100 for value in published.metrics.values())
    if published.url:  # the digits in the mirror's file names are those of the checksum
        assert published.url.endswith(f"-{published.sha256}.pth")
    if published.place == "drive":
        with pytest.raises(DownloadError) as raised:
            pull(published.name)
        text = str(raised.value)
        assert published.link in text
        assert f"lk-backbones hub publish FILE --model {published.name} --repo you/{published.name}" in text
        assert "LK_BACKBONES_NAMESPACE=you" in text
        assert ("DingXiaoH/UniRepLKNet" in text) is (published.family == "UniRepLKNet")


def test_published_files_are_recognised(tmp_path: Path) -> None:
    for name in ("RepLKNet-31B_ImageNet-22K.pth", "replknet-31B_3rdparty_in1k_20221118-fd08e268.pth", "mine.pth"):
        (tmp_path / name).write_bytes(b"x")
    assert identify_published(tmp_path / "RepLKNet-31B_ImageNet-22K.pth").name == "replknet_31b.in22k"
    assert identify_published(tmp_path / "replknet-31B_3rdparty_in1k_20221118-fd08e268.pth").name == "replknet_31b.in1k"
    assert identify_published(tmp_path / "mine.pth") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf-hub:a/b", ("a/b", None, None)),
        ("hf-hub:a/b@v1", ("a/b", None, "v1")),
        ("a/b.c/d/e.pth@refs/pr/1", ("a/b.c", "d/e.pth", "refs/pr/1")),
    ],
)
def test_hub_ids(text: str, expected: tuple) -> None:
    assert split_hub_id(text) == expected


@pytest.mark.parametrize("text", ["hf-hub:a", "hf-hub:", "hf-hub:/b", "hf-hub:a/@main"])
def test_what_is_no_hub_id(text: str) -> None:
    with pytest.raises(WeightsError, match=r"is no Hub repository: 'hf-hub:owner/name'"):
        pull(text)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("replknet_31z.in1k", WeightsError, r"neither a file, a folder nor published.*did you mean 'replknet_31"),
        ("replknet_31n", WeightsError, r"'replknet_31n' has no published weights"),
        ("you/name", FileNotFoundError, r"no file or folder 'you/name', or 'hf-hub:you/name'"),
        ("gone.safetensors", FileNotFoundError, r"no file or folder 'gone\.safetensors'"),
    ],
)
def test_wrong_sources(source: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pull(source)


def test_revisions_that_contradict() -> None:
    with pytest.raises(WeightsError, match="names the revision 'v1', but revision='v2'"):
        pull("hf-hub:you/name@v1", revision="v2")
    with pytest.raises(WeightsError, match="revision='v2' is for Hub repositories"):
        pull(os.curdir, revision="v2")


def test_sources_by_their_form(tmp_path: Path) -> None:
    assert all(is_source(text) for text in ("hf-hub:a/b", "x.pth", "folder/x", str(tmp_path), "local-dir:x"))
    assert not any(is_source(text) for text in ("imagenet", "replknet_31b.in1k", "pretrained"))


def test_the_list_shows_where_everything_is(capsys: pytest.CaptureFixture[str]) -> None:
    main(["hub", "list"])
    out = capsys.readouterr().out
    for published in list_published():
        assert published.name in out
    assert re.search(r"replknet_31b\.in1k +1K +83\.5 +224 +mit +mirror", out)
    assert re.search(
        r"unireplknet_xl\.in22k_ft_in1k_384 +22K → 1K +88\.0 +384 +apache-2\.0 +DingXiaoH/UniRepLKNet", out
    )
    assert re.search(r"slak_tiny\.in1k +1K +82\.5 +224 +mit +drive\*", out)
    main(["hub", "list", "*slak*", "--task", "segmentation"])
    assert "unireplknet" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["hub", "list", "resnet*"])
    assert "no published weights match 'resnet*'" in capsys.readouterr().err


def test_the_list_marks_weights_whose_encoder_is_not_built_in(capsys: pytest.CaptureFixture[str]) -> None:
    main(["hub", "list"])
    marked, seen = None, {}
    for line in capsys.readouterr().out.splitlines():
        if (title := re.match(r"(classification|segmentation|detection)(.*)", line)) is not None:
            marked = "not yet" in title[2]
        elif line.strip() and "." in line.split()[0]:
            seen[line.split()[0]] = marked
    families = {published.name: published.family for published in list_published()}
    encoders = lk_backbones.list_encoders()
    assert seen.keys() >= families.keys()
    assert seen["replknet_31b.in1k"] is seen["upernet_replknet_31b.in1k_ade20k_512"] is False
    for name, family in families.items():
        built_in = any(encoder.startswith(family.lower() + "_") for encoder in encoders)
        assert seen[name] is not built_in, name
    main(["hub", "list", "replknet_*"])
    assert "not yet" not in capsys.readouterr().out
