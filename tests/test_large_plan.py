"""The plan of the kernels for many tokens, walked through on the host for random sizes.

Who computes which tile, u and part of d_lora_A, and in which wave, is arithmetic that host and
device share (csrc/cuda/nf4_lora_matmul_large_plan.h); nothing here needs a GPU.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_tiles_riders_and_waves(tmp_path):
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        pytest.skip("nvcc is neither on PATH nor in /usr/local/cuda")
    program = tmp_path / "large_plan"
    source = Path(__file__).with_name("large_plan.cu")
    build = [nvcc, "-std=c++17", "-O1", f"-I{ROOT / 'csrc'}", "-o", program, source]
    compiled = subprocess.run(build, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    with_riders, late_starts = map(int, done.stdout.split())
    assert with_riders > 1000  # of 10000
    assert late_starts > 100  # plans whose first wave makes only z, of 5000
