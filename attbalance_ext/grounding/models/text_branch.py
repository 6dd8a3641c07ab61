"""BERT-base (Devlin et al., NAACL 2019): the text branch of TransVG, VLTVG and QRNet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from attbalance_ext.grounding.errors import UserError
from attbalance_ext.grounding.models.pretrained import load, read_config, require_design

BERT_BASE: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
}


class TextBranch(nn.Module):
    """transformers' BERT-base without its pooler, on fused attention.

    Args:
        vocabulary_size: words (tokens) of the tokenizer.
        max_words: longest sentence.
        weights: folder or hub id (``id@revision`` too) of BERT-base's weights; None: random ones.
        last_layers: the token features are the mean of the outputs of this many last layers (VLTVG: 4).

    Raises:
        UserError: weights of another design than BERT-base, of another vocabulary, or not whole; sentences longer
            than BERT's positions.
    """

    dim = 768

    def __init__(
        self, *, vocabulary_size: int, max_words: int, weights: str | None = None, last_layers: int = 1
    ) -> None:
        super().__init__()
        self.last_layers = last_layers
        if weights is None:
            config = BertConfig(vocab_size=vocabulary_size, **BERT_BASE, attn_implementation="sdpa")
            self.bert = BertModel(config, add_pooling_layer=False)
        else:
            config = read_config("text_weights", weights, "bert")
            require_design("text_weights", weights, config, {**BERT_BASE, "vocab_size": vocabulary_size})
            self.bert = load(
                "text_weights", weights, BertModel, config, attn_implementation="sdpa", add_pooling_layer=False
            )
        if max_words > config.max_position_embeddings:
            raise UserError(f"max_words must be at most {config.max_position_embeddings} for BERT, got {max_words}")

    def forward(self, words: Tensor, padding: Tensor) -> Tensor:
        """(B, T) int64 and (B, T) bool, True = ignore -> (B, T, 768)."""
        # Layer by layer: transformers' own way to keep the layers' outputs cannot be compiled, and it would look into a
        # mask on the host. (B, 1, 1, T) is what its layers take.
        seen = ~padding[:, None, None]
        states = [self.bert.embeddings(words)]
        for layer in self.bert.encoder.layer:
            states.append(layer(states[-1], seen))
        return torch.stack(states[-self.last_layers :]).mean(0)
