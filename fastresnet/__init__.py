# SPDX-License-Identifier: Apache-2.0
"""Residual networks with fused kernels: torchvision's models, signatures and weights, faster.

``fastresnet.resnet50(...)`` stands in for ``torchvision.models.resnet50(...)``, and
``fastresnet.convert(model)`` fuses a model that exists already.
"""

from . import models, nn, ops, optim
from .memory import release_memory
from .models import *  # noqa: F403
from .models import __all__ as _model_names

__version__ = "0.1.0"

__all__ = ["models", "nn", "ops", "optim", "release_memory", *_model_names]
