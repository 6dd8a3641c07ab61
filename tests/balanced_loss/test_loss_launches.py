"""How the CUDA kernel of `balanced_loss` is launched, and that its results do not depend on the order of threads."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from helpers import same_bits
from helpers_loss import LossProblem, make_loss_problem, solve_loss
from torch import Tensor

from attbalance_ext import AttBalanceConfig, AttBalanceLoss
from tests.emulation import Launch, emulated_cuda, guarded

SHARED = "balanced_loss_kernel<true>"  # the template argument: ranks are sorted in shared memory
WORKSPACE = "balanced_loss_kernel<false>"


def solve(problem: LossProblem, config: AttBalanceConfig | None = None) -> Launch:
    """The one launch of a call."""
    with emulated_cuda() as device:
        solve_loss(problem, config or AttBalanceConfig(), "cuda")
        (launch,) = device.launches()
    return launch


@pytest.mark.parametrize("layers", [0, 1, 4, 6, 40])
@pytest.mark.parametrize("batch", [0, 1, 8, 64, 65, 256, 1000, 4096, 5000])
def test_one_block_in_one_launch(layers: int, batch: int) -> None:
    launch = solve(make_loss_problem(layers=layers, batch=batch))
    assert launch.grid == (1, 1, 1)
    assert launch.block[1:] == (1, 1)
    assert launch.block[0] in range(32, 1025, 32)
    assert launch.block[0] >= min(batch, 1024)
    assert launch.shared_bytes <= 99 * 1024
    sorted_in_workspace = batch == 5000 and layers > 0
    assert launch.kernel.endswith(WORKSPACE if sorted_in_workspace else SHARED)


def test_a_warp_for_each_row_of_ranks() -> None:
    """The rows of L layers and of the IoU are sorted at the same time, 64 ranks to a warp."""
    threads = {
        (layers, batch): solve(make_loss_problem(layers=layers, batch=batch)).block[0]
        for layers, batch in ((6, 8), (6, 64), (6, 65), (4, 256), (6, 256), (31, 64), (32, 64))
    }
    assert threads == {
        (6, 8): 7 * 32,
        (6, 64): 7 * 32,
        (6, 65): 7 * 2 * 32,
        (4, 256): 5 * 4 * 32,
        (6, 256): 7 * 4 * 32,
        (31, 64): 32 * 32,
        (32, 64): 17 * 32,  # 33 rows in two rounds
    }


@pytest.mark.parametrize("batch", [100, 5000])
def test_nothing_is_sorted_for_a_given_rho(batch: int) -> None:
    launch = solve(make_loss_problem(batch=batch), AttBalanceConfig(rho="off"))
    assert launch.kernel.endswith(SHARED)
    assert launch.shared_bytes <= 1024
    with emulated_cuda() as device:
        AttBalanceLoss(backend="cuda")(None, torch.rand(batch, 4), torch.rand(batch, 4))
        (plain,) = device.launches()
    assert plain == launch


ORDERS = [
    {},
    {"thread_order": "reversed"},
    {"thread_order": "shuffled", "seed": 1},
    {"shared_fill": 0},
    {"shared_fill": 0x7F},
    {"multiprocessors": 1},
]


@pytest.mark.parametrize("batch", [1, 8, 64, 257, 4096, 5000])
def test_same_bits_in_any_order_and_from_any_shared_memory(batch: int) -> None:
    problem = make_loss_problem(layers=3, batch=batch, stages=2, ties=True, invalid=batch > 1)
    problem.in_box[1, ::7] = torch.nan
    solutions = []
    for order in ORDERS:
        with emulated_cuda(**order):
            solutions.append(solve_loss(problem, AttBalanceConfig(), "cuda").tensors())
    for other in solutions[1:]:
        assert all(map(same_bits, solutions[0], other))


def arguments(problem: LossProblem, rho: Tensor | None = None, *, plain: bool = False) -> list[object]:
    """The op's own arguments, with unequal weights."""
    tensors = [getattr(problem, field.name) for field in fields(problem)]
    return [*tensors, rho, 0.7, 5.0, 2.0, 0.3, 1.7, 0, False, True, True, plain]


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("batch", [1, 7, 65, 5000])
def test_no_input_is_read_beyond_its_ends(batch: int, side: str) -> None:
    problem = make_loss_problem(layers=3, batch=batch, stages=2, with_ratio=True)
    walled = replace(problem, **{f.name: guarded(getattr(problem, f.name), side) for f in fields(problem)})
    with emulated_cuda():
        expected = torch.ops.attbalance_ext.balanced_loss.cuda(*arguments(problem))
        found = torch.ops.attbalance_ext.balanced_loss.cuda(*arguments(walled))
    assert all(map(same_bits, found, expected))


def test_double_is_refused() -> None:
    problem = make_loss_problem(stages=1, dtype=torch.float64, with_ratio=True)
    with emulated_cuda(), pytest.raises(RuntimeError, match="in_box has the wrong dtype"):
        torch.ops.attbalance_ext.balanced_loss.cuda(*arguments(problem))


def test_batches_whose_rank_sums_overflow_are_refused() -> None:
    """Only where they are ranked."""
    batch = 2**20 + 1
    box, row = torch.zeros(batch, 4), torch.zeros(1, batch)
    problem = LossProblem(row, row, row, torch.ones(batch, dtype=torch.bool), box[None], box, row[0])
    with emulated_cuda() as device:
        with pytest.raises(RuntimeError, match="rho of more than 1048576 samples"):
            torch.ops.attbalance_ext.balanced_loss.cuda(*arguments(problem))
        assert not device.launches()
        torch.ops.attbalance_ext.balanced_loss.cuda(*arguments(problem, torch.zeros(1)))
        assert len(device.launches()) == 1
