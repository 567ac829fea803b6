"""Which kernels CUDA tensors get: decided by what was built, what is installed and what the GPU is. No GPU is needed here."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import iumad_kernels
from iumad_kernels import _C, gpu, triton

backend = sys.modules["iumad_kernels.backend"]  # the package exports a function of that name
LIBRARY = Path(iumad_kernels.__file__).with_name("_cuda.so")


@pytest.fixture(autouse=True)
def _undecided(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    gpu.activate.cache_clear()
    monkeypatch.setattr(backend, "_warned", set())
    monkeypatch.setattr(triton, "register", lambda key, skip: None)
    yield
    gpu.activate.cache_clear()


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """An installation and a machine: which architectures were built, the GPU's compute capability, whether Triton is there."""

    def machine(built: str, capability: tuple[int, int] | None, has_triton: bool) -> list[str]:
        loaded: list[str] = []
        monkeypatch.setattr(gpu, "__file__", str(tmp_path / "gpu.py"))
        if built:
            (tmp_path / "_cuda.so").touch()
        monkeypatch.setattr(
            _C, "build_info", lambda: {"cuda_architectures": built, "torch_headers": "2.13.0"}
        )
        monkeypatch.setattr(torch.version, "cuda", "13.0" if capability else None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
        monkeypatch.setattr(torch.ops, "load_library", loaded.append)
        monkeypatch.setattr(triton, "available", lambda: has_triton)
        return loaded

    return machine


def test_cuda_before_triton(pretend) -> None:
    loaded = pretend("80 90", (9, 0), True)
    assert iumad_kernels.backend_for("selective_scan_2d", "cuda").backend == "cuda"
    assert iumad_kernels.backend_for("cross_attention", "cuda").backend == "triton"
    assert len(loaded) == 1


def test_newer_gpus_compile_the_ptx(pretend) -> None:
    pretend("80 90", (12, 0), False)
    assert iumad_kernels.backend_for("selective_scan", "cuda").backend == "cuda"


def test_triton_without_nvcc(pretend) -> None:
    pretend("", (9, 0), True)
    choice = iumad_kernels.backend_for("selective_scan", "cuda")
    assert choice == ("triton", "the CUDA kernels were not built")


def test_unsupported_compute_capability(pretend) -> None:
    loaded = pretend("80 90", (7, 5), True)
    choice = iumad_kernels.backend_for("selective_scan", "cuda")
    assert choice.backend == "reference"
    assert (
        "the CUDA kernels are built for compute capability 8.0 and newer, but Some GPU has 7.5"
        in choice.reason
    )
    assert "Triton needs compute capability 8.0 and newer, but Some GPU has 7.5" in choice.reason
    assert "pip install" not in choice.reason  # would not help
    assert not loaded
    for forced in ("cuda", "triton"):
        with (
            iumad_kernels.backend(forced),
            pytest.raises(RuntimeError, match=rf"no {forced} backend for cuda tensors.*Some GPU has 7\.5"),
        ):
            backend.select("selective_scan", torch.device("cuda"))


def test_built_for_newer_gpus_only(pretend) -> None:
    pretend("90", (8, 0), True)
    choice = iumad_kernels.backend_for("selective_scan", "cuda")
    assert choice.backend == "triton"
    assert "9.0 and newer, but Some GPU has 8.0" in choice.reason


def test_reference_warns_once_with_both_remedies(pretend) -> None:
    pretend("", (9, 0), False)
    with pytest.warns(
        UserWarning,
        match=r"slow reference.*not built and Triton is not installed: .*pip install triton.*IUMAD_CUDA=on pip",
    ):
        assert backend.select("selective_scan", torch.device("cuda")) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.select("selective_scan", torch.device("cuda")) == "reference"


def test_a_cpu_torch_does_not_load_it(pretend) -> None:
    loaded = pretend("80 90", None, False)
    assert "has no CUDA" in iumad_kernels.backend_for("selective_scan", "cuda").reason
    assert not loaded


SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "selective_scan": {"u": (1, 2, 3), "delta": (1, 2, 3), "A": (2, 4), "B": (1, 4, 3), "C": (1, 4, 3), "z": (1, 2, 3)},
    "selective_scan_2d": {"u": (1, 2, 3, 3), "delta": (1, 2, 3, 3), "A": (2, 4), "B": (1, 4, 3, 3), "C": (1, 4, 3, 3)},
    "selective_state_update": {"state": (1, 2, 4), "x": (1, 2), "dt": (1, 2), "A": (2, 4), "B": (1, 4), "C": (1, 4)},
    "cross_attention": {"query": (1, 1, 2, 3), "key": (1, 1, 2, 3), "value": (1, 1, 2, 3), "attn_mask": (2, 2)},
    "kl_divergence": {"student_logits": (2, 3), "teacher_logits": (2, 3)},
    "kl_bottleneck": {"fused_logits": (2, 3), "bottleneck_logits": (2, 3), "labels": (2,)},
    "fused_linear_kl": {"features_t": (2, 3), "weight_t": (4, 3), "features_s": (2, 3), "weight_s": (4, 3), "bias_s": (4,)},
    "gaussian_bottleneck": {"mu": (2, 3), "logvar": (2, 3), "seed": ()},
    "depthwise_conv2d": {"x": (1, 3, 4, 4), "weight": (3, 1, 3, 3), "bias": (3,)},
    "causal_conv1d": {"x": (1, 3, 4), "weight": (3, 4), "bias": (3,), "seq_idx": (1, 4)},
    "anomaly_map": {"features": (1, 3, 4, 4), "reference": (1, 3, 4, 4)},
}  # fmt: skip
INTEGERS = {"labels", "seed", "seq_idx"}


@pytest.mark.parametrize(
    ("op", "moved"), [(op, name) for op, shapes in SHAPES.items() for name in list(shapes)[1:]]
)
def test_mixed_devices(op: str, moved: str) -> None:
    """Any tensor elsewhere than the first one: refused before any work, by name and device."""
    given = {
        name: torch.zeros(
            shape, dtype=torch.int64 if name in INTEGERS else None, device="meta" if name == moved else "cpu"
        )
        for name, shape in SHAPES[op].items()
    }
    flags = {"size": 8, "pool": 2} if op == "anomaly_map" else {}
    with pytest.raises(ValueError, match=rf"{op}: \w+ is on (meta|cpu), but .*(is|are) on (meta|cpu)"):
        getattr(iumad_kernels, op)(**given, **flags)


def test_forcing_a_backend_the_device_lacks() -> None:
    with iumad_kernels.backend("cuda"), pytest.raises(RuntimeError, match="no cuda backend for cpu tensors"):
        backend.select("selective_scan", torch.device("cpu"))


@pytest.mark.skipif(not LIBRARY.exists(), reason="the CUDA kernels were not built here")
def test_library_needs_one_symbol_a_cpu_torch_lacks() -> None:
    """It links to nothing of CUDA but what the runtime, linked statically, finds at run time: the driver."""

    def symbols(kind: str, library: Path) -> set[str]:
        command = ["nm", "-D", f"--{kind}-only", str(library)]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return {line.split()[-1] for line in listing.splitlines()}

    cpu_torch = Path(torch.__file__).parent / "lib/libtorch_cpu.so"
    missing = symbols("undefined", LIBRARY) - symbols("defined", cpu_torch)
    # Names with a version are the C and C++ libraries'; those with two underscores belong to the tool chain.
    missing = {name for name in missing if "@" not in name and not name.startswith("_")}
    assert missing == {"aoti_torch_get_current_cuda_stream"}
