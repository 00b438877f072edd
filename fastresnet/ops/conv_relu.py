# SPDX-License-Identifier: Apache-2.0
"""A convolution with bias, residual sum and ReLU as one pass, for inference: cuDNN's, by way of
``aten::cudnn_convolution_relu`` and ``aten::cudnn_convolution_add_relu``.

Neither has a gradient. Where :func:`has_conv_relu_kernel` is false the twin in
:mod:`fastresnet.ops.reference` runs, and differentiates.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .. import _extension
from . import reference
from .bn_act import KERNEL_DTYPES

_OPERATOR = "aten::cudnn_convolution_relu"
_MOST_VALUES = 2**31  # of a tensor, as far as 32-bit offsets reach
# What cuDNN had no engine for, so that it is asked once.
_refused: set[tuple] = set()


def has_conv_relu_kernel(x: Tensor, weight: Tensor, groups: int = 1) -> bool:
    """Whether torch has the fused convolution for ``x`` and ``weight``.

    Both are float32, bfloat16 or float16 on one device, ``x`` [N, C, H, W] is dense in
    channels_last, there is one group, and a pixel's channels, of input and output, are a multiple
    of 16 bytes. Not where cuDNN is switched off, not where deterministic algorithms are asked for,
    which these operators do not promise, and not where gradients are recorded.
    """
    channels = 16 // x.element_size()
    return (
        groups == 1
        and _extension.takes(x.device)
        and _is_registered(x.device.type)
        and not torch.is_grad_enabled()
        and not torch.are_deterministic_algorithms_enabled()
        and not torch.backends.cudnn.deterministic
        and x.dtype in KERNEL_DTYPES
        and weight.dtype in KERNEL_DTYPES
        and weight.device == x.device
        and x.dim() == 4
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and weight.shape[0] % channels == 0
        and weight.shape[1] % channels == 0
        and x.numel() // x.shape[1] * max(weight.shape[:2]) < _MOST_VALUES
    )


def conv_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> Tensor:
    """``relu(conv2d(x, weight, bias) + residual)``.

    Args:
        x: [N, C, H, W].
        weight: [K, C / groups, height, width]; used in the dtype of ``x``, like ``bias``.
        bias: [K].
        residual: [N, K, H', W'] like the result, or None.
        stride, padding, dilation, groups: as in :func:`torch.nn.functional.conv2d`, the first three
            for both dimensions.

    Returns:
        [N, K, H', W'] in the dtype of ``x``; summed up in float32 and rounded once where the kernel
        runs.

    Raises:
        RuntimeError: shapes do not fit each other.
    """
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    case = (x.dtype, x.device, x.shape, weight.shape, *geometry.values(), residual is None)
    if not has_conv_relu_kernel(x, weight, groups) or case in _refused:
        return reference.conv_relu(x, weight, bias, residual, **geometry)
    sizes = ([stride] * 2, [padding] * 2, [dilation] * 2, groups)
    try:
        if residual is None:
            return torch.ops.aten.cudnn_convolution_relu.default(x, weight, bias, *sizes)
        return torch.ops.aten.cudnn_convolution_add_relu.default(
            x, weight, residual, 1.0, bias, *sizes
        )
    except RuntimeError as error:
        if "unable to find an engine" not in str(error):
            raise
        _refused.add(case)
        warnings.warn(
            f"cuDNN has no engine for a {x.dtype} convolution of {tuple(x.shape)} with "
            f"{tuple(weight.shape)} and ReLU in one; it runs as two",
            stacklevel=2,
        )
        return reference.conv_relu(x, weight, bias, residual, **geometry)


def _is_registered(device_type: str) -> bool:
    cudnn = torch.backends.cudnn
    if device_type == "cuda" and not (
        torch.version.hip is None and cudnn.is_available() and cudnn.enabled
    ):
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(_OPERATOR, device_type.upper())
