# SPDX-License-Identifier: Apache-2.0
"""The runs of a comparison: every combination of settings that are varied, with several seeds."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote

from fastresnet.train.config import ConfigError

_SEED = "seed"


@dataclass(frozen=True)
class Variant:
    """One run: the changes to the recipe, as ``NAME=VALUE``."""

    overrides: tuple[str, ...]

    @property
    def folder(self) -> str:
        """A name for its folder that says what was changed."""
        return ",".join(quote(change, safe="=.,()[]+ ") for change in self.overrides)


def variants(vary: Sequence[str], *, seeds: Sequence[int]) -> list[Variant]:
    """All combinations of the values of ``vary``, each with every seed.

    Args:
        vary: as in ``["optim.lr=0.002,0.001", "augment.hflip=0,0.5"]``; a comma within brackets
            belongs to a value, as in ``"schedule.sizes=(16,32),(32)"``.
        seeds: the seeds; with fewer than two, that of the recipe is left as it is.

    Raises:
        ConfigError: no value, the same value or setting twice, or seeds said in both ways.
    """
    axes = [_axis(one) for one in vary]
    if len(seeds) > 1:
        axes.append([f"{_SEED}={seed}" for seed in seeds])
    names = [axis[0].partition("=")[0] for axis in axes]
    for name in names:
        if names.count(name) > 1:
            other = " (which --seeds varies)" if name == _SEED and len(seeds) > 1 else ""
            raise ConfigError(f"--vary: expected each setting once, got {name!r} twice{other}")
    return [Variant(changes) for changes in itertools.product(*axes)]


def _axis(vary: str) -> list[str]:
    name, separator, values = vary.partition("=")
    # Commas that no closing bracket follows before an opening one.
    split = [value.strip() for value in re.split(r",(?![^(\[]*[)\]])", values)]
    if not separator or not name.strip() or "" in split:
        raise ConfigError(f"--vary: expected NAME=VALUE,VALUE,..., got {vary!r}")
    if len(set(split)) < len(split):
        raise ConfigError(f"--vary: expected different values, got {vary!r}")
    return [f"{name.strip()}={value}" for value in split]
