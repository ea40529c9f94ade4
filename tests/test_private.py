"""Private parts of other libraries: all in one room, each there, and missed clearly."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import lk_backbones
from lk_backbones import _private
from lk_backbones._private.borrow import borrow
from lk_backbones._private.huggingface_hub import replace_get_session

PACKAGE = Path(lk_backbones.__file__).parent
LIBRARIES = [module.name for module in pkgutil.iter_modules(_private.__path__) if module.name != "borrow"]
FOREIGN = (
    "torch",
    "torchvision",
    "torchmetrics",
    "lightning",
    "timm",
    "segmentation_models_pytorch",
    "huggingface_hub",
)
# Documented, for all their underscore: PyTorch's own notes on extending autograd and modules name them.
DOCUMENTED = {"_version"}


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_part_is_there(library: str) -> None:
    module = importlib.import_module(f"lk_backbones._private.{library}")
    assert module.__all__
    for name in module.__all__:
        assert getattr(module, name) is not None


@pytest.mark.parametrize(
    ("library", "owner", "name"),
    [
        ("torch", "torch._C", "_len_torch_dispatch_stack"),
        ("torchvision", "torchvision.models.detection._utils", "Matcher"),
        ("torchmetrics", "torchmetrics.metric.Metric", "_sync_dist"),
        ("lightning", "lightning.pytorch.cli.LightningCLI", "_parse_ckpt_path"),
        ("timm", "timm.models._features", "feature_take_indices"),
        ("smp", "segmentation_models_pytorch.encoders._base", "EncoderMixin"),
    ],
)
def test_a_part_that_moved_is_named(library: str, owner: str, name: str) -> None:
    """In a process of its own, as what is imported stays."""
    script = f"""
import importlib, pkgutil, sys
owner = pkgutil.resolve_name({owner!r})
delattr(owner, {name!r})
for module in [m for m in sys.modules if m.startswith("lk_backbones")]:
    del sys.modules[module]
import types
package = types.ModuleType("lk_backbones")  # without what imports everything
package.__path__ = [{str(PACKAGE)!r}]
sys.modules["lk_backbones"] = package
try:
    importlib.import_module("lk_backbones._private.{library}")
except ImportError as error:
    print(error)
else:
    sys.exit("nobody missed it")
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert name in done.stdout
    assert "not public" in done.stdout
    assert "Install an earlier" in done.stdout


def test_a_part_that_is_missing_names_the_release() -> None:
    with pytest.raises(ImportError, match=r"timm\.models\.nothing.* timm \d+\.\d+.* Install an earlier timm"):
        borrow("timm", "timm.models", "nothing")
    with pytest.raises(ImportError, match=r"timm\.nowhere\.nothing"):
        borrow("timm", "timm.nowhere", "nothing")


def test_a_client_that_asks_elsewhere_for_its_session_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the answers that it shows, nothing could be verified."""
    monkeypatch.delattr("huggingface_hub.utils._http.get_session")
    with pytest.raises(ImportError, match=r"huggingface_hub\.utils\._http\.get_session.* huggingface_hub \d"):
        replace_get_session(lambda: None)


def _private_uses(file: Path) -> list[str]:
    """Private names that a file takes from other libraries, by import or as attributes of something imported."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imported: set[str] = set()
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FOREIGN:
            imported |= {alias.asname or alias.name for alias in node.names}
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found += [f"{node.lineno}: {part}" for part in parts if part.startswith("_")]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in FOREIGN:
                    imported.add(alias.asname or alias.name.split(".")[0])
                    found += [f"{node.lineno}: {part}" for part in alias.name.split(".") if part.startswith("_")]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.endswith("__"):
            continue
        root = node.value
        while isinstance(root, ast.Attribute):
            root = root.value
        if isinstance(root, ast.Name) and root.id in imported and node.attr not in DOCUMENTED:
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_private_parts_are_in_their_room(file: Path) -> None:
    if file.parent.name == "_private":
        return
    assert _private_uses(file) == []


def test_the_search_finds_them(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        "import torch\nimport torch._C\nfrom timm.models._features import x\nfrom lightning import pytorch as pl\n"
        "torch._C._do()\npl.cli._help\nself._own\nother._theirs\n"
    )
    assert sorted(found.partition(":")[0] for found in _private_uses(file)) == ["2", "3", "5", "5", "6"]
