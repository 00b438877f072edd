# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' own parts, at sizes that take no time: what they compare is the same work, what
is wrong is not timed, and what they wrote becomes the report."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import bench_conv_layers
import bench_data
import bench_inference
import bench_time_to_accuracy
import bench_train_memory
import bench_train_step
import clocks
import harness
import pytest
import report
import runtimes
import torch
from bench_conv_layers import Torch, TorchConvolution
from layers import POSITIONS, Layer, conv_layers
from providers import MODEL_PROVIDERS, initial_weights, weights_in_use
from roofline import Peak, Roofline, measure

from fastresnet.data import ImageSet
from fastresnet.train import RECIPES, apply_overrides

ROOFLINE = Roofline(
    multiply={"bfloat16": Peak("torch.mm", 100.0), "float32": Peak("torch.mm", 50.0)},
    bandwidth=Peak("copy", 10.0),
)


def conv_case(position: str = "middle", **changes) -> bench_conv_layers.Case:
    layer = Layer(
        channels=16,
        out_channels=24,
        kernel=3,
        stride=1,
        padding=1,
        dilation=1,
        side=6,
        position=position,
        projected=False,
    )
    case = bench_conv_layers.Case("tiny", 6, 3, "float32", layer, count=2, layers=2, mode="forward")
    return replace(case, **changes)


def timed(comparison: harness.Comparison, rounds: int = 2) -> list[harness.Row]:
    for _ in range(rounds):
        comparison.round()
    return comparison.rows()


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of results, and a README and a page beside it."""
    folder = tmp_path / "benchmarks" / "results"
    monkeypatch.setattr(harness, "RESULTS", folder)
    monkeypatch.setattr(report, "RESULTS", folder)
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    monkeypatch.setattr(report, "PAGE", tmp_path / "docs" / "benchmarks.md")
    (tmp_path / "README.md").write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    return folder


def test_layers_are_those_of_the_network() -> None:
    found = conv_layers("resnet50", 224)
    # 16 blocks of three convolutions, and four projections.
    assert sum(found.values()) == 52
    assert {layer.position for layer in found} == set(POSITIONS)
    assert sum(n for layer, n in found.items() if layer.position == "shortcut") == 4
    # 4.09 GFLOP an image without the stem (0.118 multiplications) and the classifier (0.002).
    products = sum(
        n * layer.out_side**2 * layer.out_channels * layer.channels * layer.kernel**2
        for layer, n in found.items()
    )
    assert products == pytest.approx(4.089e9 - 0.118e9 - 0.002e9, rel=1e-3)
    assert all(layer.channels > 3 for layer in found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", bench_conv_layers.MODES)
@pytest.mark.parametrize("position", POSITIONS)
def test_every_provider_of_a_layer_computes_the_same(position: str, mode: str, dtype: str) -> None:
    case = conv_case(position, mode=mode, dtype=dtype)
    rows = timed(bench_conv_layers.compare(case, ROOFLINE))
    assert [row.status for row in rows] == ["ok"] * 4
    assert [row.role for row in rows] == ["baseline", "ours", "context", "noise"]
    for row in rows:
        seconds = row.figures["ms"] / 1e3
        assert row.p50 == pytest.approx(case.flops / 1e9 / seconds)
        assert row.figures["GB/s"] == pytest.approx(case.nbytes / seconds / 1e9)
        assert row.figures["floor"] * seconds == pytest.approx(row.config["floor_seconds"])
    names = set(rows[1].errors)
    prologue = {"sums"} if case.layer.prologue else set()
    wanted = {"x", "weight", "bn_weight", "bn_bias"} | prologue
    assert names == (wanted if mode == "backward" else {"y", "mean", "var"})


def test_a_layer_behind_a_projection_and_odd_channels() -> None:
    layer = replace(conv_case("first").layer, channels=20, projected=True, stride=2)
    for mode in bench_conv_layers.MODES:
        comparison = bench_conv_layers.compare(conv_case(layer=layer, mode=mode), ROOFLINE)
        assert {provider.status for provider in comparison.providers} == {"ok"}


def test_bytes_of_a_layer_are_those_of_its_tensors() -> None:
    for position in POSITIONS:
        case = conv_case(position, mode="backward")
        link = bench_conv_layers.make_link(case)
        x = link.x if isinstance(link.x, torch.Tensor) else link.x.x
        read = [link.grad, link.y.x, x, link.weight, link.mask, link.addend, link.addend_mask]
        written = [x, link.weight]
        total = sum(t.numel() * t.itemsize for t in [*read, *written] if t is not None)
        assert case.nbytes == total, position


@pytest.mark.parametrize("mode", bench_conv_layers.MODES)
@pytest.mark.parametrize("error", ["wrong", "raises"])
def test_a_wrong_provider_is_refused(
    monkeypatch: pytest.MonkeyPatch, mode: str, error: str
) -> None:
    name = "conv_stats" if mode == "forward" else "conv_bn_backward"
    right: Callable = getattr(bench_conv_layers.ops, name)

    def wrong(*args, **options):
        if error == "raises":
            raise RuntimeError("no kernel\nsecond line")
        first, *rest = right(*args, **options)
        first[:, 0] = 0
        return (
            bench_conv_layers.ops.ConvGradients(first, *rest)
            if mode == "backward"
            else (first, *rest)
        )

    monkeypatch.setattr(bench_conv_layers.ops, name, wrong)
    rows = timed(bench_conv_layers.compare(conv_case(mode=mode), ROOFLINE))
    ours = next(row for row in rows if row.role == "ours")
    assert ours.status.startswith("failed: ")
    assert ("no kernel" in ours.status) == (error == "raises")
    assert (ours.p50, ours.n, ours.figures) == (None, 0, {})
    assert all(row.n == 2 for row in rows if row.role != "ours")


def comparison_of(baseline: float, ours: float, **options) -> harness.Comparison:
    """Two providers, so far from a truth of ones."""
    comparison = harness.Comparison(
        *("suite", "case"),
        metric="rate",
        unit="1/s",
        work=1,
        config={"dtype": "float32"},
        **options,
    )
    for name, role, value in (("peer", "baseline", baseline), ("own", "ours", ours)):
        found = {"a": torch.full((4,), 1.0 + value), "b": torch.ones(4)}
        comparison.add(name, lambda: None, lambda found=found: found, role=role)
    return comparison


def test_what_a_baseline_cannot_tell_is_refused_or_named() -> None:
    truth = {"a": torch.ones(4), "b": torch.ones(4)}
    with pytest.raises(ValueError, match=r"the baseline's a is 2\.00 from the truth"):
        comparison_of(2.0, 0.0).check(truth)
    partly = comparison_of(2.0, 5.0)
    partly.check(truth, partial=True)
    assert partly.config["unchecked"] == ["a"]
    assert partly.providers[1].status == "ok"
    with pytest.raises(ValueError, match="the baseline's a is"):
        comparison_of(2.0, 0.0).check({"a": torch.ones(4)}, partial=True)
    refused = comparison_of(1e-3, 2e-3)
    refused.check(truth)
    assert refused.providers[1].status.startswith("failed: a is 2.00e-03 from truth")


def test_errors_that_depend_on_the_input_are_judged_by_several() -> None:
    truth = {"a": torch.ones(4), "b": torch.ones(4)}

    def elsewhere() -> dict[str, float]:
        return {"a": 2e-3, "b": 0.0}

    unlucky = comparison_of(1e-3, 2e-3)
    unlucky.check(truth, elsewhere=elsewhere)
    assert unlucky.providers[1].status == "ok"
    assert unlucky.config["baseline_elsewhere"] == elsewhere()
    wrong = comparison_of(1e-3, 4e-3)
    wrong.check(truth, elsewhere=elsewhere)
    assert wrong.providers[1].status.startswith("failed: a is 4.00e-03 from truth (3.00e-03)")
    # However far off the baseline is, an error that zeros would have is none to pass.
    zeros = comparison_of(1e-3, -1.0)
    zeros.check(truth, elsewhere=lambda: {"a": 1.0, "b": 0.0})
    assert zeros.providers[1].status.startswith("failed: a is 1.00e+00")
    lucky = comparison_of(1e-3, 1e-3)
    lucky.check(truth, elsewhere=lambda: pytest.fail("not asked for"))


def test_a_generation_of_processors_has_a_name_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = "cpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\nflags\t\t: fpu\n\n"
    monkeypatch.setattr(Path, "exists", lambda _: True)
    monkeypatch.setattr(Path, "read_text", lambda _: text + text)
    assert harness.cpu_model() == "AMD EPYC (family 26, model 2)"


def test_a_revision_with_new_results_is_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks"
    code, rows = tmp_path / "kernel.cpp", folder / harness.RESULTS.name / "rows.jsonl"
    rows.parent.mkdir(parents=True)

    def git(*arguments: str) -> None:
        command = ["git", "-c", "user.name=A", "-c", "user.email=a@example.org", *arguments]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)

    assert harness.git_revision(folder) == "unknown"
    code.write_text("1")
    rows.write_text("{}\n")
    git("init")
    git("add", "--all")
    git("commit", "--message", "first")
    revision = harness.git_revision(folder)
    assert len(revision) >= 7
    assert "dirty" not in revision
    rows.write_text("{}\n{}\n")
    assert harness.git_revision(folder) == revision
    code.write_text("2")
    assert harness.git_revision(folder) == f"{revision}-dirty"


def test_largest_errors_are_those_of_other_batches() -> None:
    case = bench_train_step.Case("resnet18", 32, 4, "float32")
    weights = initial_weights("resnet18")
    baseline = MODEL_PROVIDERS[0]
    errors = bench_train_step.largest_errors(case, baseline, weights, batches=2)
    assert errors.keys() == {"logits", "gradient"}
    assert all(0 < error < 1e-2 for error in errors.values())


def test_a_training_step_of_both() -> None:
    case = bench_train_step.Case("resnet18", 64, 2, "bfloat16")
    eager = tuple(p for p in MODEL_PROVIDERS if not p.compiled and not p.stock)
    rows = timed(bench_train_step.compare(case, "train_step", providers=eager), rounds=1)
    assert {row.status for row in rows} == {"ok"}
    assert rows[0].config["truth"] == "float64"
    large = bench_train_step.Case("resnet50", 224, 64, "bfloat16")
    assert large.truth_dtype == torch.float32
    assert replace(large, dtype="float32").truth_dtype == torch.float64


def test_scaling_covers_factories_and_axes() -> None:
    cases = list(bench_train_step.scaling_cases())
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    assert not set(names) & {case.name for case in bench_train_step.CASES}
    assert {case.architecture for case in cases} >= set(bench_train_step.FACTORIES)
    assert {case.batch for case in cases} >= {1, 64}
    assert {case.side for case in cases} >= {32, 512}
    before = torch.get_num_threads()
    with bench_train_step.threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_cases_of_inference() -> None:
    scaling = bench_inference.scaling_cases()
    names = [case.name for case in (*bench_inference.CASES, *scaling)]
    assert len(set(names)) == len(names)
    assert {case.architecture for case in scaling} == set(bench_inference.FACTORIES)
    assert {case.batch for case in scaling} == {1, 2, 4, 8, 16, 32, 64}
    assert {case.dtype for case in scaling} == {"bfloat16", "float32"}


def inferences(
    dtype: str, others: tuple[runtimes.Runtime, ...] = runtimes.RUNTIMES
) -> harness.Comparison:
    """Of a tiny network, without what compiles for long."""
    return bench_inference.compare(
        bench_train_step.Case("cifar_resnet18", 8, 4, dtype),
        "inference",
        providers=tuple(p for p in bench_inference.PROVIDERS if not p.compiled),
        runtimes=others,
        clock=clocks.host_clock,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_provider_of_an_inference_computes_the_same(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = {"OpenVINO": "openvino", "ONNX Runtime": "onnx"}
    if dtype == "bfloat16":
        del packages["ONNX Runtime"]
    for package in packages.values():
        monkeypatch.setitem(sys.modules, package, None)
    rows = {row.provider: row for row in timed(inferences(dtype), rounds=1)}
    assert rows.keys() - packages.keys() == {
        *("torchvision", "fastresnet", "stock torchvision", harness.SAME_AGAIN)
    }
    for name, row in rows.items():
        if name in packages:
            assert row.role == "peer"
            assert row.status.startswith("failed: ModuleNotFoundError: ")
            assert packages[name] in row.status
        else:
            assert row.status == "ok"
            assert row.p50 > 0


@pytest.mark.parametrize("runtime", runtimes.RUNTIMES, ids=lambda runtime: runtime.name)
def test_other_runtimes_compute_the_same(runtime: runtimes.Runtime) -> None:
    for package in ("openvino",) if runtime.name == "OpenVINO" else ("onnx", "onnxruntime"):
        pytest.importorskip(package)
        assert package in runtimes.versions()
    *_, found = inferences("float32", (runtime,)).providers
    assert (found.name, found.status) == (runtime.name, "ok")


def test_weights_in_use_have_statistics() -> None:
    weights, again = (weights_in_use("cifar_resnet18", side=8) for _ in range(2))
    assert all(torch.equal(weight, again[name]) for name, weight in weights.items())
    assert weights.keys() == initial_weights("cifar_resnet18").keys()
    means = torch.cat([w for name, w in weights.items() if name.endswith("running_mean")])
    deviations = torch.cat([w for name, w in weights.items() if name.endswith("running_var")])
    assert means.unique().numel() > 0.99 * means.numel()
    assert ((deviations - 1).abs() > 0.01).float().mean() > 0.9


def test_a_turn_begins_with_a_pause_and_an_untimed_step(monkeypatch: pytest.MonkeyPatch) -> None:
    class Time:
        def __init__(self) -> None:
            self.now, self.slept, self.steps = 0.0, [], 0

        def sleep(self, seconds: float) -> None:
            assert self.steps == 0
            self.slept.append(seconds)

        def perf_counter(self) -> float:
            return self.now

        def step(self) -> None:
            self.steps += 1
            self.now += 0.5 if self.steps > 1 else 100.0

    for least, steps in ((1.75, 4), (0.0, 1)):
        time = Time()
        monkeypatch.setattr(clocks, "time", time)
        assert clocks.TurnClock(pause=0.25, least=least)(time.step) == 0.5
        assert (time.slept, time.steps) == ([0.25], 1 + steps)


def test_roofline_is_the_best_of_what_was_tried() -> None:
    roofline = measure(sides=(64, 128), stream_bytes=1 << 20, repeats=1)
    assert roofline.multiply["bfloat16"].rate >= roofline.multiply["float32"].rate > 0
    assert roofline.multiply["float32"].name.startswith("torch.mm float32")
    assert roofline.bandwidth.rate > 0
    # 200 GFLOP at 100 a second, 10 GB at 10.
    assert ROOFLINE.floor("bfloat16", flops=200e9, nbytes=10e9) == 2
    assert ROOFLINE.floor("bfloat16", flops=1e9, nbytes=40e9) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_step_holds_what_the_step_needs() -> None:
    case = bench_train_step.Case("resnet18", 64, 8, "float32")
    usage = bench_train_memory.measured(case, "fastresnet")
    assert isinstance(usage, bench_train_memory.Usage), usage
    # At least the gradients: 11.7 million parameters in float32.
    assert min(usage.peaks) > 44
    assert len(usage.losses) == 1 + bench_train_memory.STEPS


def memory_rows(
    monkeypatch: pytest.MonkeyPatch, ours: bench_train_memory.Usage | str
) -> list[harness.Row]:
    case = bench_train_memory.CASES[0]
    peer = bench_train_memory.Usage(900.0, [1000.0, 1010.0, 990.0], [6.9, 6.8], "0")
    monkeypatch.setattr(
        bench_train_memory, "measured", lambda _, name: ours if name == "fastresnet" else peer
    )
    return bench_train_memory.compare(case)


def test_memory_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = bench_train_memory.Usage(910.0, [600.0], [6.91, 6.79], "0")
    peer, ours, same = memory_rows(monkeypatch, usage)
    assert (peer.p50, ours.p50, same.p50) == (1000.0, 600.0, 1000.0)
    assert {row.better for row in (peer, ours, same)} == {"lower"}
    assert ours.figures == {"MiB idle": 910.0}
    _, other, _ = memory_rows(monkeypatch, replace(usage, losses=[6.91, 2.0]))
    assert other.status.startswith("failed: losses")
    assert other.p50 is None
    _, crashed, _ = memory_rows(monkeypatch, "failed: exit status -9")
    assert (crashed.status, crashed.p50) == ("failed: exit status -9", None)


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0734, "0.0734"), (12.34, "12.3"), (999.9, "1,000"), (215678, "216,000")]
)
def test_figures_have_three_digits_and_no_exponent(value, shown):
    assert report.figure({"p50": value, "status": "ok"}) == shown


def test_report_of_every_suite(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for position in ("middle", "last"):
        for mode in bench_conv_layers.MODES:
            case = conv_case(position, mode=mode)
            harness.append(timed(bench_conv_layers.compare(case, ROOFLINE)))
    # Of another network one layer of two: in the table of layers, in no sum.
    part = bench_conv_layers.compare(conv_case(architecture="part"), ROOFLINE)
    path = harness.append(timed(part))
    usage = bench_train_memory.Usage(910.0, [700.0], [6.9, 6.8], "0")
    harness.append(memory_rows(monkeypatch, usage))
    slow = comparison_of(0.0, 0.0, bar=2.3)
    slow.suite = "train_step"
    slow.check({"a": torch.ones(4)})
    slow.providers[0].seconds, slow.providers[1].seconds = [1.0, 1.0], [2.0, 2.0]
    slow._same_again = [1.0, 1.0]
    rows = slow.rows()
    harness.append(rows)
    slow.suite = "inference"
    harness.append(slow.rows())
    # A suite that has no plot.
    slow.suite = "data"
    harness.append(slow.rows())
    # Rows from before there were further figures, of an earlier run of the same case.
    old = [json.loads(json.dumps(vars(row))) for row in rows]
    for row in old:
        del row["figures"], row["better"]
        row |= {"timestamp": "2026-01-01T00:00:00+00:00", "p50": 123.0}
    (results / "train_step-old.jsonl").write_text("".join(json.dumps(row) + "\n" for row in old))

    monkeypatch.setattr(sys, "argv", ["report.py"])
    report.main()
    readme, page = report.README.read_text(), report.PAGE.read_text()
    assert readme.startswith("before\n")
    assert readme.endswith("after\n")
    assert "old" not in readme
    assert "0.50 (slower), below the aim of 2.3" in readme
    assert "123" not in page
    assert "**0.70**, above the aim of 0.65" in readme
    assert "tiny-6-b3-float32, backward" in readme
    assert report.SUITES["data"] in readme
    assert "part-6-b3-float32" not in readme
    assert "part-6-b3-float32-16x6x6-24-3x3-middle-forward" in page
    assert "float32 50 GFLOP/s (torch.mm), 10.0 GB/s (copy)" in page
    assert "(benchmarks/results/conv_layers.png)" in readme
    assert "(../benchmarks/results/conv_layers.png)" in page
    assert {p.stem for p in results.glob("*.png")} == set(report.PLOTTED)
    assert report.SUITES["inference"] in readme
    assert path.name.startswith("conv_layers-")

    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["report.py", "--suite", "train_step"])
    report.main()
    assert "| case | 1 | 0.5 |" in capsys.readouterr().out


def test_sums_count_each_layer_as_often_as_the_network_has_it() -> None:
    rows = [
        {
            **{"role": role, "provider": role, "p50": 1.0, "figures": {"ms": ms}},
            "config": {
                **{"network": "net", "mode": "forward", "layers": 2},
                **{"count": count, "floor_seconds": 0.001},
            },
        }
        for count, ms, role in ((1, 10.0, "baseline"), (3, 20.0, "baseline"))
    ]
    found = report.network_sums([report.Result({"torch": row}) for row in rows])
    assert [total.seconds("baseline") for total in found] == [pytest.approx(0.07)]
    assert found[0].floor_seconds == pytest.approx(0.004)
    assert report.network_sums([report.Result({"torch": rows[0]})]) == []


@pytest.mark.parametrize(
    ("ratio", "noise", "bar", "lower", "text"),
    [
        (1.5, 0.1, 1.2, False, "**1.50**"),
        (1.05, 0.1, None, False, "no difference (1.05)"),
        (0.8, 0.1, None, False, "0.80 (slower)"),
        (0.6, 0.1, 0.65, True, "**0.60**"),
        (1.3, 0.1, 0.65, True, "1.30 (more), above the aim of 0.65"),
        (None, 0.1, 1.0, False, "failed"),
    ],
)
def test_verdicts(ratio, noise, bar, lower, text) -> None:
    assert report.verdict(ratio, noise, bar, lower=lower) == text


def test_the_best_peer_may_be_stock() -> None:
    def row(provider: str, role: str, p50: float) -> dict[str, object]:
        return {"provider": provider, "role": role, "p50": p50, "status": "ok"}

    rows = {
        row["provider"]: row
        for row in (
            row("torchvision", "baseline", 8.0),
            row("torch.compile", "peer", 7.0),
            row("fastresnet", "ours", 20.0),
            row("stock torchvision", "context", 10.0),
            row("torch, convolution alone", "context", 40.0),  # less work
        )
    }
    assert report.Result(rows).ratio == 2.0


def test_context_computes_the_convolution_only() -> None:
    link = bench_conv_layers.make_link(conv_case("last", mode="backward"))
    alone, whole = TorchConvolution(link), Torch(link)
    assert torch.equal(alone.forward(), whole.forward()[0])
    assert alone.backward_results() == {}


@pytest.mark.parametrize("case", ["files", "memory"])
def test_loaders_are_given_the_same_work(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"SIZE": 32, "BATCH": 2, "FILES": 4, "REPEATS": 1, "SMALL_BATCH": 8}.items():
        monkeypatch.setattr(bench_data, name, value)
    if case == "files":
        comparison = bench_data.compare_files(bench_data.Case("tiny", 96, 64), tmp_path)
        names = {"PIL + torchvision v2", "torchvision.io + v2", "fastresnet"}
        assert names <= {provider.name for provider in comparison.providers}
    else:
        comparison = bench_data.compare_small(24)
    assert [provider.status for provider in comparison.providers] == ["ok"] * len(
        comparison.providers
    )
    rows = timed(comparison, rounds=1)
    assert all(row.p50 > 0 for row in rows)
    assert all(0 <= row.errors["grey levels"] < 1 for row in rows if row.role != "noise")


def test_a_loader_whose_pixels_are_others_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_data, "SMALL_BATCH", 8)
    comparison = bench_data.compare_small(8)
    truth = torch.rand(8, 3, 32, 32, dtype=torch.float64)
    bench_data.check_pixels(comparison, truth)
    assert {provider.status.partition(":")[0] for provider in comparison.providers} == {"failed"}


def accuracy_race(monkeypatch: pytest.MonkeyPatch, **changes) -> list[list[harness.Row]]:
    """Two epochs of two steps."""
    monkeypatch.setattr(bench_time_to_accuracy, "WORKERS", 0)
    recipe = apply_overrides(
        RECIPES["cifar10-fast"](),
        ["schedule.epochs=2", "schedule.sizes=8,16", "data.batch_size=8"],
    )
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (16, 32, 32, 3), generator=generator, dtype=torch.uint8)
    known = ImageSet(images, torch.arange(16) % 2)
    return bench_time_to_accuracy.race(recipe, known, known, classes=10, **changes)


def test_time_to_an_accuracy(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows_of = accuracy_race(monkeypatch, targets=[0.0, 1.1])
    for reached, rows in zip((True, False), rows_of, strict=True):
        assert [row.role for row in rows] == ["baseline", "ours"]
        for row in rows:
            first, second = (row.figures[f"s after epoch {epoch}"] for epoch in (1, 2))
            assert 0 < first < second
            assert row.figures["images/s"] == pytest.approx(2 * 16 / second)
            assert row.p50 == (first if reached else None)
            assert row.status.startswith("ok" if reached else "failed: ")
            assert (row.better, row.bar) == ("lower", 0.5)
        harness.append(rows)
    monkeypatch.setattr(sys, "argv", ["report.py"])
    report.main()
    readme = report.README.read_text()
    assert "fashion-mnist-as-cifar10-0%" in readme
    assert "| failed | failed | failed | unknown |" in readme


def test_a_race_ends_when_both_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    (rows,) = accuracy_race(monkeypatch, targets=[0.0])
    assert all("s after epoch 1" in row.figures for row in rows)
    assert all("s after epoch 2" not in row.figures for row in rows)


@pytest.mark.parametrize("wrong", ["pixels", "weights"])
def test_a_race_of_other_work_is_refused(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make = bench_time_to_accuracy.trainings

    def changed(*arguments, **options) -> list[bench_time_to_accuracy.Training]:
        peer, ours = make(*arguments, **options)
        with torch.no_grad():
            if wrong == "pixels":
                ours.test_loader._shift += 0.5
            else:
                ours.model.fc.weight *= 2
        return [peer, ours]

    monkeypatch.setattr(bench_time_to_accuracy, "trainings", changed)
    message = "grey levels apart" if wrong == "pixels" else "our logits are"
    with pytest.raises(ValueError, match=message):
        accuracy_race(monkeypatch, targets=[0.0])
