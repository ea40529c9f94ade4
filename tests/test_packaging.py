"""The wheel: what is in it, and that it stands without the clone."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import lk_backbones
from lk_backbones.weights import list_published

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parent.parent
RECIPES = {path.relative_to(ROOT / "recipes").as_posix() for path in (ROOT / "recipes").rglob("*.yaml")}


def test_what_is_built_is_said_in_one_place() -> None:
    targets = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"]
    assert targets["wheel"]["force-include"] == {"recipes": "lk_backbones/recipes"}
    assert all((ROOT / name).exists() for name in targets["sdist"]["include"])
    assert {"lk_backbones", "recipes", "LICENSE", "CITATION.cff"} <= set(targets["sdist"]["include"])
    assert not (ROOT / "lk_backbones" / "recipes").exists(), "recipes are written at the top level only"


def test_the_citation_names_this_version_and_every_paper_whose_weights_are_listed() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "references"} <= citation.keys()
    assert citation["version"] == lk_backbones.__version__
    assert citation["license"] == "MIT"
    cited = {paper["identifiers"][0]["value"].removeprefix("arXiv:"): paper for paper in citation["references"]}
    for arxiv, paper in cited.items():
        assert paper["url"].endswith(f"/{arxiv}")
        assert paper["type"] in ("article", "conference-paper")
        assert all(author.keys() == {"family-names", "given-names"} for author in paper["authors"])
    listed = {weights.arxiv: weights.paper for weights in list_published()}
    assert {arxiv: cited[arxiv]["title"] for arxiv in listed} == listed


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the content of a wheel that was built from this tree."""
    wheel_builder = pytest.importorskip(
        "hatchling.builders.wheel", reason="hatchling, which builds the wheel"
    ).WheelBuilder
    folder = tmp_path_factory.mktemp("wheel")
    (wheel,) = wheel_builder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / "installed")
    return folder / "installed"


def test_the_wheel_has_recipes_tables_and_the_licence_but_no_tests(installed: Path) -> None:
    package = installed / "lk_backbones"
    assert {path.relative_to(package / "recipes").as_posix() for path in package.rglob("recipes/*/*.yaml")} == RECIPES
    for path in (
        "py.typed",
        "weights/catalogue.json",
        "data/tables/ade20k.json",
        "data/tables/imagenet_16_classes.json",
    ):
        assert (package / path).read_bytes() == (ROOT / "lk_backbones" / path).read_bytes()
    assert {path.name.partition("-")[0] for path in installed.iterdir()} == {"lk_backbones"}
    assert list(installed.glob("*.dist-info/licenses/LICENSE"))


FIND = """
import sys
import lk_backbones
from lk_backbones.cli import main
from lk_backbones.cli.recipes import list_recipes, list_sweeps
assert lk_backbones.__file__.startswith(sys.argv[1]), lk_backbones.__file__
recipes = [*list_recipes(), *list_sweeps()]
assert all(str(recipe.path).startswith(sys.argv[1]) for recipe in recipes), recipes
print(len(recipes))
main(["recipes", "copy", "recipes/own/unet_replknet_31n_256.yaml"])
main(["fit", "--config", "camvid/unet_replknet_31n_360", "--config", "unet_replknet_31n_256.yaml", "--print_config"])
"""


def test_recipes_are_found_without_the_clone(installed: Path, tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", FIND, str(installed)]
    ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[0] == str(len(RECIPES))
    assert (tmp_path / "unet_replknet_31n_256.yaml").read_bytes() == (
        ROOT / "recipes/own/unet_replknet_31n_256.yaml"
    ).read_bytes()
    assert "default_root_dir: runs/own" in ran.stdout
    assert "num_classes: 11" in ran.stdout  # of the first configuration, as the second has none
