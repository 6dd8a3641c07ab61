"""The README's code runs as it stands, on a host with TransVG's token order."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

README = Path(__file__).parent.parent / "README.md"


class Host(nn.Module):
    """[REG, 20 words, 20 x 20 visual tokens] through six layers; REG's output gives the box."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True) for _ in range(6))
        self.head = nn.Linear(32, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        for layer in self.layers:
            tokens = layer(tokens)
        return self.head(tokens[:, 0]).sigmoid()


def test_five_lines_of_use() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    model = Host()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    names = {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "loader": [(torch.randn(2, 421, 32), torch.rand(2, 4) * 0.5 + 0.25) for _ in range(2)],
    }
    exec(code, names)
    assert names["loss"].isfinite()  # type: ignore[attr-defined]
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
