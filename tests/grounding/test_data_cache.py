"""The cache: damaged files are noticed, half-written ones never seen, several processes do not disturb each other."""

from __future__ import annotations

import ast
import logging
import multiprocessing
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from attbalance_ext.grounding.data import cache, generate
from attbalance_ext.grounding.data.cache import cache_directory, load_or_create
from attbalance_ext.grounding.data.dataset import load_arrays
from attbalance_ext.grounding.data.names import BuiltinName
from attbalance_ext.grounding.files import replace_file

ARRAYS = {"a": np.arange(5000), "b": np.ones((2, 3), np.float32)}


def visible(folder: Path) -> list[str]:
    """Names of the files in a folder, without those of locks."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def forbidden() -> dict[str, np.ndarray]:
    raise AssertionError("generated although the cache is whole")


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes) -> bytes:
    middle = len(content) // 3
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def pickled(content: bytes) -> bytes:
    import io

    buffer = io.BytesIO()
    np.savez(buffer, a=np.array([{}], dtype=object))
    return buffer.getvalue()


def test_a_whole_file_is_read_back(tmp_path: Path) -> None:
    created = load_or_create(tmp_path / "deep" / "x.npz", lambda: ARRAYS)
    read = load_or_create(tmp_path / "deep" / "x.npz", forbidden)
    for arrays in (created, read):
        assert arrays.keys() == ARRAYS.keys()
        for name, array in ARRAYS.items():
            assert arrays[name].dtype == array.dtype
            assert np.array_equal(arrays[name], array)


@pytest.mark.parametrize("damage", [cut, flip, pickled, lambda _: b"", lambda _: b"not an archive" * 100])
def test_a_damaged_file_is_made_again(damage, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "x.npz"
    load_or_create(path, lambda: ARRAYS)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    with caplog.at_level(logging.WARNING):
        arrays = load_or_create(path, lambda: ARRAYS)
    assert np.array_equal(arrays["a"], ARRAYS["a"])
    (record,) = caplog.records
    assert "x.npz is damaged" in record.getMessage()
    assert "\n" not in record.getMessage()
    assert np.array_equal(load_or_create(path, forbidden)["a"], ARRAYS["a"])


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def interrupted(file) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_file(path, interrupted)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def _generate(cache: Path, barrier, results) -> None:
    generate.SCENES["val"] = 20
    barrier.wait()
    arrays = load_arrays(BuiltinName("refcoco", False), "val", cache=cache, progress=False)
    results.put({name: array.tobytes() for name, array in arrays.items()})


def test_two_processes_generate_the_same_bytes_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_generate, args=(tmp_path, barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    first, second = results.get(timeout=240), results.get(timeout=240)
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert first == second
    (file,) = visible(tmp_path)
    assert file.endswith(".npz")


@pytest.mark.parametrize("there", [None, b"damaged"])
def test_of_two_processes_one_creates_and_the_other_reads(there: bytes | None, tmp_path: Path) -> None:
    path, calls = tmp_path / "x.npz", tmp_path / "calls"
    if there is not None:
        path.write_bytes(there)

    def create() -> dict[str, np.ndarray]:
        with open(calls, "a") as file:
            file.write("!")
        time.sleep(0.3)
        return ARRAYS

    def load() -> None:
        barrier.wait()
        assert np.array_equal(load_or_create(path, create)["a"], ARRAYS["a"])

    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    processes = [context.Process(target=load) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert calls.read_text() == "!"


def test_a_whole_file_needs_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock is a file, and a cache may be read-only."""
    path = tmp_path / "x.npz"
    load_or_create(path, lambda: ARRAYS)

    def refuse(path: Path) -> None:
        raise PermissionError(f"{path} is read-only")

    monkeypatch.setattr(cache, "exclusive", refuse)
    assert np.array_equal(load_or_create(path, forbidden)["a"], ARRAYS["a"])


def test_the_file_is_named_after_content_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(generate.SCENES, "val", 5)
    for size in (64, 128):
        load_arrays(BuiltinName("refcoco", True), "val", cache=tmp_path, size=size, progress=False)
    monkeypatch.setattr("attbalance_ext.grounding.data.dataset.content_version", lambda: "other")
    load_arrays(BuiltinName("refcoco", True), "val", cache=tmp_path, progress=False)
    version = generate.content_version()
    assert visible(tmp_path) == sorted(
        [
            f"builtin-refcoco-hard-val-5x64-{version}.npz",
            f"builtin-refcoco-hard-val-5x128-{version}.npz",
            "builtin-refcoco-hard-val-5x64-other.npz",
        ]
    )


def modules_behind(path: Path) -> set[Path]:
    """``path`` and every module of its folder that it imports, directly or not."""
    found, left = set(), {path}
    while left:
        module = left.pop()
        found.add(module)
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                names = [node.module] if node.module else [name.name for name in node.names]
                left |= {path.with_name(f"{name}.py") for name in names} - found
    return found


def test_whatever_makes_the_content_makes_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each module behind the generator; but not the names, which are the file's own."""
    modules = {path.name for path in modules_behind(Path(generate.__file__))} - {"names.py"}
    assert {"generate.py", "scene.py", "render.py", "grammar.py"} <= modules
    for path in Path(generate.__file__).parent.glob("*.py"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(generate, "__file__", str(tmp_path / "generate.py"))
    versions = [generate.content_version()]
    for name in sorted(modules):
        with open(tmp_path / name, "a") as file:
            file.write("# changed\n")
        versions.append(generate.content_version())
    assert len(set(versions)) == len(modules) + 1


def test_where_the_cache_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTBALANCE_CACHE", str(tmp_path / "chosen"))
    assert cache_directory() == tmp_path / "chosen"
    assert cache_directory(tmp_path) == tmp_path
    monkeypatch.delenv("ATTBALANCE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "attbalance_ext"
