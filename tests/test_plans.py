"""Plans of CUDA kernels, walked through on the host for random sizes; nothing here needs a GPU.

Who computes which tile and when is arithmetic on the host, or that host and device share: of the
kernels for many tokens (csrc/cuda/nf4_lora_matmul_large_plan.h), and of that for some hundred
tokens with the projection before or in it (nf4_lora_matmul_mid_plan.h, lora_project.h), of dx
with the gradients before or beside it (nf4_lora_matmul_dx_plan.h, lora_grads_plan.h), and of that
for a few tokens (nf4_lora_matmul_small_plan.h).
"""

import shutil
import subprocess
from pathlib import Path

import beside_dx
import pytest

ROOT = Path(__file__).resolve().parent.parent


def _run(name, tmp_path, *flags, arguments=()):
    """Compile and run a program beside this file; return the numbers it prints."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        pytest.skip("nvcc is neither on PATH nor in /usr/local/cuda")
    source, program = Path(__file__).with_name(name), tmp_path / "program"
    build = [nvcc, "-std=c++17", "-O1", f"-I{ROOT / 'csrc'}", *flags, "-o", program, source]
    compiled = subprocess.run(build, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    done = subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout
    return [int(number) for number in done.stdout.split()]


def test_division_by_what_the_host_knows(tmp_path):
    (unequal,) = _run("divisor.cu", tmp_path)
    assert unequal > 1000  # of 20000


def test_tiles_riders_and_waves_of_many_tokens(tmp_path):
    with_riders, late_starts = _run("large_plan.cu", tmp_path)
    assert with_riders > 1000  # of 10000
    assert late_starts > 100  # plans whose first wave makes only z, of 5000


def test_the_ring_of_many_tokens_is_read_before_it_is_written_again(tmp_path):
    late_starts, with_riders = _run("large_ring.cu", tmp_path)
    assert late_starts > 100  # of 6000 plans
    assert with_riders > 1000  # of 12000


def test_some_hundred_tokens_find_room_on_any_device(tmp_path):
    (level,) = _run("mid_plan.cu", tmp_path)
    assert level > 1000  # of 20000


def test_gradients_in_front_of_and_beside_dx(tmp_path):
    together, beside, shared, *left = _run("backward_plan.cu", tmp_path, "-arch=sm_90a")
    assert together > 1000  # in one launch, of 40000
    assert beside > 1000  # of 20000
    assert shared > 300  # products of which clusters share the N of tiles, of 20000
    assert min(left) > 500  # beside it and in front: dx makes the gradient of lora_A


def test_layers_whose_gradients_run_beside_dx(tmp_path):
    """Those that test_nf4_lora_backward.py computes on a card."""
    sizes = [size for layer in beside_dx.LAYERS for size in layer]
    planned = _run("backward_plan.cu", tmp_path, "-arch=sm_90a", arguments=sizes)
    found = list(zip(planned[::3], planned[1::3], planned[2::3], strict=True))
    assert found == list(beside_dx.LAYERS.values())


def test_shares_of_few_tokens_and_who_waits_for_whom(tmp_path):
    shared_tiles, wait_for_sms = _run("small_plan.cu", tmp_path)
    assert shared_tiles > 1000  # plans in which CTAs begin and end within tiles, of 20000
    assert wait_for_sms > 300  # with more CTAs, those that compute z among them, than SMs


def test_devices_are_asked_for_clusters_once(tmp_path):
    (questions,) = _run("cluster_room.cpp", tmp_path, "-cudart=none")
    assert questions > 0
