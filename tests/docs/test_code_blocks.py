"""The code of the documentation is run: Python page by page, shell commands as far as that is cheap."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import helpers_shell
import pytest
import torch
from helpers_blocks import PAGES, ROOT, Block, blocks, every_block, indented_code, inline_code
from torch import Tensor, nn

BLOCKS = every_block()
LANGUAGES = {"python", "sh", "text"}  # text: what is no code, a diagram or equations
TEXT_PAGES = {"docs/architecture.md"}
LEFT_OUT = 0  # blocks that say why they cannot be run: raise it knowingly

# Commands that are run; of all others the programs, options and files are looked up.
RUN = {
    "attbalance info": [sys.executable, "-m", "attbalance_ext.cli", "info"],
    "make help": ["make", "help"],
    "python -m benchmarks table": [sys.executable, "-m", "benchmarks", "table"],
}


class Host(nn.Module):
    """[REG, a word, 8 x 8 visual tokens] through six layers; REG's output gives the box."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Linear(32, 4)

    def forward(self, pictures: Tensor, words: Tensor) -> Tensor:
        return self.head(self.encoder(torch.cat([words, pictures], dim=1))[:, 0]).sigmoid()


def after_readme(names: dict[str, Any]) -> None:
    """Its loop trains every parameter of the reader's model."""
    model = Host()
    first = [parameter.detach().clone() for parameter in model.parameters()]
    loader = [(torch.randn(2, 64, 32), torch.randn(2, 2, 32), torch.rand(2, 4) * 0.5 + 0.25) for _ in range(2)]
    names["train"](model, loader, torch.optim.AdamW(model.parameters(), lr=1e-3))
    assert all(not torch.equal(old, new) for old, new in zip(first, model.parameters(), strict=True))


# What a page's blocks find before the first one, and what must hold after the last. Other pages stand on their own.
BEFORE: dict[str, Callable[[], dict[str, Any]]] = {}
AFTER: dict[str, Callable[[dict[str, Any]], None]] = {"README.md": after_readme}


def run_python(page: str, found: list[Block], names: dict[str, Any]) -> None:
    """The page's blocks in order, in one namespace; an error names the page and the line in it."""
    names["__name__"] = page  # not "__main__"
    for block in found:
        # Lines before the code, so that a traceback counts as the page does.
        exec(compile("\n" * block.line + block.code, str(ROOT / page), "exec"), names)


def of(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language and block.reason is None]


@pytest.mark.parametrize("page", sorted({block.page for block in of("python")}))
def test_python(page: str) -> None:
    names = BEFORE.get(page, dict)()
    run_python(page, [block for block in of("python") if block.page == page], names)
    AFTER.get(page, lambda names: None)(names)


@pytest.mark.parametrize("block", of("sh"), ids=str)
def test_shell(block: Block) -> None:
    found = helpers_shell.commands_of(block.code)
    assert found, "a block without a command"
    for command in found:
        helpers_shell.check(command)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_sentences(page: Path) -> None:
    for code in inline_code(page.read_text()):
        words = code.split()
        named = len(words) > 1 and words[0] in ("attbalance", "make", "pytest", "torchrun")
        if named or words[:2] == ["python", "-m"] or words[0].endswith(".sh"):
            with suppress(helpers_shell.Incomplete):
                helpers_shell.check(code)


@pytest.mark.parametrize("command", RUN)
def test_cheap_commands_run(command: str) -> None:
    stated = {typed.partition("#")[0].strip() for block in of("sh") for typed in helpers_shell.commands_of(block.code)}
    assert command in stated, "no page shows it any more"
    done = subprocess.run(RUN[command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_every_block_says_what_it_is() -> None:
    unknown = [f"{block} is {block.language!r}" for block in BLOCKS if block.language not in LANGUAGES]
    unknown += [str(block) for block in BLOCKS if block.language == "text" and block.page not in TEXT_PAGES]
    unknown += [f"{page.name}:{line} is indented" for page in PAGES for line in indented_code(page.read_text())]
    assert not unknown


def test_few_blocks_are_left_out() -> None:
    left_out = [f"{block}: {block.reason}" for block in BLOCKS if block.reason is not None]
    assert len(left_out) <= LEFT_OUT, "\n".join(left_out)
    assert len(of("python")) >= 25
    assert len(of("sh")) >= 8


def test_a_broken_block_is_seen() -> None:
    page = "# A page\n\n```python\nimport torch\n```\n\n- a list:\n\n  ```python\n  1 / 0\n  ```\n"
    found = blocks(page, "docs/page.md")
    assert [(block.line, block.code) for block in found] == [(3, "import torch"), (9, "1 / 0")]
    with pytest.raises(ZeroDivisionError) as error:
        run_python("docs/page.md", found, {})
    assert error.traceback[-1].lineno == 9  # counted from 0: the line in the page
    assert indented_code("text\n\n    code\n\n- item\n\n    more of it\n\n```sh\n\n    shell\n```\n") == [3]
    assert blocks("<!-- not run: needs two GPUs -->\n```sh\nx\n```", "p")[0].reason == "needs two GPUs"


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        ("make nothing", "nothing"),
        ("make test JOB=8", "does not read JOB"),
        ("attbalance nothing", "No such command"),
        ("attbalance train --nothing 1", "--nothing"),
        ("attbalance train --steps many", "--steps"),
        ("attbalance experiment", "Missing argument"),
        ("attbalance bench run --nothing", "--nothing"),
        ("python -m benchmarks run --batches 8", "--batches"),
        ("python -m nothing_at_all run", "no module"),
        ("torchrun --nproc-per-nodes 8 -m attbalance_ext.cli train", "nproc-per-nodes"),
        ("torchrun --nproc-per-node 8 -m attbalance_ext.cli train --nothing", "--nothing"),
        ("pip install --nothing .", "--nothing"),
        ("pip install '.[nothing]'", "no extra 'nothing'"),
        ("pytest -m nothing", "no marker"),
        ("pytest tests/nothing", "no tests/nothing"),
        ("scripts/nothing.sh", "no executable"),
        ("ATTBALANCE_NOTHING=1 make test", "ATTBALANCE_NOTHING"),
        ("docker run this", "unknown program"),
    ],
)
def test_a_wrong_command_is_seen(command: str, wrong: str) -> None:
    with pytest.raises(helpers_shell.WrongCommand, match=wrong):
        helpers_shell.check(command)
