# SPDX-License-Identifier: Apache-2.0
"""The operators in plain torch: specification, fallback and baseline in one.

Every function here has the signature of its twin in :mod:`fastresnet.ops` and takes any dtype,
layout and device that torch takes. Autograd differentiates them; with ``training=True`` the
statistics are recomputed from ``x``, so that their gradient is torch's own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bn_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of ``x`` [N, C, H, W], in at least float32."""
    values = x.detach().to(_statistics_dtype(x))
    var, mean = torch.var_mean(values, (0, 2, 3), correction=0)
    return mean, var


def bn(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    training: bool,
) -> Tensor:
    """Batch norm of ``x`` by the given statistics, or by its own where ``training``."""
    # ATen's batch norm takes the parameters in x's dtype or, for 16-bit x, in float32.
    dtype = _statistics_dtype(x)
    weight, bias = (None if p is None else p.to(dtype) for p in (weight, bias))
    if training:
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
    return F.batch_norm(x, mean.to(dtype), var.to(dtype), weight, bias, training=False, eps=eps)


def bn_relu(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    training: bool,
) -> Tensor:
    """``relu(bn(x))``."""
    return F.relu(bn(x, mean, var, weight, bias, eps=eps, training=training))


def bn_add_relu(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor,
    *,
    eps: float = 1e-5,
    training: bool,
) -> Tensor:
    """``relu(bn(x) + residual)``."""
    return F.relu(bn(x, mean, var, weight, bias, eps=eps, training=training) + residual)


def bn_add_bn_relu(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor,
    residual_mean: Tensor,
    residual_var: Tensor,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    *,
    eps: float = 1e-5,
    residual_eps: float = 1e-5,
    training: bool,
) -> Tensor:
    """``relu(bn(x) + bn(residual))``, each with its own statistics and parameters."""
    identity = bn(
        residual,
        residual_mean,
        residual_var,
        residual_weight,
        residual_bias,
        eps=residual_eps,
        training=training,
    )
    return bn_add_relu(x, mean, var, weight, bias, identity, eps=eps, training=training)


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
