"""The page to try models on: what stands behind it, and a real upload in a real browser."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lk_backbones.analysis import activation_maps
from lk_backbones.analysis.page import Looker, build_page, launch
from lk_backbones.cli import main

SMALL = "replknet_31n,kernel_sizes=3,num_classes=7"
ENCODER = "replknet_31n,kernel_sizes=3,num_classes=0"
SEGMENTATION = "smp:fpn/resnet18,classes=4"

has_gradio = importlib.util.find_spec("gradio") is not None
needs_gradio = pytest.mark.skipif(not has_gradio, reason='gradio is not installed: pip install "lk-backbones[demo]"')


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)


@pytest.fixture(scope="module")
def looker() -> Looker:
    return Looker([SEGMENTATION, SMALL, ENCODER], size=(64, 64))


def test_areas_are_those_of_the_label_map(looker: Looker, pixels: np.ndarray) -> None:
    pytest.importorskip("pytorch_grad_cam")
    look = looker.look(SEGMENTATION, pixels, method="layercam")
    model = looker.model(SEGMENTATION)
    image = model.read(pixels)
    assert image.shape == (3, 46, 64)  # fitted, its shape kept
    padded = torch.nn.functional.pad(model.given(image), (0, 0, 0, 18))
    with torch.inference_mode():
        label_map = model.model(padded[None])[0, :, :46].argmax(0)
    expected = {f"class_{c}": int((label_map == c).sum()) for c in label_map.unique().tolist()}
    assert {row[0]: row[2] for row in look.rows} == expected
    assert sum(float(row[1]) for row in look.rows) == pytest.approx(100, abs=0.05)
    assert look.inside is not None
    assert look.notes == []


def test_a_classifier_and_an_encoder(looker: Looker, pixels: np.ndarray) -> None:
    pytest.importorskip("pytorch_grad_cam")
    look = looker.look(SMALL, pixels, "class_2", "hirescam", "1", with_field=False)
    with torch.inference_mode():
        model = looker.model(SMALL)
        probabilities = model.model(model.given(model.read(pixels))[None])[0].softmax(0)
    assert look.rows[0] == (f"class_{int(probabilities.argmax())}", round(100 * float(probabilities.max()), 2))
    assert look.inside is not None
    features = looker.look(ENCODER, pixels, with_field=False)  # no answer, so its features and its main component
    assert features.rows == []
    assert features.inside is not None


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"level": "9"}, "activation map: level 9: RepLKNet has the levels 0"),
        ({"level": "/etc/passwd"}, "has no module of this path"),
        ({"target": "../x"}, "has no class '../x'"),
        ({"method": "magic"}, "method 'magic': there are gradcam"),
    ],
)
def test_what_is_wrong_is_told_beside_the_answer(
    asked: dict[str, str], words: str, looker: Looker, pixels: np.ndarray
) -> None:
    pytest.importorskip("pytorch_grad_cam")
    look = looker.look(SMALL, pixels, with_field=False, **asked)
    assert words in look.notes[0]
    assert look.rows
    assert look.inside is None


def test_only_models_that_were_named_are_opened(looker: Looker, pixels: np.ndarray, tmp_path: Path) -> None:
    secret = tmp_path / "secret.ckpt"
    torch.save({"state_dict": {}}, secret)
    for name in (str(secret), "resnet10t", "hf-hub:you/name", f"{SMALL},in_chans=3"):
        with pytest.raises(ValueError, match="opens no others"):
            looker.look(name, pixels)
    assert Looker([SMALL], any_model=True).model(ENCODER).kind == "features"


@needs_gradio
def test_the_page_calls_what_stands_behind_it(pixels: np.ndarray) -> None:
    pytest.importorskip("pytorch_grad_cam")
    page = build_page([SMALL], size=(64, 64))
    assert not page.analytics_enabled
    (look, *_) = [fn.fn for fn in page.fns.values() if fn.api_name == "look"]
    answer, table, inside, notes = look(SMALL, pixels, "automatic", "gradcam", "-1", False)
    assert isinstance(answer, Image.Image)
    assert isinstance(inside, Image.Image)
    assert len(table.value["data"]) == 5
    assert not notes.visible
    import gradio

    with pytest.raises(gradio.Error, match="Drop a picture first"):
        look(SMALL, None, "automatic", "gradcam", "-1", False)
    with pytest.raises(gradio.Error, match="opens no others"):
        look("<script>", pixels, "automatic", "gradcam", "-1", False)


def test_without_gradio(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    with pytest.raises(SystemExit):
        main(["demo", SMALL])
    assert 'pip install "lk-backbones[demo]"' in " ".join(capsys.readouterr().err.split())


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
    flags += [
        "disable-component-update",
        "disable-sync",
        f"user-data-dir={tmp_path / 'profile'}",
        "window-size=1400,1500",
    ]
    for flag in flags:
        options.add_argument(f"--{flag}")
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()


@needs_gradio
def test_a_real_upload_in_a_real_browser(browser: Any, pixels: np.ndarray, tmp_path: Path) -> None:
    pytest.importorskip("pytorch_grad_cam")
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    Image.fromarray(pixels).save(tmp_path / "picture.png")
    page = build_page([SEGMENTATION], size=(64, 64))
    url = launch(page, block=False)
    try:
        assert url.startswith("http://127.0.0.1:")
        browser.get(url)
        wait = WebDriverWait(browser, 60)
        field = wait.until(lambda b: b.find_element(By.CSS_SELECTOR, "#picture input[type=file]"))
        field.send_keys(str(tmp_path / "picture.png"))
        for place in ("answer", "inside"):
            shown = wait.until(lambda b, place=place: b.find_element(By.CSS_SELECTOR, f"#{place} img"))
            wait.until(lambda b, shown=shown: int(shown.get_attribute("naturalWidth")) > 400)
        table = browser.find_element(By.ID, "table").text
        look = Looker([SEGMENTATION], size=(64, 64)).look(SEGMENTATION, pixels)
        assert str(look.rows[0][0]) in table
        assert str(look.rows[0][2]) in table.replace(",", "")
        addresses = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
        assert [address for address in addresses if not address.startswith((url, "data:", "blob:"))] == []
    finally:
        page.close()


def test_the_map_on_the_page_is_that_of_the_function(looker: Looker, pixels: np.ndarray) -> None:
    pytest.importorskip("pytorch_grad_cam")
    model = looker.model(SMALL)
    image = model.given(model.read(pixels))
    (found,) = activation_maps(model.model, image[None], model.find_class("CLASS_2"))
    assert found.target == 2
