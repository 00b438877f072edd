# SPDX-License-Identifier: Apache-2.0
"""Downloads through torchvision's data sets, and the folder that they go to."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CONNECT_SECONDS = 15.0


def cache_folder() -> Path:
    """Where downloads go that have no folder named for them."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fastresnet"


def torchvision_download(name: str, root: Path) -> None:
    """Has torchvision's data set of this name download its files into its folder in ``root``.

    Raises:
        OSError, RuntimeError: there is no network, or the files are not the expected ones.
    """
    from torchvision import datasets

    with _connect_timeout(_CONNECT_SECONDS):
        getattr(datasets, name)(str(root), train=True, download=True)


@contextmanager
def _connect_timeout(seconds: float) -> Iterator[None]:
    # torchvision opens its URLs without a timeout: behind a firewall that drops packets, the
    # fallback would come only after minutes of silence.
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
