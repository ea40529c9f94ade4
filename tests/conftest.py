"""Shared by all rooms: golden fixtures, randomised statistics, and the small encoders that tests may really run."""

from __future__ import annotations

import gc
import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.layers import LayerScale2d

import lk_backbones
from tests.pretended_gpu import pretended_gpu  # noqa: F401, a fixture

FIXTURES = Path(__file__).parent / "fixtures"

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    # Processes that compute with more threads than there are cores wait for each other most of the time.
    threads = max(1, torch.get_num_threads() // workers)
    torch.set_num_threads(threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # and of the processes that tests start


def pytest_collection_finish() -> None:
    """Let garbage collections pass over the million objects that imports made, which none of them frees."""
    gc.collect()
    gc.freeze()


def count_parameters(name: str) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in timm.create_model(name).parameters())


ALL_ENCODERS = lk_backbones.list_encoders()
# A new family is tested by being registered; what is too big for a laptop is only built on the meta device.
SMALL_ENCODERS = [name for name in ALL_ENCODERS if count_parameters(name) < 5e6]


# The levels that a family may have: from half resolution on, or from behind a 4x4 patch stem.
LEVELS = ([2, 4, 8, 16, 32], [4, 8, 16, 32])


def feature_strides(name: str) -> list[int]:
    """Strides of the maps that a registered encoder says it has."""
    with torch.device("meta"):
        return [level["reduction"] for level in timm.create_model(name).feature_info]


@pytest.fixture(autouse=True)
def settings_of_torch_stay_within_a_test() -> Iterator[None]:
    """A trainer with ``deterministic=True`` leaves it set in the process, and some of torch's operators then refuse."""
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True, scope="session")
def no_test_touches_the_users_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """On a GPU, every test that convolves would leave what it measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LK_BACKBONES_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "any_encoder" in metafunc.fixturenames:
        metafunc.parametrize("any_encoder", ALL_ENCODERS)
    if "small_encoder" in metafunc.fixturenames:
        metafunc.parametrize("small_encoder", SMALL_ENCODERS)


def load_golden(name: str) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors of a golden fixture, grouped by the prefix before the first dot."""
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in load_file(FIXTURES / f"{name}.safetensors").items():
        group, _, rest = key.partition(".")
        groups.setdefault(group, {})[rest] = value
    return groups


def load_manifest(name: str) -> dict[str, Any]:
    """Keys and shapes of a published checkpoint."""
    return json.loads(gzip.decompress((FIXTURES / f"keys_{name}.json.gz").read_bytes()))


def assert_golden(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-5) -> None:
    """Compare relative to the largest expected value, as the golden fixtures ask."""
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"off by {error:.2e} of the largest value, allowed {tolerance:.0e}"


def randomize_norms(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every batch norm statistics and weights of its own, and every layer scale, so that a wrong fold shows."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            torch.nn.init.normal_(module.bias, 0, 0.2, generator=generator)
        elif isinstance(module, LayerScale2d):  # which starts near zero, where nothing of its branch is seen
            torch.nn.init.uniform_(module.gamma, 0.2, 0.8, generator=generator)
    return model
