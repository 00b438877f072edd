# SPDX-License-Identifier: Apache-2.0
"""The layers behind a network's convolutions in inference under autocast, which casts their weights
at every call: that takes longer than a product with one image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .batch_norm import has_hooks, is_transformed
from .fold_store import forget_folds, keep_fold, recall_fold


def classify(classifier: nn.Module, x: Any) -> Any:
    """``classifier(x)``, the weights of its layers cast once and kept
    (:mod:`fastresnet.nn.fold_store`) where autocast on the CPU casts them.

    Args:
        classifier: any module; replaced are ``nn.Linear``, by itself or in an ``nn.Sequential``.
        x: what it is called with; [N, C] there.
    """
    if torch.is_grad_enabled():
        forget_folds(classifier)
    if type(classifier) is not nn.Sequential or has_hooks(classifier):
        return _linear(classifier, x)
    for module in classifier:
        x = _linear(module, x)
    return x


def _linear(linear: nn.Module, x: Any) -> Any:
    if type(linear) is not nn.Linear or has_hooks(linear) or not _is_cast(linear, x):
        return linear(x)
    dtype = torch.get_autocast_dtype("cpu")
    images = x.to(dtype)[:, :, None, None]
    folded = recall_fold([linear], dtype)
    if folded is None:
        weight = ops.PackedWeight(linear.weight.detach()[:, :, None, None])
        if not ops.has_conv_relu_kernel(images, weight.weight):
            return linear(x)
        bias = None if linear.bias is None else linear.bias.detach().float()
        folded = weight, bias
        keep_fold([linear], dtype, folded)
    geometry = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    return ops.launch_conv_relu(images, *folded, relu=False, **geometry).flatten(1)


def _is_cast(linear: nn.Linear, x: Any) -> bool:
    return (
        type(x) is Tensor
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not is_transformed(x)
        and x.device.type == linear.weight.device.type == "cpu"
        and x.dim() == 2
        and x.shape[1] == linear.in_features
        and x.numel() > 0
        and torch.is_autocast_enabled("cpu")
        and x.dtype in ops.KERNEL_DTYPES
        and linear.weight.dtype == torch.float32 != torch.get_autocast_dtype("cpu")
    )
