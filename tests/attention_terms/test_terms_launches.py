"""How the CUDA kernels of `attention_terms` are chosen and cut, and that nothing but the cut depends on the device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import same_bits
from helpers_attention import LAYOUTS, Problem, assert_solves, literal, make_problem, solve
from torch import Tensor

from attbalance_ext import BoxRegion, QueryAttention, attention_terms
from tests.emulation import Device, emulated_cuda, guarded
from tests.emulation.build import load

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def names(device: Device) -> list[str]:
    return [launch.kernel.replace("attbalance::", "") for launch in device.launches()]


# --- the plan --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan() -> ModuleType:
    return load("_emulated_cuda")


def test_splits_fill_the_device_and_no_more(plan: ModuleType) -> None:
    for multiprocessors in (1, 16, 132, 148):
        for rows in (1, 6, 48, 192, 1536, 100_000):
            for tokens in (1, 31, 400, 1369, 20_000):
                splits = plan.forward_splits(rows, tokens, multiprocessors)
                assert 1 <= splits <= 16
                assert splits == 1 or tokens // splits >= 32  # each warp has a group of tokens
                assert splits == 1 or rows * splits <= 2 * multiprocessors
                more = splits + 1 <= min(16, tokens // 32)
                assert not more or rows * (splits + 1) > 2 * multiprocessors
    assert plan.forward_splits(0, 400, 132) >= 1


def test_tiles_of_the_backward_pass(plan: ModuleType) -> None:
    for rows in (1, 48, 1536):
        for tokens in (1, 31, 400, 1369):
            tile = plan.backward_tile(rows, tokens, 132)
            assert tile in (16, 32, 64, 128, 256)
            enough = rows * -(-tokens // tile) >= 4 * 132
            assert enough or tile == 16
            assert tile == 256 or rows * -(-tokens // (2 * tile)) < 4 * 132


def test_columns_of_a_lane(plan: ModuleType) -> None:
    assert [plan.lane_elements(dim) for dim in (1, 256, 257, 512, 768, 769, 1024)] == [8, 8, 16, 16, 24, 32, 32]


# --- launches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("multiprocessors", "expected"),
    [
        (132, ["forward_rows<float, 8, true>", "finish_rows", "backward_rows<float, 8>"]),
        (4, ["forward_rows<float, 8, true>", "backward_rows<float, 8>"]),
    ],
)
def test_all_layers_in_one_launch(multiprocessors: int, expected: list[str]) -> None:
    """And a second one for the merge, where rows are few for the device."""
    with emulated_cuda(multiprocessors=multiprocessors) as device:
        solve(make_problem(layers=6, batch=2, tokens=64, width=32), "cuda")
        assert names(device) == expected


def test_layers_of_several_kinds_and_more_than_one_launch_holds() -> None:
    with emulated_cuda() as device:
        problem = make_problem(layers=5, batch=2, width=32, key_dtype=(F32, F32, BF16, BF16, F16), teacher_dtype=None)
        assert_solves(solve(problem, "cuda"), literal(problem))
        forward = [name for name in names(device) if name.startswith("forward")]
        assert forward == [f"forward_rows<{t}, 8, false>" for t in ("float", "BFloat16", "Float16")]

        device.clear()
        problem = make_problem(layers=35, batch=1, tokens=40, width=32, padded=True)
        assert_solves(solve(problem, "cuda"), literal(problem))
        assert [launch.grid[0] for launch in device.launches() if launch.kernel.startswith("forward")] == [16, 16, 3]


NARROW = {
    "odd width": {"width": 37},
    "more columns than a warp's registers hold": {"width": 1032, "batch": 1},
    "rows that do not start at 16 bytes": {"width": 32, "layout": "wide_rows"},
    "a teacher of another dtype": {"width": 32, "key_dtype": (BF16,)},
}


@pytest.mark.parametrize("case", NARROW.values(), ids=NARROW)
def test_the_path_for_any_layout(case: dict) -> None:
    problem = make_problem(tokens=70, padded=True, **case)
    with emulated_cuda() as device:
        assert_solves(solve(problem, "cuda"), literal(problem))
        assert names(device)[0] == "forward_any"


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("offset", [1, 3, 4, 8])
def test_odd_pointers(dtype: torch.dtype, offset: int) -> None:
    """Keys that start anywhere: only those at a multiple of 16 bytes take the path of 128-bit loads."""
    problem = make_problem(layers=1, tokens=50, width=64, key_dtype=(dtype,), teacher_dtype=None)
    key = problem.key[0]
    storage = key.new_full((key.numel() + 64,), torch.nan)
    shift = -storage.data_ptr() % 64 // dtype.itemsize + offset
    problem.key = [storage[shift : shift + key.numel()].view_as(key).copy_(key)]
    with emulated_cuda() as device:
        assert_solves(solve(problem, "cuda"), literal(problem))
        assert names(device)[0].startswith("forward_rows" if offset * dtype.itemsize % 16 == 0 else "forward_any")


def test_strides_beyond_32_bits(tmp_path: Path) -> None:
    """Offsets are 64 bits wide: tokens 2^31 elements apart, in an empty file of 16 GiB of which three pages exist."""
    stride = 2**31
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * stride + 64, dtype=F32)
    problem = make_problem(layers=1, batch=1, tokens=3, width=32, teacher_dtype=None)
    key = memory.as_strided((1, 3, 32), (3 * stride, stride, 1)).copy_(problem.key[0])
    with emulated_cuda() as device:
        found = attention_terms(QueryAttention(problem.query, key, problem.scale), problem.region, backend="cuda")
        assert names(device)[0].startswith("forward_rows")
    torch.testing.assert_close(found.rac.double(), literal(problem).terms.rac, rtol=2e-5, atol=1e-6)


# --- what must not matter --------------------------------------------------------------------------------------------

CASES = {
    "split rows": {"layers": 2, "batch": 2, "tokens": 400, "width": 32},
    "whole rows": {"layers": 2, "batch": 2, "tokens": 31, "width": 16},
    "any layout": {"layers": 2, "batch": 2, "tokens": 100, "width": 7},
    "keys' gradients alone": {"layers": 2, "batch": 2, "tokens": 40, "width": 16},
    "half of the lanes idle": {"layers": 1, "batch": 2, "tokens": 70, "width": 320, "key_dtype": (BF16,)},
}


def keys_alone(problem: Problem) -> list[Tensor]:
    key = [k.detach().requires_grad_() for k in problem.key]
    terms = attention_terms(problem.student(key=key), problem.region, teacher=problem.teacher, backend="cuda")
    return [*terms, *torch.autograd.grad(terms.rac.sum() + terms.mrc.sum(), key)]


@pytest.mark.parametrize("name", CASES)
def test_same_bits_in_any_order_of_threads_and_blocks(name: str) -> None:
    """No kernel relies on another block, on a barrier that is missing, or on what shared memory held before."""
    problem = make_problem(padded=True, **CASES[name])
    run = keys_alone if name == "keys' gradients alone" else lambda problem: solve(problem, "cuda").tensors()
    with emulated_cuda() as device:
        expected = run(problem)
        for orders in (
            {"block_order": "reversed"},
            {"block_order": "shuffled", "seed": 1},
            {"thread_order": "reversed"},
            {"thread_order": "shuffled", "seed": 2},
            {"shared_fill": 0x3F},
        ):
            device.configure(**orders)
            assert all(map(same_bits, expected, run(problem))), orders


@pytest.mark.parametrize("multiprocessors", [1, 5, 40, 1000])
@pytest.mark.parametrize("width", [24, 25])
def test_right_on_any_number_of_multiprocessors(multiprocessors: int, width: int) -> None:
    problem = make_problem(layers=2, batch=3, tokens=500, width=width, padded=True, layout="sequence_first")
    with emulated_cuda(multiprocessors=multiprocessors):
        assert_solves(solve(problem, "cuda"), literal(problem))


@pytest.mark.parametrize("width", [8, 16, 24, 32, 64, 128, 248, 256, 264, 384, 512, 520, 768, 776, 1024])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_every_width_of_the_wide_path(dtype: torch.dtype, width: int) -> None:
    for teacher in (None, dtype):
        problem = make_problem(
            layers=1, batch=2, tokens=70, width=width, key_dtype=(dtype,), teacher_dtype=teacher, padded=True
        )
        with emulated_cuda() as device:
            assert_solves(solve(problem, "cuda"), literal(problem))
            elements = -(-width // 256) * 8
            kind = "float" if dtype == F32 else "BFloat16"
            expected = f"forward_rows<{kind}, {elements}, {str(teacher is not None).lower()}>"
            if teacher == F32 and width > 768:  # two such rows are more than the registers hold
                expected = "forward_any"
            assert names(device)[0] == expected


# --- memory ----------------------------------------------------------------------------------------------------------


def walled(problem: Problem, side: str) -> Problem:
    assert isinstance(problem.region, BoxRegion)
    assert problem.teacher is not None
    region = replace(problem.region, boxes=guarded(problem.region.boxes, side))
    teacher = problem.teacher
    return replace(
        problem,
        query=[guarded(q, side) for q in problem.query],
        key=[guarded(k, side) for k in problem.key],
        padding=guarded(problem.padding, side) if problem.padding is not None else None,
        teacher=QueryAttention(
            [guarded(q, side) for q in teacher.query], [guarded(k, side) for k in teacher.key], teacher.scale
        ),
        region=region,
    )


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [32, 33, 320])
def test_nothing_beyond_the_inputs_is_read(width: int, layout: str, side: str) -> None:
    """Every input ends, or begins, at a page that may not be touched: a read beyond it would end the process."""
    problem = walled(make_problem(tokens=31, width=width, layout=layout, padded=True), side)
    with emulated_cuda():
        assert_solves(solve(problem, "cuda"), literal(problem))
