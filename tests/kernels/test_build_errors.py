"""What `pip install .` says where something is missing: one sentence that tells what to do, before anything is compiled."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import setuptools

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bridge(monkeypatch: pytest.MonkeyPatch) -> Any:
    """setup.py as a module, with setup() itself left out and nothing started."""
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    spec = importlib.util.spec_from_file_location("iumad_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def started(*command: Any, **options: Any) -> None:
        pytest.fail(f"a build was started: {command}")

    monkeypatch.setattr(module.subprocess, "run", started)
    return module


def use_torch(
    bridge: Any, monkeypatch: pytest.MonkeyPatch, folder: Path, version: str | None, headers: bool
) -> None:
    """The only place where torch could be is `folder`; with version None it is not there either."""
    if version is not None:
        (folder / "torch").mkdir()
        (folder / "torch/version.py").write_text(f"__version__ = '{version}'\ncuda = None\n")
    if headers:
        (folder / "torch/include/torch/csrc/stable").mkdir(parents=True)
        (folder / "torch/include/torch/csrc/stable/library.h").touch()
    monkeypatch.setattr(
        bridge.sysconfig, "get_paths", lambda: {"purelib": str(folder), "platlib": str(folder)}
    )
    monkeypatch.setattr(bridge.sys, "path", [])


def message(bridge: Any) -> str:
    from setuptools import Distribution

    build = bridge.CMakeBuild(Distribution())
    with pytest.raises(SystemExit) as stopped:
        build.build_extension(setuptools.Extension("iumad_kernels._C", []))
    return str(stopped.value)


def test_no_torch(bridge: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_torch(bridge, monkeypatch, tmp_path, None, headers=False)
    text = message(bridge)
    assert "torch is not installed" in text
    assert "pip install torch" in text


@pytest.mark.parametrize("version", ["2.9.1+cpu", "2.6.0", "1.13.1"])
def test_old_torch(version: str, bridge: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_torch(bridge, monkeypatch, tmp_path, version, headers=True)
    text = message(bridge)
    assert "torch >= 2.10" in text
    assert version in text
    assert "pip install -U torch" in text


def test_torch_without_headers(bridge: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_torch(bridge, monkeypatch, tmp_path, "2.13.0", headers=False)
    text = message(bridge)
    assert "no C++ headers" in text
    assert "reinstall" in text


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "2.14.0a0+git123", "3.0.0"])
def test_new_torch_is_taken(
    version: str, bridge: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_torch(bridge, monkeypatch, tmp_path, version, headers=True)
    assert bridge.find_torch() == tmp_path / "torch"


def test_no_compiler(bridge: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_torch(bridge, monkeypatch, tmp_path, "2.13.0", headers=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    text = message(bridge)
    assert "C++20 compiler" in text
    assert "apt install g++" in text


def test_compiler_that_does_not_exist(bridge: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_torch(bridge, monkeypatch, tmp_path, "2.13.0", headers=True)
    monkeypatch.setenv("CXX", "/nowhere/g++-99")
    assert "CXX is '/nowhere/g++-99'" in message(bridge)


def test_no_build_tools(bridge: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_torch(bridge, monkeypatch, tmp_path, "2.13.0", headers=True)
    monkeypatch.setattr(bridge.shutil, "which", lambda tool: None if tool in ("cmake", "ninja") else tool)
    text = message(bridge)
    assert "needs cmake, ninja, pybind11" in text
    assert "pip install cmake ninja pybind11" in text
