# SPDX-License-Identifier: Apache-2.0
"""Convolutions with the batch norm beside them: the graphs' twins, the choice between a graph and
its parts, and the segments of a network that are made of both. On the CPU, where the twins stand in
for cuDNN."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from layouts import channels_last
from tolerances import assert_no_worse, error
from torch import Tensor, nn

import fastresnet
from fastresnet import ops
from fastresnet.cli.info import environment
from fastresnet.nn import segments, stages
from fastresnet.ops import Geometry, Normalized, choice, conv_graph

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
_ops = torch.ops.fastresnet


@pytest.fixture(autouse=True)
def _nothing_is_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choice, "policy", "timed")
    forget(monkeypatch)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a new process knows."""
    monkeypatch.setattr(choice, "_choices", {})
    monkeypatch.setattr(choice, "_known", {})
    monkeypatch.setattr(choice, "_has_run", set())
    monkeypatch.setattr(choice, "_read", False)


# ---- Both ways to a result.


class Sizes:
    """A convolution that has an output, drawn at random."""

    def __init__(self, draw: Callable) -> None:
        self.batch = draw(st.integers(1, 3))
        self.groups = draw(st.sampled_from([1, 1, 2]))
        self.channels = self.groups * draw(st.integers(1, 9))
        self.out_channels = self.groups * draw(st.integers(1, 9))
        self.sides = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
        self.kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
        self.geometry = Geometry(
            draw(st.integers(1, 3)), draw(st.integers(0, 2)), draw(st.integers(1, 2)), self.groups
        )

    @property
    def out_sides(self) -> list[int]:
        stride, padding, dilation, _ = self.geometry
        pairs = zip(self.sides, self.kernel, strict=True)
        return [(side + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for side, k in pairs]

    def x(self, dtype: torch.dtype) -> Tensor:
        return channels_last(self.batch, self.channels, *self.sides, dtype=dtype)

    def weight(self, dtype: torch.dtype) -> Tensor:
        width = self.channels // self.groups
        return channels_last(self.out_channels, width, *self.kernel, dtype=dtype)

    def grad(self, dtype: torch.dtype) -> Tensor:
        return channels_last(self.batch, self.out_channels, *self.out_sides, dtype=dtype)


sizes = st.composite(Sizes)()
each = settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])


def norm_of(x: Tensor, training: bool = True) -> Normalized:
    mean, var = ops.reference.bn_stats(x)
    weight, bias = torch.rand(x.shape[1]) - 0.5, torch.randn(x.shape[1])
    return Normalized(x, mean, var, weight, bias, 1e-3, training)


def assert_alike(found: tuple[Tensor | None, ...], expected: tuple[Tensor | None, ...]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is None:
            continue
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        if ours.dim() == 4:
            assert ours.is_contiguous(memory_format=torch.channels_last)
        scale = max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * scale)


@each
@given(sizes=sizes)
def test_statistics(sizes: Sizes) -> None:
    assume(min(sizes.out_sides) > 0)
    x, weight = sizes.x(torch.float32), sizes.weight(torch.float32)
    found = conv_graph._conv_stats_fused(x, weight, *sizes.geometry)
    assert_alike(found, conv_graph._conv_stats_apart(x, weight, *sizes.geometry))
    stride, padding, dilation, groups = sizes.geometry
    y = F.conv2d(x.double(), weight.double(), None, stride, padding, dilation, groups)
    var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
    assert_alike(found, (y.float(), mean.float(), var.float()))


@each
@given(sizes=sizes, training=st.booleans())
def test_back_through_relu_and_batch_norm(sizes: Sizes, training: bool) -> None:
    assume(min(sizes.out_sides) > 0)
    x = norm_of(sizes.x(torch.float32), training)
    assume(x.x.numel() > x.x.shape[1])
    arguments = (sizes.grad(torch.float32), sizes.weight(torch.float32), *x, *sizes.geometry)
    found = conv_graph._bn_relu_fused(*arguments)
    assert_alike(found, conv_graph._bn_relu_apart(*arguments))


@each
@given(sizes=sizes, training=st.booleans(), dual=st.booleans())
def test_back_through_a_join(sizes: Sizes, training: bool, dual: bool) -> None:
    assume(min(sizes.out_sides) > 0)
    x, residual = (norm_of(sizes.x(torch.float32), training) for _ in range(2))
    assume(x.x.numel() > x.x.shape[1])
    _, mask = _ops.bn_add_relu.default(*x[:5], residual.x, x.eps, training)
    own = (x.x, x.mean, x.var, x.weight, x.eps, training)
    other = (*residual[:4], residual.eps) if dual else (None, None, None, None, 0.0)
    first = (sizes.grad(torch.float32), sizes.weight(torch.float32), sizes.x(torch.float32), mask)
    arguments = (*first, *own, *other, *sizes.geometry)
    found = conv_graph._join_fused(*arguments)
    assert_alike(found, conv_graph._join_apart(*arguments))


@each
@given(sizes=sizes)
def test_back_to_a_sum(sizes: Sizes) -> None:
    assume(min(sizes.out_sides) > 0)
    addend = sizes.x(torch.float32)
    arguments = (sizes.grad(torch.float32), sizes.weight(torch.float32), addend, *sizes.geometry)
    found = _ops.conv_dgrad_add.default(*arguments)
    before = addend.clone()
    assert_alike((found,), (conv_graph._dgrad_add_apart(*arguments),))
    assert torch.equal(addend, before)


@pytest.mark.parametrize("dual", [False, True], ids=["single", "dual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operators_are_sound(dtype: torch.dtype, dual: bool) -> None:
    x, residual = (norm_of(channels_last(2, 16, 5, 4, dtype=dtype)) for _ in range(2))
    weight = channels_last(8, 16, 3, 3, dtype=dtype)
    grad, geometry = channels_last(2, 8, 3, 2, dtype=dtype), (2, 1, 1, 1)
    mask = torch.randint(0, 256, (2, 5, 4, 2), dtype=torch.uint8)
    scale = _ops.bn_scale.default(x.var, x.weight, x.eps)
    other = (residual.x, residual.mean) if dual else (None, None)
    both = (grad, weight, residual.x, mask, x.x, x.mean, *other, *geometry)
    vectors = (x.x, x.mean, x.var, x.weight)
    sums = torch.randn(3, 16)
    calls = {
        _ops.bn_scale: (x.var, x.weight, x.eps),
        _ops.conv_sums: (x.x, weight, *geometry),
        _ops.bn_stats_of_sums: (x.x, sums[:2]),
        _ops.conv_dgrad_add: (grad, weight, x.x, *geometry),
        _ops.bn_relu_conv_dgrad: (grad, weight, x.x, x.mean, scale, x.bias, *geometry),
        _ops.bn_add_relu_conv_dgrad: both,
        _ops.bn_backward_of_sums: (x.x, sums[:2], *vectors, 1e-3, True),
        _ops.bn_add_bn_backward_of_sums: (
            *(x.x, sums, *vectors, *residual[:4]),
            *(1e-3, 1e-2, True),
        ),
    }
    for operator, arguments in calls.items():
        torch.library.opcheck(operator.default, arguments)


# ---- The choice.


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> dict[str, list]:
    """Lets the CPU choose, by times that a test sets; what was timed and what ran."""
    seen: dict[str, list] = {"times": [], "ran": [], "capturing": [False]}
    monkeypatch.setattr(choice, "DEVICES", ("cpu",))
    monkeypatch.setattr(choice, "_milliseconds", lambda *_: seen["times"].pop(0))
    monkeypatch.setattr(choice, "_is_capturing", lambda _: seen["capturing"][0])
    return seen


def doubled(seen: dict[str, list], name: str, error: Exception | None = None, off: float = 1.0):
    def way(x: Tensor, factor: int) -> Tensor:
        seen["ran"].append((name, tuple(x.shape)))
        if error is not None:
            raise error
        return factor * x * off

    return way


def run_both(seen: dict[str, list], x: Tensor | None = None, **fused) -> Tensor:
    x = torch.ones(2, 3, 4, 4, dtype=torch.bfloat16) if x is None else x
    return choice.choose("double", doubled(seen, "fused", **fused), doubled(seen, "apart"), (x, 2))


def the_choice() -> choice.Choice:
    (problems,) = choice.choices().values()
    (found,) = problems.values()
    return found


@pytest.mark.parametrize("faster", ["fused", "apart"])
def test_the_faster_way_is_taken(watched: dict[str, list], faster: str) -> None:
    watched["times"] += [1.0, 3.0, 1.0, 2.0, 9.0, 2.0] if faster == "fused" else [3.0, 1.0] * 3
    for _ in range(3):
        watched["ran"].clear()
        assert run_both(watched).eq(2).all()
        assert watched["ran"][-1][0] == faster
    assert len(watched["ran"]) == 1
    assert the_choice().fused == (faster == "fused")
    assert "ms fused" in the_choice().reason
    assert choice.choices() == {"cpu": {"double bfloat16 2x3x4x4 2": the_choice()}}


def test_another_size_is_another_problem(watched: dict[str, list]) -> None:
    watched["times"] += [1.0, 2.0] * 3 + [2.0, 1.0] * 3
    run_both(watched)
    run_both(watched, torch.ones(2, 3, 4, 5, dtype=torch.float16))
    assert sorted(found.fused for found in choice.choices()["cpu"].values()) == [False, True]


def test_what_is_not_possible_is_said_and_not_tried_again(watched: dict[str, list]) -> None:
    for _ in range(2):
        watched["ran"].clear()
        assert run_both(watched, error=RuntimeError("no plan\nno details")).eq(2).all()
    assert watched["ran"] == [("apart", (2, 3, 4, 4))]
    assert the_choice() == choice.Choice(False, "not possible: no plan")


def test_too_little_memory_is_no_verdict(watched: dict[str, list]) -> None:
    assert run_both(watched, error=RuntimeError("CUDA out of memory.")).eq(2).all()
    assert choice.choices() == {}
    watched["times"] += [1.0, 2.0] * 3
    run_both(watched)
    assert the_choice().fused


@pytest.mark.parametrize("off", [1.1, 0.0, float("nan"), float("inf")])
def test_a_wrong_result_is_never_used(watched: dict[str, list], off: float) -> None:
    assert run_both(watched, off=off).eq(2).all()
    assert not the_choice().fused
    assert "differs" in the_choice().reason


def test_other_mistakes_are_not_hidden(watched: dict[str, list]) -> None:
    with pytest.raises(ZeroDivisionError):
        run_both(watched, error=ZeroDivisionError())


@pytest.mark.parametrize("x", ["float32", "meta", "misaligned"])
def test_what_graphs_do_not_take_is_not_tried(watched: dict[str, list], x: str) -> None:
    values = {
        "float32": torch.ones(2, 3, 4, 4),
        "meta": torch.ones(2, 3, 4, 4, dtype=torch.bfloat16, device="meta"),
        "misaligned": torch.ones(97, dtype=torch.bfloat16)[1:].view(2, 3, 4, 4),
    }
    run_both(watched, values[x])
    assert watched["ran"] == [("apart", (2, 3, 4, 4))]


def test_determinism_is_honoured(watched: dict[str, list], monkeypatch: pytest.MonkeyPatch) -> None:
    watched["times"] += [1.0, 2.0] * 3
    run_both(watched)
    watched["ran"].clear()
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    run_both(watched)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    torch.use_deterministic_algorithms(True)
    try:
        run_both(watched)
    finally:
        torch.use_deterministic_algorithms(False)
    assert {name for name, _ in watched["ran"]} == {"apart"}


def test_nothing_is_timed_while_a_graph_is_captured(
    watched: dict[str, list], monkeypatch: pytest.MonkeyPatch
) -> None:
    watched["capturing"][0] = True
    run_both(watched)
    assert watched["ran"] == [("apart", (2, 3, 4, 4))]
    watched["capturing"][0] = False
    watched["times"] += [1.0, 2.0] * 3
    run_both(watched)
    for capturing in (True, False):
        watched["capturing"][0] = capturing
        watched["ran"].clear()
        run_both(watched)
        assert watched["ran"] == [("fused", (2, 3, 4, 4))]
    # Known to be faster from a file, but this process has no plan of it yet.
    forget(monkeypatch)
    watched["capturing"][0] = True
    watched["ran"].clear()
    run_both(watched)
    assert watched["ran"] == [("apart", (2, 3, 4, 4))]


@pytest.mark.parametrize(("policy", "way"), [("always", "fused"), ("never", "apart")])
def test_policies(
    watched: dict[str, list], monkeypatch: pytest.MonkeyPatch, policy: str, way: str
) -> None:
    monkeypatch.setattr(choice, "policy", policy)
    for _ in range(2):
        run_both(watched)
        assert watched["ran"][-1][0] == way
    assert choice.choices() == {}
    assert not choice.file().exists()
    if policy == "always":  # but not a wrong one
        run_both(watched, torch.ones(1, 1, 1, 8, dtype=torch.bfloat16), off=2.0)
        assert watched["ran"][-1][0] == "apart"


def test_choices_outlive_a_process(
    watched: dict[str, list], monkeypatch: pytest.MonkeyPatch
) -> None:
    watched["times"] += [1.0, 2.0] * 3
    run_both(watched)
    known = choice.choices()
    forget(monkeypatch)
    assert choice.choices() == known
    watched["ran"].clear()
    run_both(watched)
    assert watched["ran"] == [("fused", (2, 3, 4, 4))]


def test_processes_share_the_file(watched: dict[str, list]) -> None:
    watched["times"] += [1.0, 2.0] * 6
    run_both(watched)
    stored = json.loads(choice.file().read_text())
    stored["another GPU"] = {"a problem": [False, "slower"]}
    choice.file().write_text(json.dumps(stored))
    run_both(watched, torch.ones(1, 1, 1, 8, dtype=torch.bfloat16))
    stored = json.loads(choice.file().read_text())
    assert stored["another GPU"] == {"a problem": [False, "slower"]}
    assert len(stored["cpu"]) == 2


def test_a_damaged_file_is_told_and_replaced(watched: dict[str, list]) -> None:
    choice.file().parent.mkdir(parents=True)
    choice.file().write_text("{")
    watched["times"] += [1.0, 2.0] * 3
    with pytest.warns(UserWarning, match=r"conv_graphs\.json"):
        run_both(watched)
    assert json.loads(choice.file().read_text())["cpu"]


def test_a_folder_that_cannot_be_written_is_told(
    watched: dict[str, list], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "taken").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken"))
    watched["times"] += [1.0, 2.0] * 3
    with pytest.warns(UserWarning, match="cannot write"):
        assert run_both(watched).eq(2).all()
    assert the_choice().fused


def test_trying_leaves_random_numbers_alone(watched: dict[str, list]) -> None:
    before = torch.get_rng_state()
    watched["times"] += [1.0, 2.0] * 3
    run_both(watched)
    assert torch.equal(before, torch.get_rng_state())


def test_a_mask_is_tried_in_front_of_room() -> None:
    """A reader that takes a byte for each value would read eight times as far."""
    mask = torch.zeros(2, 5, 4, 2, dtype=torch.uint8)
    found = choice._like(mask, torch.Generator().manual_seed(0))
    assert found.shape == mask.shape
    assert found.is_contiguous()
    assert found.untyped_storage().nbytes() == 8 * mask.numel()
    assert found.float().mean() > 90


def test_an_unknown_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRESNET_CONV_GRAPHS", "yes")
    with pytest.raises(ValueError, match="must be auto, 0 or 1, got 'yes'"):
        choice._policy_from_environment()


def test_info_shows_the_choices(watched: dict[str, list]) -> None:
    assert environment()["convolution graphs"] == {"timed so far": "none"}
    watched["times"] += [1.0, 2.0] * 3
    run_both(watched)
    shown = environment()["convolution graphs"]
    assert shown["cpu: double bfloat16 2x3x4x4 2"].startswith("fused (1.0000 ms fused, 2.0000")


def test_the_public_operator_chooses(
    watched: dict[str, list], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "policy", "always")
    x, weight = channels_last(2, 8, 6, 6, dtype=torch.bfloat16), torch.randn(8, 8, 3, 3)
    found = ops.conv_stats(x, weight, stride=2, padding=1)
    assert [problem for _, _, problem in choice._choices] == [
        "conv_stats bfloat16 2x8x6x6 8x8x3x3 2 1 1 1"
    ]
    expected = ops.reference.conv_stats(x, weight, stride=2, padding=1)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


# ---- Segments.


@pytest.fixture
def segmented(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Segments on the CPU; the list holds how many blocks each run of them had."""
    monkeypatch.setitem(stages._CHAINS, "cpu", stages._run_forks)
    monkeypatch.setattr(choice, "DEVICES", ("cpu",))
    monkeypatch.setattr("fastresnet.nn.blocks.residual_block", lambda *_: None)
    seen: list[int] = []
    run = segments.run_segments

    def watched(blocks: list, x: Tensor) -> Tensor | None:
        out = run(blocks, x)
        if out is not None:
            seen.append(len(blocks))
        return out

    monkeypatch.setattr(stages, "run_segments", watched)
    return seen


class Network(nn.Module):
    """Stages of residual blocks of every kind: with and without a projection, behind one and
    behind none, strided and not."""

    def __init__(self, kind: type, groups: int = 1) -> None:
        super().__init__()
        wide = 16 * kind.expansion
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        first = [] if kind.expansion > 1 else [kind(16, 16)]
        shortcuts = [
            nn.Sequential(nn.Conv2d(channels, wide, 1, stride, bias=False), nn.BatchNorm2d(wide))
            for channels, stride in ((16, 1), (wide, 2))
        ]
        width = {"groups": groups, "base_width": 64 // groups} if groups > 1 else {}
        self.stages = nn.ModuleList(
            [
                nn.Sequential(*first, kind(16, 16, 1, shortcuts[0], **width), kind(wide, 16)),
                nn.Sequential(kind(wide, 16, 2, shortcuts[1]), kind(wide, 16), kind(wide, 16)),
            ]
        )
        self.fc = nn.Linear(wide, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).contiguous(memory_format=torch.channels_last)
        return self.fc(stages.run_stages(self.stages, x).mean((2, 3)))


KINDS = {
    "BasicBlock": (fastresnet.nn.BasicBlock, torchvision.models.resnet.BasicBlock),
    "Bottleneck": (fastresnet.nn.Bottleneck, torchvision.models.resnet.Bottleneck),
}
BLOCKS = {"BasicBlock": 6, "Bottleneck": 5}


def twins(kind: str, **arguments) -> list[nn.Module]:
    """Ours, torchvision's, and torchvision's in float64, with the same parameters."""
    mine, torchs = KINDS[kind]
    ours = Network(mine, **arguments)
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    theirs = [Network(torchs, **arguments) for _ in range(2)]
    for model in theirs:
        model.load_state_dict(ours.state_dict())
    return [ours, theirs[0], theirs[1].double()]


def images() -> Tensor:
    return torch.randn(4, 3, 12, 12)


def step(model: nn.Module, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output, gradients and buffers of a training step; of 16 bits under autocast."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype in choice.DTYPES):
        out = model(x)
    out.double().square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": x.grad, **gradients, **dict(model.named_buffers())}


def assert_trains_alike(
    models: list[nn.Module], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Ours is as near to float64 as torchvision's is; returns what ours came to."""
    ours, theirs, exact = models
    x = images()
    found, torchs = step(ours, x, dtype), step(theirs, x, dtype)
    wanted = step(exact, x.double(), torch.float64)
    assert set(found) == set(torchs) == set(wanted)
    if dtype == torch.float32:
        for key, value in wanted.items():
            assert_no_worse(found[key], torchs[key], value, key, 8 * value.abs().max().item())
        return found
    # The rounding errors of one vector of 16 values are a matter of chance; those of all are not.
    scales = {key: value.double().square().mean().sqrt() for key, value in wanted.items()}

    def pooled(results: dict[str, Tensor]) -> Tensor:
        return torch.cat([(results[k].double() / scale).flatten() for k, scale in scales.items()])

    assert_no_worse(pooled(found), pooled(torchs), pooled(wanted), "all together", 1.0)
    for key, value in wanted.items():
        assert error(found[key], value) <= 3 * error(torchs[key], value) + 1e-3 * scales[key], key
    return found


@pytest.mark.parametrize("policy", ["never", "always"])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("BasicBlock", torch.float32),
        ("BasicBlock", torch.bfloat16),
        ("BasicBlock", torch.float16),
        ("Bottleneck", torch.float32),
        ("Bottleneck", torch.bfloat16),
    ],
    ids=str,
)
def test_segments_train_as_torchvision(
    segmented: list[int],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    dtype: torch.dtype,
    policy: str,
) -> None:
    monkeypatch.setattr(choice, "policy", policy)
    assert_trains_alike(twins(kind), dtype)
    assert segmented == [BLOCKS[kind]]
    if dtype in choice.DTYPES and policy == "always":
        kinds = {problem.split()[0] for _, _, problem in choice._choices}
        expected = {"conv_stats", "dgrad_bn_relu", "dgrad_join", "dgrad_join_of_two", "dgrad_add"}
        assert kinds == expected
        assert all(found.fused for found in choice._choices.values()), choice._choices
    else:
        assert choice._choices == {}


def test_grouped_convolutions_run_in_segments(segmented: list[int]) -> None:
    assert_trains_alike(twins("Bottleneck", groups=4))
    assert segmented == [BLOCKS["Bottleneck"]]


def test_a_segment_is_one_node(segmented: list[int]) -> None:
    nodes, names = [twins("BasicBlock")[0](images()).sum().grad_fn], []
    known = set()
    while nodes:
        node = nodes.pop()
        if node in known or node is None:
            continue
        known.add(node)
        names.append(node.name())
        nodes += [parent for parent, _ in node.next_functions]
    assert names.count("_SegmentBackward") == BLOCKS["BasicBlock"]
    assert sum("Convolution" in name for name in names) == 1  # that in front of the blocks


@pytest.mark.parametrize("frozen", ["weights", "norms", "shortcuts", "in front", "all but one"])
def test_what_needs_no_gradient(segmented: list[int], frozen: str) -> None:
    models = twins("Bottleneck")
    for model in models:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(
                {
                    "weights": "conv2" not in name,
                    "norms": parameter.dim() > 1,
                    "shortcuts": "downsample.0" not in name,
                    "in front": name != "conv.weight",
                    "all but one": name == "stages.1.0.bn2.bias",
                }[frozen]
            )
    found = assert_trains_alike(models)
    assert segmented == [BLOCKS["Bottleneck"]]
    gradients = {name for name, p in models[0].named_parameters() if p.grad is not None}
    assert gradients == {name for name, p in models[0].named_parameters() if p.requires_grad}
    assert gradients <= set(found)


def test_saved_tensors_may_come_back_in_another_layout(segmented: list[int]) -> None:
    model, x = twins("Bottleneck")[0], images()
    found = []
    for context in (contextlib.nullcontext(), torch.autograd.graph.save_on_cpu(pin_memory=True)):
        with context:
            loss = model(x).square().sum()
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    assert len(segmented) == 2
    for ours, wanted in zip(*found, strict=True):
        assert torch.equal(ours, wanted)


def test_several_steps_learn_alike(segmented: list[int]) -> None:
    ours, theirs, _ = twins("BasicBlock")
    x, losses = images(), []
    for model in (ours, theirs):
        optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        run = []
        for _ in range(4):
            optimiser.zero_grad()
            loss = F.cross_entropy(model(x), torch.arange(4))
            loss.backward()
            optimiser.step()
            run.append(loss.item())
        losses.append(run)
    assert len(segmented) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < losses[0][0]


def test_a_whole_network_runs_in_segments(segmented: list[int]) -> None:
    model = fastresnet.models.resnet18(num_classes=5)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert segmented == [8]
    assert all(parameter.grad is not None for parameter in model.parameters())


def add_bias(model: nn.Module) -> None:
    conv = model.stages[1][1].conv1
    conv.bias = nn.Parameter(torch.randn(conv.out_channels).to(conv.weight.dtype))


def freeze_statistics(model: nn.Module) -> None:
    model.stages[0][0].bn2.eval()


def hook(model: nn.Module) -> None:
    model.stages[1][0].bn2.register_forward_hook(lambda *_: None)


def no_affine(model: nn.Module) -> None:
    model.stages[1][0].bn1 = nn.BatchNorm2d(16, affine=False)


def circular_padding(model: nn.Module) -> None:
    model.stages[1][0].conv2.padding_mode = "circular"
    model.stages[1][0].conv2._reversed_padding_repeated_twice = [1, 1, 1, 1]


CHANGES = [add_bias, freeze_statistics, hook, no_affine, circular_padding]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_segments_do_not_take_runs_otherwise(
    segmented: list[int], change: Callable[[nn.Module], None]
) -> None:
    models = twins("BasicBlock")
    for model in models:
        torch.manual_seed(1)
        change(model)
    models[2].double()
    assert_trains_alike(models)
    assert segmented == []


def test_no_second_derivative(segmented: list[int]) -> None:
    x = images().requires_grad_()
    model = twins("BasicBlock")[0]
    (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|differentiated twice"):
        grad.sum().backward()
    assert segmented == [BLOCKS["BasicBlock"]]


def test_one_value_a_channel_is_refused_in_torchs_words(segmented: list[int]) -> None:
    model = fastresnet.models.resnet18(num_classes=5)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(torch.randn(1, 3, 32, 32))
    assert segmented == []
