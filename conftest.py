"""Options and fixtures shared by tests/ and benchmarks/."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--benchmark", action="store_true", help="run the benchmark suite in benchmarks/ instead of the tests"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--benchmark") and config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args[:] = [str(path) for path in sorted((ROOT / "benchmarks").glob("test_*.py"))]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _chosen(what: str, name: str) -> Iterator[str]:
    """Chooses the kernels of an instruction set ("cpu_isa") or kind of bfloat16 instructions ("cpu_bf16") for a while."""
    from iumad_kernels import _C

    choose, before = getattr(_C, f"set_{what}"), getattr(_C, what)()
    choose(name)
    yield name
    choose(before)


@pytest.fixture
def isa(request: pytest.FixtureRequest):
    """Runs the test with the kernels of one instruction set (parametrize indirectly with names of _C.cpu_isas())."""
    yield from _chosen("cpu_isa", request.param)


@pytest.fixture
def bf16_unit(request: pytest.FixtureRequest):
    """Runs the test with one kind of bfloat16 instructions (parametrize indirectly with names of _C.cpu_bf16_units())."""
    yield from _chosen("cpu_bf16", request.param)


@pytest.fixture
def real_data() -> Path:
    """The folder of real RGB + depth data; tests that use it skip where it is absent."""
    path = Path(os.environ.get("IUMAD_TEST_DATA", ROOT.parent / "shared/data"))
    if not (path / "road_rgbd").is_dir():
        pytest.skip(f"real data not found at {path}: set IUMAD_TEST_DATA")
    return path
