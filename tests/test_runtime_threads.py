"""Threads beside PyTorch: its own OpenMP threads where they can be borrowed, a pool of ours elsewhere."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from secateur.runtime import accelerate, available, threads
from secateur.runtime.native import Layer, Spec, candidates
from secateur.runtime.threads import Pool, Team, openmp_of_torch, workers_beside_torch

pytestmark = pytest.mark.skipif(not available(), reason="the native library is not built")
borrowed = pytest.mark.skipif(
    openmp_of_torch() is None, reason="this PyTorch has no OpenMP runtime that can be seen"
)

BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
PARALLEL = ctypes.CFUNCTYPE(None, BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)


def sparse(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(shape, generator=generator) < 0.2
    return torch.randn(shape, generator=generator) * keep


def linear(positions: int) -> tuple[Layer, Tensor]:
    spec = Spec("linear", 80, 96)
    variant = candidates(spec, positions=positions, density=0.2)[0]
    return Layer.from_dense(sparse(80, 96), spec, variant), sparse(positions, 96, seed=1)


def convolution() -> tuple[Layer, Tensor]:
    spec = Spec("conv", 24, 8, kernel=(3, 3), pads=(1, 1, 1, 1))
    variant = candidates(spec, positions=400, density=0.2)[0]
    return Layer.from_dense(sparse(24, 8, 3, 3), spec, variant), sparse(2, 8, 20, 20, seed=1)


LAYERS: dict[str, Callable[[], tuple[Layer, Tensor]]] = {
    "one token": lambda: linear(1),
    "tokens": lambda: linear(200),
    "convolution": convolution,
}


@borrowed
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_team_computes_the_bits_of_a_pool(kind: str, count: int) -> None:
    layer, x = LAYERS[kind]()
    parallel = openmp_of_torch()
    assert parallel is not None
    for _ in range(20):
        assert torch.equal(layer.run(x, pool=Team(parallel, count)), layer.run(x, pool=Pool(count)))


@pytest.mark.parametrize("present", [0, 1, 2, 7])
def test_every_task_runs_once_however_many_threads_come(present: int) -> None:
    """A runtime may give fewer threads than were asked for; one that gives none is the planted error."""
    asked: list[int] = []

    @PARALLEL
    def parallel(body: Callable[[int], None], data: int, threads: int, flags: int) -> None:
        asked.append(threads)
        for _ in range(present):
            body(data)

    layer, x = linear(200)
    team = Team(ctypes.cast(parallel, ctypes.c_void_p), 3)
    # Fresh memory of one size comes back with what lay in it, so the right answer must not.
    wrong = [torch.full((200, 80), torch.nan) for _ in range(4)]
    del wrong
    same = torch.equal(layer.run(x, pool=team), layer.run(x, pool=Pool(3)))
    assert asked
    assert max(asked) <= 3
    assert same == (present > 0)


@borrowed
def test_a_team_may_be_used_from_many_threads() -> None:
    layer, x = linear(200)
    team, expected = workers_beside_torch(2), layer.run(x)
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(30):
            if not torch.equal(layer.run(x, pool=team), expected):
                wrong.append(number)

    running = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not wrong


@borrowed
def test_pytorch_lends_its_threads_to_accelerated_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(workers_beside_torch(2), Team)
    assert isinstance(workers_beside_torch(1), Pool)
    monkeypatch.setattr(threads, "openmp_of_torch", lambda: None)
    assert isinstance(workers_beside_torch(2), Pool)


@borrowed
def test_a_child_process_does_not_wait_for_threads_of_its_parent() -> None:
    program = """
import os, sys
import torch
from torch import nn
from secateur.runtime import accelerate

torch.set_num_threads(2)
net = nn.Sequential(nn.Linear(256, 256)).eval()
with torch.no_grad():
    net[0].weight *= torch.rand(256, 256) < 0.1
x = torch.randn(128, 256)
# A layer that stays dense is PyTorch's, which does wait for them.
accelerate(net, choose="first")
with torch.inference_mode():
    before = net(x)
    torch.randn(600, 600) @ torch.randn(600, 600)  # PyTorch's threads are there, and spin
    child = os.fork()
    if not child:
        same = torch.equal(net(x), before)
        torch.set_num_threads(1)  # as workers of data loaders do
        os._exit(0 if same and torch.equal(net(x), before) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        check=False, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (0, "")


def test_accelerated_layers_follow_the_number_of_threads() -> None:
    net = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 8)).eval()
    with torch.no_grad():
        net[0].weight.copy_(sparse(48, 64))
    x = sparse(30, 64, seed=2)
    expected, before = net(x), torch.get_num_threads()
    accelerate(net)
    try:
        with torch.inference_mode():
            for count in (1, 2, 3, 1):
                torch.set_num_threads(count)
                torch.testing.assert_close(net(x), expected)
    finally:
        torch.set_num_threads(before)
