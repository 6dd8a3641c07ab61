"""Trains the model in `transvg.py`: `plain.py` as it was, `attbalance.py` with the ten lines that AttBalance takes.

    diff -u examples/transvg_style/plain.py examples/transvg_style/attbalance.py
    python examples/transvg_style/attbalance.py
    python examples/transvg_style/attbalance.py --steps 30    # a quick look

The whole run takes a minute on a CPU. Attention moves into the box first; boxes follow in the second half.
"""

import argparse

import torch
from transvg import TransVG, accuracy, box_loss, scenes


def train(steps: int, batch: int) -> None:
    torch.manual_seed(0)
    model = TransVG()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        inputs, boxes = scenes(batch, seed=step)
        predicted = model(*inputs)
        loss = box_loss(predicted, boxes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:<4} loss {box_loss(predicted, boxes):.3f}  accuracy {accuracy(predicted, boxes):6.1%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    train(args.steps, args.batch)
