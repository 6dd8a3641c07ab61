"""Every form of host that a tap supports, one by one: RAC + MRC and every gradient against explicit projections and
head-averaged attention, in float64.

`test_tap_gradients.py` crosses the options of one layer; here each form has a name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers_hosts import Host, captured_inputs, explicit_map, explicit_scores, explicit_terms, relative_error
from torch import Tensor, nn
from torch.distributed import HashStore, destroy_process_group, init_process_group
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from attbalance_ext import AttentionTap, MomentumTeacher, QueryAttention, attention_map, attention_terms

BATCH, TOKENS, MEMORY, WIDTH, MEMORY_WIDTH = 3, 12, 10, 16, 6
BOUND = 1e-9
SCATTERED = (2, 9, 3, 5, 8, 6)

Run = Callable[..., Tensor]


class Encoder(nn.Module):
    """PyTorch's own encoder, without a nested batch: its padding hides tokens, its layers run as they are."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 24, dropout=0.0, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def tapped(self) -> list[nn.MultiheadAttention]:
        return [layer.self_attn for layer in self.encoder.layers]

    def forward(self, tokens: Tensor, memory: None, padding: Tensor | None) -> Tensor:
        return self.encoder(tokens, src_key_padding_mask=padding)


class Decoder(nn.Module):
    """Object queries that attend to each other and to a memory: its cross-attention is tapped."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, 2, 24, dropout=0.0, **options), 2)
        self.batch_first = options.get("batch_first", False)

    def tapped(self) -> list[nn.MultiheadAttention]:
        return [layer.multihead_attn for layer in self.decoder.layers]

    def forward(self, tokens: Tensor, memory: Tensor, padding: Tensor | None) -> Tensor:
        if not self.batch_first:
            tokens, memory = tokens.transpose(0, 1), memory.transpose(0, 1)
        output = self.decoder(tokens, memory, memory_key_padding_mask=padding)
        return output if self.batch_first else output.transpose(0, 1)


class Positioned(nn.Module):
    """DETR's layers: query and key are the tokens plus their positions, the value is the tokens alone."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(TOKENS, 1, WIDTH))
        self.layers = nn.ModuleList(nn.MultiheadAttention(WIDTH, 2) for _ in range(2))

    def tapped(self) -> list[nn.MultiheadAttention]:
        return list(self.layers)

    def forward(self, tokens: Tensor, memory: None, padding: Tensor | None) -> Tensor:
        tokens = tokens.transpose(0, 1)
        for layer in self.layers:
            query = key = tokens + self.positions
            tokens = tokens + layer(query, key, tokens, key_padding_mask=padding, need_weights=False)[0]
        return tokens.transpose(0, 1)


def tapped(host: nn.Module) -> list[nn.MultiheadAttention]:
    return list(host.layers) if isinstance(host, Host) else host.tapped()


def plainly(host: nn.Module) -> AbstractContextManager[Run]:
    return nullcontext(host)


@contextmanager
def under_autocast(host: nn.Module) -> Iterator[Run]:
    with torch.autocast("cpu", torch.bfloat16):  # leaves float64 alone, as it does the folded query
        yield host


@contextmanager
def checkpointed(host: nn.Module) -> Iterator[Run]:
    yield lambda *inputs: checkpoint(host, *inputs, use_reentrant=False)


@contextmanager
def checkpointed_layers(host: nn.Module) -> Iterator[Run]:
    for layer in tapped(host):

        def again(*args: Any, forward: Callable[..., Any] = layer.forward, **kwargs: Any) -> Any:
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)

        layer.forward = again
    yield host


@contextmanager
def checkpointed_blocks(host: nn.Module) -> Iterator[Run]:
    for block in host.encoder.layers:

        def again(*args: Any, forward: Callable[..., Any] = block.forward, **kwargs: Any) -> Any:
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)

        block.forward = again
    yield host


@contextmanager
def distributed(host: nn.Module) -> Iterator[Run]:
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield DistributedDataParallel(host)
    finally:
        destroy_process_group()


@contextmanager
def compiled(host: nn.Module) -> Iterator[Run]:
    torch._dynamo.reset()
    yield torch.compile(host, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


@dataclass(frozen=True)
class Form:
    """A host, where its object query and its visual tokens are, and how it runs."""

    make: Callable[[], nn.Module]
    query: int | slice | Sequence[int] = 0
    visual: slice | Sequence[int] = field(default_factory=lambda: slice(2, 9))
    memory: int | None = None  # width of the cross-attention's source
    mask: str | None = "bool"
    given: Callable[[Any], Any] = field(default=lambda visual: visual)  # how the tap is told the visual tokens
    run: Callable[[nn.Module], AbstractContextManager[Run]] = plainly


def host(**options: Any) -> Callable[[], nn.Module]:
    return lambda: Host(width=WIDTH, **options)


def as_mask(visual: Sequence[int]) -> Tensor:
    return torch.tensor([token in visual for token in range(TOKENS)])


FORMS = {
    # layouts and projections
    "batch_first": Form(host(batch_first=True)),
    "sequence_first": Form(host()),
    "called_by_position": Form(host(positional=True)),
    "no_bias": Form(host(bias=False)),
    "no_mask": Form(host(), mask=None),
    "float_mask": Form(host(batch_first=True), mask="float"),
    "add_bias_kv": Form(host(add_bias_kv=True)),
    "add_bias_kv_without_bias": Form(host(add_bias_kv=True, bias=False)),
    "add_zero_attn": Form(host(add_zero_attn=True)),
    "dropout": Form(host(dropout=0.3)),
    "four_heads": Form(host(heads=4, batch_first=True)),
    "position_embeddings_on_query_and_key": Form(Positioned),
    # cross-attention
    "cross_packed": Form(host(batch_first=True), memory=WIDTH),
    "cross_packed_sequence_first": Form(host(), memory=WIDTH),
    "cross_kdim_vdim": Form(host(kdim=MEMORY_WIDTH, vdim=MEMORY_WIDTH, batch_first=True), memory=MEMORY_WIDTH),
    "cross_kdim_vdim_sequence_first": Form(host(kdim=MEMORY_WIDTH, vdim=MEMORY_WIDTH), memory=MEMORY_WIDTH),
    "cross_kdim_vdim_no_bias": Form(host(kdim=MEMORY_WIDTH, vdim=MEMORY_WIDTH, bias=False), memory=MEMORY_WIDTH),
    # PyTorch's own stacks
    "encoder_post_norm": Form(Encoder),
    "encoder_pre_norm": Form(lambda: Encoder(norm_first=True)),
    "decoder": Form(Decoder, memory=WIDTH),
    "decoder_batch_first": Form(lambda: Decoder(batch_first=True), memory=WIDTH),
    "decoder_pre_norm": Form(lambda: Decoder(batch_first=True, norm_first=True), memory=WIDTH),
    # where the object query is
    "query_last": Form(host(), query=-1),
    "query_inside": Form(host(batch_first=True), query=4),
    "query_is_visual": Form(host(batch_first=True), query=5),
    "queries_slice": Form(host(batch_first=True), query=slice(0, 2)),
    "queries_slice_sequence_first": Form(host(), query=slice(-4, None)),
    "queries_every_third": Form(host(), query=slice(0, None, 3)),
    "queries_index": Form(host(batch_first=True), query=(7, 0, 3)),
    "queries_index_sequence_first": Form(host(), query=(7, 0, 3)),
    "queries_index_from_the_end": Form(host(), query=(-1, 0, -5)),
    "queries_run_of_ints": Form(host(), query=range(3, 6)),
    "queries_all_of_a_decoder": Form(Decoder, query=slice(None), memory=WIDTH),
    "queries_index_of_a_decoder": Form(lambda: Decoder(batch_first=True), query=(11, 2), memory=WIDTH),
    # where the visual tokens are
    "visual_all": Form(host(batch_first=True), visual=slice(None)),
    "visual_tail": Form(host(), visual=slice(-5, None)),
    "visual_every_second": Form(host(batch_first=True), visual=slice(1, None, 2)),
    "visual_ints": Form(host(batch_first=True), visual=SCATTERED),
    "visual_ints_sequence_first": Form(host(), visual=SCATTERED),
    "visual_ints_from_the_end": Form(host(), visual=(-1, 2, -3, 4)),
    "visual_run_of_ints": Form(host(), visual=range(3, 9), given=list),
    "visual_tensor": Form(host(batch_first=True), visual=SCATTERED, given=torch.tensor),
    "visual_mask": Form(host(), visual=sorted(SCATTERED), given=as_mask),
    "visual_ints_of_a_memory": Form(host(), visual=SCATTERED, memory=WIDTH),
    "visual_ints_queries_ints": Form(host(), visual=SCATTERED, query=(4, 1)),
    # how it runs
    "autocast": Form(host(batch_first=True), run=under_autocast),
    "checkpoint": Form(host(batch_first=True, dropout=0.2), run=checkpointed),
    "checkpoint_of_layers": Form(host(), run=checkpointed_layers),
    "checkpoint_of_blocks": Form(Encoder, run=checkpointed_blocks),
    "checkpoint_queries_slice": Form(host(), query=slice(0, 3), run=checkpointed),
    "checkpoint_queries_index": Form(host(), query=(7, 0, 3), run=checkpointed),
    "checkpoint_visual_index": Form(Encoder, visual=SCATTERED, run=checkpointed_blocks),
    "checkpoint_decoder": Form(Decoder, query=slice(None), memory=WIDTH, run=checkpointed),
    "ddp": Form(host(batch_first=True), run=distributed),
    "ddp_queries_index": Form(host(), query=(7, 0, 3), visual=SCATTERED, run=distributed),
    "compile": Form(host(batch_first=True), run=compiled),
    "compile_sequence_first": Form(host(), query=-1, run=compiled),
    "compile_queries_index": Form(host(), query=(7, 0, -3), visual=SCATTERED, run=compiled),
    "compile_decoder": Form(Decoder, query=slice(0, 5), memory=WIDTH, run=compiled),
}


def randomised(model: nn.Module) -> nn.Module:
    """PyTorch starts biases at zero, where a forgotten one would not show."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.double()


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_rac_and_mrc_and_every_gradient_equal_the_explicit_ones(form: Form) -> None:
    model = randomised(form.make())
    keys = TOKENS if form.memory is None else MEMORY
    visual = list(range(keys)[form.visual]) if isinstance(form.visual, slice) else list(form.visual)
    recorded = (
        [form.query]
        if isinstance(form.query, int)
        else list(range(TOKENS)[form.query] if isinstance(form.query, slice) else form.query)
    )
    choice = None if isinstance(form.query, int) else torch.randint(len(recorded), (BATCH,))
    chosen = [recorded[0]] * BATCH if choice is None else [recorded[number] for number in choice.tolist()]

    hidden = torch.zeros(BATCH, keys, dtype=torch.bool)
    hidden[0, -2:] = hidden[1, 5] = form.mask is not None
    mask = {
        None: None,
        "bool": hidden,
        "float": torch.zeros(BATCH, keys, dtype=torch.float64).masked_fill(hidden, -torch.inf),
    }[form.mask]
    region = torch.rand(BATCH, len(visual), dtype=torch.float64)
    weights = torch.rand(2, 2, BATCH, dtype=torch.float64)
    inputs = [torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64)]
    if form.memory is not None:
        inputs.append(torch.randn(BATCH, MEMORY, form.memory, dtype=torch.float64))
    for x in inputs:
        x.requires_grad_()

    def make_tap(host: nn.Module) -> AttentionTap:
        return AttentionTap(tapped(host), query=form.query, visual=form.given(form.visual))

    def loss(rac: Tensor, mrc: Tensor, output: Tensor) -> Tensor:
        return (weights[0] * rac).sum() + (weights[1] * mrc).sum() + 0.1 * output.square().sum()

    def called(run: Run) -> Tensor:
        torch.manual_seed(1)  # dropout
        return run(inputs[0], inputs[1] if len(inputs) > 1 else None, mask)

    def explicit_maps(host: nn.Module) -> tuple[list[Tensor], Tensor]:
        with captured_inputs(tapped(host)) as seen:
            output = called(host)
        maps = []
        for layer, tokens in zip(tapped(host), seen, strict=True):
            of_each = [explicit_scores(layer, tokens, query)[sample] for sample, query in enumerate(chosen)]
            maps.append(explicit_map(torch.stack(of_each)[:, visual], hidden[:, visual]))
        return maps, output

    def gradients(host: nn.Module, objective: Tensor) -> dict[str, Tensor | None]:
        leaves = {f"input {number}": x for number, x in enumerate(inputs)} | dict(host.named_parameters())
        host.zero_grad()
        for x in inputs:
            x.grad = None
        objective.backward()
        return {name: None if leaf.grad is None else leaf.grad.clone() for name, leaf in leaves.items()}

    twin = copy.deepcopy(model)
    teacher = MomentumTeacher(model, make_tap)
    randomised(teacher.module)
    with torch.no_grad():
        target, _ = explicit_maps(copy.deepcopy(teacher.module))
    maps, output = explicit_maps(twin)
    truth = explicit_terms(maps, region, target)
    expected = gradients(twin, loss(truth.rac, truth.mrc, output))

    tap = make_tap(model)
    with form.run(model) as run:
        with tap.recording():
            output = called(run)
        attention = tap.attention(choice)
        recorded_map = attention_map(attention)
        teachers: QueryAttention = teacher.attention(inputs[0], *(inputs[1:] or [None]), mask, query=choice)
        terms = attention_terms(attention, region, teacher=teachers, backend="cpu")
        actual = gradients(model, loss(terms.rac, terms.mrc, output))

    assert relative_error(recorded_map, torch.stack(maps)) < BOUND
    assert relative_error(attention_map(teachers), torch.stack(target)) < BOUND
    assert relative_error(terms.rac, truth.rac) < BOUND
    assert relative_error(terms.mrc, truth.mrc) < BOUND
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        if gradient is None:
            assert actual[name] is None, name
        else:
            assert actual[name] is not None, name
            assert relative_error(actual[name], gradient) < BOUND, name
    assert sum(gradient is not None for gradient in expected.values()) > len(inputs) + len(tapped(model))
