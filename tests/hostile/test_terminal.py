"""Text from outside on its way to a terminal, and terminals that cannot show everything."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

from lk_backbones._printing import printable, without_credentials
from lk_backbones.cli import main
from lk_backbones.metrics.tables import ap_table, iou_table
from tests.hostile.conftest import Refused
from tests.hub.conftest import ROOT

TEXTS = {
    "markup": "[red]a[/red]",
    "a closing tag": "a[/]b",
    "a closing tag of nothing": "[/bold]",
    "a link": "[link=https://example.org]a[/link]",
    "an emoji code": ":warning:",
    "colours": "a\x1b[31mb\x1b[0m",
    "a title": "a\x1b]0;title\x07b",
    "a link of the terminal": "\x1b]8;;https://example.org\x1b\\a\x1b]8;;\x1b\\",
    "an eight-bit sequence": "a\x9b31mb",
    "a carriage return": "a\rb",
    "a backspace": "a\b\bb",
    "a new line": "a\nfatal: b",
    "an exotic new line": "a\u2028fatal: b\x85c",
    "the other direction": "a\u202ecod.exe",
    "isolated direction": "a\u2066b\u2069",
    "what has no width": "a\u200bb\ufeff",
    "half a pair": "a\udc9bb",
    "a tab": "a\tb",
    "a backslash at the end": "a\\",
}
ESCAPES = "\x1b\x9b\x07\r\b\t\x85\u2028\u202e\u2066\u2069\u200b\ufeff"


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_names_in_errors(text: str, workspace: Path, refused: Refused) -> None:
    """They stand there as they are, or escaped, on the error's own lines."""
    shown = printable(text)
    commands = [
        ["hub", "list", text],
        ["hub", "pull", f"./{text}.pth"],
        ["hub", "pull", "x", "--namespace", text],
        ["convert", f"{text}.pth"],
        ["hub", "publish", "x.pth", "--repo", "you/x", "--dry-run", "--metric", text],
        ["validate", "--ckpt_path", f"{text}.ckpt"],
    ]
    for command in commands:
        message = refused(command, "error: ")
        assert not set(ESCAPES) & set(message)
        assert "\n" not in text or "fatal" not in message.partition("\n")[0] or r"\n" in shown
        if command[:2] == ["hub", "list"] and "\n" not in text:
            assert shown in message


def test_a_newline_in_an_error_makes_no_line_of_its_own(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["hub", "list", "x\nerror: all is well\n\rerror: trust me"])
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("error: ")
    assert all(line.startswith("  ") for line in lines[1:])


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_names_of_tensors_and_files(text: str, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = workspace / "x.pth"
    torch.save({"state_dict": {"a": torch.ones(1)}, text: 1, "model_ema": {text: torch.ones(1)}}, file)
    main(["hub", "pull", "x.pth"])
    out = capsys.readouterr().out
    assert not set(ESCAPES) & set(out)
    assert printable(text) in out
    assert len(out.splitlines()) == 7  # one for each thing that is said


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_names_of_classes_in_tables(text: str) -> None:
    names = ["road", text]
    segmentation = {f"test/iou/{name}": torch.tensor(0.5) for name in names}
    segmentation |= {"test/mean_iou": torch.tensor(0.5), "test/pixel_accuracy": torch.tensor(0.5)}
    keys = [
        "ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
        "ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large",
    ]  # fmt: skip
    detection = {f"test/box_{key}": torch.tensor(0.5) for key in keys}
    detection |= {f"test/box_ap/{name}": torch.tensor(0.5) for name in names}
    for table in (iou_table(segmentation, names, "test"), ap_table(detection, names, "test")):
        console = Console(width=100, force_terminal=True, color_system="truecolor", record=True, file=io.StringIO())
        console.print(table)
        shown = console.export_text()
        assert printable(text) in shown
        assert not set(ESCAPES) & set(shown)


SECRETS = {
    "https://user:pass@host/x": "https://***@host/x",
    "https://user:p@ss@host/x@main": "https://***@host/x@main",
    "GET https://host/x?token=abc&y=1) failed": "GET https://host/x?***) failed",
    "Authorization: Bearer hf_abcdefghijkl": "Authorization: ***",
    "token hf_abcdefghijkl is invalid": "token *** is invalid",
    "hf-hub:you/x@main": "hf-hub:you/x@main",
    "https://host/you/x/resolve/main/a.pth": "https://host/you/x/resolve/main/a.pth",
    "basic training of the bearer of news": "basic training of the bearer of news",
}


@pytest.mark.parametrize(("text", "shown"), SECRETS.items(), ids=range(len(SECRETS)))
def test_credentials_are_hidden(text: str, shown: str) -> None:
    assert without_credentials(text) == shown


def test_given_secrets_are_hidden_however_they_are_spelt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://me:se%2Fcret!@host")
    monkeypatch.setenv("HF_TOKEN", "an-odd-token")
    for text in ("se%2Fcret!", "se/cret!", "se%2Fcret%21", "x an-odd-token y"):
        assert "***" in without_credentials(text)
        assert "cret" not in without_credentials(text)
        assert "odd" not in without_credentials(text)


# ---- terminals that cannot show everything ----

COMMANDS = """
import sys
from lk_backbones.cli import main

tiny = "--trainer.accelerator cpu --trainer.devices 1 --trainer.num_sanity_val_steps 0 --data.num_workers 0".split()
fit = '''fit --model SegmentationTask --model.architecture fpn --model.encoder replknet_31n --model.num_classes 9
--model.encoder_kwargs {"kernel_sizes":3,"depths":[1,1,1,1]} --data SyntheticScenesDataModule --data.image_size [64,64]
--data.batch_size 2 --data.train_images 2 --data.val_images 1 --data.test_images 1 --trainer.max_epochs 1'''.split()
restore = ["--ckpt_path", "→.ckpt", *tiny]
commands = [
    ["--help"],
    ["--version"],
    ["models", "replknet_31n"],
    ["hub", "list", "*31b*"],
    ["hub", "list", "→"],
    ["hub", "pull", "→.safetensors"],
    ["hub", "publish", "→.safetensors", "--repo", "you/x", "--dry-run", "--model", "replknet_31n", "--folder", "→ 日本",
     "--model-kwargs", '{"kernel_sizes": 3, "depths": [1, 1, 1, 1]}', "--description", "→"],
    ["convert", "→ 日本", "--to", "→"],
    ["convert", "nothing→.pth"],
]
if sys.argv[1:]:
    commands += [
        [*fit, *tiny, "--trainer.default_root_dir", "→"],
        ["validate", *restore],
        ["test", *restore],
        ["predict", *restore, "--pictures", "pictures"],
        ["validate", "--ckpt_path", "nothing→.ckpt"],
        ["fit", "--help"],
    ]
for command in commands:
    try:
        main(command)
        code = 0
    except SystemExit as stopped:
        code = stopped.code or 0
    print("exit code of", *(ascii(word) for word in command[:2]), code)
    if command[0] == "fit" and code == 0 and len(command) > 2:
        import pathlib
        next(pathlib.Path("→").rglob("*.ckpt")).rename("→.ckpt")
"""


@pytest.mark.parametrize(
    ("encoding", "environment", "training"),
    [
        pytest.param("cp1252", {"PYTHONIOENCODING": "cp1252"}, True, id="cp1252"),
        pytest.param("ascii", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, False, id="C"),
        pytest.param("ascii", {"PYTHONIOENCODING": "ascii"}, False, id="ascii"),
    ],
)
def test_every_command_prints_to_every_terminal(
    encoding: str, environment: dict[str, str], training: bool, tmp_path: Path
) -> None:
    """Piped, in a process of its own; names of files that the encoding lacks come on top."""
    import timm

    state = timm.create_model("replknet_31n", num_classes=3, kernel_sizes=3, depths=[1, 1, 1, 1]).state_dict()
    filesystem_is_ascii = environment.get("LC_ALL") == "C"
    script = (
        COMMANDS.replace("→ 日本", "folder").replace("→.", "x.").replace('"→"', '"x"')
        if filesystem_is_ascii
        else COMMANDS
    )
    save_file(state, tmp_path / ("x.safetensors" if filesystem_is_ascii else "→.safetensors"))
    (tmp_path / "pictures").mkdir()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "pictures" / "→.png")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHON"))}
    done = subprocess.run(
        [sys.executable, "-c", script, *(["training"] if training else [])],
        capture_output=True,
        cwd=tmp_path,
        env=inherited | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | environment,
        timeout=300,
    )
    out, err = done.stdout.decode(encoding), done.stderr.decode(encoding)
    assert done.returncode == 0, err[-3000:]
    assert "Traceback" not in err
    assert "UnicodeEncodeError" not in err
    codes = [line.split()[-1] for line in out.splitlines() if line.startswith("exit code of")]
    assert codes == list("000010001" + ("000010" if training else "")), out
    assert "22K > 1K" in out
    assert err.count("error:") == 2 + training
    if training:
        assert "mean IoU" in out


def test_the_streams_are_left_as_they_were(workspace: Path) -> None:
    before = sys.stdout.errors, sys.stderr.errors
    main(["--version"])
    assert (sys.stdout.errors, sys.stderr.errors) == before
