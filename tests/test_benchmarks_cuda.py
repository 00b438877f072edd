# SPDX-License-Identifier: Apache-2.0
"""The GPU's benchmarks without a GPU: clock, comparisons and rows, with stand-ins on the CPU."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import bench_cuda
import harness
import pytest
import report
import torch
from bench_cuda import PROVIDERS, Case, Inference, TrainingStep
from clocks import EventClock, clock_of, host_clock
from stand_in_graphs import StandIn

from fastresnet.ops import choice

CONFTEST = Path(__file__).resolve().parent.parent / "benchmarks" / "conftest.py"


class Device:
    """A device on which everything between two events takes so long, whatever it is; what was
    asked of it is in ``asked``."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.now, self.asked = seconds, 0.0, []

    def event(self, *, enable_timing: bool) -> Device.Event:
        assert enable_timing
        return Device.Event(self)

    def synchronize(self) -> None:
        self.asked.append("synchronize")

    def step(self) -> None:
        self.asked.append("step")

    class Event:
        def __init__(self, device: Device) -> None:
            self.device, self.at = device, None

        def record(self) -> None:
            self.device.asked.append("record")
            self.at = self.device.now
            self.device.now += self.device.seconds

        def elapsed_time(self, end: Device.Event) -> float:
            assert self.device.asked[-1] == "synchronize", "the events may not have happened"
            return (end.at - self.at) * 1e3


def test_events_time_a_step() -> None:
    device = Device(0.25)
    clock = EventClock(device.event, device.synchronize)
    assert clock(device.step) == pytest.approx(0.25)
    assert device.asked == ["synchronize", "record", "step", "record", "synchronize"]
    assert clock_of("cpu") is host_clock
    assert isinstance(clock_of("cuda"), EventClock)
    assert host_clock(lambda: None) >= 0


def eager() -> tuple[bench_cuda.GpuProvider, ...]:
    return tuple(provider for provider in PROVIDERS if not provider.compiled)


@pytest.mark.parametrize(("work", "dtype"), [(TrainingStep, "bfloat16"), (Inference, "float32")])
def test_every_provider_does_the_same_work(work: type, dtype: str) -> None:
    # Of fewer values a batch norm's statistics turn rounding into chance.
    case = Case("cifar_resnet18", 16, 8, dtype, graphs=True)
    device, made = Device(0.5), []

    def graphs(model: torch.nn.Module) -> StandIn:
        made.append(StandIn(model))
        return made[-1]

    comparison = bench_cuda.compare(
        *(case, "suite", work),
        device="cpu",
        clock=EventClock(device.event, device.synchronize),
        providers=eager(),
        graphs=graphs,
    )
    assert {provider.status for provider in comparison.providers} == {"ok"}
    comparison.round()
    rows = comparison.rows()
    assert [row.provider for row in rows[:-1]] == [provider.name for provider in eager()]
    assert {row.p50 for row in rows} == {8 / 0.5}
    assert device.asked.count("record") == 2 * len(rows)
    assert [graph.captured for graph in made] == [1, 1]
    assert [graph.replayed for graph in made] == [2, 2], "one for the check, one for the round"


def test_a_step_changes_the_weights_as_the_baseline_does() -> None:
    case = Case("cifar_resnet18", 8, 4, "float32", graphs=True)
    weights = bench_cuda.initial_weights(case.architecture)
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    found = []
    for provider in (eager()[0], eager()[4]):
        assert provider.role == ("ours" if found else "baseline")
        step = TrainingStep(case, provider, weights, images, labels, StandIn)
        assert step.records == bool(found)
        losses = [step.step().item() for _ in range(2)]
        found.append((losses, step.model.state_dict()))
    for losses, state in found[1:]:
        assert losses == pytest.approx(found[0][0], rel=1e-3)
        for name, value in found[0][1].items():
            torch.testing.assert_close(state[name], value, rtol=1e-2, atol=1e-3)


def test_each_level_of_training_is_timed() -> None:
    case = Case("cifar_resnet18", 8, 2, "float32")
    weights = bench_cuda.initial_weights(case.architecture)
    policies, before = {}, choice.policy
    for provider in (provider for provider in case.providers if provider.role == "ours"):
        step = TrainingStep(
            *(case, provider, weights, torch.randn(2, 3, 8, 8), torch.arange(2), StandIn)
        )
        seen: list[str] = []
        step.model.conv1.register_forward_hook(lambda *_, seen=seen: seen.append(choice.policy))
        step.step()
        policies[provider.name] = seen
    assert policies == {"fastresnet, torch's convolutions": ["never"], "fastresnet": ["timed"]}
    assert choice.policy == before


def test_a_large_batch_has_no_recorded_providers() -> None:
    for case in (*bench_cuda.TRAINING, *bench_cuda.INFERENCE):
        names = {provider.name for provider in case.providers}
        assert any("CUDA graph" in name for name in names) == case.graphs == (case.batch <= 128)
        assert {"torchvision", "torch.compile", "fastresnet", "stock torchvision"} <= names
    large = bench_cuda.TRAINING[0]
    assert large.truth_dtype == torch.float32
    assert replace(large, dtype="float32").truth_dtype == torch.float64


def test_rows_of_a_gpu_are_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    case = Case("cifar_resnet18", 16, 2, "float32")
    device = Device(0.5)
    comparison = bench_cuda.compare(
        *(case, "cuda_inference", Inference),
        device="cpu",
        clock=EventClock(device.event, device.synchronize),
        providers=eager()[:3:2],
    )
    for provider in comparison.providers:
        provider.seconds = [1.0, 1.0]
    for gpu in ("NVIDIA H100", "NVIDIA A100"):
        rows = comparison.rows()
        for row in rows:
            row.machine = row.machine | {"device": "cuda", "gpu": gpu, "cuda": "13.0"}
        path = harness.append(rows)
        assert path.name.startswith(f"cuda_inference-{gpu.lower().replace(' ', '-')}-")
    found = report.table(report.latest(report.read("cuda_inference")))
    assert "NVIDIA H100" in found
    assert "NVIDIA A100" in found


@pytest.mark.parametrize("required", ["0", "1"])
def test_without_a_gpu_they_are_skipped_unless_one_is_required(
    monkeypatch: pytest.MonkeyPatch, required: str
) -> None:
    class Item:
        def __init__(self) -> None:
            self.keywords, self.markers = {"needs_cuda": True}, []

        def add_marker(self, marker: pytest.Mark) -> None:
            self.markers.append(marker)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("FASTRESNET_REQUIRE_CUDA", required)
    found = importlib.util.spec_from_file_location("benchmarks_conftest", CONFTEST)
    conftest = importlib.util.module_from_spec(found)
    found.loader.exec_module(conftest)
    item = Item()
    conftest.skip_without_gpu([item])
    assert [marker.name for marker in item.markers] == ([] if required == "1" else ["skip"])
    assert bench_cuda.pytestmark.name == "needs_cuda"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_comparison_fails() -> None:
    with pytest.raises((RuntimeError, AssertionError), match=r"CUDA|NVIDIA"):
        bench_cuda.compare(Case("cifar_resnet18", 8, 2, "float32"), "suite", Inference)
