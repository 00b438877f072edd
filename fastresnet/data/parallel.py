# SPDX-License-Identifier: Apache-2.0
"""Work on many files at once, in threads: reading, decoding and encoding let others run."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_T = TypeVar("_T")
_R = TypeVar("_R")

Progress = Callable[[int, int], None]
"""Is told how many of how many pieces of work are done."""

_AHEAD = 4  # pieces of work a thread that are begun before their results are asked for


def map_in_order(
    function: Callable[[_T], _R], items: Iterable[_T], *, threads: int | None = None
) -> Iterator[_R]:
    """Yields ``function(item)`` for each item, in the order of the items.

    Args:
        function: called in one of the threads; what it raises is raised here.
        items: taken only a few pieces of work ahead, so there may be millions.
        threads: how many; None for one a processor that this process may use.
    """
    count = len(os.sched_getaffinity(0)) if threads is None else threads
    if count < 1:
        raise ValueError(f"expected at least 1 thread, got {count}")
    begun: deque[Future[_R]] = deque()
    pool = ThreadPoolExecutor(count)
    try:
        for item in items:
            begun.append(pool.submit(function, item))
            if len(begun) >= _AHEAD * count:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def report(
    results: Iterable[_R], total: int, progress: Progress | None, *, done: int = 0
) -> Iterator[_R]:
    """Yields the results on, telling ``progress`` of each; ``done`` were done before."""
    for result in results:
        done += 1
        if progress is not None:
            progress(done, total)
        yield result
