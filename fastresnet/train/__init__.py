# SPDX-License-Identifier: Apache-2.0
"""Training: typed recipes, the loop, checkpoints and reports.

Nothing here knows which network is trained or where its images come from. The loop is
``fastresnet.train.loop.Trainer``; it is not imported here, because it needs the packages of the
``train`` extra, and recipes do not.
"""

from fastresnet.train.config import ConfigError, Recipe
from fastresnet.train.overrides import apply_overrides, override
from fastresnet.train.recipes import RECIPES

__all__ = ["RECIPES", "ConfigError", "Recipe", "apply_overrides", "override"]
