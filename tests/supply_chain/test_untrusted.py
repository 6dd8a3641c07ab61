"""What is read is data: calls that could execute a file of somebody else's say that they do not.

Ruff's rules S (pyproject.toml) refuse pickle, eval, exec, shells, unsafe YAML and XML; these calls it does not know.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES = [
    *ROOT.glob("*.py"),
    *(
        path
        for folder in ("attbalance_ext", "benchmarks", "examples", "scripts")
        for path in (ROOT / folder).rglob("*.py")
    ),
]
# The call, by its last names: the argument that makes it read data alone.
SAFE = {
    ("torch", "load"): ("weights_only", True),
    ("np", "load"): ("allow_pickle", False),
    ("AutoConfig", "from_pretrained"): ("trust_remote_code", False),
    ("AutoModel", "from_pretrained"): ("trust_remote_code", False),
    ("AutoTokenizer", "from_pretrained"): ("trust_remote_code", False),
}


def faults(source: str) -> list[str]:
    """Calls without the argument, or with another value than a literal one of the table."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        for name, value in given.items():
            if name == "trust_remote_code" and not _is(value, False):
                found.append(f"line {node.lineno}: trust_remote_code")
        name, safe = SAFE.get(tuple(ast.unparse(node.func).split(".")[-2:]), (None, None))
        if name is not None and not (name in given and _is(given[name], safe)):
            found.append(f"line {node.lineno}: {ast.unparse(node.func)} without {name}={safe}")
        # Pillow hands PostScript to Ghostscript, unless it is told which formats a file may be of.
        if ast.unparse(node.func).endswith("Image.open") and _is(given.get("formats", ast.Constant(None)), None):
            found.append(f"line {node.lineno}: {ast.unparse(node.func)} without formats")
        if ast.unparse(node.func).endswith(("hub.load", "load_state_dict_from_url", "urlopen", "urlretrieve")):
            found.append(f"line {node.lineno}: {ast.unparse(node.func)}")
    return found


def _is(node: ast.expr, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_no_call_executes_what_it_reads() -> None:
    assert len(SOURCES) > 100
    found = {str(path.relative_to(ROOT)): faults(path.read_text()) for path in SOURCES}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "torch.load(file, weights_only=flag)",
        "np.load(file, allow_pickle=True)",
        "AutoConfig.from_pretrained(name)",
        "Anything.from_pretrained(name, trust_remote_code=True)",
        "torch.hub.load('owner/name', 'model')",
        "Image.open(path)",
        "PIL.Image.open(path, 'r', formats=None)",
    ],
)
def test_such_a_call_is_seen(line: str) -> None:
    assert len(faults(line)) == 1
