# SPDX-License-Identifier: Apache-2.0
"""A convolution with bias, residual sum and ReLU as one pass, for inference: our own on the CPU; on
CUDA cuDNN's, by way of ``aten::cudnn_convolution_relu`` and ``aten::cudnn_convolution_add_relu``.

None has a gradient. Where :func:`has_conv_relu_kernel` is false the twin in
:mod:`fastresnet.ops.reference` runs, and differentiates.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .. import _extension
from . import reference
from .bn_act import KERNEL_DTYPES
from .conv import empty_output, has_conv_kernel

_OPERATOR = "aten::cudnn_convolution_relu"
_MOST_VALUES = 2**31  # of a tensor, as far as 32-bit offsets reach
# What cuDNN had no engine for, so that it is asked once.
_refused: set[tuple] = set()


class PackedWeight:
    """A convolution's weight times a factor for each output channel, as the CPU's kernel reads it:
    in an order that depends on the input's size, made where such an input is first met and kept.

    weight: [K, C / groups, height, width]; not to be changed from then on.
    scale: float32 [K]; None for ones.
    """

    def __init__(self, weight: Tensor, scale: Tensor | None = None) -> None:
        self.weight = weight
        self.scale = scale
        # By all that the choice of a method depends on; several sizes may share a tensor.
        self._of_input: dict[tuple, Tensor] = {}
        self._of_method: dict[tuple, Tensor] = {}

    def scaled(self) -> Tensor:
        """The weight times the scale."""
        if self.scale is None:
            return self.weight
        return self.weight.float() * self.scale[:, None, None, None]

    def for_input(self, x: Tensor, *geometry: int) -> Tensor:
        """Float32 values, as ``fastresnet::conv_relu`` takes them with ``x`` and ``geometry``."""
        key = (x.shape, x.dtype, torch.get_num_threads(), geometry)
        packed = self._of_input.get(key)
        if packed is None:
            tile, by_places, patches, _ = torch.ops.fastresnet.conv_method.default(
                x, self.weight, *geometry, packed=True
            )
            # Place by place, what no place of the map meets is left out.
            sides = x.shape[2:] if by_places else None
            method = (tile, patches, sides, x.dtype, geometry)
            packed = self._of_method.get(method)
            if packed is None:
                packed = torch.ops.fastresnet.conv_pack.default(x, self.scaled(), *geometry)
                self._of_method[method] = packed
            self._of_input[key] = packed
        return packed


def has_conv_relu_kernel(x: Tensor, weight: Tensor, *, stride: int = 1, groups: int = 1) -> bool:
    """Whether there is a fused convolution for ``x`` and ``weight``; not where gradients are
    recorded.

    On the CPU what :func:`fastresnet.ops.has_conv_kernel` says. On CUDA: both are float32, bfloat16
    or float16 on one device, ``x`` [N, C, H, W] is dense in channels_last, there is one group, and
    a pixel's channels, of input and output, are a multiple of 16 bytes; not where cuDNN is switched
    off, and not where deterministic algorithms are asked for, which its operators do not promise.
    """
    if torch.is_grad_enabled():
        return False
    return has_conv_kernel(x, weight, stride=stride, groups=groups) or _has_cudnn_kernel(
        x, weight, groups
    )


def _has_cudnn_kernel(x: Tensor, weight: Tensor, groups: int) -> bool:
    channels = 16 // x.element_size()
    return (
        groups == 1
        # Neither the dispatcher nor cuDNN can be asked from within a graph.
        and not torch.compiler.is_compiling()
        and _extension.takes(x.device)
        and _is_registered(x.device.type)
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
    weight: Tensor | PackedWeight,
    bias: Tensor | None,
    residual: Tensor | None = None,
    *,
    relu: bool = True,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> Tensor:
    """``relu(conv2d(x, weight, bias) + residual)``.

    Args:
        x: [N, C, H, W].
        weight: [K, C / groups, height, width]; used in the dtype of ``x``. A
            :class:`PackedWeight` spares calls on the CPU its packing.
        bias: [K]; None for zeros.
        residual: [N, K, H', W'] like the result, or None.
        relu: whether there is a ReLU at the end.
        stride, padding, dilation, groups: as in :func:`torch.nn.functional.conv2d`, the first three
            for both dimensions.

    Returns:
        [N, K, H', W'] in the dtype of ``x``; summed up in float32 and rounded once where the kernel
        runs.

    Raises:
        RuntimeError, ValueError: shapes do not fit each other.
    """
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if not has_conv_relu_kernel(x, _filters(weight), stride=stride, groups=groups):
        return reference.conv_relu(x, _unpacked(weight), bias, residual, relu=relu, **geometry)
    return launch_conv_relu(x, weight, bias, residual, relu=relu, **geometry)


def launch_conv_relu(
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None,
    residual: Tensor | None = None,
    *,
    relu: bool = True,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
) -> Tensor:
    """:func:`conv_relu` of what :func:`has_conv_relu_kernel` was asked about before."""
    geometry = (stride, padding, dilation, groups)
    filters = _filters(weight)
    if not has_conv_kernel(x, filters, stride=stride, groups=groups):
        return _by_cudnn(x, _unpacked(weight), bias, residual, relu, *geometry)
    values = weight.for_input(x, *geometry) if isinstance(weight, PackedWeight) else weight
    bias = None if bias is None else bias.float()
    return torch.ops.fastresnet.conv_relu.default(
        x, values, filters.shape, bias, residual, relu, *geometry
    )


def _filters(weight: Tensor | PackedWeight) -> Tensor:
    """Of the weight's sizes and dtype, without the scale."""
    return weight.weight if isinstance(weight, PackedWeight) else weight


def _unpacked(weight: Tensor | PackedWeight) -> Tensor:
    return weight.scaled() if isinstance(weight, PackedWeight) else weight


def _by_cudnn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
) -> Tensor:
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    case = (x.dtype, x.device, x.shape, weight.shape, *geometry.values(), residual is None)
    if not relu or case in _refused:
        return reference.conv_relu(x, weight, bias, residual, relu=relu, **geometry)
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
            stacklevel=4,
        )
        return reference.conv_relu(x, weight, bias, residual, **geometry)


def _is_registered(device_type: str) -> bool:
    cudnn = torch.backends.cudnn
    if device_type == "cuda" and not (
        torch.version.hip is None and cudnn.is_available() and cudnn.enabled
    ):
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(_OPERATOR, device_type.upper())


if _extension.has_schemas:

    @torch.library.register_fake("fastresnet::conv_relu")
    def _(x, weight, weight_size, bias, residual, relu, stride, padding, dilation, groups):
        return empty_output(x, weight_size, stride, padding, dilation)
