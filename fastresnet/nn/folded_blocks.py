# SPDX-License-Identifier: Apache-2.0
"""Residual blocks in inference: one :func:`fastresnet.ops.conv_relu` a convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from .batch_norm import is_relu
from .folding import Step, may_fold, run_steps
from .links import Link
from .residual import as_link


class Block(Protocol):
    """What a residual block is made of; as in :func:`fastresnet.nn.residual.residual_block`."""

    links: list[Link]
    relu: nn.Module
    downsample: nn.Module | None


def folded_blocks(blocks: Sequence[Block], x: Tensor) -> Tensor | None:
    """Residual blocks without gradients, one behind another, or None (and nothing done) where
    something asks for more than the fused convolutions do.

    Args:
        blocks: at least one.
        x: [N, C, H, W].
    """
    if not may_fold(x):
        return None
    steps: list[Step] = []
    for block in blocks:
        links, downsample = block.links, block.downsample
        projection = as_link(downsample) if downsample is not None else None
        if (downsample is not None and projection is None) or not is_relu(block.relu):
            return None
        source = residual = len(steps)
        if projection is not None:
            steps.append(Step(projection, source, relu=False))
            residual = len(steps)
        for link in links[:-1]:
            steps.append(Step(link, source))
            source = len(steps)
        steps.append(Step(links[-1], source, residual))
    return run_steps(steps, x)
