"""Fixtures and skips of the whole suite."""

from __future__ import annotations

import importlib.util

import pytest
import torch

# tests/ops needs torch alone.
HAS_MMENGINE = importlib.util.find_spec("mmengine") is not None


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda: needs a CUDA device")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(skip)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _isolation():
    """Fixed random numbers, no scope or verbose logger left behind by another test."""
    torch.manual_seed(0)
    if not HAS_MMENGINE:
        yield
        return
    from mmengine.logging import MMLogger
    from mmengine.registry import DefaultScope

    MMLogger.get_instance("mmengine").setLevel("WARNING")
    scopes = dict(DefaultScope._instance_dict)
    yield
    DefaultScope._instance_dict.clear()
    DefaultScope._instance_dict.update(scopes)
