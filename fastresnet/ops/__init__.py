# SPDX-License-Identifier: Apache-2.0
"""The fused operators as differentiable functions, each with a plain-torch twin in
:mod:`fastresnet.ops.reference`."""

from . import choice, conv_graph, reference, reference_warp
from .avg_pool import global_avg_pool
from .bn_act import (
    KERNEL_DTYPES,
    as_kernels_take,
    bn,
    bn_add_bn_relu,
    bn_add_bn_relu_fork,
    bn_add_relu,
    bn_add_relu_fork,
    bn_relu,
    bn_stats,
    has_kernel,
)
from .conv import (
    bn_sums,
    conv_bn_backward,
    conv_stats,
    has_conv_kernel,
    launch_conv_bn_backward,
    launch_conv_stats,
)
from .conv_graph import Geometry
from .conv_relu import PackedWeight, conv_relu, has_conv_relu_kernel, launch_conv_relu
from .conv_sequence import ConvSequence
from .max_pool import bn_relu_max_pool, has_max_pool_kernel
from .reference import ConvGradients, ConvStep, Fork, Normalized
from .warp import warp

__all__ = [
    "KERNEL_DTYPES",
    "ConvGradients",
    "ConvSequence",
    "ConvStep",
    "Fork",
    "Geometry",
    "Normalized",
    "PackedWeight",
    "as_kernels_take",
    "bn",
    "bn_add_bn_relu",
    "bn_add_bn_relu_fork",
    "bn_add_relu",
    "bn_add_relu_fork",
    "bn_relu",
    "bn_relu_max_pool",
    "bn_stats",
    "bn_sums",
    "choice",
    "conv_bn_backward",
    "conv_graph",
    "conv_relu",
    "conv_stats",
    "global_avg_pool",
    "has_conv_kernel",
    "has_conv_relu_kernel",
    "has_kernel",
    "has_max_pool_kernel",
    "launch_conv_bn_backward",
    "launch_conv_relu",
    "launch_conv_stats",
    "reference",
    "reference_warp",
    "warp",
]
