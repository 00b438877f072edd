# SPDX-License-Identifier: Apache-2.0
"""Stages of residual blocks run as one chain, where nobody can look between two blocks.

In inference all of them are one call. In training:

On the CPU a block is one node (:mod:`fastresnet.nn.residual`), and is told in the chain what its
input is made of, to save that.

On CUDA it is several. A block's output is used twice, by the next block's convolution and by its
shortcut, and autograd would add the two gradients in a pass of its own: read two tensors, write a
third. In the chain they stay apart until the backward of the join in front reads both: in a
segment's node where the kernels take over all of it (:mod:`fastresnet.nn.segments`), else in that
of a join handed out twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import Fork
from .batch_norm import has_hooks
from .blocks import BasicBlock, Bottleneck
from .fold_store import forget_folds
from .folded_blocks import folded_blocks
from .join import Join
from .links import runs_as_node
from .residual import residual_block
from .running_stats import Seen, update_running_stats
from .segments import run_segments
from .sequential import FusedSequential

Block = BasicBlock | Bottleneck


def run_stages(stages: Sequence[nn.Module], x: Any, source: Join | None = None) -> Any:
    """``x`` through ``stages``, one behind another.

    Args:
        stages: any modules; chained are ``nn.Sequential`` of :class:`BasicBlock` and
            :class:`Bottleneck`.
        x: what the first is called with; chained is [N, C, H, W].
        source: what ``x`` is made of, if that is saved for backward.
    """
    is_training = torch.is_grad_enabled()
    if is_training:
        for stage in stages:
            forget_folds(stage)
    blocks = _plain_blocks(stages)
    if blocks and not is_training:
        out = folded_blocks(blocks, x)
        if out is not None:
            return out
    if blocks is not None and runs_as_node(x) and x.device.type in _CHAINS:
        return _CHAINS[x.device.type](blocks, x, source)
    for stage in stages:
        x = stage(x)
    return x


def _run_nodes(blocks: Sequence[Block], x: Tensor, source: Join | None) -> Tensor:
    seen: list[Seen] = []
    for block in blocks:
        result = residual_block(block.links, block.relu, block.downsample, x, source)
        if result is None:
            x, source = block(x), None
            continue
        x, join, of_block = result
        seen += of_block
        # A block without anything to train saves nothing.
        saved = x.requires_grad and join.is_made_of_saved(source is None)
        source = join if saved else None
    update_running_stats(seen)
    return x


def _run_forks(blocks: Sequence[Block], x: Tensor, _source: Join | None) -> Tensor:
    out = run_segments(blocks, x) if blocks else x
    if out is not None:
        return out
    fork = Fork(x, x)
    for block in blocks:
        fork = block.fork(fork)
    return fork.x


_CHAINS = {"cpu": _run_nodes, "cuda": _run_forks}


def _plain_blocks(stages: Sequence[nn.Module]) -> list[Block] | None:
    """The blocks of the stages; None where there is something else, or a hook that sees them."""
    blocks: list[Block] = []
    for stage in stages:
        if type(stage) not in (nn.Sequential, FusedSequential) or has_hooks(stage):
            return None
        blocks += list(stage)
    return blocks if all(map(_is_plain_block, blocks)) else None


def _is_plain_block(block: nn.Module) -> bool:
    """Whether it is a block of ours and no hook sees its input."""
    if type(block) not in (BasicBlock, Bottleneck):
        return False
    readers = [block, block.conv1]
    if block.downsample is not None:
        readers += list(block.downsample.modules())
    return not any(map(has_hooks, readers))
