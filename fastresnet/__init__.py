# SPDX-License-Identifier: Apache-2.0
"""Residual networks with fused kernels: torchvision's models, signatures and weights, faster."""

from . import ops

__version__ = "0.1.0"

__all__ = ["ops"]
