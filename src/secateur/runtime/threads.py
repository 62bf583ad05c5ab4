"""Who runs the tasks of a layer: threads of our own, or those that PyTorch has already."""

from __future__ import annotations

import ctypes
import os
import weakref
from functools import cache
from typing import Any, Protocol

import torch

from secateur.core.errors import UsageError
from secateur.runtime.library import load

# A child of fork() has none of the threads that OpenMP believes it has.
_PROCESS = os.getpid()


class Workers(Protocol):
    """Threads for :meth:`Layer.run`; the calling one works, too.

    Args:
        address: Of the native object.
        threads: How many there are.
        run: The native function that runs tasks on it.
    """

    address: int

    @property
    def threads(self) -> int: ...

    @property
    def run(self) -> ctypes.c_void_p: ...


class Pool:
    """A few threads of our own. The calling thread works too, so 1 starts none.

    Several threads may use one pool: whoever finds it busy does its work alone.

    Args:
        threads: How many threads work at a run, the caller among them; 1 to 256.

    Example:
        >>> Pool(2).threads
        2
    """

    def __init__(self, threads: int) -> None:
        if not 1 <= threads <= 256:
            raise UsageError(
                f"a pool of {threads} threads",
                "1 to 256 are possible",
                "the thread that calls is one of them, and more than that wait for each other",
                "give as many threads as there are cores",
            )
        library = load()
        self.address = library.secateur_pool_create(threads)
        if not self.address:
            raise MemoryError(f"a pool of {threads} threads")
        destroyed_with(self, library.secateur_pool_destroy)

    @property
    def threads(self) -> int:
        """How many there are; fewer than asked if the system gave no more."""
        return int(load().secateur_pool_threads(self.address))

    @property
    def run(self) -> ctypes.c_void_p:
        """The native function that runs tasks on it."""
        return ctypes.cast(load().secateur_pool_run, ctypes.c_void_p)


class Team:
    """A team of threads of an OpenMP runtime that the program has already.

    Args:
        parallel: The address of that runtime's ``GOMP_parallel``.
        threads: How many threads work at a run at most, the caller among them.

    Example:
        >>> found = openmp_of_torch()
        >>> found is None or Team(found, 2).threads == 2
        True
    """

    def __init__(self, parallel: ctypes.c_void_p, threads: int) -> None:
        library = load()
        self.threads = threads
        self.address = library.secateur_team_create(parallel, threads)
        if not self.address:
            raise MemoryError(f"a team of {threads} threads")
        destroyed_with(self, library.secateur_team_destroy)

    @property
    def run(self) -> ctypes.c_void_p:
        """The native function that runs tasks on it."""
        return ctypes.cast(load().secateur_team_run, ctypes.c_void_p)


@cache
def openmp_of_torch() -> ctypes.c_void_p | None:
    """``GOMP_parallel`` of the OpenMP runtime that PyTorch loaded; None where it has none.

    Example:
        >>> openmp_of_torch() is None or bool(openmp_of_torch().value)
        True
    """
    if not torch.backends.openmp.is_available():
        return None
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p)
    except (AttributeError, OSError, TypeError):  # another runtime, or none that can be seen
        return None


def workers_beside_torch(threads: int) -> Workers:
    """Threads for layers between PyTorch's own operators.

    After each of its operators PyTorch's threads spin for some milliseconds, in which they would keep
    a pool of ours from running. So its threads are borrowed where that is possible.

    Args:
        threads: How many work at a run, the caller among them; 1 to 256.

    Example:
        >>> workers_beside_torch(1).threads
        1
    """
    parallel = openmp_of_torch()
    if threads == 1 or parallel is None or os.getpid() != _PROCESS:
        return Pool(threads)
    return Team(parallel, threads)


def destroyed_with(owner: Any, destroy: Any) -> None:
    """Free a native object with the Python object that has its ``address``."""
    # Not at the end of the process: daemon threads may still run it then, without Python's lock.
    weakref.finalize(owner, destroy, owner.address).atexit = False
