# SPDX-License-Identifier: Apache-2.0
"""Whether there are convolutions of our own here: not on processors without AVX2, nor where the
library is switched off."""

from __future__ import annotations

import pytest
import torch
from layouts import channels_last

from fastresnet import ops

with torch.no_grad():
    has_ours = ops.has_conv_relu_kernel(channels_last(1, 8, 2, 2), torch.ones(8, 8, 1, 1))
needs_ours = pytest.mark.skipif(not has_ours, reason="no convolutions of our own here")
