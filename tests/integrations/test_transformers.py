"""A tap on Hugging Face models: what it reads, and that nothing else changes."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("transformers", minversion="5")

from helpers_hosts import explicit_terms, relative_error
from helpers_sync import no_host_sync
from helpers_transformers import BATCH, DECODER, HOSTS, OTHERS, WIDTH, Host, bert, detr, llama, qwen2, randomised
from transformers import (
    BertConfig,
    Gemma2Config,
    Gemma2Model,
    Llama4TextConfig,
    Llama4TextModel,
    LxmertConfig,
    LxmertModel,
    ViltConfig,
)
from transformers.models.bert.modeling_bert import (
    ALL_ATTENTION_FUNCTIONS,
    BertSelfAttention,
    eager_attention_forward,
)
from transformers.models.deepseek_v32 import DeepseekV32Config, DeepseekV32Model
from transformers.models.llama import modeling_llama
from transformers.models.vilt.modeling_vilt import ViltModel

from attbalance_ext import AttentionTap, MomentumTeacher, Tap, attention_map, attention_terms
from attbalance_ext.integrations.transformers import TransformersTap, attention_modules

HOST = pytest.mark.parametrize("make", HOSTS.values(), ids=HOSTS)
IMPLEMENTATION = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def recorded(host: Host, tap: TransformersTap | None = None) -> Any:
    tap = tap or host.make_tap(host.model)
    with tap.recording():
        host.output()
    return tap.attention(host.choice)


def gradients(host: Host, model: nn.Module, objective: Tensor) -> dict[str, Tensor | None]:
    leaves = host.inputs | dict(model.named_parameters())
    model.zero_grad()
    for x in host.inputs.values():
        x.grad = None
    objective.backward()
    return {name: None if leaf.grad is None else leaf.grad.clone() for name, leaf in leaves.items()}


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative, with a floor for gradients that are 0 but for rounding, as a key bias's is: softmax drops it."""
    return (torch.linalg.vector_norm(actual - expected) / torch.linalg.vector_norm(expected).clamp_min(1e-3)).item()


@IMPLEMENTATION
@HOST
def test_rac_and_mrc_and_every_gradient_equal_the_explicit_ones(make: Callable[..., Host], attention: str) -> None:
    host = make(attention)
    twin = copy.deepcopy(host.model)
    teacher = MomentumTeacher(host.caller(), lambda copied: host.make_tap(copied.model))
    with torch.no_grad():
        for parameter in teacher.module.parameters():
            parameter.mul_(1.1)
        target, _ = host.explicit(copy.deepcopy(teacher.module.model))
    maps, output = host.explicit(twin)
    region = torch.rand(maps[0].shape, dtype=torch.float64)
    weights = torch.rand(2, len(maps), BATCH, dtype=torch.float64)

    def loss(terms: Any, output: Tensor) -> Tensor:
        return (weights[0] * terms.rac).sum() + (weights[1] * terms.mrc).sum() + 0.1 * output.square().sum()

    truth = explicit_terms(maps, region, target)
    expected = gradients(host, twin, loss(truth, output))

    tap = host.make_tap(host.model)
    with tap.recording():
        output = host.output()
    students, teachers = tap.attention(host.choice), teacher.attention(host.inputs, query=host.choice)
    terms = attention_terms(students, region, teacher=teachers, backend="cpu")
    actual = gradients(host, host.model, loss(terms, output))

    assert relative_error(attention_map(students), torch.stack(maps)) < host.bound
    assert relative_error(attention_map(teachers), torch.stack(target)) < host.bound
    assert relative_error(terms.rac, truth.rac) < host.bound
    assert relative_error(terms.mrc, truth.mrc) < host.bound
    for name, gradient in expected.items():
        if gradient is None:
            assert actual[name] is None, name
        else:
            assert error(actual[name], gradient) < host.bound, name
    assert sum(gradient is not None for gradient in expected.values()) > 10


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_other_kinds_of_attention_against_their_own_weights(make: Callable[[], Any]) -> None:
    """log w_j of a head is its score but for a constant, so the softmax of its mean over the heads is the map."""
    model, run, modules = make()
    model.set_attn_implementation("eager")
    tap = TransformersTap(modules, query=-2)
    weights: list[Tensor] = []
    for module in modules:
        module.register_forward_hook(lambda module, args, output: weights.append(output[1]))
    with torch.no_grad(), tap.recording():
        run(randomised(model, torch.float32).eval())
    truth = torch.stack([w[:, :, -2].double().log().mean(1).softmax(-1) for w in weights])
    assert truth.std() > 0.01
    torch.testing.assert_close(attention_map(tap.attention()).double(), truth, rtol=1e-4, atol=1e-6)


@IMPLEMENTATION
@HOST
def test_a_training_step_is_bit_equal_with_the_tap_on(make: Callable[..., Host], attention: str) -> None:
    host = make(attention)

    def step() -> list[Tensor | None]:
        output = host.output()
        return [output.detach(), *gradients(host, host.model, output.square().sum()).values(), torch.rand(3)]

    without = step()
    tap = host.make_tap(host.model)
    idle = step()
    with tap.recording():
        recording = step()
    tap.remove()
    removed = step()
    for steps in (idle, recording, removed):
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(steps, without, strict=True))


@IMPLEMENTATION
def test_a_host_that_compares_its_implementations_name(attention: str) -> None:
    """DeepSeek V3.2 masks what its indexer leaves out where the name is "eager" or "sdpa"; so each layer by itself."""
    config = DeepseekV32Config(
        **{**DECODER, "num_key_value_heads": 4},
        moe_intermediate_size=16,
        q_lora_rank=16,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        index_topk=6,
        index_n_heads=2,
        index_head_dim=16,
        first_k_dense_replace=2,
        attn_implementation=attention,
    )
    model = DeepseekV32Model(config).eval()
    words = torch.randint(20, (BATCH, 24))
    expected = model(words, use_cache=False, output_attentions=attention == "eager")
    for layer in (0, 1):
        tap = TransformersTap(model, layers=slice(layer, layer + 1), query=-1)
        with tap.recording():
            output = model(words, use_cache=False)
        assert torch.equal(output.last_hidden_state, expected.last_hidden_state)
        padding = tap.attention().padding
        assert padding is not None
        assert (~padding).sum(1).tolist() == [6, 6]
        if attention == "eager":
            assert torch.equal(padding, expected.attentions[layer][:, 0, -1] == 0)


@HOST
def test_attention_stays_fused(make: Callable[..., Host], monkeypatch: pytest.MonkeyPatch) -> None:
    host = make()
    calls: list[Any] = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **kw: calls.append(kw) or fused(*args, **kw))
    host.output()
    without, calls[:] = list(calls), []
    recorded(host)
    assert len(calls) == len(without) >= len(host.modules(host.model))
    assert [sorted(call) for call in calls] == [sorted(call) for call in without]
    assert [call["attn_mask"] is None for call in calls] == [call["attn_mask"] is None for call in without]


@HOST
def test_the_record_shares_the_hosts_memory(make: Callable[..., Host]) -> None:
    """Of keys that lie as (B, M, H, d), which is how projections leave them, none is copied but an index's."""
    host = make()
    tap = TransformersTap(host.modules(host.model), query=0, visual=slice(1, None))
    keys: list[Tensor] = []
    fused = F.scaled_dot_product_attention

    def see(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        keys.append(key)
        return fused(query, key, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, tap.recording():
        patch.setattr(F, "scaled_dot_product_attention", see)
        host.output()
    seen = {key.untyped_storage().data_ptr() for key in keys}
    if host.heads[0] == host.heads[1]:  # the host itself repeats those that are shared
        assert all(key.untyped_storage().data_ptr() in seen for key in tap.attention().key)
    else:
        assert {key.shape[2] for key in tap.attention().key} == {WIDTH // 2}


@HOST
def test_under_autocast(make: Callable[..., Host]) -> None:
    host = make()
    host.model.float()
    for name, x in host.inputs.items():
        host.inputs[name] = x.detach().float().requires_grad_()
    maps = torch.stack(host.explicit(host.model)[0]).detach()
    with torch.autocast("cpu", torch.bfloat16):
        attention = recorded(host)
        terms = attention_terms(attention, torch.rand(maps.shape[1:]))
    assert {key.dtype for key in attention.key} == {torch.bfloat16} or host.rotary  # whose rotation is float32
    assert terms.rac.dtype == torch.float32
    assert relative_error(attention_map(attention), maps) < 0.05
    found = gradients(host, host.model, terms.rac.sum())
    assert all(gradient is None or gradient.isfinite().all() for gradient in found.values())
    assert all(found[name].any() for name in host.inputs)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*deprecated")
@HOST
def test_gradient_checkpointing(make: Callable[..., Host]) -> None:
    host = make()
    region = torch.rand(len(host.modules(host.model)), 1)

    def step() -> dict[str, Tensor | None]:
        tap = host.make_tap(host.model)
        with tap.recording():
            output = host.output()
        attention = tap.attention(host.choice)
        terms = attention_terms(attention, torch.arange(attention.key[0].shape[1]).expand(BATCH, -1) % 2.0)
        found = gradients(host, host.model, (region * terms.rac).sum() + 0.1 * output.square().sum())
        tap.remove()
        return found

    expected = step()
    host.model.gradient_checkpointing_enable({"use_reentrant": False})
    actual = step()
    for name, gradient in expected.items():
        if gradient is None:
            assert actual[name] is None
        else:
            assert error(actual[name], gradient) < host.bound, name
    host.model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="reentrant activation checkpointing"):
        step()


@pytest.mark.parametrize("make", [bert, qwen2], ids=["bert", "qwen2"])
def test_fullgraph_compilation(make: Callable[..., Host]) -> None:
    host = make()
    expected = attention_map(recorded(host))
    tap = host.make_tap(host.model)
    torch._dynamo.reset()
    compiled = torch.compile(host.caller(), fullgraph=True, backend="aot_eager")
    host.model.eval()
    with tap.recording():
        compiled(host.inputs)
    attention = tap.attention(host.choice)
    eager = recorded(host)
    torch.testing.assert_close(attention_map(attention), attention_map(eager), rtol=1e-6, atol=1e-8)
    assert attention.query[0].requires_grad
    assert expected.shape == attention_map(attention).shape
    torch._dynamo.reset()


def copies(model: nn.Module) -> Iterator[nn.Module]:
    yield copy.deepcopy(model)
    yield pickle.loads(pickle.dumps(model))


@HOST
def test_copies_of_a_model_carry_no_tap(make: Callable[..., Host]) -> None:
    host = make()
    tap = host.make_tap(host.model)
    with tap.recording():
        output = host.output()
        for twin in copies(host.model):
            assert torch.equal(host.output(twin), output)  # would be "ran twice" if the copy's hooks worked
    attention = tap.attention(host.choice)
    for twin in copies(host.model):
        assert torch.equal(host.output(twin), output)
        twin_tap = host.make_tap(twin)
        with twin_tap.recording():
            host.output(twin)
        assert torch.equal(attention_map(twin_tap.attention(host.choice)), attention_map(attention))
    with pytest.raises(RuntimeError, match="no recording"):
        tap.attention(host.choice)
    with pytest.raises(RuntimeError, match="make a new TransformersTap"), copy.deepcopy(tap).recording():
        pass


@HOST
def test_remove_restores_everything(make: Callable[..., Host]) -> None:
    host = make()
    before = [dict(module.__dict__) for module in host.model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in host.model.modules()]
    tap = host.make_tap(host.model)
    recorded(host, tap)
    tap.remove()
    tap.remove()
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in host.model.modules()] == hooks
    assert not any(m._forward_hooks_always_called for m in host.modules(host.model))
    for module, state in zip(host.model.modules(), before, strict=True):
        assert all(getattr(module, name) is state[name] for name in state if name == "config")
    with pytest.raises(RuntimeError, match="was removed"):
        recorded(host, tap)


def test_an_error_in_a_layer_leaves_its_config() -> None:
    host = bert()
    (module, *_) = host.modules(host.model)
    config = module.config
    tap = host.make_tap(host.model)
    for where in (module.query, module.dropout):  # before the attention is asked for, and wherever else
        handle = where.register_forward_pre_hook(lambda *_: 1 / 0)
        if where is module.query:
            with pytest.raises(ZeroDivisionError):
                recorded(host, tap)
        handle.remove()
        assert module.config is config
    assert len(recorded(host, tap).key) == 2


def test_two_taps_at_once() -> None:
    host = bert()
    one = TransformersTap(host.model, query=0, visual=slice(5, 14))
    two = TransformersTap(host.model, layers=slice(-1, None), query=[3, 1], visual=[2, 9])
    with one.recording(), two.recording():
        host.output()
    first, second = one.attention(), two.attention(torch.tensor([0, 0]))
    assert len(first.key) == 3
    assert len(second.key) == 1
    with one.recording():
        host.output()
    with pytest.raises(RuntimeError, match="no recording"):
        two.attention()
    again = one.attention()
    assert torch.equal(attention_map(again), attention_map(first))
    alone = TransformersTap(host.model, layers=slice(-1, None), query=3, visual=[2, 9])
    assert torch.equal(attention_map(recorded(host, alone)), attention_map(second))


def test_two_models_at_once() -> None:
    hosts = [bert("eager"), bert("sdpa"), detr()]
    alone = [attention_map(recorded(host)) for host in hosts]
    taps = [host.make_tap(host.model) for host in hosts]
    with taps[0].recording(), taps[1].recording(), taps[2].recording():
        for host in hosts:
            host.output()
    for host, tap, expected in zip(hosts, taps, alone, strict=True):
        assert torch.equal(attention_map(tap.attention(host.choice)), expected)


def test_the_implementation_may_change_under_a_tap() -> None:
    host = qwen2("sdpa")
    tap = host.make_tap(host.model)
    first = attention_map(recorded(host, tap))
    host.model.set_attn_implementation("eager")
    torch.testing.assert_close(attention_map(recorded(host, tap)), first, rtol=1e-5, atol=1e-6)
    assert {module.config._attn_implementation for module in host.modules(host.model)} == {"eager"}


def test_a_tap_beside_an_attention_tap() -> None:
    """The two kinds keep one protocol."""
    host = bert()
    other = nn.TransformerEncoderLayer(WIDTH, 2, 40, batch_first=True).double()
    taps: list[Tap] = [host.make_tap(host.model), AttentionTap([other.self_attn])]
    with taps[0].recording(), taps[1].recording():
        other(host.output())
    assert [len(tap.attention().key) for tap in taps] == [2, 1]
    assert all(isinstance(tap, Tap) for tap in taps)


def test_a_model_is_taken_whole_or_by_its_layers() -> None:
    host = detr()
    kinds = [type(module).__name__ for module in attention_modules(host.model)]
    assert kinds == ["DetrSelfAttention"] + 3 * ["DetrSelfAttention", "DetrCrossAttention"]
    host = llama()
    assert attention_modules(host.model) == host.modules(host.model)
    tap = TransformersTap(host.model, layers=slice(1, None), query=-1)
    assert len(recorded(Host(**{**vars(host), "choice": None}), tap).key) == 1


def test_what_is_refused_when_a_tap_is_made() -> None:
    vilt = ViltModel(
        ViltConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=32,
            patch_size=16,
            vocab_size=10,
        )
    )
    lxmert = LxmertModel(
        LxmertConfig(
            hidden_size=16,
            num_attention_heads=2,
            l_layers=1,
            x_layers=1,
            r_layers=1,
            intermediate_size=16,
            vocab_size=10,
            visual_feat_dim=4,
        )
    )
    for model in (vilt, lxmert):
        with pytest.raises(TypeError, match=f"no module of {type(model).__name__} .* uses the attention interface"):
            TransformersTap(model)
    with pytest.raises(TypeError, match=r"modules\[0\] must be a module whose .* calls .* got ViltSelfAttention"):
        TransformersTap([vilt.encoder.layer[0].attention.attention])
    host = bert()
    with pytest.raises(TypeError, match=r"modules\[0\] .* got BertLayer"):
        TransformersTap([host.model.encoder.layer[0]])
    with pytest.raises(ValueError, match="modules is empty"):
        TransformersTap([])
    with pytest.raises(ValueError, match="one layer twice"):
        TransformersTap(2 * host.modules(host.model))
    with pytest.raises(
        TypeError, match=r"query must be an int, a slice, a sequence of ints, an int64 tensor .* got float"
    ):
        TransformersTap(host.model, query=0.5)  # type: ignore[arg-type]
    assert not any(module._forward_pre_hooks for module in host.model.modules())


def test_mistakes_with_several_kinds_of_layers() -> None:
    model, run, _ = OTHERS["llava"]()
    for layers in (-1, [0, 1]):
        with pytest.raises(TypeError, match=r"layers must be a slice, slice\(-4, None\) .* got (int|list)"):
            TransformersTap(model, layers=layers)
    tap = TransformersTap(model, query=-1, visual=range(2, 18))
    with pytest.raises(ValueError, match=r"layer 0, CLIPAttention: .* give the one to tap"), tap.recording():
        run(model)


def bert_attention(**options: Any) -> BertSelfAttention:
    config = BertConfig(hidden_size=16, num_attention_heads=2, attn_implementation="sdpa")
    return BertSelfAttention(config, **options)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(2, 2, 5, 5), r"one mask for all heads, got shape \(2, 2, 5, 5\)"),
        (torch.zeros(2, 5, 5), r"a mask \(B, 1, S, M\) or \(B, M\), got Tensor"),
    ],
    ids=["for_each_head", "rank"],
)
def test_masks_that_are_refused(mask: Tensor, message: str) -> None:
    module = bert_attention()
    tap = TransformersTap([module])
    config = module.config
    with pytest.raises(ValueError, match=message), tap.recording():
        module(torch.randn(2, 5, 16), mask)
    assert module.config is config
    with pytest.raises(ValueError, match="position bias"), tap.recording():
        module(torch.randn(2, 5, 16), position_bias=torch.zeros(1, 2, 5, 5))


@pytest.mark.parametrize("query", [1, slice(0, 2)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float", "one_for_all", "one_row"])
def test_the_masks_row_of_the_object_query(query: int | slice, kind: str) -> None:
    hidden = torch.rand(2, 1, 5, 5) > 0.6
    if kind == "one_for_all":
        hidden = hidden[:1]
    if kind == "one_row":
        hidden = hidden[:, :, :1]
    mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min) if kind == "float" else ~hidden
    module = bert_attention()
    tap = TransformersTap([module], query=query, visual=[3, 1])
    with tap.recording():
        module(torch.randn(2, 5, 16), mask)
    choice = None if query == 1 else torch.tensor([1, 0])
    rows = [1, 1] if query == 1 else [1, 0]
    expected = torch.stack([hidden.expand(2, 1, 5, 5)[sample, 0, row] for sample, row in enumerate(rows)])
    assert torch.equal(tap.attention(choice).padding, expected[:, [3, 1]])


class Attend(BertSelfAttention):
    """Calls the interface with what it is given, all by keyword."""

    def forward(self, **arguments: Any) -> Tensor:
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        return attend(self, **arguments)[0]


@pytest.mark.parametrize("query", [2, [2, 0]], ids=str)
def test_learned_queries_that_are_one_for_all_samples_and_arguments_by_keyword(query: Any) -> None:
    module = Attend(BertConfig(hidden_size=16, num_attention_heads=2, attn_implementation="sdpa"))
    tap = TransformersTap([module], query=query)
    q, k = torch.randn(1, 2, 3, 8, requires_grad=True), torch.randn(2, 2, 5, 8)
    hidden = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with tap.recording():
        output = module(query=q, key=k, value=k, attention_mask=~hidden[:, None, None])
    attention = tap.attention(None if query == 2 else torch.zeros(2, dtype=torch.int64))
    assert output.shape == (2, 3, 2, 8)
    truth = ((q @ k.mT)[:, :, 2].mean(1) / math.sqrt(8)).masked_fill(hidden, -torch.inf).softmax(-1)
    torch.testing.assert_close(attention_map(attention)[0], truth)


@pytest.mark.parametrize(("attention", "causal"), [("sdpa", True), ("eager", False), (None, False)])
def test_causality_without_a_mask(attention: str | None, causal: bool) -> None:
    """A flag to "sdpa". "eager", which is also what a module without a choice runs, does not look at it."""
    module = bert_attention(is_causal=True).eval()
    module.config._attn_implementation = attention
    tap = TransformersTap([module], query=2)
    x = torch.randn(2, 5, 16)
    with tap.recording():
        output = module(x)[0]
    padding = tap.attention().padding
    x[:, 3:] = 0
    assert torch.allclose(module(x)[0][:, 2], output[:, 2]) is causal
    assert (padding is not None) is causal
    if causal:
        assert padding.tolist() == 2 * [[False, False, False, True, True]]


def test_flash_attentions_masks_are_read() -> None:
    """By the arguments alone: (B, M) with 0 at padding, causality as a flag. The attention itself is a stand-in."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def stand_in(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        assert module.config._attn_implementation == "flash_stand_in"  # by which the real one finds its version
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)

    AttentionInterface.register("flash_stand_in", stand_in)
    module = bert_attention(is_causal=True)
    module.config._attn_implementation = "flash_stand_in"
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    tap = TransformersTap([module], query=3)
    with tap.recording():
        module(torch.randn(2, 5, 16), mask)
    expected = torch.tensor([[False, False, False, False, True], [True, False, False, False, True]])
    assert torch.equal(tap.attention().padding, expected)
    several = TransformersTap([module], query=slice(None))
    with several.recording():
        module(torch.randn(2, 5, 16), mask)
    assert torch.equal(several.attention(torch.tensor([3, 3])).padding, expected)
    module.is_causal = False
    with tap.recording():
        module(torch.randn(2, 5, 16), mask)
    assert torch.equal(tap.attention().padding, mask == 0)
    with tap.recording():
        module(torch.randn(2, 5, 16))
    assert tap.attention().padding is None
    with pytest.raises(ValueError, match="a sliding window that flash_stand_in applies by itself"), tap.recording():
        module(torch.randn(2, 5, 16), mask, sliding_window=2)


def test_a_step_of_generation_sees_every_key() -> None:
    host = llama()
    model, tokens = host.model.eval(), torch.randint(20, (BATCH, 6))
    tap = TransformersTap(model, query=-1)
    with torch.no_grad():
        cache = model(tokens[:, :5], use_cache=True).past_key_values
        with tap.recording():
            model(tokens[:, 5:], past_key_values=cache)
        step = tap.attention()
        with tap.recording():
            model(tokens)
    assert step.padding is None
    torch.testing.assert_close(attention_map(step), attention_map(tap.attention()), rtol=1e-5, atol=1e-6)


def test_windows_of_different_sizes_are_refused() -> None:
    """A recording has one padding for all layers."""
    config = Gemma2Config(**DECODER, head_dim=8, sliding_window=4)
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    model = Gemma2Model(config)
    tokens = torch.randint(20, (2, 9))
    with pytest.raises(ValueError, match="windows of different sizes"), TransformersTap(model).recording():
        model(tokens)
    kinds = {
        kind: [layer.self_attn for layer in model.layers if layer.self_attn.layer_type == kind]
        for kind in config.layer_types
    }
    for kind, modules in kinds.items():
        tap = TransformersTap(modules, query=7)
        with tap.recording():
            model(tokens)
        seen = ~tap.attention().padding[0]
        assert seen.nonzero()[:, 0].tolist() == list(range(4 if kind == "sliding_attention" else 0, 8))
    within = TransformersTap(model)
    with within.recording():
        model(tokens[:, :4])  # which no window cuts
    assert len(within.attention().key) == 2


@IMPLEMENTATION
def test_chunked_layers_beside_full_ones_are_refused(attention: str) -> None:
    config = Llama4TextConfig(
        **DECODER,
        intermediate_size_mlp=40,
        head_dim=8,
        attention_chunk_size=8,
        no_rope_layers=[1, 0],
        moe_layers=[],
        pad_token_id=0,
        attn_implementation=attention,
    )
    model, words = Llama4TextModel(config), torch.randint(1, 20, (BATCH, 12))
    assert config.layer_types == ["chunked_attention", "full_attention"]
    both, chunked = TransformersTap(model, query=-1), TransformersTap(model, layers=slice(1), query=-1)
    with both.recording(), chunked.recording():
        model(words, use_cache=False)
    with pytest.raises(ValueError, match=r"layer\(s\) \[0\] hide other visual tokens .* tap layers of one kind"):
        both.attention()
    assert chunked.attention().padding.tolist() == 2 * [8 * [True] + 4 * [False]]


class Indexes(BertSelfAttention):
    """Takes its attention by index, with nothing to fall back to."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        heads = hidden_states.unflatten(-1, (2, 8)).transpose(1, 2)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](self, heads, heads, heads, None)[0]


def test_a_module_that_takes_its_attention_by_index() -> None:
    module = Indexes(BertConfig(hidden_size=16, num_attention_heads=2, attn_implementation="flash_attention_2"))
    tap, x = TransformersTap([module], query=1), torch.randn(2, 5, 16)
    expected = module(x)
    with tap.recording():
        assert torch.equal(module(x), expected)
    heads = x.unflatten(-1, (2, 8)).transpose(1, 2)
    truth = (heads[:, :, 1:2] @ heads.mT).mean(1)[:, 0] / math.sqrt(8)
    torch.testing.assert_close(attention_map(tap.attention())[0], truth.softmax(-1))


def test_the_interface_has_its_place_back_after_the_last_recording() -> None:
    host = llama()
    interface = modeling_llama.ALL_ATTENTION_FUNCTIONS
    one, two = TransformersTap(host.model, query=-1), TransformersTap(host.model, query=2)
    first, second = one.recording(), two.recording()
    first.__enter__()
    second.__enter__()
    host.output()
    first.__exit__(None, None, None)
    assert modeling_llama.ALL_ATTENTION_FUNCTIONS is not interface
    assert modeling_llama.ALL_ATTENTION_FUNCTIONS.valid_keys() == interface.valid_keys()
    second.__exit__(None, None, None)
    assert modeling_llama.ALL_ATTENTION_FUNCTIONS is interface
    assert len(one.attention().key) == len(two.attention().key) == 2
    with pytest.raises(ZeroDivisionError), one.recording():
        _ = 1 / 0
    assert modeling_llama.ALL_ATTENTION_FUNCTIONS is interface


class Packed(BertSelfAttention):
    """Attends within the parts of a sequence, one after the other."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        heads = hidden_states.unflatten(-1, (2, 8)).transpose(1, 2)
        return torch.cat([attend(self, part, part, part, None)[0] for part in heads.split(3, 2)], 1)


def test_a_module_that_calls_its_attention_twice_is_refused() -> None:
    module = Packed(BertConfig(hidden_size=16, num_attention_heads=2, attn_implementation="sdpa"))
    config = module.config
    tap = TransformersTap([module])
    with pytest.raises(RuntimeError, match=r"layer 0, Packed, .* asked for its attention twice"), tap.recording():
        module(torch.randn(2, 5, 16))
    assert module.config is config
    module(torch.randn(2, 5, 16))


def test_no_host_synchronisation() -> None:
    with torch.device("meta"):
        module = bert_attention(is_causal=True)
        x, mask = torch.randn(2, 5, 16), torch.ones(2, 1, 5, 5, dtype=torch.bool)
        choice = torch.zeros(2, dtype=torch.int64)
    one, several = TransformersTap([module], query=3), TransformersTap([module], query=[0, 3, -1], visual=[4, 1])
    with no_host_sync(), one.recording(), several.recording():
        module(x, mask)
        one.attention(), several.attention(choice)
    with no_host_sync(), one.recording(), several.recording():
        module(x)  # causal by a flag
        one.attention(), several.attention(choice)
