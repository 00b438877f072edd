# SPDX-License-Identifier: Apache-2.0
"""torch's optimisers, fused, for weights in ``channels_last``.

On the CPU torch's fused steps copy each tensor that is not contiguous, as the weights of most
convolutions are not in ``channels_last``: parameter, gradient and state, there and back. Here they
are handed over as [K, height, width, C / groups], which is the order of their memory. The results
are torch's own, bit by bit, and so are hooks, states and ``state_dict``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd


class _Fused(torch.optim.Optimizer):
    def __init__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(params, *args, fused=True, **kwargs)


class SGD(_Fused, torch.optim.SGD):
    """:class:`torch.optim.SGD` with ``fused=True``.

    Args:
        params: parameters, or groups of them, as torch takes them.
        args, kwargs: those of :class:`torch.optim.SGD`, but for ``fused``.

    Raises:
        RuntimeError: ``foreach`` or ``differentiable`` is asked for.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As :meth:`torch.optim.SGD.step`, which would keep its momentum with the views."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        settings = ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")
        for group in self.param_groups:
            parameters: list[Tensor] = []
            gradients: list[Tensor] = []
            momenta: list[Tensor | None] = []
            has_sparse_grad = self._init_group(group, parameters, gradients, momenta)
            views, momenta_views = list(parameters), list(momenta)
            _view_in_memory_order(views, gradients, momenta_views)
            sgd(
                *(views, gradients, momenta_views),
                has_sparse_grad=has_sparse_grad,
                foreach=False,
                fused=True,
                grad_scale=getattr(self, "grad_scale", None),
                found_inf=getattr(self, "found_inf", None),
                **{name: group[name] for name in settings},
            )
            for parameter, old, new in zip(parameters, momenta, momenta_views, strict=False):
                if old is None:  # made in this step
                    turned = _is_out_of_order(parameter)
                    self.state[parameter]["momentum_buffer"] = (
                        new.permute(0, 3, 1, 2) if turned else new
                    )
        return loss


class _FusedInMemoryOrder(_Fused):
    """For torch's optimisers that only read the lists which their groups are gathered in."""

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> Any:
        found = super()._init_group(group, *lists)
        _view_in_memory_order(*lists)
        return found


class Adam(_FusedInMemoryOrder, torch.optim.Adam):
    """:class:`torch.optim.Adam` with ``fused=True``; arguments as :class:`SGD`'s."""


class AdamW(_FusedInMemoryOrder, torch.optim.AdamW):
    """:class:`torch.optim.AdamW` with ``fused=True``; arguments as :class:`SGD`'s."""


class Adagrad(_FusedInMemoryOrder, torch.optim.Adagrad):
    """:class:`torch.optim.Adagrad` with ``fused=True``, for parameters on the CPU; arguments as
    :class:`SGD`'s."""


def _is_out_of_order(parameter: Tensor) -> bool:
    """Whether torch would copy it: on the CPU, [K, C, height, width] in channels_last."""
    return (
        parameter.device.type == "cpu"
        and parameter.dim() == 4
        and not parameter.is_contiguous()
        and parameter.is_contiguous(memory_format=torch.channels_last)
    )


def _view_in_memory_order(parameters: list[Tensor], *others: list[Tensor | None]) -> None:
    """Replaces each parameter that is out of order by a view, and so what the other lists, of the
    same length or empty, hold of its shape at the same index."""
    for index, parameter in enumerate(parameters):
        if _is_out_of_order(parameter):
            for tensors in (parameters, *others):
                if tensors and tensors[index] is not None and tensors[index].dim() == 4:
                    tensors[index] = tensors[index].permute(0, 2, 3, 1)
