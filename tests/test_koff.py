"""Gates, penalties, memories, losses, compaction and router against closed forms, finite differences, brute force."""

import math
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import koff
from data import BadInput, fast, objectives, penalties, scores, starts, tables
from data.checkpoint import load, load_module, save_backbone, save_module
from data.corpus import passages
from data.router import Router

KINDS = {
    "llama": {},
    "llama-biases": dict(attention_bias=True, mlp_bias=True),
    "qwen2": dict(model_type="qwen2", head_dim=6, hidden_size=24),
    "qwen3": dict(model_type="qwen3", tie_word_embeddings=False),
    "mistral": dict(model_type="mistral", sliding_window=None),
    "olmo2": dict(model_type="olmo2", attention_bias=True, tie_word_embeddings=False),
}
GRANULARITIES = ["projection", "neuron"]
SETS = [(granularity, "kv+mlp") for granularity in GRANULARITIES] + [("neuron", s) for s in koff.GATED if s != "kv+mlp"]


def random_mask(gates, share=0.4):
    return {name: torch.rand(a.shape) > share for name, a in gates.log_alpha.items()}


def random_memory(model, first, rank=3, kv_tokens=5):
    torch.manual_seed(2)
    memory = koff.MemoryModule(model.config, first, rank, 6.0, kv_tokens)
    for p in memory.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return memory.requires_grad_(False)


# Hard Concrete ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [2 / 3, 2.0])
@pytest.mark.parametrize("a", [-2.0, 0.0, 1.5])
def test_hard_concrete_follows_its_distribution(a, beta):
    torch.manual_seed(0)
    u = torch.rand(400_000, dtype=torch.float64)
    log_alpha = torch.tensor(a, dtype=torch.float64)
    z = koff.hard_concrete(log_alpha, beta, u)
    assert abs((z > 0).double().mean() - koff.probability_open(log_alpha, beta)) < 3e-3

    def above(t):  # P(z > t), from the distribution function of the concrete variable (Louizos, Eq. 9)
        s = (t - koff.GAMMA) / (koff.ZETA - koff.GAMMA)
        return 1 / (1 + math.exp(beta * math.log(s / (1 - s)) - a))

    assert abs((z == 1).double().mean() - above(1.0)) < 3e-3
    grid = np.linspace(0, 1, 4001)
    tail = torch.tensor([above(t) for t in grid])
    expectation = torch.trapezoid(tail, torch.from_numpy(grid))  # E z = integral of P(z > t)
    assert abs(z.mean() - expectation) < 3e-3


def test_hard_concrete_gradient_is_the_finite_difference_and_zero_where_clamped():
    u = torch.linspace(0.01, 0.99, 199, dtype=torch.float64)
    a = torch.full_like(u, 0.3).requires_grad_()
    z = koff.hard_concrete(a, 2 / 3, u)
    grad = torch.autograd.grad(z.sum(), a)[0]
    step = 1e-6
    with torch.no_grad():
        numeric = (koff.hard_concrete(a + step, 2 / 3, u) - koff.hard_concrete(a - step, 2 / 3, u)) / (2 * step)
    assert torch.allclose(grad, numeric, atol=1e-6)
    assert (grad[(z == 0) | (z == 1)] == 0).all() and (grad[(z > 0) & (z < 1)] > 0).all()


def test_the_gates_are_the_papers_unless_told_otherwise(tiny):
    shapes = {name: list(a.shape) for name, a in koff.Gates(tiny().config, 1).log_alpha.items()}
    assert shapes == {"k": [2, 16], "v": [2, 16], "gate": [2, 40], "up": [2, 40], "down": [2, 24]}
    shapes = {name: list(a.shape) for name, a in koff.Gates(tiny().config, 1, "neuron").log_alpha.items()}
    assert shapes == {"k": [2, 16], "v": [2, 16], "neuron": [2, 40], "down": [2, 24]}


# Cost ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("granularity,gated", SETS)
def test_cost_of_saturated_gates_is_what_compaction_removes(tiny, kind, granularity, gated):
    model = tiny(**KINDS[kind])
    gates = koff.Gates(model.config, 1, granularity, gated=gated)
    assert gates.total == sum(p.numel() for p in model.parameters())
    mask = random_mask(gates)
    small = koff.materialise(model, koff.kept_channels(mask, model.config, 1, "cpu"))
    gone = gates.total - sum(p.numel() for p in small.parameters())
    assert koff.removed_physical(model.config, {n: m.double() for n, m in mask.items()}).item() == gone
    assert gates.sparsity(mask).item() == gone / gates.total
    for name, a in gates.log_alpha.items():
        a.data = torch.where(mask[name], 60.0, -60.0)
    assert koff.removed_physical(model.config, gates.p_open()).item() == pytest.approx(gone, rel=1e-6)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("count", koff.COUNTS)
def test_expected_cost_is_the_mean_over_sampled_masks(tiny, granularity, count):
    gates = koff.Gates(tiny(mlp_bias=True).config, 1, granularity)
    torch.manual_seed(0)
    for a in gates.log_alpha.values():
        a.data.normal_(0, 1.5)
    p, removed = gates.p_open(), koff.COUNTS[count]
    masks = ({n: torch.bernoulli(q).double() for n, q in p.items()} for _ in range(1500))
    draws = [removed(gates.config, mask).item() for mask in masks]
    error = np.std(draws) / len(draws) ** 0.5
    assert abs(np.mean(draws) - removed(gates.config, p).item()) < 4 * error


def test_paper_count_is_closed_channels_times_fan_in(tiny):
    gates = koff.Gates(tiny().config, 2, "projection")
    mask = {n: torch.ones(a.shape) for n, a in gates.log_alpha.items()}
    for name, channels in {"k": 2, "gate": 5, "up": 5, "down": 3}.items():
        mask[name][0, :channels] = 0
    assert koff.removed_paper(gates.config, mask).item() == 2 * 24 + 5 * 24 + 5 * 24 + 3 * 40
    # gate and up close the same five neurons, so down loses five columns too: rows of down are 35 wide by then
    assert koff.removed_physical(gates.config, mask).item() == 2 * 24 + 2 * 5 * 24 + 24 * 40 - 21 * 35
    neurons = {"neuron": torch.ones(1, 40), "down": torch.ones(1, 24)}
    neurons["neuron"][0, :5] = 0
    assert koff.removed_paper(gates.config, neurons).item() == 5 * 2 * 24  # rows of gate and up
    assert koff.removed_physical(gates.config, neurons).item() == 5 * 3 * 24  # and columns of down


@pytest.mark.parametrize("granularity,count", list(product(GRANULARITIES, koff.COUNTS)))
def test_final_mask_closes_in_order_and_overshoots_by_less_than_one_gate(tiny, granularity, count):
    gates = koff.Gates(tiny().config, 1, granularity)
    torch.manual_seed(0)
    for a in gates.log_alpha.values():
        a.data.normal_()
    mask = gates.final_mask(0.2, count)
    assert gates.sparsity(mask, count) >= 0.2
    closed = [(n, i, j) for n, m in mask.items() for i, j in (~m).nonzero().tolist()]
    reopened = []
    for n, i, j in closed:
        mask[n][i, j] = True
        reopened.append(gates.sparsity(mask, count).item() < 0.2)
        mask[n][i, j] = False
    assert any(reopened)
    highest = max(gates.log_alpha[n][i, j].item() for n, i, j in closed)
    assert all((a[mask[n]] >= highest).all() for n, a in gates.log_alpha.items())


# Penalties ----------------------------------------------------------------------------------------------------------


def test_the_hinge_is_lambda_times_the_gap_and_nothing_beyond_the_target():
    sparsity = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.9], requires_grad=True)
    loss = koff.Hinge(60.0)(sparsity, 0.25)
    assert loss.tolist() == pytest.approx([15.0, 9.0, 3.0, 0.0, 0.0])
    assert torch.autograd.grad(loss.sum(), sparsity)[0].tolist() == [-60.0, -60.0, -60.0, 0.0, 0.0]


def test_a_lagrangian_lands_on_its_target_from_both_sides_and_a_hinge_waits_beyond_it():
    def land(kind, start, steps=400):
        penalty, a = kind(20.0), torch.full((50,), start, requires_grad=True)
        optimizer = torch.optim.Adam([a], lr=0.05)
        for _ in range(steps):
            closed = 1 - torch.sigmoid(a).mean()
            (penalty(closed, 0.3) + 0.2 * closed).backward()  # what is closed costs something
            optimizer.step()
            optimizer.zero_grad()
        return closed.item()

    assert land(penalties.Lagrangian, 3.0) == pytest.approx(0.3, abs=0.01)
    assert land(penalties.Lagrangian, -3.0) == pytest.approx(0.3, abs=0.03)
    for hinge in (koff.Hinge, penalties.ScaledHinge):
        assert land(hinge, 3.0) > 0.29
        assert land(hinge, -3.0, steps=20) > 0.85  # nothing but the small cost pulls it back


def test_penalties_that_adapt_follow_their_formulas():
    """Written out with plain numbers, over a path that falls behind, catches up and goes beyond."""
    path, target, start = [0.05, 0.04, 0.1, 0.19, 0.2, 0.205, 0.22], 0.2, 20.0
    scaled, lagrangian = penalties.ScaledHinge(start), penalties.Lagrangian(start)
    hinge, linear, square, before = start, 0.0, 3 * start, path[0]
    for sparsity in path:
        gap, ahead = target - sparsity, target - sparsity - 9 * (sparsity - before)
        x = torch.tensor(sparsity, dtype=torch.float64, requires_grad=True)
        assert scaled(x, target).item() == pytest.approx(hinge * max(0, ahead), rel=1e-4, abs=1e-5)
        loss = lagrangian(x, target)
        assert loss.item() == pytest.approx(linear * ahead + square * ahead**2, rel=1e-4, abs=1e-5)
        slope = -(linear + 2 * square * ahead)  # the speed is no function of the gates
        assert torch.autograd.grad(loss, x)[0].item() == pytest.approx(slope, rel=1e-4, abs=1e-4)
        behind = 1.03 if sparsity <= before else 1.0
        hinge *= behind if gap > 0.002 else 1 / 1.03
        linear = max(0, linear + 3 * start * (0.01 if gap > 0 else 0.15) * gap)
        square += 3 * start * gap**2
        before = sparsity
    assert scaled.multiplier.item() == pytest.approx(hinge, rel=1e-5) and hinge != start
    assert lagrangian.multiplier.item() == pytest.approx(linear, rel=1e-4) and linear > 0
    assert lagrangian.squared.item() == pytest.approx(square, rel=1e-5) and square > 3 * start


@pytest.mark.parametrize("kind", koff.PENALTIES)
def test_a_penalty_goes_on_from_its_saved_buffers(kind):
    path = torch.tensor([0.0, 0.02, 0.05, 0.06, 0.2, 0.3])
    whole, half = koff.PENALTIES[kind](20.0), koff.PENALTIES[kind](20.0)
    expected = [whole(sparsity, 0.1).item() for sparsity in path]
    for sparsity in path[:3]:
        half(sparsity, 0.1)
    resumed = koff.PENALTIES[kind](20.0)
    resumed.load_state_dict(half.state_dict())
    assert [resumed(sparsity, 0.1).item() for sparsity in path[3:]] == expected[3:]


# Where gates start --------------------------------------------------------------------------------------------------


def test_fisher_score_is_the_squared_gradient_of_each_token(tiny):
    model, step = tiny(), 1e-2
    gates, tokens = koff.Gates(model.config, 1, "neuron"), torch.randint(0, 131, (2, 5))
    torch.manual_seed(5)
    drawn = torch.multinomial(model(tokens).flatten(0, 1).softmax(-1), 1).view(2, 5)
    square = {n: torch.zeros(a.shape) for n, a in gates.log_alpha.items()}
    z = {n: torch.ones(a.shape[0], 2, 5, a.shape[1]) for n, a in gates.log_alpha.items()}
    for name, place in product(z, range(5)):
        for n, channel in product(*map(range, square[name].shape)):
            loss = []
            for sign in (1, -1):
                z[name][n, :, place, channel] += sign * step
                logits = model(tokens, gates.by_block(z, torch.float32)).transpose(1, 2)
                loss.append(F.cross_entropy(logits, drawn, reduction="none").sum(1))  # [B]
                z[name][n, :, place, channel] = 1
            square[name][n, channel] += ((loss[0] - loss[1]) / (2 * step)).square().sum()
    whole, frees = sum(q.sum() for q in square.values()), {"k": 24, "v": 24, "neuron": 3 * 24, "down": 40}
    torch.manual_seed(5)
    score = scores.fisher_scores(model, gates, [[tokens]])
    for name, s in score.items():
        expected = square[name] / whole / frees[name]
        assert (s - expected).abs().max() < 0.01 * expected.max(), name
    starts.spread_by_rank(gates, score)
    every = torch.cat([a.flatten() for a in gates.log_alpha.values()])
    assert every.min() == 1 and every.max() == 5
    order = torch.cat([s.flatten() for s in score.values()]).argsort()
    assert (every[order].diff() >= 0).all()


def test_fisher_score_of_a_gate_is_the_sum_over_the_domains(tiny):
    model = tiny()
    gates = koff.Gates(model.config, 1, "neuron")
    one, two, three = torch.randint(0, 131, (3, 2, 12))
    torch.manual_seed(5)
    first = scores.fisher_scores(model, gates, [[one, two]])
    second = scores.fisher_scores(model, gates, [[three]])
    torch.manual_seed(5)  # the same tokens are drawn
    both = scores.fisher_scores(model, gates, [[one, two], [three]])
    frees = {"k": 24, "v": 24, "neuron": 3 * 24, "down": 40}
    for alone in (first, second):
        assert sum((score * frees[name]).sum() for name, score in alone.items()) == pytest.approx(1)
        assert any((both[name] > alone[name]).any() for name in both)  # neither decides alone
    for name, score in both.items():
        assert torch.equal(score, first[name] + second[name]), name


def test_fisher_score_is_the_curvature_of_the_kl_to_the_teacher(tiny):
    model, step = tiny().double(), 0.1
    gates, tokens = koff.Gates(model.config, 1, "neuron"), torch.randint(0, 131, (2, 6))
    z = {n: torch.ones(a.shape[0], 2, 6, a.shape[1]).double() for n, a in gates.log_alpha.items()}
    teacher = model(tokens).log_softmax(-1)
    curvature = torch.zeros(gates.log_alpha["neuron"].shape)
    for n, channel in product(*map(range, curvature.shape)):
        for place in range(6):
            z["neuron"][n, :, place, channel] = 1 - step
            student = model(tokens, gates.by_block(z, torch.float64)).log_softmax(-1)
            curvature[n, channel] += (teacher.exp() * (teacher - student)).sum()
            z["neuron"][n, :, place, channel] = 1
    score = scores.fisher_scores(model, gates, [[tokens] * 200])["neuron"].double()
    assert torch.corrcoef(torch.stack([score.flatten(), curvature.double().flatten()]))[0, 1] > 0.99


# The student --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_open_gates_and_an_empty_memory_are_the_teacher_bit_for_bit(tiny, dtype):
    model, tokens = tiny().to(dtype), torch.randint(0, 131, (2, 30))
    for granularity in GRANULARITIES:
        gates = koff.Gates(model.config, 1, granularity, start=1000.0)
        memory = koff.MemoryModule(model.config, 1, rank=4, alpha=8.0, kv_tokens=0)
        z = gates.sample(dtype, torch.Generator().manual_seed(0))
        assert torch.equal(model(tokens, z, memory.by_block(dtype)), model(tokens))
        z[2]["down"] = z[2]["down"] * 0.5
        assert not torch.equal(model(tokens, z), model(tokens))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("granularity,gated", SETS)
def test_compact_equals_masked(tiny, kind, granularity, gated):
    model, tokens = tiny(**KINDS[kind]), torch.randint(0, 131, (2, 30))
    gates = koff.Gates(model.config, 1, granularity, gated=gated)
    mask = random_mask(gates)
    z = gates.by_block({n: m.float() for n, m in mask.items()}, torch.float32)
    memory = random_memory(model, 1).by_block(torch.float32)
    kept = koff.kept_channels(mask, model.config, 1, "cpu")
    small = koff.materialise(model, kept)
    assert (small(tokens) - model(tokens, z)).abs().max() < 1e-4
    masked = model(tokens, z, memory)
    assert (small(tokens, None, koff.materialise_memories(memory, kept)) - masked).abs().max() < 1e-4
    assert (masked - model(tokens, z)).abs().max() > 1e-2  # the memory does something
    mask["v"][0, 0] = ~mask["v"][0, 0]
    kept = koff.kept_channels(mask, model.config, 1, "cpu")
    assert (koff.materialise(model, kept)(tokens) - model(tokens, z)).abs().max() > 1e-4


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_memory_learns_the_same_in_the_compact_backbone(tiny, granularity):
    model, tokens = tiny(), torch.randint(0, 131, (2, 30))
    gates = koff.Gates(model.config, 1, granularity)
    mask, memory, weight = random_mask(gates), random_memory(model, 1).requires_grad_(), torch.randn(2, 30, 131)
    kept = koff.kept_channels(mask, model.config, 1, "cpu")
    z = gates.by_block({n: m.float() for n, m in mask.items()}, torch.float32)
    masked = model(tokens, z, memory.by_block(torch.float32))
    small = koff.materialise(model, kept)(tokens, None, koff.materialise_memories(memory.by_block(torch.float32), kept))
    for a, b in zip(
        *(torch.autograd.grad((y * weight).sum(), memory.parameters()) for y in (masked, small)), strict=True
    ):
        assert (a - b).abs().max() < 1e-3 * b.abs().max()


def test_a_whole_block_may_close(tiny):
    model, tokens = tiny(), torch.randint(0, 131, (1, 9))
    gates = koff.Gates(model.config, 1, "neuron")
    mask = {n: torch.zeros(a.shape, dtype=torch.bool) for n, a in gates.log_alpha.items()}
    z = gates.by_block({n: m.float() for n, m in mask.items()}, torch.float32)
    kept = koff.kept_channels(mask, model.config, 1, "cpu")
    assert (koff.materialise(model, kept)(tokens) - model(tokens, z)).abs().max() < 1e-4


def test_kv_memory_from_text_in_all_blocks_is_running_that_text(tiny):
    for kind in ("llama", "qwen3", "olmo2"):
        model, tokens = tiny(**KINDS[kind]), torch.randint(0, 131, (2, 30))
        tokens[1, :7] = tokens[0, :7]
        memory = koff.MemoryModule(model.config, 0, 0, 1.0, 7)
        context = starts.text_context(model, tokens[0, :7], 0)
        starts.start_kv(memory, context)
        expected = model(tokens)[:, 7:]
        assert (model(tokens[:, 7:], memories=context) - expected).abs().max() < 1e-4
        assert (model(tokens[:, 7:], memories=memory.by_block(torch.float32)) - expected).abs().max() < 1e-4


def test_a_kv_memory_starts_from_the_passage_that_predicts_the_text_best(tiny):
    model, first = tiny(), 1
    tried, judged = torch.randint(0, 131, (5, 7)), torch.randint(0, 131, (3, 30))
    losses = []
    for passage in tried:
        logits = model(judged, memories=starts.text_context(model, passage, first))
        losses.append(F.cross_entropy(logits[:, :-1].flatten(0, 1), judged[:, 1:].flatten()))
    assert len(set(losses)) == 5
    best = starts.text_context(model, tried[torch.stack(losses).argmin()], first)
    found = starts.best_context(model, tried, judged, first)
    assert found.keys() == best.keys() == {1, 2}
    for i, memory in found.items():
        assert torch.equal(memory.keys, best[i].keys) and torch.equal(memory.values, best[i].values)


def test_passages_are_the_starts_and_middles_of_equal_parts():
    ids = np.arange(100, dtype=np.uint16)
    beginnings, middles = passages(ids, 2, 3, places=4, judged=5)
    assert beginnings.tolist() == [[0, 1, 2], [75, 76, 77]]
    assert middles.tolist() == [[12, 13, 14, 15, 16], [37, 38, 39, 40, 41], [62, 63, 64, 65, 66], [87, 88, 89, 90, 91]]
    assert beginnings.dtype == middles.dtype == np.int64
    for n, places in ((50, 4), (4, 50)):  # so many that starts and middles would overlap
        beginnings, middles = passages(ids, n, 3, places, judged=5)
        assert (len(beginnings), len(middles)) == (min(n, 10), 10)
    assert passages(ids, 1, 3, 4, judged=5)[0].tolist() == [[0, 1, 2]]
    assert passages(ids[:9], 4, 3, 4, judged=5)[0].tolist() == [[0, 1, 2]]
    assert passages(ids[:2], 4, 3, 4, judged=5)[0].tolist() == [[0, 1]]


def test_checkpointing_changes_no_gradient(tiny):
    model, tokens = tiny(), torch.randint(0, 131, (2, 20))
    found = []
    for checkpointing in (False, True):
        gates, memory = koff.Gates(model.config, 1, "neuron"), random_memory(model, 1).requires_grad_()
        z = gates.sample(torch.float32, torch.Generator().manual_seed(3))
        x = model.run(model.embed_tokens(tokens), 1, 3, z, memory.by_block(torch.float32), None, checkpointing)
        model.logits(x).square().mean().backward()
        found.append([p.grad for p in (*gates.parameters(), *memory.parameters())])
    assert all(torch.equal(a, b) and a.abs().sum() > 0 for a, b in zip(*found, strict=True))


# Losses -------------------------------------------------------------------------------------------------------------


def reference(teacher, student, top, objective):
    """The three KLs in float64 over the whole vocabulary, one row at a time."""
    total = 0.0
    for t, s in zip(teacher.double().softmax(-1), student.double().softmax(-1), strict=True):
        keep = t.topk(top).indices
        rest = torch.ones(len(t), dtype=torch.bool)
        rest[keep] = False
        p, q = t[keep], s[keep]
        if objective == "kl-renormalise":
            p, q = p / p.sum(), q / q.sum()
        total += (p * (p / q).log()).sum()
        if objective == "kl":
            total += t[rest].sum() * (t[rest].sum() / s[rest].sum()).log()
    return total.item()


class Head:
    """A stand-in for the model: its "hidden states" are the logits."""

    def logits(self, x):
        return x.float().clone()


KLS = ["kl", "kl-renormalise", "kl-drop"]


@pytest.mark.parametrize("objective", KLS)
@pytest.mark.parametrize("sharpness", [1.0, 6.0])
def test_kl_against_the_whole_vocabulary(objective, sharpness):
    torch.manual_seed(0)
    teacher, student = torch.randn(60, 300) * sharpness, torch.randn(60, 300) * sharpness
    before = student.clone()
    found = koff.OBJECTIVES[objective](student, *koff.teacher_topk(Head(), teacher, 100))
    assert found.shape == (60,) and torch.equal(student, before)
    assert found.sum().item() == pytest.approx(reference(teacher, student, 100, objective), rel=1e-4)


def test_the_teacher_keeps_its_most_likely_outcomes_and_at_least_one_outside():
    torch.manual_seed(0)
    logits = torch.randn(8, 30)
    log_p = logits.log_softmax(-1)
    for top, K in ((5, 5), (100, 29)):
        index, found, rest = koff.teacher_topk(Head(), logits, top)
        assert torch.equal(index, log_p.argsort(-1, descending=True)[:, :K])
        assert torch.allclose(found, log_p.gather(-1, index), atol=1e-6)
        others = log_p.exp().sum(-1, keepdim=True) - log_p.gather(-1, index).exp().sum(-1, keepdim=True)
        assert rest.shape == (8, 1) and torch.allclose(rest.exp(), others, atol=1e-6)


@pytest.mark.parametrize("objective", [*KLS, "blend"])
def test_gradient_of_the_objective_is_the_finite_difference(objective):
    torch.manual_seed(0)
    index, *log_p = koff.teacher_topk(Head(), torch.randn(3, 12) * 3, 5)
    teacher = (index, *(a.double() for a in log_p))
    student = (torch.randn(3, 12, dtype=torch.float64) * 3).requires_grad_()
    targets = torch.tensor([3, objectives.NO_TARGET, 0])
    assert torch.autograd.gradcheck(lambda logits: koff.OBJECTIVES[objective](logits, *teacher, targets), student)


def test_the_gradients_are_those_that_the_docstring_of_the_objectives_gives():
    torch.manual_seed(0)
    logits, teacher = (torch.randn(4, 12).double() * 3).requires_grad_(), torch.randn(4, 12).double() * 3
    index, log_p, log_p_rest = koff.teacher_topk(Head(), teacher, 5)
    p, p_rest, q = log_p.exp().double(), log_p_rest.exp().double(), logits.detach().softmax(-1)
    inside, outside = q.gather(-1, index), q.scatter(-1, index, 0.0)
    mass, rest = p.sum(-1, keepdim=True), outside.sum(-1, keepdim=True)
    expected = {
        "kl": (inside - p, outside * (1 - p_rest / rest)),
        "kl-renormalise": (inside / inside.sum(-1, keepdim=True) - p / mass, 0 * outside),
        "kl-drop": (inside * mass - p, outside * mass),
    }
    for name, (in_top, beyond) in expected.items():
        loss = koff.OBJECTIVES[name](logits, index, log_p, log_p_rest).sum()
        gradient = torch.autograd.grad(loss, logits)[0]
        assert torch.allclose(gradient.gather(-1, index), in_top, atol=1e-6), name
        assert torch.allclose(gradient.scatter(-1, index, 0.0), beyond, atol=1e-6), name


def test_next_token_loss_is_the_cross_entropy_and_the_last_token_has_none():
    logits, targets = torch.randn(5, 30) * 4, torch.randint(0, 30, (5,))
    targets[4] = objectives.NO_TARGET
    expected = -logits.log_softmax(-1)[range(4), targets[:4]]
    found = objectives.next_token_loss(logits, targets)
    assert torch.allclose(found[:4], expected) and found[4] == 0


def test_the_kl_is_exact_down_to_a_rest_of_a_billionth():
    teacher, student = torch.zeros(1, 200), torch.zeros(1, 200)
    teacher[:, :100] = 10.0
    teacher[:, 100:] = 10.0 + math.log(1e-9)
    student[:, :100] = 10.0
    student[:, 100:] = 10.0 + math.log(1e-8)
    index, log_p, log_p_rest = koff.teacher_topk(Head(), teacher, 100)
    assert log_p_rest.item() == pytest.approx(math.log(1e-9), abs=1e-5)
    student.requires_grad_()
    koff.kl_topk(student, index, log_p, log_p_rest).sum().backward()
    q, p = student.double().softmax(-1)[0, 100:].sum(), math.exp(log_p_rest.item())
    assert student.grad[0, 100:].sum().item() == pytest.approx((q - p).item(), rel=1e-2)


@pytest.mark.parametrize("objective", ["kl", "next-token", "blend"])
def test_distillation_is_the_mean_per_token(tiny, objective):
    model, tokens = tiny(), torch.randint(0, 131, (3, 11))
    answer = koff.teacher_topk(model, model.hidden(tokens).flatten(0, 1), 20)
    hidden = torch.randn(3, 11, 24, requires_grad=True)
    loss = fast.distill(model, hidden, answer, tokens, koff.OBJECTIVES[objective])
    log_q = model.logits(hidden.flatten(0, 1)).log_softmax(-1)
    log_q_rest = log_q.exp().scatter(-1, answer[0], 0.0).sum(-1, keepdim=True).log()
    log_p, log_q = torch.cat(answer[1:], -1), torch.cat([log_q.gather(-1, answer[0]), log_q_rest], -1)
    kl = (log_p.exp() * (log_p - log_q)).sum() / 33
    every = F.cross_entropy(model.logits(hidden)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    ce = every / 33  # one mean for all objectives; the last token of a sequence has no next one and counts as 0
    whole = {"kl": kl, "next-token": ce, "blend": (kl + ce) / 2}[objective]
    assert torch.allclose(loss, whole, rtol=1e-5)
    assert torch.allclose(*(torch.autograd.grad(x, hidden)[0] for x in (loss, whole)), atol=1e-6)


# Router, files ------------------------------------------------------------------------------------------------------


def test_router_knows_its_domains_and_what_it_does_not_know():
    rng = np.random.default_rng(0)
    low, high, strange = (rng.integers(a, a + 300, 20_000) for a in (0, 250, 2000))
    router = Router()
    router.add("low", low, "key of low")
    router.add("high", high, "key of high")
    tiles = [ids[:5000].reshape(-1, 50) for ids in (low, high, strange)]
    assert [router.domains[i] for i in router.scores(tiles[0]).argmax(1)] == ["low"] * 100
    assert router.route(tiles[1]).count("high") > 90 and set(router.route(tiles[1])) <= {"high", None}
    assert router.route(tiles[2]) == [None] * 100


def test_saved_parts_load_alone_and_a_module_of_another_backbone_is_refused(tiny, tmp_path):
    model, tokens = tiny(), torch.randint(0, 131, (1, 20))
    gates = koff.Gates(model.config, 1, "neuron")
    (tmp_path / "pretrained").mkdir()
    (tmp_path / "pretrained/tokenizer.json").write_text("{}")
    runs = []
    for name in ("one", "two"):
        kept = koff.kept_channels(random_mask(gates), model.config, 1, "cpu")
        memory = koff.materialise_memories(random_memory(model, 1).by_block(torch.float32), kept)
        small = koff.materialise(model, kept)
        fingerprint = save_backbone(tmp_path / name, small, tmp_path / "pretrained")
        save_module(tmp_path / f"{name}.safetensors", memory, fingerprint)
        loaded = load(tmp_path / name)
        again = load_module(tmp_path / f"{name}.safetensors", loaded.config, torch.float32)
        assert torch.equal(loaded(tokens, None, again), small(tokens, None, memory))
        runs.append(loaded)
    with pytest.raises(BadInput, match="another backbone"):
        load_module(tmp_path / "one.safetensors", runs[1].config, torch.float32)
    (tmp_path / "one.safetensors").write_bytes(b"short")
    with pytest.raises(BadInput, match="cannot be read"):
        load_module(tmp_path / "one.safetensors", runs[0].config, torch.float32)


def test_ledger_counts_the_saved_tensors(tiny):
    memory = random_memory(tiny(), 1)
    blocks, one = memory.by_block(torch.float32), sum(p.numel() for p in memory.parameters())
    assert one >= 2 * (3 * (16 + 24) * 2 + 3 * (40 + 24) * 3 + 2 * 5 * 2 * 8)
    assert tables.ledger(10_000, 4_000, {"a": blocks, "b": blocks}) == {
        "total": 10_000, "removed": 4_000, "one_module": one, "all_modules": 2 * one, "one_module_share": one / 4_000,
    }  # fmt: skip
