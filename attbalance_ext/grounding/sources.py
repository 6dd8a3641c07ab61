"""From the settings of a run to its data: pictures with sentences, their tokenizer, and batches for its model."""

from __future__ import annotations

from pathlib import Path

import torch

from attbalance_ext.grounding.data import GroundingDataset, Vocabulary, load_dataset
from attbalance_ext.grounding.data.dataset import SIZES
from attbalance_ext.grounding.data.files import FileDataset, open_dataset
from attbalance_ext.grounding.data.protocol import Pictures
from attbalance_ext.grounding.data.tokenizers import HuggingFaceTokenizer, Tokenizer, WordTokenizer
from attbalance_ext.grounding.data.transforms import TrainTransform
from attbalance_ext.grounding.errors import UserError
from attbalance_ext.grounding.models import GroundingModel, design
from attbalance_ext.grounding.settings import Settings
from attbalance_ext.grounding.split import PreparedSplit, Split, StreamedSplit

PRETRAINING = "builtin:refcoco"
"""Whose scenes pre-train the tiny models' image encoder where a run's own data do not say what lies in them."""


def open_pictures(settings: Settings, split: str, *, cache: Path | None = None) -> GroundingDataset | FileDataset:
    """The sentences and images of a split: built-in, or from files under ``settings.data_root``."""
    pictures: GroundingDataset | FileDataset
    if settings.data_root is None:
        # Larger canvases show the largest pictures there are, scaled up.
        size = settings.size if settings.size in SIZES or _keeps_pictures(settings) else max(SIZES)
        pictures = load_dataset(settings.data, split, cache=cache, size=size)
    else:
        pictures = open_dataset(settings.data, split, root=Path(settings.data_root), wrong_boxes=settings.wrong_boxes)
    if split == "train" and settings.train_share < 1.0:
        pictures = pictures.part(settings.train_share)
    if not len(pictures):
        why = ""
        if split == "train" and settings.train_share < 1.0:
            why = f" in a share of {settings.train_share} of its pictures (train_share)"
        elif settings.data_root is not None:
            why = ": all of its boxes are wrong and left out ('attbalance data check ROOT' counts them)"
        raise UserError(f"{settings.data} {split} has no sentences{why}")
    return pictures


def make_tokenizer(settings: Settings, train: Pictures) -> Tokenizer:
    """The tokenizer that the settings name, else the words of the training sentences."""
    if settings.tokenizer is not None:
        return HuggingFaceTokenizer.load(settings.tokenizer)
    if weights := settings.model_options.get("text_weights"):
        # Words numbered otherwise would read other words' embeddings, and nothing would say so.
        raise UserError(f"text_weights need the tokenizer they were trained with: give tokenizer too, as {weights!r}")
    return WordTokenizer(Vocabulary.build(train.sentences), special_tokens=design(settings.model).bert)


def open_split(
    settings: Settings,
    split: str,
    tokenizer: Tokenizer,
    model: GroundingModel,
    *,
    cache: Path | None = None,
    training: bool = False,
) -> Split:
    """A split for ``model``: in memory where the data are and nothing is augmented, else streamed.

    ``training``: augment as the settings say.
    """
    pictures = open_pictures(settings, split, cache=cache)
    device = torch.device(settings.device)
    if isinstance(pictures, GroundingDataset) and _keeps_pictures(settings):
        return PreparedSplit(pictures, tokenizer, model, device)
    return StreamedSplit(
        pictures,
        tokenizer,
        model,
        device,
        augment=TrainTransform(settings.size, flip=settings.flip) if training and settings.augment else None,
        seed=settings.seed,
        workers=settings.workers,
    )


def pretraining_scenes(settings: Settings, *, cache: Path | None = None) -> GroundingDataset:
    """Scenes that tell what lies in them: the run's own where they are built-in."""
    name = settings.data if settings.data_root is None else PRETRAINING
    return load_dataset(name, "train", cache=cache, size=settings.size)


def _keeps_pictures(settings: Settings) -> bool:
    """Whether the model takes built-in pictures as they are: the tiny ones do."""
    return not design(settings.model).bert and not settings.augment
