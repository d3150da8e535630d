"""Several processes that work on a stream of items, in its order. They end when the process that started them ends."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool


def map_in_order(function: Callable, items: Iterable, workers: int, make: Callable, *args) -> Iterator:
    """function(tool, item) for each item. The tool is make(*args), which each process calls once.

    A few items for each worker wait, so that memory does not grow with the data. ValueError if a process dies.
    """
    context = multiprocessing.get_context("spawn")  # the same everywhere, and safe beside other libraries' threads
    pending = deque()
    with ProcessPoolExecutor(workers, context, initializer=begin, initargs=(make, *args)) as pool:
        try:
            for item in items:
                pending.append(pool.submit(work, function, item))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise ValueError("--workers: a process died, perhaps for lack of memory; use fewer") from None
        finally:
            pool.shutdown(cancel_futures=True)


def begin(make: Callable, *args):
    """Begin a process: make its tool, and watch its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process to handle
    threading.Thread(target=end_with_parent, daemon=True).start()
    global tool
    tool = make(*args)


def end_with_parent():
    """Wait for the parent's end. A parent that was killed tells nobody."""
    multiprocessing.parent_process().join()
    os._exit(1)


def work(function: Callable, item):
    """function() with the process' own tool."""
    return function(tool, item)
