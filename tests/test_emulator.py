# SPDX-License-Identifier: Apache-2.0
"""The emulator of CUDA: kernels that are right pass, kernels with one mistake are noticed."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from emulator import Emulator, EmulatorError, PlantedKernels, Schedule, sanitized, unwritten

HERE = Path(__file__).parent
SCHEDULES = [Schedule.drawn(seed) for seed in range(41)]
# All four blocks of a planted kernel resident at once, so that they may wait for one another.
RESIDENT = [Schedule(seed, 4, 40 * (seed % 3)) for seed in range(1, 41)]

RIGHT = {
    "correct": SCHEDULES,
    "ticket": SCHEDULES,
    "ticket_with_fence_behind_barrier": SCHEDULES,
    "count_atomically": SCHEDULES,
    "lock": RESIDENT,
    "wait_for_the_grid": RESIDENT,
    "vote": SCHEDULES,
    "dynamic": SCHEDULES,
    "large_dynamic": SCHEDULES[:4],
    "copy_and_wait": SCHEDULES,
}
MISTAKES = {
    "missing_barrier": "wrong result",
    "outside": "outside of every tensor: store of 4 bytes",
    "before": "outside of every tensor: load of 4 bytes",
    "misaligned": "misaligned load of 16 bytes",
    "read_only_of_written": "of what the same launch has written, as read-only: load of 4 bytes",
    "memset_past_the_end": "outside of every tensor: the host's memset",
    "exit_before_barrier": "barrier",
    "two_barriers": "different barriers",
    "barrier_against_shuffle": "deadlock",
    "exit_before_shuffle": "exit",
    "shuffle_outside_mask": "not in the mask",
    "ticket_without_barrier": "wrong result",
    "ticket_without_fence": "wrong result",
    "ticket_with_fence_of_another": "wrong result",
    "empty_grid": "no device accepts",
    "deep_block": "no device accepts",
    "lost_update": "wrong result",
    "lock_never_released": "livelock",
    "lock_without_fence": "wrong result",
    "wait_for_the_grid": "livelock",  # where the other blocks are not resident
    "wait_for_a_block_too_many": "livelock",
    "vote_of_a_branch": "deadlock",
    "vote_against_shuffle": "different collectives",
    "two_shuffles": "different collectives",
    "too_large_dynamic": "more dynamic shared memory than the kernel may have",
    "too_large_permitted_dynamic": "more dynamic shared memory than the kernel may have",
    "too_large_together": "more static and dynamic shared memory together",
    "too_large_static": "more static shared memory than a device accepts",
    "copy_without_wait": "wrong result",
    "copy_waits_too_little": "wrong result",
    "copy_without_barrier": "wrong result",
    "copy_never_waited_for": "copies that it has not waited for",
    "misaligned_copy": "misaligned copy to shared memory of 16 bytes",
}
FOR_SANITIZERS = {
    "past_dynamic": "heap-buffer-overflow",
    "past_static": "index 64 out of bounds",
    "overflow": "signed integer overflow",
}
PRODUCT_MISTAKES = {  # by their number in matrix_product.cpp
    "short_wait": (1, "wrong result"),
    "no_barrier_after_wait": (2, "wrong result"),
    "no_barrier_before_copy": (3, "wrong result"),
    "misaligned_row": (4, "misaligned row"),
    "part_of_a_warp": (5, "exit"),
}


@pytest.fixture
def planted(emulated: Callable[[str], ctypes.CDLL]) -> PlantedKernels:
    return PlantedKernels(emulated("planted"))


@pytest.mark.parametrize("name", RIGHT)
def test_right_kernel_passes(planted: PlantedKernels, name: str) -> None:
    planted.run_case(name, RIGHT[name])


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_noticed(planted: PlantedKernels, name: str) -> None:
    with pytest.raises(EmulatorError, match=MISTAKES[name]):
        planted.run_case(name, SCHEDULES)


def test_after_a_mistake_the_next_kernel_runs(planted: PlantedKernels) -> None:
    for name in ("lock_never_released", "exit_before_shuffle", "copy_never_waited_for"):
        with pytest.raises(EmulatorError):
            planted.run_case(name, SCHEDULES)
        planted.run_case("correct", SCHEDULES[:3])


def check_product(emulator: Emulator, dtype: torch.dtype, depth: int, mistake: int = 0) -> None:
    a, b = (torch.randn(16, depth).to(dtype) for _ in range(2))
    for schedule in SCHEDULES:
        emulator.schedule = schedule
        c = unwritten((16, 16), torch.float32)
        arguments = [mistake, dtype == torch.bfloat16, depth, a, b, c]
        emulator.run("matrix_product", arguments)
        if not torch.allclose(c.double(), a.double() @ b.double().T, rtol=1e-5, atol=1e-5):
            raise EmulatorError("wrong result")


@pytest.mark.parametrize("depth", [16, 48, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tensor_cores_against_float64(emulated, dtype: torch.dtype, depth: int) -> None:
    emulator = Emulator(emulated("matrix_product"))
    check_product(emulator, dtype, depth)
    loaded = emulator.traffic.loaded  # every row of both once, 16 bytes at a time
    assert loaded.bytes == loaded.transactions * 32 == loaded.sectors * 32 == 2 * 16 * depth * 2


@pytest.mark.parametrize("name", PRODUCT_MISTAKES)
def test_mistake_with_tensor_cores_is_noticed(emulated, name: str) -> None:
    mistake, message = PRODUCT_MISTAKES[name]
    with pytest.raises(EmulatorError, match=message):
        check_product(Emulator(emulated("matrix_product")), torch.bfloat16, 64, mistake)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOR_SANITIZERS)
def test_mistake_is_noticed_by_sanitizers(name: str, tmp_path: Path) -> None:
    program = (
        "from pathlib import Path; import emulator; "
        f"kernels = emulator.build(Path({str(tmp_path)!r}), 'planted', emulator.toolkit_include());"
        f"emulator.PlantedKernels(kernels).run_case({name!r}, [emulator.Schedule()])"
    )
    done = sanitized([sys.executable, "-c", program], PYTHONPATH=str(HERE))
    assert done.returncode != 0
    assert FOR_SANITIZERS[name] in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "file",
    [
        "test_cuda_avg_pool.py",
        "test_cuda_emulator.py",
        "test_cuda_max_pool.py",
        "test_cudnn_graphs.py",
        "test_emulator.py",
    ],
)
def test_sanitizers_find_nothing_else(file: str) -> None:
    # Without a barrier that it needs, a kernel does what the sanitizers are right to refuse.
    chosen = ["-k", "not needed and not noticed", f"--rootdir={HERE.parent}", str(HERE / file)]
    done = sanitized([sys.executable, "-m", "pytest", "-q", *chosen])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
