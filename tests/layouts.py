# SPDX-License-Identifier: Apache-2.0
"""Random tensors in the layout that the kernels take."""

from __future__ import annotations

import torch
from torch import Tensor


def channels_last(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normally distributed values of [N, C, H, W]."""
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
