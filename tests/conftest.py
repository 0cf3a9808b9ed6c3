"""Fixtures, skips and settings of all tests."""

from __future__ import annotations

import contextlib
import os
import sys
from collections import defaultdict
from random import Random

import pytest
import torch

# The library of cuda_host/emulated.py, if the tests of CUDA are to run on the devices made there.
CUDA_ON_HOST = os.environ.get("DDF_MM_TEST_CUDA_ON_HOST")
CASES_ON_HOST = int(os.environ.get("DDF_MM_TEST_CASES_ON_HOST", "4"))
if CUDA_ON_HOST:
    from cuda_host import emulated

    emulated.install(CUDA_ON_HOST)

# tests/ops needs only torch, so nothing else is imported here.
with contextlib.suppress(ImportError):
    from hypothesis import HealthCheck, settings

    # Deterministic, and few enough examples for CI.
    settings.register_profile(
        "suite",
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=400,
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.register_profile(
        "thorough", settings.get_profile("suite"), derandomize=False, max_examples=20_000
    )
    settings.register_profile("cuda on host", settings.get_profile("suite"), max_examples=30)
    # Of test_sanitizers.py, for each instruction set.
    settings.register_profile("sanitized", settings.get_profile("suite"), max_examples=150)
    settings.load_profile("cuda on host" if CUDA_ON_HOST else "suite")


# The slowest files, slowest first, so that none runs alone at the end.
LONGEST = [
    "test_sanitizers.py",
    "test_ops_on_host.py",
    "test_kernels_on_host.py",
    "test_train_test.py",
    "test_other_toolboxes.py",
    "test_imagenet_recipes.py",
    "test_export.py",
    "test_digits_recipe.py",
    "test_digit_scenes_recipes.py",
    "test_distributed.py",
    "test_dist.py",
    "test_registry.py",
    "test_compiled.py",
    "test_up.py",
    "test_sweep.py",
]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda: needs a CUDA device, or an emulated one")
    config.addinivalue_line("markers", "gpu: no emulated CUDA device does for it")
    config.addinivalue_line("markers", "slow: left out by `make test-fast`")
    config.addinivalue_line(
        "markers", "any_torch: the same with every torch, whose version it does not depend on"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONGEST)))
    if CUDA_ON_HOST:
        items[:] = sample_for_the_host(items)
    elif not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device")
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(skip)


def sample_for_the_host(items: list[pytest.Item]) -> list[pytest.Item]:
    """Some cases of each test that needs a CUDA device: the host takes its time for all. The tests
    of the emulation all run."""
    cases = defaultdict(list)
    for item in items:
        if item.get_closest_marker("cuda") and not item.get_closest_marker("gpu"):
            cases[item.nodeid.split("[")[0]].append(item)
    return [
        item
        for name, all_of_one in cases.items()
        for item in (
            all_of_one
            if "emulated_cases" in name
            else Random(name).sample(all_of_one, min(CASES_ON_HOST, len(all_of_one)))
        )
    ]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def one_thread():
    """More threads slow down many tiny calls, and a machine that runs several tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def default_scopes() -> dict:
    """mmengine's default scopes, if mmengine is imported."""
    registry = sys.modules.get("mmengine.registry")
    return registry.DefaultScope._instance_dict if registry else {}


@pytest.fixture(autouse=True)
def _isolation():
    """Fixed random seed, and no default scope or verbose logger from another test."""
    torch.manual_seed(0)
    if logging := sys.modules.get("mmengine.logging"):
        logging.MMLogger.get_instance("mmengine").setLevel("WARNING")
    scopes = dict(default_scopes())
    yield
    default_scopes().clear()
    default_scopes().update(scopes)
