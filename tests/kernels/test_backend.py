"""The environment variable that forces a backend."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import torch
import iumad_kernels as ik
print(*ik.backend_for("selective_scan", "cpu"), sep=": ")
with ik.backend("cpu"):
    print(ik.backend_for("selective_scan", "cpu").backend)
x = torch.ones(1, 2, 3)
ik.selective_scan(x, x, torch.ones(2, 1), x[:, :1], x[:, :1])
"""


@pytest.mark.parametrize("value", ["reference", "", "fast"])
def test_environment_variable(value: str) -> None:
    """Read once, at import; a block that asks for a backend goes before it; a name that is none raises at the first call."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        env=os.environ | {"IUMAD_BACKEND": value},
        capture_output=True,
        text=True,
    )
    if value == "fast":
        assert "ValueError: unknown backend 'fast': one of cpu, cuda, triton, reference" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    chosen = (
        "reference: forced by the environment variable IUMAD_BACKEND" if value else "cpu: the fastest for cpu"
    )
    assert done.stdout.splitlines() == [chosen, "cpu"]
