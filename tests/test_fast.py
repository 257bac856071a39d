"""Everything in data/fast.py equals its plain form in model.py or koff.py."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

import koff
from data import fast
from data.objectives import next_tokens
from model import Attention, Cache, Memory, attend, causal_mask, matrix_name
from test_koff import KINDS, Head, random_mask, random_memory

LENGTHS = [(7, 7), (5, 12), (1, 9), (1, 1), (128, 140), (300, 345)]  # T rows of text, S keys


def queries_and_keys(T, S, H=6, G=2, **more):
    torch.manual_seed(0)
    shapes = ((2, H, T, 16), (2, G, S, 16), (2, G, S, 16))
    return [torch.randn(shape, **more).requires_grad_() for shape in shapes]


# Attention ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("H,G", [(6, 2), (4, 1), (3, 3)])
@pytest.mark.parametrize("T,S", LENGTHS)
def test_attention_without_copies_is_attention(T, S, H, G):
    q, k, v = queries_and_keys(T, S, H, G)
    mask, weight = causal_mask(T, S, q), torch.randn(2, H, T, 16)
    plain, ours = attend(q, k, v, mask), fast.attend(q, k, v, mask)
    assert ours.shape == plain.shape and (ours - plain).abs().max() < 1e-5
    for a, b in zip(*(torch.autograd.grad(y, (q, k, v), weight) for y in (ours, plain)), strict=True):
        assert (a - b).abs().max() < 1e-4


@pytest.mark.parametrize("T,S", LENGTHS)
def test_in_bfloat16_it_is_as_close_to_float32_as_the_plain_form(T, S):
    q, k, v = (x.detach().bfloat16() for x in queries_and_keys(T, S))
    mask = causal_mask(T, S, q)
    exact = attend(q.float(), k.float(), v.float(), causal_mask(T, S, q.float()))
    for form in (attend, fast.attend):
        found = form(q, k, v, mask)
        assert found.dtype == torch.bfloat16
        assert (found.float() - exact).abs().max() < 0.02 * exact.abs().max()


def test_attention_takes_the_layout_of_a_gpu_kernel(monkeypatch):
    """CUDA's memory-efficient kernel returns [B, T, H, hd] seen as [B, H, T, hd]."""
    sdpa = F.scaled_dot_product_attention
    q, k, v = queries_and_keys(5, 12)
    mask = causal_mask(5, 12, q)
    expected = fast.attend(q, k, v, mask)
    turned = lambda *a, **kw: sdpa(*a, **kw).transpose(1, 2).contiguous().transpose(1, 2)  # noqa: E731
    monkeypatch.setattr(F, "scaled_dot_product_attention", turned)
    assert torch.equal(fast.attend(q, k, v, mask), expected)


class OnCuda(torch.Tensor):
    """A tensor of the CPU that says it is CUDA's."""

    is_cuda = True


@pytest.mark.parametrize("kind,dtype,heads", [
    (torch.Tensor, torch.float32, 2), (OnCuda, torch.bfloat16, 2), (OnCuda, torch.float32, 6)])  # fmt: skip
def test_float32_on_cuda_gets_keys_for_each_head(monkeypatch, kind, dtype, heads):
    sdpa = F.scaled_dot_product_attention
    q, k, v = queries_and_keys(7, 7, dtype=dtype)
    expected = sdpa(q, k, v, is_causal=True, enable_gqa=True)
    seen = []

    def spy(q, k, v, **options):
        seen.append((k.shape[1], v.shape[1], options["enable_gqa"]))
        return sdpa(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    ours = fast.attend(q.as_subclass(kind), k, v, None)
    assert seen == [(heads, heads, heads == 2)]
    assert torch.allclose(ours, expected, atol=1e-6)
    for x, y in zip(*(torch.autograd.grad(y.sum(), (q, k, v)) for y in (ours, expected)), strict=True):
        assert torch.allclose(x, y, atol=1e-5)


def test_enable_replaces_the_attention_of_the_model():
    assert Attention.attend is attend
    fast.enable()
    assert Attention.attend is fast.attend  # until the test is over: see conftest.py


def test_a_whole_model_has_the_same_logits_and_gradients(tiny):
    """Text of its own in the lower block, text behind a KV memory in the upper ones; gates and LoRA are learned."""
    model, tokens, weight = tiny(), torch.randint(0, 131, (2, 30)), torch.randn(2, 30, 131)
    gates, memory = koff.Gates(model.config, 1), random_memory(model, 1).requires_grad_()
    learned = [*gates.parameters(), *memory.parameters()]

    def run():
        z = gates.sample(torch.float32, torch.Generator().manual_seed(0))
        logits = model(tokens, z, memory.by_block(torch.float32))
        return logits, torch.autograd.grad((logits * weight).sum(), learned)

    logits, gradients = run()
    fast.enable()
    fast_logits, fast_gradients = run()
    assert not torch.equal(logits, fast_logits)  # other kernels were at work
    assert (fast_logits - logits).abs().max() < 1e-4
    for a, b in zip(fast_gradients, gradients, strict=True):
        assert b.abs().max() > 0 and (a - b).abs().max() < 1e-4 * b.abs().max()


@pytest.mark.parametrize("kind", ["llama", "qwen3", "olmo2"])
def test_decoding_with_a_cache_is_the_same(tiny, kind):
    model, tokens = tiny(model_type=kind), torch.randint(0, 131, (2, 20))
    memory = random_memory(model, 0).by_block(torch.float32)
    whole = model(tokens, memories=memory)
    fast.enable()
    cache = Cache(room=11)
    parts = [model(tokens[:, a:b], memories=memory, cache=cache) for a, b in ((0, 9), (9, 10), (10, 17), (17, 20))]
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-4


# LoRA in the matrices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_lora_in_the_matrices_is_lora_beside_them_and_the_model_stays_as_it_is(tiny, kind, cut):
    model, tokens = tiny(**KINDS[kind]), torch.randint(0, 131, (2, 30))
    memories = random_memory(model, 1).by_block(torch.float32)
    if cut:
        kept = koff.kept_channels(random_mask(koff.Gates(model.config, 1)), model.config, 1, "cpu")
        model, memories = koff.materialise(model, kept), koff.materialise_memories(memories, kept)
    alone, beside = model(tokens), model(tokens, memories=memories)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole, rest = fast.merged(model, memories)
    found = whole(tokens, memories=rest)
    assert (found - beside).abs().max() < 1e-5 * beside.abs().max()
    assert (beside - alone).abs().max() > 0.1 * beside.abs().max()  # the module does something

    touched = {f"{matrix_name(i, name)}.weight" for i in (1, 2) for name in ("k", "v", "gate", "up", "down")}
    assert before.keys() == model.state_dict().keys() == whole.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert (whole.state_dict()[name].data_ptr() == tensor.data_ptr()) == (name not in touched), name
    assert all(memory.lora for memory in memories.values())
    assert not any(p.requires_grad for p in whole.parameters())


@dataclass
class Scaled(Memory):
    """What a fork may make of a memory."""

    scale: torch.Tensor | None = None


def test_all_but_lora_stays_a_memory(tiny):
    model = tiny()
    memories = {}
    for i, memory in random_memory(model, 1).by_block(torch.float32).items():
        memories[i] = Scaled(memory.lora, memory.keys, memory.values, torch.ones(24))
    _, rest = fast.merged(model, memories)
    assert list(rest) == [1, 2]
    for i, memory in rest.items():
        assert type(memory) is Scaled and memory.lora == {}
        assert all(getattr(memory, name) is getattr(memories[i], name) for name in ("keys", "values", "scale"))


def test_the_sum_is_rounded_once(tiny):
    model = tiny().bfloat16()
    memories = random_memory(model, 1).by_block(torch.bfloat16)
    whole, _ = fast.merged(model, memories)
    for i, memory in memories.items():
        for name, (a, b) in memory.lora.items():
            w, found = (m.get_submodule(matrix_name(i, name)).weight for m in (model, whole))
            exact = w.double() + b.double() @ a.double()
            assert found.dtype == torch.bfloat16
            assert ((found.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()  # half a unit of 8 bits


# Logits in chunks ---------------------------------------------------------------------------------------------------

ROWS = [1, 128, 129, 300]  # less than a chunk, one, a little more, several


@pytest.mark.parametrize("n", ROWS)
def test_the_teachers_answer_in_chunks_is_its_answer(tiny, n):
    model, hidden = tiny(), torch.randn(n, 24)
    for top in (20, 1000):
        whole, ours = koff.teacher_topk(model, hidden, top), fast.teacher_topk(model, hidden, top)
        assert torch.equal(ours[0], whole[0])
        for a, b in zip(ours[1:], whole[1:], strict=True):
            assert a.shape == b.shape and torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 11), (2, 64), (4, 75)])
@pytest.mark.parametrize("objective", koff.OBJECTIVES)
def test_distillation_in_chunks_has_the_loss_and_the_gradient_of_the_whole(tiny, objective, shape):
    model, tokens = tiny(), torch.randint(0, 131, shape)
    teacher = koff.teacher_topk(model, model.hidden(tokens).flatten(0, 1), 20)
    hidden = torch.randn(*shape, 24, requires_grad=True)
    plain = koff.OBJECTIVES[objective](model.logits(hidden.flatten(0, 1)), *teacher, next_tokens(tokens)).mean()
    losses = [plain, fast.distill(model, hidden, teacher, tokens, koff.OBJECTIVES[objective])]
    if objective == "kl":
        assert torch.equal(plain, koff.distill(model, hidden, teacher))
    whole, chunked = (torch.autograd.grad(3 * loss, hidden)[0] for loss in losses)
    assert torch.allclose(*losses, rtol=1e-5)
    assert whole.abs().max() > 0 and torch.allclose(chunked, whole, atol=1e-4 * whole.abs().max())


def test_chunks_never_hold_more_than_their_size():
    seen, x = [], torch.randn(1000, 4, requires_grad=True)

    def loss(logits, beside):
        seen.append(len(logits))
        return (logits.square() * beside).sum(-1)

    beside = torch.arange(1000.0)[:, None]  # each row has its own
    total = fast.in_chunks(Head(), x, loss, beside, size=300)
    (total / 2).backward()
    assert seen == [300, 300, 300, 100]
    assert total.item() == pytest.approx((x.square() * beside).sum().item(), rel=1e-5)
    assert torch.allclose(x.grad, beside * x)


def test_training_never_holds_more_than_a_few_rows_of_logits(tiny, monkeypatch):
    model, tokens, seen = tiny(), torch.randint(0, 131, (4, 75)), []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda x: seen.append(len(x)) or logits(x))
    hidden = torch.randn(4, 75, 24, requires_grad=True)
    teacher = fast.teacher_topk(model, hidden.flatten(0, 1), 20)
    fast.distill(model, hidden, teacher, tokens, koff.kl_topk).backward()
    assert seen == 2 * [128, 128, 44]


# Rounded neurons ----------------------------------------------------------------------------------------------------


def ragged_gates(tiny, granularity="neuron"):
    gates = koff.Gates(tiny(hidden_size=48, intermediate_size=400).config, 1, granularity)
    torch.manual_seed(0)
    for a in gates.log_alpha.values():
        a.data.normal_()
    return gates


def test_open_neurons_are_rounded_and_the_target_is_met(tiny):
    gates = ragged_gates(tiny)
    free, rounded = gates.final_mask(0.2), fast.final_mask(gates, 0.2, "physical", 8)
    assert (free["neuron"].sum(1) % 8).any() and not (rounded["neuron"].sum(1) % 8).any()
    assert 0.2 <= gates.sparsity(rounded) < 0.2 + 400 / gates.total  # a gate of down frees most, its 400 columns
    assert (free["neuron"].sum(1) - rounded["neuron"].sum(1)).abs().max() <= 8
    for a, row in zip(gates.log_alpha["neuron"], rounded["neuron"], strict=True):
        assert a[row].min() > a[~row].max()


@pytest.mark.parametrize("count", koff.COUNTS)
@pytest.mark.parametrize("multiple,granularity", [(1, "neuron"), (8, "projection")])
def test_where_there_is_nothing_to_round_the_mask_is_the_plain_one(tiny, multiple, granularity, count):
    gates = ragged_gates(tiny, granularity)
    plain, ours = gates.final_mask(0.2, count), fast.final_mask(gates, 0.2, count, multiple)
    assert all(torch.equal(ours[name], plain[name]) for name in plain)
