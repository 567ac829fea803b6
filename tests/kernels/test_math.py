"""The error bounds that csrc/core/math.h states, on every instruction set, by dense sampling against extended precision."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from iumad_kernels import _C

ROOT = Path(__file__).parents[2]
# As in CMakeLists.txt.
FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mfma",
        "-mf16c",
        "-mprefer-vector-width=512",
    ],
}
COMMON = ["-std=c++20", "-O2", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-w"]
SMALLEST = {np.float32: float(np.finfo(np.float32).tiny), np.float64: float(np.finfo(np.float64).tiny)}

Evaluate = Callable[[str, np.ndarray], np.ndarray]

pytestmark = pytest.mark.skipif(
    np.finfo(np.longdouble).eps > 2e-19, reason=f"no extended precision on {platform.machine()}"
)
both_types = pytest.mark.parametrize("dtype", [np.float32, np.float64])


X86 = platform.machine() in ("x86_64", "AMD64")


def flags_for(isa: str) -> list[str]:
    """AVX-512 is emulated where the CPU does not have it."""
    if isa == "avx512" and ("avx512" not in _C.cpu_isas() or _C.build_info()["emulated"]):
        return [*flags_for("avx2"), "-include", str(ROOT / "tests/cpu_emulation/avx512.h")]
    if isa not in ("avx512", *_C.cpu_isas()):
        pytest.skip(f"this CPU does not have {isa}")
    return FLAGS.get(isa, [])


@pytest.fixture(scope="module", params=list(FLAGS) if X86 else _C.cpu_isas())
def isa(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def evaluate(isa: str, tmp_path_factory: pytest.TempPathFactory) -> Evaluate:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler to compile math.h with")
    program = tmp_path_factory.mktemp("math") / f"evaluate_{isa}"
    source = ROOT / "tests/kernels/math/evaluate.cpp"
    options = [*COMMON, *flags_for(isa), f"-DIUMAD_ISA={isa}", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *options, str(source), "-o", str(program)], check=True)

    def call(name: str, x: np.ndarray) -> np.ndarray:
        padded = np.concatenate([x, np.ones(-len(x) % 16, x.dtype)])
        kind = "float" if x.dtype == np.float32 else "double"
        done = subprocess.run([program, name, kind], input=padded.tobytes(), capture_output=True, check=True)
        return np.frombuffer(done.stdout, x.dtype)[: len(x)]

    return call


def spread(low: float, high: float, dtype: type, count: int = 400_000) -> np.ndarray:
    """Random values and the ends."""
    x = np.random.default_rng(0).uniform(low, high, count).astype(dtype)
    return np.concatenate([x, np.array([low, high], dtype)])


def relative(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    return np.abs(got.astype(np.longdouble) / want - 1)


@both_types
def test_log(evaluate: Evaluate, dtype: type) -> None:
    """Of every positive normal number, and relative to the result also near 1, where that is near 0."""
    info = np.finfo(dtype)
    powers = spread(info.minexp + 1, info.maxexp - 1, np.float64)
    anywhere = np.exp2(powers).astype(dtype)
    near_one = np.concatenate([spread(0.5, 2, dtype), (1 + spread(-1e-3, 1e-3, np.float64)).astype(dtype)])
    neighbours = np.array(
        [np.nextafter(dtype(1), dtype(0)), np.nextafter(dtype(1), dtype(2)), info.tiny, info.max], dtype
    )
    x = np.concatenate([anywhere, near_one, neighbours])
    x = x[x != 1]
    bound = 4e-7 if dtype == np.float32 else 1e-15
    assert relative(evaluate("log", x), np.log(x.astype(np.longdouble))).max() < bound
    assert evaluate("log", np.ones(1, dtype))[0] == 0


@both_types
def test_cos_sin_turns(evaluate: Evaluate, dtype: type) -> None:
    eighths = np.arange(8) / 8
    edges = np.concatenate([np.nextafter(eighths.astype(dtype), dtype(s)) for s in (0, 2)])
    x = np.concatenate([spread(0, 1, dtype)[:-1], eighths.astype(dtype), edges])
    x = x[x < 1]
    angle = 2 * np.longdouble("3.14159265358979323846264338327950288") * x.astype(np.longdouble)
    bound = 2e-7 if dtype == np.float32 else 1e-15
    assert np.abs(evaluate("cos", x) - np.cos(angle)).max() < bound
    assert np.abs(evaluate("sin", x) - np.sin(angle)).max() < bound


@both_types
def test_exp2(evaluate: Evaluate, dtype: type) -> None:
    info = np.finfo(dtype)
    near_zero = np.logspace(-12, 0, 1000)
    x = np.concatenate([spread(info.minexp + 1, info.maxexp - 0.01, dtype), near_zero, -near_zero]).astype(
        dtype
    )
    want = np.exp2(x.astype(np.longdouble))
    bound = 2e-7 if dtype == np.float32 else 4e-16
    assert relative(evaluate("exp2", x), want).max() < bound
    assert (evaluate("exp2", -near_zero.astype(dtype)) <= 1).all()
    below = evaluate("exp2", spread(-1e4, info.minexp * 1.0001, dtype))
    assert ((below >= 0) & (below <= SMALLEST[dtype])).all()
    special = evaluate("exp2", np.array([0, -np.inf, np.inf, np.nan, -info.max, info.max], dtype))
    np.testing.assert_array_equal(special, np.array([1, 0, np.inf, np.nan, 0, np.inf], dtype))


@both_types
def test_exp2_product_rounds_its_argument(evaluate: Evaluate, dtype: type) -> None:
    info = np.finfo(dtype)
    x = spread(-(info.maxexp**0.5), info.maxexp**0.5, dtype)[:-2]
    product = x.astype(np.longdouble) ** 2
    bound = 2e-7 + 4.2e-8 * product if dtype == np.float32 else 4e-16 + 7.7e-17 * product
    assert (relative(evaluate("exp2_of_square", x), np.exp2(product)) < bound).all()
    assert np.isinf(evaluate("exp2_of_square", np.array([info.max], dtype))).all()  # a product that overflows


@both_types
def test_exp2_in_range_is_the_same(evaluate: Evaluate, dtype: type) -> None:
    """Without clamps where none is needed."""
    most = 120 if dtype == np.float32 else 1000
    for name, x in (
        ("exp2_normal", spread(-most, most, dtype)),
        ("exp2_finite", spread(-1e4, np.finfo(dtype).maxexp - 1, dtype)),
    ):
        np.testing.assert_array_equal(evaluate(name, x), evaluate("exp2", x))
    assert evaluate("exp2_finite", np.array([-np.inf], dtype))[0] == 0
    assert np.isnan(evaluate("exp2_normal", np.array([np.nan], dtype))).all()
    assert np.isnan(evaluate("exp2_finite", np.array([np.nan], dtype))).all()


@both_types
def test_exp2_product_moderate(evaluate: Evaluate, dtype: type) -> None:
    most = 120 if dtype == np.float32 else 1000
    x = spread(-most, most, dtype)
    product = dtype(0.9) * x.astype(np.longdouble)
    bound = 2e-7 + 4.2e-8 * np.abs(product) if dtype == np.float32 else 4e-16 + 7.7e-17 * np.abs(product)
    assert (relative(evaluate("exp2_moderate", x), np.exp2(product)) < bound).all()
    special = evaluate("exp2_moderate", np.array([0, np.nan], dtype))
    np.testing.assert_array_equal(special, np.array([1, np.nan], dtype))


@pytest.mark.parametrize("name", ["exp2_moderate", "exp2_coarse_moderate"])
def test_exp2_product_moderate_on_avx512(evaluate: Evaluate, isa: str, name: str) -> None:
    """There what is moderate goes far beyond what floats hold, and the product is not rounded."""
    if isa != "avx512":
        pytest.skip("AVX-512's")
    x = spread(-120, 120, np.float32)
    product = np.float32(0.9) * x.astype(np.longdouble)
    assert relative(evaluate(name, x), np.exp2(product)).max() < (2e-7 if name == "exp2_moderate" else 4e-7)
    far = np.concatenate(
        [2.0 ** np.arange(8, 60), spread(200, 2.0**60, np.float64), spread(200, 1e7, np.float64)]
    )
    assert (evaluate(name, far.astype(np.float32)) == np.inf).all()
    assert (evaluate(name, -far.astype(np.float32)) == 0).all()


@pytest.mark.parametrize("name", ["exp2_coarse", "exp2_coarse_moderate"])
def test_exp2_product_coarse(evaluate: Evaluate, name: str) -> None:
    near_zero = np.logspace(-12, 0, 1000)
    x = np.concatenate([spread(-120, 120, np.float64), spread(-1, 1, np.float64), near_zero, -near_zero])
    x = x.astype(np.float32)
    got, product = evaluate(name, x), np.float32(0.9) * x.astype(np.longdouble)
    assert (relative(got, np.exp2(product)) < 4e-6 + 4.2e-8 * np.abs(product)).all()
    assert (got[x < 0] <= 1).all()
    small = (x > -0.01) & (x < -1e-3)
    assert relative(1 - got[small], -np.expm1(product[small] * np.log(np.longdouble(2)))).max() < 5e-4
    assert (evaluate(name, np.zeros(1, np.float32)) == 1).all()
    assert np.isnan(evaluate(name, np.array([np.nan], np.float32))).all()


@both_types
def test_exp(evaluate: Evaluate, dtype: type) -> None:
    """The rounding of the constant log2(e) and of the product counts too. Never negative, of what is negative never above 1."""
    info = np.finfo(dtype)
    lowest = (info.minexp + 1) * np.log(2)
    x = np.concatenate([spread(lowest, 0, dtype), -np.logspace(-12, 0, 1000).astype(dtype)])
    x = x[x.astype(np.float64) * np.log2(np.e) > (info.minexp + 1) * (1 - 1e-6)]
    got, want = evaluate("exp", x), np.exp(x.astype(np.longdouble))
    bound = 2e-7 + 1.8e-7 * np.abs(x) if dtype == np.float32 else 4e-16 * (1 + 2 * np.abs(x))
    assert (relative(got, want) < bound).all()
    assert (got <= 1).all()
    special = evaluate("exp", np.array([0, -np.inf, -info.max, np.nan], dtype))
    np.testing.assert_array_equal(special, np.array([1, 0, 0, np.nan], dtype))


@both_types
def test_log1p_unit(evaluate: Evaluate, dtype: type) -> None:
    x = np.concatenate([spread(0, 1, dtype), np.logspace(-30, 0, 2000).astype(dtype)])
    x = x[x > 0]
    bound = 2e-7 if dtype == np.float32 else 1e-15
    assert relative(evaluate("log1p_unit", x), np.log1p(x.astype(np.longdouble))).max() < bound
    assert evaluate("log1p_unit", np.zeros(1, dtype))[0] == 0
    if dtype == np.float32:
        assert relative(evaluate("log1p_unit_coarse", x), np.log1p(x.astype(np.longdouble))).max() < 9e-6


@both_types
def test_reciprocal_near_one(evaluate: Evaluate, dtype: type) -> None:
    x = spread(1, 2, dtype)
    want = 1 / x.astype(np.longdouble)
    assert (np.abs(evaluate("reciprocal", x) - want) <= np.spacing(want.astype(dtype))).all()


@both_types
def test_sigmoid(evaluate: Evaluate, dtype: type) -> None:
    """Also of numbers so large that their exponential has none: 0 and 1, and NaN of NaN."""
    x = spread(-80, 80, dtype)
    want = 1 / (1 + np.exp(-x.astype(np.longdouble)))
    bound = 4e-7 + 1.8e-7 * np.abs(x) if dtype == np.float32 else 1e-15 * (1 + np.abs(x))
    assert (relative(evaluate("sigmoid", x), want) < bound).all()
    big = np.finfo(dtype).max
    special = evaluate("sigmoid", np.array([-np.inf, -big, 0, big, np.inf, np.nan], dtype))
    np.testing.assert_array_equal(special, np.array([0, 0, 0.5, 1, 1, np.nan], dtype))


@both_types
def test_sqrt(evaluate: Evaluate, dtype: type) -> None:
    x = np.concatenate([spread(0, 1e6, dtype), np.array([0, np.inf], dtype)])
    np.testing.assert_array_equal(evaluate("sqrt", x), np.sqrt(x))
