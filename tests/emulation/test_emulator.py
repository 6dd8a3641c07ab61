"""The emulator itself, on kernels that each do one thing, right or wrong (tiny_kernels.cpp)."""

from __future__ import annotations

import faulthandler
import math
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests.emulation import build
from tests.emulation.device import Device
from tests.emulation.guard import guarded

ONE = (1, 1, 1)
ORDERS = ("forward", "reversed", "shuffled")
unsanitised = pytest.mark.skipif(build.VARIANT == "sanitised", reason="AddressSanitizer ends the process first")


@pytest.fixture(scope="module", params=["plain", "ucontext"] if build.VARIANT == "plain" else [build.VARIANT])
def kernels(request: pytest.FixtureRequest) -> ModuleType:
    return build.load("_tiny_kernels", request.param)


@pytest.fixture(autouse=True)
def device(kernels: ModuleType) -> Iterator[Device]:
    device = Device(kernels)
    device.configure()
    device.clear()
    yield device
    device.configure()


def row(threads: int) -> tuple[int, int, int]:
    return (threads, 1, 1)


def ints(*shape: int) -> Tensor:
    return torch.full(shape, -1, dtype=torch.int32)


# --- launches --------------------------------------------------------------------------------------------------------


def test_indices_and_sizes(kernels: ModuleType) -> None:
    grid, block = (2, 3, 4), (5, 3, 2)
    found = ints(24, 30, 12)
    kernels.indices(grid, block, 0, found.data_ptr())
    for b in range(24):
        for t in range(30):
            thread = [t % 5, t // 5 % 3, t // 15]
            assert found[b, t].tolist() == [*thread, b % 2, b // 2 % 3, b // 6, *block, *grid]


def test_log_of_launches(kernels: ModuleType, device: Device) -> None:
    found, values, operands = ints(6, 8, 12), torch.zeros(32), torch.ones(32).int()
    kernels.indices((2, 1, 3), (4, 2, 1), 40, found.data_ptr())
    for _ in range(2):
        kernels.shuffle_float(ONE, row(32), 0, values.data_ptr(), operands.data_ptr(), values.data_ptr(), 3, 32)
    shuffle = ("shuffle<float>", ONE, (32, 1, 1), 0)
    assert device.launches() == [("indices", (2, 1, 3), (4, 2, 1), 40), shuffle, shuffle]
    device.clear()
    assert device.launches() == []


def test_an_empty_grid_launches_nothing(kernels: ModuleType, device: Device) -> None:
    kernels.indices((0, 1, 1), ONE, 0, 0)
    assert device.launches() == []


def test_a_kernel_has_a_name(kernels: ModuleType, device: Device) -> None:
    with pytest.raises(
        RuntimeError, match=r"nameless: the emulator finds no name for this kernel: .* external linkage"
    ):
        kernels.nameless(ONE, ONE, 0)
    assert device.launches() == []


@pytest.mark.parametrize(
    ("grid", "block", "shared", "message"),
    [
        (ONE, row(1025), 0, "invalid block"),
        (ONE, (1, 1, 65), 0, "invalid block"),
        (ONE, (0, 1, 1), 0, "invalid block"),
        ((1, 65536, 1), ONE, 0, "invalid grid"),
        (ONE, ONE, 48 * 1024 + 1, "49153 bytes of shared memory.*may have 49152"),
    ],
)
def test_launches_the_hardware_refuses(kernels: ModuleType, device: Device, grid, block, shared, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"attbalance_ext: indices: {message}"):
        kernels.indices(grid, block, shared, 0)
    assert device.launches() == []


def test_more_shared_memory_on_request(kernels: ModuleType) -> None:
    most = 227 * 1024
    out = torch.zeros(1)
    with pytest.raises(RuntimeError, match="at most 232448 bytes"):
        kernels.allow_shared(most + 1)
    kernels.allow_shared(most)
    kernels.read_shared(ONE, ONE, most, out.data_ptr())
    assert out.isnan()


def test_multiprocessors(kernels: ModuleType, device: Device) -> None:
    assert kernels.multiprocessors() == 132
    device.configure(multiprocessors=7)
    assert kernels.multiprocessors() == 7


def test_settings_can_be_set_back(device: Device) -> None:
    wanted = {"multiprocessors": 3, "block_order": "reversed", "thread_order": "shuffled", "seed": 5, "shared_fill": 1}
    before = device.configure(**wanted)
    assert device.configure(**before) == wanted
    assert device.configure() == before


def test_unknown_order(device: Device) -> None:
    with pytest.raises(ValueError, match="forward, reversed or shuffled, got 'random'"):
        device.configure(thread_order="random")


# --- warps -----------------------------------------------------------------------------------------------------------


def shuffled(kind: str, lane: int, operand: int, width: int) -> int:
    """The lane that is read, from the toolkit's description."""
    first = lane // width * width
    last = first + width - 1
    if kind == "indexed":
        return first + operand % width
    source = {"up": lane - operand, "down": lane + operand, "xor": lane ^ operand}[kind]
    inside = {"up": source >= first, "down": source <= last, "xor": source <= last}[kind]
    return source if inside else lane


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("width", [32, 16, 8, 4, 2, 1])
@pytest.mark.parametrize(("code", "kind"), list(enumerate(["indexed", "up", "down", "xor"])))
def test_shuffles(kernels: ModuleType, device: Device, code: int, kind: str, width: int, order: str) -> None:
    device.configure(thread_order=order, seed=3)
    values = torch.randn(96)
    for operand in range(32):
        operands = torch.full((96,), operand, dtype=torch.int32)
        found = torch.zeros(96)
        arguments = (values.data_ptr(), operands.data_ptr(), found.data_ptr(), code, width)
        kernels.shuffle_float(ONE, row(96), 0, *arguments)
        expected = [i // 32 * 32 + shuffled(kind, i % 32, operand, width) for i in range(96)]
        assert torch.equal(found, values[expected])


def test_shuffle_with_a_source_for_each_lane(kernels: ModuleType) -> None:
    permutation = torch.randperm(32).int()
    values, found = torch.randn(32), torch.zeros(32)
    kernels.shuffle_float(ONE, row(32), 0, values.data_ptr(), permutation.data_ptr(), found.data_ptr(), 0, 32)
    assert torch.equal(found, values[permutation.long()])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("int", torch.int32),
        ("unsigned", torch.int32),
        ("float", torch.float32),
        ("double", torch.float64),
        ("long_long", torch.int64),
    ],
)
def test_shuffles_move_every_bit(kernels: ModuleType, name: str, dtype: torch.dtype) -> None:
    raw = {4: torch.int32, 8: torch.int64}[dtype.itemsize]
    bits = torch.randint(torch.iinfo(raw).min, torch.iinfo(raw).max, (32,), dtype=raw)
    values, found = bits.view(dtype), torch.zeros(32, dtype=dtype)
    operands = torch.full((32,), 1, dtype=torch.int32)
    getattr(kernels, f"shuffle_{name}")(
        ONE, row(32), 0, values.data_ptr(), operands.data_ptr(), found.data_ptr(), 3, 32
    )
    assert torch.equal(found.view(raw), bits[torch.arange(32) ^ 1])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("split", [1, 5, 16, 31])
def test_votes_of_both_sides_of_a_branch(kernels: ModuleType, device: Device, split: int, order: str) -> None:
    device.configure(thread_order=order)
    for predicate in (torch.zeros(32), torch.ones(32), torch.arange(32) % 3 == 1):
        predicate = predicate.int()
        ballot, any_, all_, next_ = (ints(32) for _ in range(4))
        pointers = [t.data_ptr() for t in (ballot, any_, all_, next_)]
        kernels.divided_votes(ONE, row(32), 0, predicate.data_ptr(), split, *pointers)
        for lanes in (range(split), range(split, 32)):
            votes = [bool(predicate[lane]) for lane in lanes]
            bits = sum(1 << lane for lane in lanes if predicate[lane])
            for lane in lanes:
                assert ballot[lane].item() & 0xFFFFFFFF == bits
                assert any_[lane] == any(votes)
                assert all_[lane] == all(votes)
                assert next_[lane] == (lane + 1 if lane + 1 in lanes else lanes[0])


def test_missing_syncwarp_shows(kernels: ModuleType, device: Device) -> None:
    expected = torch.arange(32, dtype=torch.int32) ^ 1
    for order in ORDERS:
        device.configure(thread_order=order)
        found = ints(32)
        kernels.neighbours(ONE, row(32), 128, found.data_ptr(), True)
        assert torch.equal(found, expected)
        kernels.neighbours(ONE, row(32), 128, found.data_ptr(), False)
        assert not torch.equal(found, expected)


WARP_MISUSE = [
    r"thread \(0, 0, 0\) waits in __shfl_sync with mask 0xffffffff for ever: lane 5 waits in __syncthreads",
    r"thread \(0, 0, 0\) waits in __syncwarp with mask 0xffffffff for ever: lane 7 has returned",
    r"thread \(0, 0, 0\) in __any_sync: is not in its own mask 0x00000002",
    r"thread \(1, 0, 0\) in __shfl_down_sync: reads lane 2, which its mask 0x00000003 does not name",
    r"thread \(0, 0, 0\) in __shfl_xor_sync: gives the width 12",
    r"thread \(0, 0, 0\) waits in __ballot_sync with mask 0xffffffff for ever: lane 16 has returned",
    r"thread \(0, 0, 0\) waits in __any_sync with mask 0xffffffff for ever: "
    "lane 16 waits in __all_sync with mask 0xffffffff",
]


@pytest.mark.parametrize(("kind", "message"), list(enumerate(WARP_MISUSE)))
def test_misused_warp_operations_are_errors(kernels: ModuleType, kind: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=r"kernel misused_warp, block \(0, 0, 0\): " + message):
        kernels.misused_warp((2, 1, 1), row(32), 0, kind)


def test_lanes_that_do_not_exist_are_missing(kernels: ModuleType) -> None:
    values, operands = torch.zeros(40), torch.zeros(40).int()
    arguments = (values.data_ptr(), operands.data_ptr(), values.data_ptr(), 0, 32)
    with pytest.raises(RuntimeError, match=r"thread \(32, 0, 0\) waits in .* for ever: lane 8 does not exist, lane 9"):
        kernels.shuffle_float(ONE, row(40), 0, *arguments)


# --- blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 32, 64, 256, 1024])
@pytest.mark.parametrize("order", ORDERS)
def test_barrier_in_a_loop(kernels: ModuleType, device: Device, order: str, threads: int) -> None:
    device.configure(thread_order=order, block_order=order)
    values, found = torch.randint(-99, 99, (7, threads)).float(), torch.zeros(7)
    kernels.block_sum(row(7), row(threads), 4 * threads, values.data_ptr(), found.data_ptr(), True)
    assert torch.equal(found, values.sum(1))


def test_missing_barrier_shows_in_some_order(kernels: ModuleType, device: Device) -> None:
    values = torch.randint(1, 99, (1, 256)).float()
    wrong = set()
    for order in ORDERS:
        device.configure(thread_order=order)
        found = torch.zeros(1)
        kernels.block_sum(ONE, row(256), 4 * 256, values.data_ptr(), found.data_ptr(), False)
        if found != values.sum():
            wrong.add(order)
    assert "forward" in wrong


@pytest.mark.parametrize("predicate", [[0] * 70, [1] * 70, [0] * 69 + [2], [1] * 69 + [0]])
def test_votes_of_a_block(kernels: ModuleType, predicate: list[int]) -> None:
    any_, all_ = ints(70), ints(70)
    votes = torch.tensor(predicate, dtype=torch.int32)
    kernels.block_votes(ONE, row(70), 0, votes.data_ptr(), any_.data_ptr(), all_.data_ptr())
    assert (any_ == any(predicate)).all()
    assert (all_ == all(predicate)).all()


LOST_BARRIERS = [
    r"thread \(3, 0, 0\) has returned; thread \(0, 0, 0\) waits in __syncthreads \(and 62 more\)",
    r"thread \(0, 0, 0\) waits in __syncthreads \(and 39 more\); "
    r"thread \(40, 0, 0\) waits in __syncthreads_or \(and 23 more\)",
    r"thread \(0, 0, 0\) waits in __syncthreads \(and 31 more\); "
    r"thread \(32, 0, 0\) waits in __syncthreads_and \(and 31 more\)",
    r"thread \(32, 0, 0\) has returned \(and 31 more\); thread \(0, 0, 0\) waits in __syncthreads \(and 31 more\)",
]


@pytest.mark.parametrize(("kind", "message"), list(enumerate(LOST_BARRIERS)))
@pytest.mark.parametrize("order", ORDERS)
def test_barrier_not_reached_by_all_is_an_error(
    kernels: ModuleType, device: Device, order: str, kind: int, message: str
) -> None:
    device.configure(thread_order=order)
    expected = r"attbalance_ext: lost_barrier: kernel lost_barrier, block \(0, 0, 0\): "
    with pytest.raises(RuntimeError, match=f"{expected}a barrier is not reached by all threads: {message}"):
        kernels.lost_barrier(ONE, row(64), 0, kind)


def test_the_device_works_on_after_an_error(kernels: ModuleType) -> None:
    for _ in range(3):
        with pytest.raises(RuntimeError):
            kernels.lost_barrier(ONE, row(64), 0, 0)
        test_barrier_in_a_loop(kernels, Device(kernels), "forward", 64)


def test_dependence_between_blocks_shows(kernels: ModuleType, device: Device) -> None:
    expected = torch.arange(1, 10, dtype=torch.int32)
    for order in ORDERS:
        device.configure(block_order=order)
        found = ints(9)
        kernels.chained_blocks(row(9), ONE, 0, found.data_ptr())
        assert torch.equal(found, expected) is (order == "forward")


def test_a_seed_names_one_order(kernels: ModuleType, device: Device) -> None:
    results = []
    for seed in (0, 0, 1):
        device.configure(block_order="shuffled", seed=seed)
        found = ints(64)
        kernels.chained_blocks(row(64), ONE, 0, found.data_ptr())
        results.append(found)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


# --- shared memory ---------------------------------------------------------------------------------------------------


def test_fresh_shared_memory_is_nan(kernels: ModuleType) -> None:
    found = torch.zeros(64)
    kernels.read_shared(ONE, row(64), 256, found.data_ptr())
    assert found.isnan().all()


def test_another_fill_gives_other_bits(kernels: ModuleType, device: Device) -> None:
    device.configure(shared_fill=0x3F)
    found = torch.zeros(64)
    kernels.read_shared(ONE, row(64), 256, found.data_ptr())
    assert (found.view(torch.int32) == 0x3F3F3F3F).all()


def test_nothing_is_left_for_the_next_block(kernels: ModuleType) -> None:
    found = torch.zeros(2)
    kernels.leave_in_shared(row(2), ONE, 4, found.data_ptr())
    assert found[0] == 1
    assert found[1].isnan()


@unsanitised
@pytest.mark.parametrize("beyond", [0, 1, 5, 4095])
def test_write_past_shared_memory_is_an_error(kernels: ModuleType, beyond: int) -> None:
    kernels.write_shared(ONE, ONE, 10, 9, 1)
    with pytest.raises(RuntimeError, match=f"wrote at byte {10 + beyond} of shared memory, of which it has 10"):
        kernels.write_shared(ONE, ONE, 10, 10 + beyond, 1)


@unsanitised
def test_read_past_shared_memory_is_nan(kernels: ModuleType) -> None:
    found = torch.zeros(8)
    kernels.leave_in_shared(row(1), ONE, 4, found.data_ptr())
    kernels.read_shared(ONE, row(8), 16, found.data_ptr())
    assert found.isnan().all()


# --- global memory and bits ------------------------------------------------------------------------------------------


def test_vector_access(kernels: ModuleType) -> None:
    values, found = torch.randint(-(2**31), 2**31 - 1, (32, 4), dtype=torch.int32), ints(32, 4)
    kernels.copy_vectors(ONE, row(32), 0, values.data_ptr(), found.data_ptr(), 32)
    assert torch.equal(found, values)


def test_guarded_keeps_values_and_strides(kernels: ModuleType) -> None:
    for tensor in (torch.randn(3, 5), torch.randn(7, 6).t()[:, 2:], torch.randn(2, 3, 4).bfloat16()[..., :3]):
        for side in ("after", "before"):
            found = guarded(tensor, side)
            assert torch.equal(found, tensor)
            assert found.stride() == tensor.stride()
    strided = guarded(torch.randn(4, 6)[:, :5])
    assert strided.as_strided((3,), (6,), 5).isnan().all()


@unsanitised
@pytest.mark.parametrize(("side", "shift"), [("after", 4), ("before", -4)])
def test_access_beyond_a_guarded_tensor_ends_the_process(kernels: ModuleType, side: str, shift: int) -> None:
    values, found = guarded(torch.arange(9.0), side), torch.zeros(9)
    kernels.copy(ONE, row(32), 0, values.data_ptr(), found.data_ptr(), 9)
    assert torch.equal(found, torch.arange(9.0))
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        kernels.copy(ONE, row(32), 0, values.data_ptr() + shift, found.data_ptr(), 9)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGSEGV


def test_bit_functions(kernels: ModuleType) -> None:
    values = torch.tensor([0, 1, -1, 2**31 - 1, -(2**31), 0x00F0, 12345, -7], dtype=torch.int32)
    found = ints(len(values), 4)
    kernels.bit_functions(ONE, ONE, 0, values.data_ptr(), found.data_ptr(), len(values))
    for value, (ones, first, leading, same) in zip(values.tolist(), found.tolist(), strict=True):
        bits = value & 0xFFFFFFFF
        assert ones == bits.bit_count()
        assert first == (bits & -bits).bit_length()
        assert leading == 32 - bits.bit_length()
        assert same == value


def same_values(found: Tensor, expected: Tensor) -> bool:
    """Equal bit by bit, but for which NaN it is."""
    raw = {2: torch.int16, 4: torch.int32}[found.element_size()]
    equal = found.view(raw) == expected.view(raw)
    return bool((equal | (found.isnan() & expected.isnan())).all())


def test_every_16_bit_value_widens_as_in_pytorch(kernels: ModuleType) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    bfloat, half = torch.zeros(len(bits)), torch.zeros(len(bits))
    kernels.widen(ONE, ONE, 0, bits.data_ptr(), bfloat.data_ptr(), half.data_ptr(), len(bits))
    assert same_values(bfloat, bits.view(torch.bfloat16).float())
    assert same_values(half, bits.view(torch.float16).float())


def test_floats_narrow_as_in_pytorch(kernels: ModuleType) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    cases = []
    for dtype in (torch.bfloat16, torch.float16):
        exact = every.view(dtype).float()
        exact = exact[exact.isfinite()].sort().values
        middle = (exact[1:].double() + exact[:-1].double()).div(2).float()  # ties
        cases += [exact, middle]
        cases += [torch.nextafter(middle, torch.tensor(limit)) for limit in (-math.inf, math.inf)]
    cases.append(torch.randint(-(2**31), 2**31 - 1, (200_000,), dtype=torch.int32).view(torch.float32))
    cases.append(torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 65519.0, 65520.0, 3.4e38, 1e-45, 2.0**-25]))
    values = torch.cat(cases)
    bfloat, half = (torch.zeros(len(values), dtype=torch.int16) for _ in range(2))
    kernels.narrow(ONE, ONE, 0, values.data_ptr(), bfloat.data_ptr(), half.data_ptr(), len(values))
    assert same_values(bfloat.view(torch.bfloat16), values.bfloat16())
    assert same_values(half.view(torch.float16), values.half())


# --- the build -------------------------------------------------------------------------------------------------------


def test_compile_errors_are_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.20)\nproject(broken LANGUAGES CXX)\nadd_library(_broken MODULE broken.cpp)\n"
    )
    (sources / "broken.cpp").write_text("int f() { return undeclared; }\n")
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setattr(build, "BUILDS", tmp_path / "builds")
    with pytest.raises(RuntimeError, match=re.compile("broken.cpp:1:.*undeclared", re.DOTALL)):
        build.build("_broken")
