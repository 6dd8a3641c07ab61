"""Pickles are read as data: what they hold comes back, and what they would do is not done."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attbalance_ext.grounding.data.pickles import load_pickle, load_saved
from attbalance_ext.grounding.errors import UserError

PLAIN = [
    {"a": [1, -2, 3.5, None, True], "b": ("x", ("y",)), 7: {"z"}, "big": 10**40},
    [],
    {"sentence": "links überm Café", "bytes": b"\x00\xff", "empty": set()},
]


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def saved(path: Path, value: Any, archive: bool) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=archive)
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_types_come_back(tmp_path: Path, protocol: int) -> None:
    assert load_pickle(write(tmp_path / "a.p", pickle.dumps(PLAIN, protocol))) == PLAIN


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"(dp0\nS'sent'\np1\nS'red one'\np2\ns.", {"sent": "red one"}),
        (b"\x80\x02}q\x00U\x04sentq\x01U\x05caf\xc3\xa9q\x02s.", {"sent": "café"}),  # str, UTF-8
        (b"\x80\x02}q\x00U\x04sentq\x01U\x04caf\xe9q\x02s.", {"sent": "café"}),  # str, Latin-1
        (b"\x80\x02}q\x00U\x02idq\x01L5L\ns.", {"id": 5}),  # long
        (b"\x80\x02c__builtin__\nset\nq\x00]q\x01K\x01a\x85q\x02Rq\x03.", {1}),
    ],
)
def test_python_2(tmp_path: Path, content: bytes, expected: Any) -> None:
    assert load_pickle(write(tmp_path / "a.p", content)) == expected


@pytest.mark.parametrize("archive", [True, False])
def test_numpy_comes_back_as_numbers_and_text(tmp_path: Path, archive: bool) -> None:
    value = [
        ("a.jpg", np.array([1.5, 2, 3, 4]), "a man"),
        (np.str_("für.jpg"), np.array([1, 2, 3, 4], dtype=np.int32), np.bytes_(b"b")),
        (np.float32(0.5), np.int64(-7), np.bool_(True)),
        (np.array([1, 2], dtype=">i2"), np.array([[1, 2], [3, 4]], dtype=np.uint8), np.array(["ab", "c"])),
    ]
    assert load_saved(saved(tmp_path / "a.pth", value, archive)) == [
        ("a.jpg", [1.5, 2.0, 3.0, 4.0], "a man"),
        ("für.jpg", [1, 2, 3, 4], "b"),
        (0.5, -7, True),
        ([1, 2], [[1, 2], [3, 4]], ["ab", "c"]),
    ]


@pytest.mark.parametrize("core", ["core", "_core"])
def test_both_places_of_numpys_functions(tmp_path: Path, core: str) -> None:
    buffer = io.BytesIO()
    torch.save([np.array([1.0, 2.0])], buffer, _use_new_zipfile_serialization=False)
    content = buffer.getvalue()
    for there in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
        content = content.replace(there, f"numpy.{core}.multiarray".encode())
    assert load_saved(write(tmp_path / "a.pth", content)) == [[1.0, 2.0]]


def test_python_2_numpy(tmp_path: Path) -> None:
    """Python 2 stored an array's bytes as its str."""
    raw = struct.pack("<2d", 1.0, 200.5)
    content = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x02\x85"
        b"cnumpy\ndtype\nU\x02f8K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        + (b"\x89U" + bytes([len(raw)]) + raw)
        + b"tb."
    )
    buffer = io.BytesIO()
    torch.save([], buffer, _use_new_zipfile_serialization=False)
    preamble = buffer.getvalue()[: -len(pickle.dumps([], 2)) * 2]
    assert load_saved(write(tmp_path / "a.pth", preamble + content)) == [1.0, 200.5]


class Calls:
    """A pickle that calls ``function`` when it is loaded."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


class Plain:
    """An object of a class, with a state."""

    def __init__(self) -> None:
        self.value = 1


def attacks(proof: Path) -> dict[str, Any]:
    code = f"__import__('os').mkdir({str(proof)!r})"
    return {
        "mkdir": Calls(os.mkdir, str(proof)),
        "system": Calls(os.system, f"mkdir {proof}"),
        "eval": Calls(builtins.eval, code),
        "exec": Calls(builtins.exec, code),
        "getattr": Calls(getattr, "", "upper"),
        "numpy": Calls(np.load, str(proof), None, True),
        "numpy's own eval": Calls(np.testing.rundocs, str(proof)),
        "object": Plain(),
        "path": proof,
        "tensor": torch.ones(2),
        "object array": np.array([Calls(os.mkdir, str(proof))], dtype=object),
        "as a key": {("a",): Calls(os.mkdir, str(proof))},
    }


@pytest.mark.parametrize("kind", attacks(Path()))
@pytest.mark.parametrize("container", ["pickle 0", "pickle 2", "pickle 5", "legacy", "archive", "preamble"])
def test_a_hostile_file_runs_nothing(tmp_path: Path, kind: str, container: str) -> None:
    proof, path = tmp_path / "proof", tmp_path / "evil.file"
    value = [attacks(proof)[kind]]
    if container.startswith("pickle"):
        load, _ = load_pickle, write(path, pickle.dumps(value, int(container[-1])))
    elif container == "preamble":  # in place of the magic number
        load, _ = load_saved, write(path, pickle.dumps(value[0], 2) + pickle.dumps([], 2))
    else:
        load, _ = load_saved, saved(path, value, container == "archive")
    with pytest.raises(UserError, match=r"evil\.file is refused, nothing in it was run: "):
        load(path)
    assert not proof.exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", "asks for 'os.system'"),
        (b"(S'true'\nios\nsystem\n.", "makes an object"),  # INST
        (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.", r"asks for 'builtins\.eval'"),
        (b"\x80\x04\x8c\x05numpy\x8c\x11f2py.crackfortran\x93.", r"asks for 'numpy\.f2py\.crackfortran'"),
        (b"\x80\x02cnumpy\nndarray\n)\x81.", "makes an object"),  # NEWOBJ
        (b"\x80\x02P1\n.", "kept outside"),
        (b"\x80\x05\x96\x00\x00\x00\x01\x00\x00\x00\x00.", "makes an object"),  # a bytearray of 16 MiB
        (b"\x80\x02\x82\x01.", "makes an object"),  # an extension
        (b"c_codecs\nencode\n}S'__defaults__'\n(I1\ntsb.", "sets the state"),  # of the reader's own function
        (b"\x80\x02cnumpy\nndarray\nN}X\x0c\x00\x00\x00__setstate__K\x01s\x86b.", "sets the state"),
        (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x04\x00\x00\x00zlib\x86R.", "encodes text in 'zlib'"),
        (b"\x80\x02}" + b")" + b"\x85" * 1_000_000 + b"K\x01s.", "a tuple as a key"),  # hashing it would crash
        (b"\x80\x04\x8f(" + b")" + b"\x85" * 1_000_000 + b"\x90.", "a tuple as a key"),
    ],
)
def test_handmade_programs(tmp_path: Path, content: bytes, reason: str) -> None:
    with pytest.raises(UserError, match=rf"evil\.p is refused, nothing in it was run: .*{reason}"):
        load_pickle(write(tmp_path / "evil.p", content))


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",  # a string of 2 ** 63 bytes
        b"\x80\x02r\xff\xff\xff\x7f.",  # place 2 ** 31 in the memo, of nothing
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",  # a frame of 2 ** 63 bytes
        b"\x80\x02cnumpy\ndtype\n](" + b"N" * 1000 + b"e\x85R.",  # a dtype that is a list
        b"L" + b"9" * 1_000_000 + b"L\n.",  # an integer that takes minutes to read
        b"",
        b".",
        b"no pickle at all",
        b"\x80\x09.",
        b"\x07.",
    ],
)
@pytest.mark.timeout(20)
def test_bombs_and_rubbish_are_a_clear_error(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(UserError, match=r"bad\.p is damaged or of another kind"):
        load_pickle(write(tmp_path / "bad.p", content))


@pytest.mark.timeout(20)
def test_deep_nesting_is_read(tmp_path: Path) -> None:
    loaded = load_pickle(write(tmp_path / "deep.p", b"\x80\x02]" + b"\x85" * 500_000 + b"."))
    assert isinstance(loaded, tuple)


@pytest.mark.timeout(20)
def test_one_array_named_many_times_is_not_made_many_times(tmp_path: Path) -> None:
    large = np.zeros(100_000)
    with pytest.raises(UserError, match="array of 800000 bytes"):
        load_saved(saved(tmp_path / "a.pth", [large], True))


AGAIN = {
    "state": b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01M\xa0\x0f\x85cnumpy\ndtype\nU\x02i1\x85R\x89h\x00tb",
    "scalar": b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nU\x05S4000\x85Rh\x00\x86R",
    "bytes": b"c_codecs\nencode\nh\x00U\x06latin1\x86R",
    "set": b"c__builtin__\nset\nh\x00\x85R",
    "array": b"cnumpy\nndarray\nh\x00\x85R",
}
"""Each makes something new of the 4000 bytes in place 0 of the memo."""


@pytest.mark.parametrize("kind", AGAIN)
def test_what_is_used_again_and_again_takes_no_more_memory(tmp_path: Path, kind: str) -> None:
    values = b"](" + b"".join(b"M" + struct.pack("<H", i) for i in range(4000)) + b"e"
    text = b"T" + struct.pack("<i", 4000) + b"a" * 4000
    first = (values if kind in ("set", "array") else text) + b"q\x000]"
    content = b"\x80\x02" + first + (AGAIN[kind] + b"a") * 500 + b"."
    path = write(tmp_path / "evil.p", content)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=rf"evil\.p is refused, .* a file of {len(content)} bytes does not"):
            load_pickle(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 400 * len(content)
    assert load_pickle(write(path, b"\x80\x02" + first + (AGAIN[kind] + b"a") + b".")), "once is honest"


@pytest.mark.parametrize("protocol", range(5))
@pytest.mark.parametrize("values", [1, 4, 500])
def test_honest_files_hand_over_less_than_is_allowed(tmp_path: Path, values: int, protocol: int) -> None:
    """Files of arrays, scalars and sets alone, which hand over all that they hold. The one array that comes twice is
    stored once."""
    data = [(np.zeros(values), np.ones(values, "u1"), np.bool_(i % 2), np.float32(i), np.str_("a")) for i in range(50)]
    sets = [set(range(values)), set(map(str, range(values)))]
    value = [data, data[0], [np.full(values, 200, "u1")] * 500, sets]
    assert load_pickle(write(tmp_path / "a.p", pickle.dumps(value, protocol)))[3] == sets


@pytest.mark.parametrize("archive", [True, False])
def test_truncated_files(tmp_path: Path, archive: bool) -> None:
    whole = saved(tmp_path / "a.pth", [("a.jpg", "m", [1, 2, 3, 4], "x", [])] * 20, archive).read_bytes()
    for length in range(0, len(whole) - 200, max(1, len(whole) // 40)):
        with pytest.raises(UserError, match=r"cut\.pth"):
            load_saved(write(tmp_path / "cut.pth", whole[:length]))


def test_a_pickle_is_not_a_saved_file_and_vice_versa(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.pth is damaged or of another kind .*not written by torch\.save"):
        load_saved(write(tmp_path / "a.pth", pickle.dumps([1])))
    with zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps([0] * 10_000_000))
    with pytest.raises(UserError, match=r"b\.pth is damaged .*not written by torch\.save"):
        load_saved(tmp_path / "b.pth")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.p cannot be read: No such file"):
        load_pickle(tmp_path / "none.p")
