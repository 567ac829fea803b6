"""Options and fixtures shared by tests/ and benchmarks/."""

from __future__ import annotations

import os
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


@pytest.fixture
def isa(request: pytest.FixtureRequest):
    """Runs the test with the kernels of one instruction set (parametrize indirectly with names of _C.cpu_isas())."""
    from iumad_kernels import _C

    before = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(before)


@pytest.fixture
def bf16_unit(request: pytest.FixtureRequest):
    """Runs the test with one kind of bfloat16 instructions (parametrize indirectly with names of _C.cpu_bf16_units())."""
    from iumad_kernels import _C

    before = _C.cpu_bf16()
    _C.set_cpu_bf16(request.param)
    yield request.param
    _C.set_cpu_bf16(before)


@pytest.fixture
def real_data() -> Path:
    """The folder of real RGB + depth data; tests that use it skip where it is absent."""
    path = Path(os.environ.get("IUMAD_TEST_DATA", ROOT.parent / "shared/data"))
    if not (path / "road_rgbd").is_dir():
        pytest.skip(f"real data not found at {path}: set IUMAD_TEST_DATA")
    return path
