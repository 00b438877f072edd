# SPDX-License-Identifier: Apache-2.0
"""Batch norm whose statistics are those of all processes' batches together.

The operators normalise by given statistics; here these are the merged ones (Chan et al. 1979), and
the operators take them for constants. The gradient that statistics carry comes back by way of the
weight and the bias, vectors whose values are the parameters' and whose gradients know how they
depend on mean and variance. So batch norm, ReLU, sum and max-pool stay joined in one pass. Blocks
and chains do not run as one node: theirs sums up within one process.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import ops
from .running_stats import Seen, update_running_stats

_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Shared(NamedTuple):
    """Statistics of all processes, to be taken for constants, and the vectors that go with them."""

    mean: Tensor  # [C]
    var: Tensor  # [C], biased
    weight: Tensor  # [C]
    bias: Tensor  # [C]
    count: int  # values a channel


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the batches of all processes in training; in evaluation, torch's.

    Parameters and buffers are those of torch's ``BatchNorm1d`` to ``3d``; torch's own
    ``SyncBatchNorm`` runs on GPUs only and is not fused. :func:`sync_batch_norm` makes them.
    ``process_group`` is None for the default group.
    """

    process_group: dist.ProcessGroup | None = None

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, ...] -> the same shape and dtype."""
        if not self.is_shared():
            return super().forward(input)
        # As maps of one column; -1 would not say how long that of an empty batch is.
        maps = input.reshape(*input.shape[:2], math.prod(input.shape[2:]), 1)
        maps = maps.contiguous(memory_format=torch.channels_last)
        mean, var, weight, bias, count = self.share(maps)
        self.remember(mean, var, count)
        out = ops.bn(maps, mean, var, weight, bias, eps=self.eps, training=False)
        return out.reshape(input.shape)

    def is_shared(self) -> bool:
        """Whether the statistics are to be merged with those of other processes now."""
        return (
            self.training
            and dist.is_available()
            and dist.is_initialized()
            and dist.get_world_size(self.process_group) > 1
        )

    def share(self, x: Tensor) -> Shared:
        """Measures ``x`` [N, C, H, W] and merges that with what the other processes measure.

        Raises:
            ValueError: all together have one value a channel.
        """
        mean, var, count = _Statistics.apply(x, self.process_group)
        if count < 2:
            raise ValueError(f"expected more than 1 value per channel when training, got {count}")
        fixed_mean, fixed_var = mean.detach(), var.detach()
        weight = torch.ones_like(fixed_mean) if self.weight is None else self.weight
        bias = torch.zeros_like(fixed_mean) if self.bias is None else self.bias
        weight, bias = weight.to(mean.dtype), bias.to(mean.dtype)
        scale = (fixed_var + self.eps).rsqrt()
        # In value these are 1 and 0; in gradient they are what mean and variance do.
        gain = (var + self.eps).rsqrt() / scale
        shift = (fixed_mean - mean) * scale
        return Shared(fixed_mean, fixed_var, weight * gain, bias + weight * shift, int(count))

    def remember(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Updates the running statistics where they are kept."""
        if self.training and self.track_running_stats:
            update_running_stats([Seen(self, mean, var, count)])

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.dim()}")


class _Statistics(torch.autograd.Function):
    """forward(x, group) returns mean and biased variance of each channel over all processes, and
    the number of values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None):
        count = x.numel() // x.shape[1]
        if count > 0:
            mean, var = ops.bn_stats(x)
        else:  # without values, and without weight in what follows, but not NaN
            dtype = torch.promote_types(x.dtype, torch.float32)
            mean, var = x.new_zeros((2, x.shape[1]), dtype=dtype).unbind()
        own = torch.cat([mean, var, mean.new_tensor([count])]).double()
        every = own.new_empty(dist.get_world_size(group), len(own))
        dist.all_gather(list(every), own, group=group)
        means, variances = every[:, :-1].unflatten(1, (2, -1)).unbind(1)
        counts = every[:, -1:]
        total = counts.sum()
        shares = counts / total
        merged = (shares * means).sum(0)
        merged_var = (shares * (variances + (means - merged).square())).sum(0)
        mean, var = merged.to(mean.dtype), merged_var.to(var.dtype)
        ctx.group = group
        ctx.save_for_backward(x, mean, total)
        ctx.mark_non_differentiable(total)
        return mean, var, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor, _total: Tensor):
        x, mean, total = ctx.saved_tensors
        gradients = torch.stack([grad_mean, 2 * grad_var])
        dist.all_reduce(gradients, group=ctx.group)
        shift, slope = (gradients / total.to(gradients.dtype)).unbind()
        one = torch.ones_like(mean)
        return ops.bn(x, mean, one, slope, shift, eps=0.0, training=False), None


def sync_batch_norm(model: nn.Module, process_group: dist.ProcessGroup | None = None) -> nn.Module:
    """Makes every batch norm of the model a :class:`SyncBatchNorm`, in place; parameters, buffers
    and their names stay. It is for models that are not yet wrapped.

    Args:
        model: any module.
        process_group: the processes to merge statistics with; None for all.

    Returns:
        ``model``.

    Raises:
        TypeError: a batch norm is of a class of its own, such as ``BatchNormAct2d``.
    """
    for name, module in model.named_modules():
        if type(module) in _KINDS:
            module.__class__ = SyncBatchNorm
            module.process_group = process_group
        elif isinstance(module, _KINDS):
            raise TypeError(
                f"{name}: expected torch's BatchNorm1d, 2d or 3d, got {type(module).__name__}"
            )
    return model
