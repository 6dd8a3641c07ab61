"""The momentum teacher: what it averages, what it leaves alone, what it saves."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from helpers_hosts import Grounder
from torch import Tensor, nn

from attbalance_ext import (
    AttBalanceConfig,
    AttBalanceLoss,
    AttentionTap,
    BoxRegion,
    MomentumTeacher,
    QueryAttention,
    attention_map,
    attention_terms,
)


def make_tap(model: nn.Module) -> AttentionTap:
    return AttentionTap(model.attention_layers(), visual=slice(1, None))


class WithBuffers(Grounder):
    """A grounder with batch normalisation: floating buffers and an integer one that training moves."""

    def __init__(self) -> None:
        super().__init__(dropout=0.1)
        self.norm = nn.BatchNorm1d(16)
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, visual: Tensor) -> Tensor:
        return super().forward(self.norm(visual.transpose(1, 2)).transpose(1, 2))


@pytest.fixture
def model() -> WithBuffers:
    return WithBuffers()


@pytest.fixture
def teacher(model: WithBuffers) -> MomentumTeacher:
    return MomentumTeacher(model, make_tap)


def visual() -> Tensor:
    return torch.randn(4, 16, 16)


def disturb(model: nn.Module) -> None:
    """Something like an optimizer step: other weights, other buffers."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
        for buffer in model.buffers():
            buffer.add_(2)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.999, 1.0])
def test_update_is_the_exponential_moving_average(model: WithBuffers, momentum: float) -> None:
    teacher = MomentumTeacher(model, make_tap, momentum)
    truth = [p.detach().double() for p in model.parameters()]
    for _ in range(5):
        disturb(model)
        exact = [torch.lerp(t.detach(), s.detach(), 1 - momentum) for t, s in params(teacher, model)]
        teacher.update(model)
        assert all(torch.equal(t, e) for (t, _), e in zip(params(teacher, model), exact, strict=True))
        truth = [momentum * t + (1 - momentum) * s.double() for t, s in zip(truth, model.parameters(), strict=True)]
    for (average, _), expected in zip(params(teacher, model), truth, strict=True):
        torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-5)


def same_state(one: nn.Module, other: nn.Module) -> bool:
    states = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in states)


def params(teacher: MomentumTeacher, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    return list(zip(teacher.module.parameters(), model.parameters(), strict=True))


def test_a_new_momentum_counts_from_the_next_update(model: WithBuffers, teacher: MomentumTeacher) -> None:
    """Momentum schedules set the attribute."""
    disturb(model)
    teacher.momentum = 0.0
    teacher.update(model)
    assert all(torch.equal(a, b) for a, b in params(teacher, model))


def test_buffers_are_copied(model: WithBuffers, teacher: MomentumTeacher) -> None:
    disturb(model)
    teacher.update(model)
    buffers = list(zip(teacher.module.buffers(), model.buffers(), strict=True))
    assert len(buffers) == 4  # two of them not floating or not saved
    assert all(torch.equal(a, b) for a, b in buffers)
    assert all(a is not b for a, b in buffers)


def test_a_buffer_that_gets_its_size_in_training() -> None:
    """A model that owns its criterion: rho's running average is empty until the first step."""
    model = WithBuffers()
    model.criterion = AttBalanceLoss(AttBalanceConfig(rho="ema"))
    teacher = MomentumTeacher(model, make_tap)
    average = teacher.module.criterion.rho_average
    model.criterion.rho_average = torch.tensor([0.2, 0.3])
    teacher.update(model)
    assert teacher.module.criterion.rho_average is average
    assert torch.equal(average, torch.tensor([0.2, 0.3]))


def test_parameters_of_several_dtypes() -> None:
    model = Grounder()
    model.head.double()
    model.layers[0].bfloat16()
    teacher = MomentumTeacher(model, make_tap, momentum=0.5)
    start = [p.detach().clone() for p in model.parameters()]
    disturb(model)
    teacher.update(model)
    for old, (average, current) in zip(start, params(teacher, model), strict=True):
        assert average.dtype == current.dtype
        torch.testing.assert_close(average, (old + current) / 2, rtol=2e-2, atol=2e-2)


def test_a_student_in_another_dtype_than_its_teacher() -> None:
    model = Grounder()
    teacher = MomentumTeacher(model, make_tap, momentum=0.5)
    teacher.update(model.bfloat16())
    assert {p.dtype for p in teacher.module.parameters()} == {torch.float32}


def test_the_wrapped_student_counts_too(model: WithBuffers, teacher: MomentumTeacher) -> None:
    twin = MomentumTeacher(model, make_tap)
    disturb(model)
    teacher.update(model)
    twin.update(nn.Sequential(model))
    assert all(
        torch.equal(a, b) for a, b in zip(teacher.state_dict().values(), twin.state_dict().values(), strict=True)
    )


def test_another_model_is_refused(teacher: MomentumTeacher) -> None:
    with pytest.raises(ValueError, match=r"model must be the one that .* it has 40 parameters, the teacher 30"):
        teacher.update(Grounder(layers=3))


def test_update_leaves_the_student_alone(model: WithBuffers, teacher: MomentumTeacher) -> None:
    disturb(model)
    before = copy.deepcopy(model)
    versions = [p._version for p in model.parameters()]
    teacher.update(model)
    assert same_state(model, before)
    assert [p._version for p in model.parameters()] == versions  # a forward pass before it stays differentiable


def test_attention_is_the_averaged_models_in_evaluation(model: WithBuffers, teacher: MomentumTeacher) -> None:
    disturb(model)
    teacher.update(model)
    x = visual()
    attention = teacher.attention(x)
    twin = copy.deepcopy(teacher.module).eval()
    tap = make_tap(twin)
    with tap.recording():
        twin(x)
    assert torch.equal(attention_map(attention), attention_map(tap.attention()))
    assert torch.equal(attention_map(attention), attention_map(teacher.attention(visual=x)))
    assert torch.equal(attention_map(attention), attention_map(teacher(x)))


class Parent(nn.Module):
    def __init__(self, model: nn.Module, teacher: MomentumTeacher) -> None:
        super().__init__()
        self.model, self.teacher = model, teacher


def test_evaluation_mode_survives_train_of_a_parent(model: WithBuffers, teacher: MomentumTeacher) -> None:
    parent = Parent(model, teacher)
    for mode in (True, False, True):
        parent.train(mode)
        assert model.layers[0].training is mode
        assert not any(module.training for module in teacher.modules())
    assert teacher.train() is teacher
    assert not teacher.module.training
    x = visual()
    batches = teacher.module.norm.num_batches_tracked.clone()
    assert torch.equal(attention_map(teacher.attention(x)), attention_map(teacher.attention(x)))  # no dropout
    assert torch.equal(teacher.module.norm.num_batches_tracked, batches)


def test_a_student_in_evaluation_mode_stays_there_and_one_in_training_too(model: WithBuffers) -> None:
    for mode in (True, False):
        model.train(mode)
        teacher = MomentumTeacher(model, make_tap)
        teacher.update(model)
        teacher.attention(visual())
        assert all(module.training is mode for module in model.modules())


def test_no_gradient_reaches_the_teacher_and_none_flows_through_it(
    model: WithBuffers, teacher: MomentumTeacher
) -> None:
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in model.parameters())
    disturb(model)
    x = visual().requires_grad_()
    attention = teacher.attention(x)
    assert not any(t.requires_grad for t in (*attention.query, *attention.key))
    tap = make_tap(model)
    with tap.recording():
        model(x)
    region = BoxRegion(torch.tensor([[0.5, 0.5, 0.5, 0.5]]).expand(4, 4), (4, 4))
    attention_terms(tap.attention(), region, teacher=attention).mrc.sum().backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert model.layers[0].self_attn.in_proj_weight.grad.norm() > 0


def test_the_students_random_numbers_are_not_disturbed(model: WithBuffers) -> None:
    state = torch.get_rng_state()
    teacher = MomentumTeacher(model, make_tap)
    teacher.update(model)
    x = torch.zeros(4, 16, 16)
    teacher.attention(x)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_students_tap_and_the_teachers_are_apart(model: WithBuffers) -> None:
    """The copy is made of a model that carries hooks already, and records while the student's tap does."""
    tap = make_tap(model)
    teacher = MomentumTeacher(model, make_tap)
    disturb(model)
    x = visual()
    with tap.recording():
        model(x)
        teachers = teacher.attention(x)
    students = tap.attention()
    assert isinstance(teachers, QueryAttention)
    assert not torch.equal(attention_map(students), attention_map(teachers))
    teacher.update(model)
    assert torch.equal(attention_map(teacher.attention(x)), attention_map(teacher.attention(x)))
    with pytest.raises(RuntimeError, match="no recording"):
        tap.attention()


def test_state_dict_round_trip_gives_identical_attention(model: WithBuffers, teacher: MomentumTeacher) -> None:
    disturb(model)
    teacher.update(model)
    file = io.BytesIO()
    torch.save(teacher.state_dict(), file)
    file.seek(0)
    assert all(name.startswith("module.") for name in teacher.state_dict())
    assert set(model.state_dict()) == {name.removeprefix("module.") for name in teacher.state_dict()}

    restored = MomentumTeacher(WithBuffers(), make_tap)
    x = visual()
    before = attention_map(teacher.attention(x))
    assert not torch.equal(attention_map(restored.attention(x)), before)
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(attention_map(restored.attention(x)), before)
    disturb(model)
    teacher.update(model)
    restored.update(model)
    assert torch.equal(attention_map(restored.attention(x)), attention_map(teacher.attention(x)))


def test_conversion_of_the_module_keeps_the_tap(model: WithBuffers, teacher: MomentumTeacher) -> None:
    teacher.double()
    attention = teacher.attention(visual().double())
    assert attention.query[0].dtype == torch.float64


def test_a_copy_of_a_teacher_says_what_to_do(teacher: MomentumTeacher) -> None:
    twin = copy.deepcopy(teacher)
    assert all(
        torch.equal(a, b) for a, b in zip(twin.state_dict().values(), teacher.state_dict().values(), strict=True)
    )
    with pytest.raises(RuntimeError, match="make a new AttentionTap"):
        twin.attention(visual())
    assert len(teacher.attention(visual()).key) == 2


@pytest.mark.parametrize("momentum", [-0.1, 1.1, float("nan")])
def test_momentum_out_of_range(model: WithBuffers, momentum: float) -> None:
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\]"):
        MomentumTeacher(model, make_tap, momentum)


def test_make_tap_must_return_a_tap(model: WithBuffers) -> None:
    with pytest.raises(TypeError, match="make_tap must return a tap, for example an AttentionTap, got NoneType"):
        MomentumTeacher(model, lambda copy: None)  # type: ignore[arg-type, return-value]


def test_make_tap_that_is_no_function_or_taps_the_student() -> None:
    model = nn.ModuleList([nn.MultiheadAttention(8, 2)])
    tap = AttentionTap(list(model))
    with pytest.raises(TypeError, match=r"make_tap must be a function .* got AttentionTap"):
        MomentumTeacher(model, tap)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="make_tap tapped other modules"):
        MomentumTeacher(model, lambda copy: AttentionTap(list(model)))
