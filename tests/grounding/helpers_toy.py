"""A grounding problem small enough to train on within a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from attbalance_ext.grounding.data import Vocabulary
from attbalance_ext.grounding.data.annotations import Box
from attbalance_ext.grounding.data.tokenizers import WordTokenizer
from attbalance_ext.grounding.models import build_model
from attbalance_ext.grounding.settings import Settings
from attbalance_ext.grounding.split import PreparedSplit
from attbalance_ext.grounding.train import Trainer

COLOURS = ("red", "green", "blue")


class ToyDataset:
    """A data set as the trainer reads it: a coloured square in each half of 32 x 32 pixels, a sentence for each."""

    def __init__(self, scenes: int) -> None:
        generator = torch.Generator().manual_seed(5)
        self.images = torch.randint(0, 40, (scenes, 3, 32, 32), generator=generator).to(torch.uint8)
        self.sentences: list[str] = []
        boxes = []
        for scene in range(scenes):
            colours = torch.randperm(3, generator=generator)[:2].tolist()
            for half, colour in enumerate(colours):
                x = 16 * half + int(torch.randint(0, 7, (), generator=generator))
                y = int(torch.randint(0, 23, (), generator=generator))
                self.images[scene, colour, y : y + 9, x : x + 9] = 255
                self.sentences.append(f"the {COLOURS[colour]} square")
                boxes.append([(x + 4.5) / 32, (y + 4.5) / 32, 9 / 32, 9 / 32])
        self.boxes = torch.tensor(boxes)
        self.box_ratio = self.boxes[:, 2] * self.boxes[:, 3]
        self.scene_index = torch.arange(scenes).repeat_interleave(2)

    def __len__(self) -> int:
        return len(self.sentences)

    def pixels(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[self.scene_index[index]].permute(1, 2, 0).contiguous().numpy())

    def box(self, index: int) -> Box:
        cx, cy, w, h = (32 * self.boxes[index].double()).tolist()
        return Box(cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)

    def picture_key(self, index: int) -> int:
        return int(self.scene_index[index])


def toy_settings(**changes: Any) -> Settings:
    small = {"dim": 32, "heads": 2, "hidden": 32, "layers": 3, "supervised": [1, 2], "max_words": 6, "dropout": 0.1}
    defaults: dict[str, Any] = {
        "size": 32,
        "steps": 24,
        "batch_size": 8,
        "warmup_steps": 4,
        "validate_every": 12,
        "pretrain_steps": 0,
        "model_options": small,
    }
    return Settings(**{**defaults, **changes})


def toy_trainer(directory: Path, *, scenes: int = 16, **changes: Any) -> Trainer:
    """A trainer on the toy problem, which validates on its training data."""
    settings = toy_settings(**changes)
    dataset = ToyDataset(scenes)
    tokenizer = WordTokenizer(Vocabulary.build(dataset.sentences))
    torch.manual_seed(settings.seed)
    model = build_model(settings.model, vocabulary_size=len(tokenizer), image_size=32, **settings.model_options)
    split = PreparedSplit(dataset, tokenizer, model, torch.device("cpu"))
    return Trainer(settings, model, split, split, directory)


def finish(trainer: Trainer) -> Trainer:
    """Run a trainer to its end."""
    while not trainer.finished:
        trainer.advance()
    trainer.log.close()
    return trainer
