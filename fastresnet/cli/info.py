# SPDX-License-Identifier: Apache-2.0
"""``fastresnet info``: versions, what was built, and which paths are active and why."""

from __future__ import annotations

import argparse

from fastresnet.environment import environment


def run(arguments: argparse.Namespace) -> int:
    """Prints the environment, one section a topic."""
    for section, facts in environment().items():
        print(section)
        width = max(map(len, facts), default=0)
        for name, value in facts.items():
            print(f"  {name:<{width}}  {_text(value)}")
    return 0


def _text(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return str(value)
