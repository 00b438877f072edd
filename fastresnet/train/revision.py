# SPDX-License-Identifier: Apache-2.0
"""Which revision of the sources is running."""

from __future__ import annotations

import subprocess
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def source_revision() -> str | None:
    """git's name of the commit, with ``-dirty`` where tracked files were changed since; None where
    the package does not run from a clone."""
    try:
        # Installed into a folder within somebody else's clone it is not among its files.
        _git("ls-files", "--error-unmatch", "__init__.py")
        return _git("describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=_PACKAGE, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
