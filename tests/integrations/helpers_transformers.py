"""Small Hugging Face hosts with random weights, and their supervised attention computed the explicit way."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from helpers_hosts import explicit_map
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    Blip2QFormerConfig,
    CLIPVisionConfig,
    ConditionalDetrConfig,
    ConditionalDetrModel,
    DeepseekV3Config,
    DeepseekV3Model,
    DetrConfig,
    DetrForObjectDetection,
    LlamaConfig,
    LlavaConfig,
    LlavaModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3Model,
    ResNetConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel
from transformers.models.llama.modeling_llama import LlamaModel, rotate_half
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model

from attbalance_ext.integrations.transformers import TransformersTap, attention_modules

BATCH, WIDTH = 2, 32
DROPOUT = 0.1


@dataclass
class Host:
    """A model on fixed inputs, and what is known of it without a tap."""

    model: nn.Module
    modules: Callable[[Any], list[nn.Module]]
    inputs: dict[str, Tensor]  # those that require grad
    call: Callable[[Any, dict[str, Tensor]], Tensor]
    query: int | Sequence[int]
    choice: Tensor | None  # among several queries
    visual: slice | Sequence[int]
    hidden: Tensor  # (B, M): what each sample's object query does not see
    heads: tuple[int, int]
    projections: tuple[str, str] = ("q_proj", "k_proj")
    rotary: bool = False
    bound: float = 1e-9

    def caller(self) -> nn.Module:
        """The model with its masks: called with the inputs alone."""
        return _Caller(self.model, self.call)

    def output(self, model: nn.Module | None = None) -> Tensor:
        torch.manual_seed(1)  # dropout
        return self.call(self.model if model is None else model, self.inputs)

    def make_tap(self, model: nn.Module) -> TransformersTap:
        return TransformersTap(self.modules(model), query=self.query, visual=self.visual)

    def explicit(self, model: nn.Module) -> tuple[list[Tensor], Tensor]:
        """The maps (B, N) of the tapped layers, from every head of every token, and the model's output."""
        seen: list[Tensor] = []
        handles = [
            getattr(module, name).register_forward_hook(lambda _, args, output: seen.append(output))
            for module in self.modules(model)
            for name in self.projections
        ]
        output = self.output(model)
        for handle in handles:
            handle.remove()
        maps = []
        for queries, keys in zip(seen[::2], seen[1::2], strict=True):
            q, k = (
                x.unflatten(-1, (heads, -1)).transpose(1, 2)
                for x, heads in zip((queries, keys), self.heads, strict=True)
            )
            if self.rotary:
                cos, sin = (x[:, None] for x in model.rotary_emb(queries, torch.arange(q.shape[2])[None]))
                q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
            k = k.repeat_interleave(self.heads[0] // self.heads[1], 1)
            scores = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).mean(1)  # (B, S, M)
            row = torch.stack([scores[sample, token] for sample, token in enumerate(self.tokens)])
            maps.append(explicit_map(row[:, self.visual], self.hidden[:, self.visual]))
        return maps, output

    @property
    def tokens(self) -> list[int]:
        """Each sample's object query."""
        if self.choice is None:
            assert isinstance(self.query, int)
            return [self.query] * BATCH
        assert not isinstance(self.query, int)
        return [self.query[number] for number in self.choice.tolist()]


class _Caller(nn.Module):
    def __init__(self, model: nn.Module, call: Callable[[Any, dict[str, Tensor]], Tensor]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.call(self.model, inputs)


def randomised(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    for name, parameter in model.named_parameters():
        if "norm" not in name.lower() and parameter.requires_grad:
            nn.init.normal_(parameter, std=0.25)
    return model.to(dtype)


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def present(tokens: int) -> Tensor:
    """An attention mask with padding at the end of the first sample."""
    mask = torch.ones(BATCH, tokens, dtype=torch.int64)
    mask[0, -3:] = 0
    return mask


def bert(attention: str = "sdpa", **options: Any) -> Host:
    """VisualBERT's layout: words, then image regions, in one sequence; the first token is the object query."""
    config = BertConfig(
        hidden_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=40,
        vocab_size=20,
        max_position_embeddings=20,
        hidden_dropout_prob=DROPOUT,
        attention_probs_dropout_prob=DROPOUT,
        attn_implementation=attention,
    )
    mask = present(14)
    return Host(
        randomised(BertModel(config, add_pooling_layer=False)).train(),
        lambda model: [layer.attention.self for layer in model.encoder.layer][1:],
        {"inputs_embeds": leaf(BATCH, 14, WIDTH)},
        lambda model, inputs: model(**inputs, attention_mask=mask).last_hidden_state,
        query=0,
        choice=None,
        visual=slice(5, 14),
        hidden=mask == 0,
        heads=(4, 4),
        projections=("query", "key"),
        **options,
    )


def qformer(attention: str = "sdpa", **options: Any) -> Host:
    """BLIP-2: query tokens in a BERT whose cross-attention looks at the image."""
    config = Blip2QFormerConfig(
        hidden_size=WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=40,
        encoder_hidden_size=24,
        cross_attention_frequency=2,
        hidden_dropout_prob=DROPOUT,
        attention_probs_dropout_prob=DROPOUT,
        attn_implementation=attention,
    )
    mask = present(12)
    return Host(
        randomised(Blip2QFormerModel(config)).train(),
        lambda model: [layer.crossattention.attention for layer in model.encoder.layer[::2]],
        {"query_embeds": leaf(BATCH, 5, WIDTH), "encoder_hidden_states": leaf(BATCH, 12, 24)},
        lambda model, inputs: model(**inputs, encoder_attention_mask=mask).last_hidden_state,
        query=-1,
        choice=None,
        visual=slice(1, None),
        hidden=mask == 0,
        heads=(4, 4),
        projections=("query", "key"),
        **options,
    )


def detr(attention: str = "sdpa", **options: Any) -> Host:
    """Object queries over the image's tokens: the decoder's cross-attention, one query chosen for each sample."""
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic", out_features=["stage4"]
    )
    config = DetrConfig(
        backbone_config=backbone,
        d_model=WIDTH,
        encoder_layers=1,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        num_queries=6,
        dropout=DROPOUT,
        attn_implementation={"": attention, "backbone_config": "eager"},
    )
    pixels = torch.ones(BATCH, 128, 128, dtype=torch.int64)
    pixels[0, 96:] = 0
    return Host(
        randomised(DetrForObjectDetection(config)).train(),
        lambda model: [layer.encoder_attn for layer in model.model.decoder.layers],
        {"pixel_values": leaf(BATCH, 3, 128, 128)},
        lambda model, inputs: model(**inputs, pixel_mask=pixels).pred_boxes,
        query=range(6),
        choice=torch.tensor([4, 1]),
        visual=slice(None),
        hidden=pixels[:, ::32, ::32].flatten(1) == 0,
        heads=(4, 4),
        **options,
    )


def vlm(
    model: type[nn.Module], config: Any, *, padded: bool, query: Any, choice: Tensor | None, **options: Any
) -> Host:
    """A causal decoder with rotary positions and grouped heads; its image tokens stand among the words."""
    mask = present(15)
    if not padded:
        mask[:] = 1
    made = Host(
        randomised(model(config)).train(),
        lambda model: [layer.self_attn for layer in model.layers],
        {"inputs_embeds": leaf(BATCH, 15, WIDTH)},
        lambda model, inputs: (
            model(**inputs, attention_mask=mask if padded else None, use_cache=False).last_hidden_state
        ),
        query=query,
        choice=choice,
        visual=[2, 3, 4, 7, 8, 9, 13],
        hidden=mask == 0,
        heads=(4, 2),
        rotary=True,
        bound=1e-5,  # these models normalise in float32, whatever they are given
        **options,
    )
    made.hidden = made.hidden | (torch.arange(15) > torch.tensor(made.tokens)[:, None] % 15)
    return made


DECODER = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "vocab_size": 20,
}


def qwen2(attention: str = "sdpa") -> Host:
    config = Qwen2Config(**DECODER, attn_implementation=attention)
    return vlm(Qwen2Model, config, padded=True, query=11, choice=None)


def llama(attention: str = "sdpa") -> Host:
    """Without a mask "sdpa" is told that it is causal by a flag."""
    config = LlamaConfig(**DECODER, attn_implementation=attention)
    return vlm(LlamaModel, config, padded=False, query=[14, 9, 12], choice=torch.tensor([1, 0]))


HOSTS = {"bert": bert, "qformer": qformer, "detr": detr, "qwen2": qwen2, "llama": llama}


# More kinds of attention, each with the forward pass that a test runs and the modules it taps.

VISION = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}


def siglip() -> tuple[nn.Module, Callable[[Any], Any], list[nn.Module]]:
    model, image = (
        SiglipVisionModel(SiglipVisionConfig(**VISION, image_size=32, patch_size=8)),
        torch.randn(2, 3, 32, 32),
    )
    return model, lambda model: model(image), attention_modules(model)


def llava() -> tuple[nn.Module, Callable[[Any], Any], list[nn.Module]]:
    """Image tokens among the words; the tower and the language model each have attention of their own."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION, image_size=32, patch_size=8),
        text_config=LlamaConfig(**DECODER),
        image_token_index=15,
    )
    model = LlavaModel(config)
    words = torch.tensor([[1, 2] + 16 * [15] + [3, 4, 5]]).expand(BATCH, -1)
    image = torch.randn(BATCH, 3, 32, 32)
    return (
        model,
        lambda model: model(input_ids=words, pixel_values=image),
        attention_modules(model.language_model),
    )


def qwen3() -> tuple[nn.Module, Callable[[Any], Any], list[nn.Module]]:
    """Normalises query and key heads before it rotates them."""
    model = Qwen3Model(Qwen3Config(**DECODER, head_dim=8))
    words, mask = torch.arange(2 * 9).view(BATCH, 9), present(9)
    return model, lambda model: model(words, attention_mask=mask), attention_modules(model)


def deepseek() -> tuple[nn.Module, Callable[[Any], Any], list[nn.Module]]:
    """Latent attention: heads of query and key are wider than those of the value."""
    config = DeepseekV3Config(
        **{**DECODER, "num_key_value_heads": 4},
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=4,
        v_head_dim=8,
        first_k_dense_replace=2,
    )
    model = DeepseekV3Model(config)
    words = torch.arange(2 * 9).view(BATCH, 9)
    return model, lambda model: model(words), attention_modules(model)


def conditional_detr() -> tuple[nn.Module, Callable[[Any], Any], list[nn.Module]]:
    """Positions stand beside contents in the heads, and are not added to them."""
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, layer_type="basic", out_features=["stage4"]
    )
    config = ConditionalDetrConfig(
        backbone_config=backbone,
        d_model=WIDTH,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        num_queries=6,
    )
    model = ConditionalDetrModel(config)
    image = torch.randn(BATCH, 3, 96, 96)
    return model, lambda model: model(image), [layer.encoder_attn for layer in model.decoder.layers]


OTHERS = {
    "siglip": siglip,
    "llava": llava,
    "qwen3": qwen3,
    "deepseek_v3": deepseek,
    "conditional_detr": conditional_detr,
}
