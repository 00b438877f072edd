# SPDX-License-Identifier: Apache-2.0
"""Modules that run on the fused operators with torch's parameters, buffers and names."""

from .batch_norm import BatchNormAct2d
from .blocks import BasicBlock, Bottleneck
from .sequential import FusedSequential
from .sync import SyncBatchNorm, sync_batch_norm

__all__ = [
    "BasicBlock",
    "BatchNormAct2d",
    "Bottleneck",
    "FusedSequential",
    "SyncBatchNorm",
    "sync_batch_norm",
]
