"""Repair and memories by least squares, against numpy, the SVD, brute force, random rivals, and cases that can be exact."""

import json
import signal
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import koff
import train
from data import BadInput, scores, solve
from data.checkpoint import load
from data.corpus import windows
from data.families import parse_config
from data.run import Run
from data.starts import start
from model import Memory, Model
from test_koff import KINDS
from test_train import CONFIG, Killed, flags, freeze, in_step, killed, outputs, trainer_of, world  # noqa: F401
from train import Trainer

SOLVED = [kind for kind in KINDS if kind != "olmo2"]  # OLMo 2 has a norm behind down

# The regression -----------------------------------------------------------------------------------------------------


@pytest.fixture
def data():
    """H [n, F] and R [n, D], correlated: R has a part that H explains, of falling strength."""
    rng = np.random.default_rng(0)
    H = rng.normal(size=(300, 12)) @ rng.normal(size=(12, 12))
    R = H @ rng.normal(size=(12, 9)) * np.geomspace(1, 0.05, 9) + rng.normal(size=(300, 9))
    return H, R


def regression_of(H, R):
    """The `Regression` of H [n, F] and R [n, D], whose tokens all weigh the same."""
    fit = solve.Regression()
    fit.gram, fit.cross = torch.from_numpy(H.T @ H), torch.from_numpy(H.T @ R)
    fit.square = torch.tensor(np.square(R).sum())
    return fit


def best_of(fit, rank, ridge, curvature=None):
    """(A, B) of that rank, and the gains of all."""
    a, b, gains = solve.reduced_rank_regression(fit, ridge, curvature)
    F, D = fit.cross.shape
    full = min(F, D)
    assert a.shape == (full, F) and b.shape == (D, full) and gains.shape == (full,)
    assert torch.allclose(a.norm(dim=1), b.norm(dim=0)) and (gains.diff() <= 0).all()
    return a[:rank], b[:, :rank], gains


def regression(H, R, rank, ridge):
    """(H A^T B^T, the share of R that it says it explains)."""
    fit = regression_of(H, R)
    a, b, _ = best_of(fit, rank, ridge)
    return H @ (b @ a).T.numpy(), (fit.explained_by((b @ a).T) / fit.square).item()


def ridge_by_lstsq(H, R, ridge):
    """(W of ridge regression as plain least squares, H with one more row for each of its coefficients)."""
    more = np.vstack([H, np.sqrt(ridge * np.square(H).sum() / H.shape[1]) * np.eye(H.shape[1])])
    W, *_ = np.linalg.lstsq(more, np.vstack([R, np.zeros((H.shape[1], R.shape[1]))]), rcond=None)
    return W, more


@pytest.mark.parametrize("ridge", [1e-12, 0.1])
@pytest.mark.parametrize("rank", [1, 4, 9, 20])
def test_the_regression_is_numpys_least_squares_and_the_svd_of_what_it_fits(data, rank, ridge):
    H, R = data
    W, more = ridge_by_lstsq(H, R, ridge)
    U, S, V = np.linalg.svd(more @ W, full_matrices=False)
    best = (U[:, :rank] * S[:rank] @ V[:rank])[:300]  # without the rows that were added
    ours, explained = regression(H, R, rank, ridge)
    np.testing.assert_allclose(ours, best, atol=1e-8)
    assert explained == pytest.approx(1 - np.square(R - best).sum() / np.square(R).sum(), abs=1e-9)


def test_no_other_regression_of_its_rank_is_better(data):
    H, R = data
    ours, _ = regression(H, R, 3, 1e-12)
    error = np.square(R - ours).sum()
    rng = np.random.default_rng(1)
    _, _, V = np.linalg.svd(ours, full_matrices=False)
    for trial in range(200):
        near = 0.0 if trial % 2 else 1.0  # half of them are close to the best
        basis, _ = np.linalg.qr(near * V[:3].T + 0.3 ** (trial % 5) * rng.normal(size=(9, 3)))  # [D, r]
        W, *_ = np.linalg.lstsq(H, R @ basis, rcond=None)  # the best A for this B
        assert np.square(R - H @ W @ basis.T).sum() > error - 1e-9


def test_where_nothing_is_missing_nothing_is_added(data):
    H, _ = data
    a, b, gains = best_of(regression_of(H, np.zeros((300, 9))), 3, 0.01)
    assert (b @ a).abs().max() == 0 and (gains == 0).all()


@pytest.mark.parametrize("ridge", [1e-12, 0.1])
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_with_a_curvature_the_svd_is_of_what_is_fitted_in_its_measure(data, rank, ridge):
    """The best is that of the SVD of H W C^1/2, and what a rank gains is its singular value, squared."""
    H, R = data
    root = np.random.default_rng(2).normal(size=(9, 9))
    C = root @ root.T + 0.1 * np.eye(9)
    values, vectors = np.linalg.eigh(C)
    root, inverse = vectors * np.sqrt(values) @ vectors.T, vectors / np.sqrt(values) @ vectors.T
    W, more = ridge_by_lstsq(H, R, ridge)
    U, S, V = np.linalg.svd(more @ W @ root, full_matrices=False)
    best = (U[:, :rank] * S[:rank] @ V[:rank])[:300] @ inverse
    a, b, gains = best_of(regression_of(H, R), rank, ridge, torch.from_numpy(C))
    np.testing.assert_allclose(H @ (b @ a).T.numpy(), best, atol=1e-8)
    np.testing.assert_allclose(gains, np.square(S), atol=1e-8)
    if ridge < 1e-9:  # all ranks together gain what least squares explains
        squares = [np.square(x @ root).sum() for x in (R, R - H @ W)]
        assert gains.sum().item() == pytest.approx(squares[0] - squares[1])
    if rank == 1:
        plain, _ = regression(H, R, rank, ridge)
        assert np.square((R - best) @ root).sum() < np.square((R - plain) @ root).sum() - 1e-3


def test_a_direction_without_curvature_is_not_free(data):
    H, R = data
    C = np.zeros((9, 9))
    C[:3, :3] = np.eye(3)
    a, b, gains = best_of(regression_of(H, R), 9, 1e-12, torch.from_numpy(C))
    W, _ = ridge_by_lstsq(H, R, 1e-12)
    np.testing.assert_allclose((b @ a).T.numpy(), W, atol=1e-6)  # at full rank no measure matters
    assert (gains[3:] < 1e-3 * gains[0]).all()


# A whole module -----------------------------------------------------------------------------------------------------


def pruned(model, closed, first=1, **more):
    """(student, kept) of a tiny model whose neurons `closed` are gone in the blocks from `first` on."""
    gates = koff.Gates(model.config, first, "neuron")
    mask = {name: torch.ones(a.shape, dtype=torch.bool) for name, a in gates.log_alpha.items()}
    mask["neuron"][:, closed] = False
    for name, rows in more.items():
        mask[name][:, rows] = False
    kept = koff.kept_channels(mask, model.config, first, model.head.device)
    return koff.materialise(model, kept), kept


def solved(model, student, kept, batches, rank=4, first=1, kv_tokens=0, ridge=0.01):
    torch.manual_seed(3)
    with model.head.device:
        module = koff.MemoryModule(model.config, first, rank, 2.0 * rank, kv_tokens)  # alpha / r is not 1
    return module, solve.solve_memories(model, student, module, kept, batches, ridge)


def with_copies(model):
    """The neurons that can go: every second one is made a multiple of the one before. Without it, down can say the same
    of that one alone."""
    closed = torch.arange(1, 40, 2)
    factor = torch.linspace(-2, 2, 20)[:, None]
    for block in model.layers:
        for projection, multiple in ((block.mlp.gate_proj, 1), (block.mlp.up_proj, factor)):
            for p in projection.parameters():  # the matrix, and its bias where there is one
                rows = p.view(40, -1)
                rows[closed] = multiple * rows[closed - 1]
    return closed


@pytest.mark.parametrize("kind", SOLVED)
def test_it_is_exact_where_the_removed_neurons_are_linear_in_those_that_stay(tiny, kind):
    model = tiny(**KINDS[kind])
    student, kept = pruned(model, with_copies(model))
    tokens = torch.randint(0, 131, (8, 64))
    module, explained = solved(model, student, kept, [tokens], rank=24, ridge=1e-10)
    new = torch.randint(0, 131, (2, 50))
    memories = koff.materialise_memories(module.by_block(torch.float32), kept)
    teacher = model(new)
    assert (student(new) - teacher).abs().max() > 0.1
    assert (student(new, memories=memories) - teacher).abs().max() < 1e-4
    assert all(share == pytest.approx(1, abs=1e-6) for share in explained.values())


def parts(model, tokens, **more):
    student, kept = pruned(model, torch.arange(25, 40), k=[1, 2], v=[3], down=[0, 5, 23])
    module, explained = solved(model, student, kept, tokens, kv_tokens=3, **more)
    products = module.lora_b["down"] @ module.lora_a["down"]
    return products, explained


def test_batches_are_only_a_way_to_save_memory(tiny):
    tokens = torch.randint(0, 131, (12, 32))
    whole, explained = parts(tiny(), [tokens])
    for size in (1, 2, 5):
        split, other = parts(tiny(), tokens.split(size))
        assert (whole - split).abs().max() < 1e-4 * whole.abs().max()
        for i, share in other.items():
            assert share.item() == pytest.approx(explained[i].item(), abs=1e-5)
    assert whole.abs().max() > 0 and all(0 < share < 1 for share in explained.values())


@pytest.mark.parametrize("kind", SOLVED)
@pytest.mark.parametrize("memories", [0, 1, 2])  # all blocks, as many as have gates, fewer
def test_what_it_explains_is_what_is_missing_less(tiny, kind, memories):
    """Block by block: |R|^2 falls by the share that it says, all that it must not touch stays as it was."""
    model = tiny(**KINDS[kind])
    student, kept = pruned(model, torch.arange(20, 40), v=[3], down=[0, 5])
    tokens = torch.randint(0, 131, (6, 40))
    torch.manual_seed(3)
    module = koff.MemoryModule(model.config, memories, 4, 4.0, 3)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.2)
    before = {name: p.clone() for name, p in module.named_parameters()}
    explained = solve.solve_memories(model, student, module, kept, [tokens], 0.01)
    assert list(explained) == list(range(max(1, memories), 3))
    for name, p in module.named_parameters():
        assert torch.equal(p, before[name]) == ("down" not in name)
    whole = module.by_block(torch.float32)
    small = koff.materialise_memories(whole, kept)
    context = {i: replace(memory, lora={}) for i, memory in whole.items()}  # which the teacher has too
    x = y = model.embed_tokens(tokens)
    for i in range(3):
        without = {}
        if i in small:
            lora = {name: pair for name, pair in small[i].lora.items() if name != "down"}
            without[i] = replace(small[i], lora=lora)
        y = model.run(y, i, i + 1, memories=context)
        lacks = y - student.run(x, i, i + 1, memories=without)
        x = student.run(x, i, i + 1, memories=small)
        if i not in explained:
            continue
        weight = 1 / y.square().mean(-1, keepdim=True).sqrt()
        rows = kept[i]["down"]
        missing = (weight * lacks)[..., rows].square().sum()
        left = (weight * (y - x))[..., rows].square().sum()
        assert explained[i].item() == pytest.approx(1 - (left / missing).item(), abs=1e-4)
    closed = [0, 5]
    assert (module.lora_b["down"][-1][closed] == 0).all() and (module.lora_a["down"][-1][:, 20:] == 0).all()


def test_what_keys_and_values_add_is_not_missing(tiny):
    """Where nothing is closed, nothing is to be given back: LoRA does not undo the context."""
    model = tiny()
    tokens = torch.randint(0, 131, (6, 40))
    added = []
    for closed in ([], [7]):
        student, kept = pruned(model, closed)
        module, _ = solved(model, student, kept, [tokens], kv_tokens=3)
        torch.nn.init.normal_(module.values)
        solve.solve_memories(model, student, module, kept, [tokens], 0.01)
        added.append((module.lora_b["down"] @ module.lora_a["down"]).abs().max())
    assert added[0] < 1e-4 * added[1]


@pytest.mark.parametrize("times,ignored", [(0.5, False), (5, True)])
def test_a_direction_is_ignored_where_it_is_longer_than_a_usual_input(times, ignored):
    a, usual = torch.randn(4, 12, dtype=torch.float64), torch.randn(3, 50, 12)
    length = usual.square().sum(-1).mean().sqrt()
    massive = torch.nn.functional.normalize(torch.randn(12), dim=0)
    signs = torch.tensor([1.0, -1.0, 1.0])[:, None, None]  # the first singular vector has no sign
    changed = solve.without_massive(a, signs * times * length * massive, usual)
    if not ignored:
        assert torch.equal(changed, a)
        return
    assert (changed @ massive.double()).abs().max() < 1e-5
    other = torch.randn(12)
    other -= other @ massive * massive
    assert torch.allclose((changed - a) @ other.double(), torch.zeros(4, dtype=torch.float64), atol=1e-5)


def test_lora_behind_keys_and_values_ignores_a_massive_first_token(tiny):
    """Neuron 3 of block 1 is made huge for token 130 where nothing stands before it."""
    model = tiny()
    student, kept = pruned(model, torch.arange(25, 40))
    first = torch.tensor([[130]])
    before_mlp = solve.after_attention(student, 1, student.run(student.embed_tokens(first), 0, 1))
    block = student.layers[1]
    direction = block.post_attention_layernorm(before_mlp)[0, 0]
    for matrix in (block.mlp.gate_proj, block.mlp.up_proj):
        matrix.weight[3] = 20 * direction / direction.square().sum()
    with scores.inputs_to(block.mlp.down_proj) as neurons:
        student(first)
    tokens = torch.randint(0, 130, (8, 32))
    seen = []
    for at in (5, 0):  # the token stands elsewhere, or first
        tokens[:, at] = 130
        module, _ = solved(model, student, kept, [tokens], kv_tokens=3)
        a, b = koff.materialise_memories(module.by_block(torch.float32), kept)[1].lora["down"]
        seen.append((neurons[0][0, 0] @ a.T @ b.T).norm())
    assert seen[1] < 1e-3 * seen[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_stays_on_its_device_and_asks_for_no_number(tiny, dtype, monkeypatch):
    with torch.device("meta"):
        model = tiny().to(dtype)
        shape = {name: range(channels - 3) for name, (channels, _) in model.config.shapes.items()}
        index = {name: torch.empty(len(rows), dtype=torch.int64) for name, rows in shape.items()}
        kept = {i: {**index, "neuron": index["gate"]} for i in (1, 2)}
        student = koff.materialise(model, kept)
    tokens = torch.zeros(2, 16, dtype=torch.int64, device="meta")
    module, explained = solved(model, student, kept, [tokens, tokens], kv_tokens=3)
    assert all(share.is_meta for share in explained.values()) and all(p.is_meta for p in module.parameters())
    shares = solve.repair(model, student, kept, [tokens, tokens], 0.01)
    assert all(share.is_meta for share in shares.values()) and all(p.is_meta for p in student.parameters())
    with torch.device("meta"):
        gates = koff.Gates(model.config, 1, "neuron")
    for name, score in scores.surgeon_scores(model, gates, [[tokens], [tokens]]).items():
        assert score.is_meta and score.shape == gates.log_alpha[name].shape
    eye = torch.eye
    monkeypatch.setattr(torch, "eye", lambda *size, dtype, device: eye(*size, dtype=dtype))  # on the CPU: noticed
    with pytest.raises(Exception, match="device"):
        solve.repair(model, student, kept, [tokens], 0.01)


# The backbone -------------------------------------------------------------------------------------------------------


def seen_by(model, tokens, *names):
    """{name: the input of that part of a model, for all tokens}, float64 [n, channels]."""
    seen, hooks = {}, []

    def keep(name, x):
        seen[name] = x.flatten(0, 1).double().numpy()

    for name in names:
        hooks.append(
            model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: keep(name, args[0]))
        )
    model(tokens)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("kind", SOLVED)
def test_the_first_repaired_block_is_ridge_regression(tiny, kind):
    """By numpy, on what hooks see: o_proj, then down behind the new o_proj; each token weighs 1 / RMS of the teacher's."""
    model = tiny(**KINDS[kind])
    closed = dict(k=[1, 2], v=[3], down=[0, 5, 23])
    student, kept = pruned(model, torch.arange(25, 40), **closed)
    half, _ = pruned(model, torch.arange(25, 40), **closed)
    tokens = torch.randint(0, 131, (8, 64))
    solve.repair(model, student, kept, tokens.split(3), 0.01)
    old, new = half.layers[1], student.layers[1]
    for name, after, rows in (
        ("self_attn.o_proj", "layers.1.post_attention_layernorm", list(range(24))),
        ("mlp.down_proj", "layers.2.input_layernorm", [c for c in range(24) if c not in closed["down"]]),
    ):
        ours = seen_by(half, tokens, f"layers.1.{name}", after)
        teacher = seen_by(model, tokens, after)[after]
        weight = 1 / np.sqrt(np.square(teacher).mean(-1, keepdims=True))
        missing = weight * (teacher - ours[after])
        W, _ = ridge_by_lstsq(weight * ours[f"layers.1.{name}"], missing[:, rows], 0.01)
        matrix = old.get_submodule(name)
        np.testing.assert_allclose(new.get_submodule(name).weight.numpy(), matrix.weight.numpy() + W.T, atol=2e-4)
        assert np.abs(W).max() > 0.02
        matrix.weight = new.get_submodule(name).weight


@pytest.mark.parametrize("kind", SOLVED)
def test_a_repair_is_exact_where_what_was_cut_is_linear_in_what_is_left(tiny, kind):
    model = tiny(**KINDS[kind])
    student, kept = pruned(model, with_copies(model))
    new = torch.randint(0, 131, (2, 50))
    assert (student(new) - model(new)).abs().max() > 0.1
    explained = solve.repair(model, student, kept, torch.randint(0, 131, (8, 64)).split(3), 1e-10)
    assert (student(new) - model(new)).abs().max() < 1e-4
    assert all(share == pytest.approx(1, abs=1e-6) for share in explained.values())


@pytest.mark.parametrize(
    "more", [dict(down=list(range(24))), dict(closed=40), dict(closed=40, down=list(range(24))), dict()]
)
def test_a_block_of_which_nothing_is_left_and_one_that_is_whole_are_no_special_cases(tiny, more):
    model, tokens = tiny(), torch.randint(0, 131, (4, 32))
    student, kept = pruned(model, torch.arange(more.pop("closed", 0)), **more)
    statistics = scores.Statistics(model, 1)
    statistics.add(tokens)
    explained = solve.repair(model, student, kept, [tokens], 0.01)
    module = koff.MemoryModule(model.config, 1, 4, 4.0, 0, ("down",))
    shares = solve.solve_memories(model, student, module, kept, [tokens], 0.01, statistics.curvature)
    assert all(0 <= share < 1e-3 for share in [*explained.values(), *shares.values()])  # and not NaN
    memories = koff.materialise_memories(module.by_block(torch.float32), kept)
    assert torch.allclose(student(tokens, memories=memories), student(tokens), atol=1e-4)


def test_a_repair_in_other_batches_is_the_same(tiny):
    tokens = torch.randint(0, 131, (12, 32))
    found = {}
    for size in (12, 1, 2, 5):
        student, kept = pruned(tiny(), torch.arange(25, 40), k=[1, 2], v=[3], down=[0, 5, 23])
        shares = solve.repair(tiny(), student, kept, tokens.split(size), 0.01)
        found[size] = torch.cat([p.flatten() for p in student.parameters()]), torch.stack(list(shares.values()))
        assert (found[size][0] - found[12][0]).abs().max() < 5e-5  # of weights up to 1
        assert (found[size][1] - found[12][1]).abs().max() < 1e-5
    assert (found[12][1] > 0.1).all() and (found[12][1] < 1).all()


def test_a_repair_explains_what_it_says_and_changes_two_matrices_of_the_student_only(tiny):
    model = tiny()
    student, kept = pruned(model, torch.arange(20, 40), v=[3], down=[0, 5])
    before, teacher = ({n: t.clone() for n, t in m.state_dict().items()} for m in (student, model))
    tokens = torch.randint(0, 131, (6, 40))
    explained = solve.repair(model, student, kept, [tokens], 0.01)
    assert all(torch.equal(t, teacher[n]) for n, t in model.state_dict().items())
    changed = {n for n, t in student.state_dict().items() if not torch.equal(t, before[n])}
    parts = ("self_attn.o_proj", "mlp.down_proj")
    assert changed == {f"layers.{i}.{part}.weight" for i in (1, 2) for part in parts}
    assert all(t.shape == before[n].shape and t.dtype == before[n].dtype for n, t in student.state_dict().items())
    assert not any(p.requires_grad for p in student.parameters())
    # What is left behind the last block is what was missing there with its old down, less what it says.
    y = model.run(model.embed_tokens(tokens), 0, 3)
    left = y - student.run(student.embed_tokens(tokens), 0, 3)
    student.layers[2].mlp.down_proj.weight = torch.nn.Parameter(before["layers.2.mlp.down_proj.weight"])
    missing = y - student.run(student.embed_tokens(tokens), 0, 3)
    squares = [
        (x / y.square().mean(-1, keepdim=True).sqrt())[..., kept[2]["down"]].square().sum() for x in (left, missing)
    ]
    assert explained[2].item() == pytest.approx(1 - (squares[0] / squares[1]).item(), abs=1e-4)


def backbone_of(out):
    return {name.removeprefix("model."): t for name, t in load_file(out / "backbone/model.safetensors").items()}


@pytest.mark.parametrize("gated", ["kv+mlp", "kv+mlp+o"])
def test_without_a_repair_every_weight_of_the_backbone_is_the_pretrained_one(world, gated):  # noqa: F811
    """Bit for bit. With it all but o_proj and down are, in the blocks with gates."""
    for repair, out in ("none", world / "runs/none"), ("domains", world / "runs/domains"):
        argv = flags(world, out=out, repair=repair, sparsity=0.03, gated=gated, gate_init="constant", gate_share=0.5)
        assert train.main(argv) == 0
        base = load(world / "base")
        _, mask = Run(out).gates(base)
        kept = koff.kept_channels(mask, base.config, 1, "cpu")
        assert any(len(index["neuron"]) < 40 for index in kept.values())
        expected, found = {}, backbone_of(out)
        for name, tensor in base.state_dict().items():
            for matrix in ("q", "k", "v", "o", "gate", "up", "down"):
                if f".{matrix}_proj." in name and int(name.split(".")[1]) in kept:
                    index = kept[int(name.split(".")[1])]
                    tensor = tensor[index[matrix]]
                    if matrix == "down":
                        tensor = tensor[:, index["neuron"]]
            expected[name] = tensor
        assert expected.keys() == {name for name in found if not name.endswith(".kept")}
        differ = {name for name, tensor in expected.items() if not torch.equal(found[name], tensor)}
        parts = ("self_attn.o_proj", "mlp.down_proj")
        repaired = {f"layers.{i}.{part}.weight" for i in (1, 2) for part in parts}
        if repair == "none":
            assert not differ
        else:  # where only rows of o_proj are closed, nothing is missing in the others
            assert {name for name in repaired if "down" in name} <= differ <= repaired


def watched(monkeypatch):
    """A list of the texts {name: ids} of each repair from now on."""
    seen, repair = [], train.repair_student
    monkeypatch.setattr(train, "repair_student", lambda trainer, texts: seen.append(texts) or repair(trainer, texts))
    return seen


def test_a_backbone_is_repaired_on_a_text_of_ones_own_and_on_no_other(world, monkeypatch, capsys):  # noqa: F811
    seen, text = watched(monkeypatch), world / "general.txt"
    text.write_text((world / "data/french.txt").read_text()[::-1])
    given = dict(repair=text, repair_tokens=300, sparsity=0.03)
    assert train.main(flags(world, **given)) == 0
    (texts,) = seen
    run = Run(world / "runs/one")
    ids = run.tokenizer.encode(text.read_text(), bos=True)
    assert list(texts) == ["--repair"] and texts["--repair"].tolist() == ids[: len(texts["--repair"])]
    trainer, opened = trainer_of(world, **given)
    whole = {"french": opened["french"], "german": opened["german"]}
    used, fit = [], solve.repair
    monkeypatch.setattr(solve, "repair", lambda *given: used.append(torch.cat(given[3])) or fit(*given))
    freeze(trainer)
    solve.repair_student(trainer, texts)
    solve.repair_student(trainer, whole)
    assert torch.equal(used[0], torch.from_numpy(windows(texts["--repair"], 16, 19)))  # 300 tokens, in windows of 16
    assert torch.equal(used[1], torch.cat([torch.from_numpy(windows(ids, 16, 10)) for ids in whole.values()]))
    # A text that is not there, and another one.
    capsys.readouterr()
    assert train.main(flags(world, out=world / "runs/two", repair=world / "none.txt")) == 2
    said = capsys.readouterr().err
    assert (
        f"{world / 'none.txt'} does not exist" in said and said.count("\n") == 1 and not (world / "runs/two").exists()
    )
    with in_step(monkeypatch, 4, lambda: signal.raise_signal(signal.SIGTERM)):
        assert train.main(flags(world, out=world / "runs/two", **given)) == 143
    before = text.read_text()
    text.write_text(before + "more of it\n")
    assert train.main(flags(world, out=world / "runs/two", **given)) == 2
    assert "began with another text of --repair" in capsys.readouterr().err
    assert train.main(flags(world, out=world / "runs/two", **given | dict(repair="domains"))) == 2
    assert "(--repair differs)" in capsys.readouterr().err
    text.write_text(before)
    assert train.main(flags(world, out=world / "runs/two", **given)) == 0
    assert outputs(world / "runs/two") == outputs(world / "runs/one")
    # A later module is for the backbone as it is: it does not need the text.
    text.unlink()
    (world / "dutch.txt").write_text((world / "data/german.txt").read_text())
    assert train.main(["--add", str(world / "dutch.txt"), "--out", str(world / "runs/one")]) == 0


@pytest.mark.parametrize("how", ["kill", "signal", "signal when it goes on later"])
def test_a_run_that_is_stopped_while_it_is_repaired_ends_as_any_other(world, monkeypatch, how, capsys):  # noqa: F811
    more = dict(gate_share=0.5, sparsity=0.03)
    assert train.main(flags(world, **more)) == 0
    repair = train.repair_student

    def interrupted(*given):
        if how == "kill":
            raise Killed
        signal.raise_signal(signal.SIGTERM)
        return repair(*given)

    argv = flags(world, out=world / "runs/two", **more)
    if "later" in how:
        with in_step(monkeypatch, 7, killed), pytest.raises(Killed):
            train.main(argv)
    with monkeypatch.context() as patch:
        patch.setattr(train, "repair_student", interrupted)
        if how == "kill":
            with pytest.raises(Killed):
                train.main(argv)
        else:
            assert train.main(argv) == 143 and "stopped after the backbone was repaired" in capsys.readouterr().err
    assert train.main(argv) == 0
    assert outputs(world / "runs/two") == outputs(world / "runs/one")
    logs = [(world / "runs" / name / "log.jsonl").read_text() for name in ("one", "two")]
    assert logs[0] == logs[1] and logs[0].count("repaired") == 1


@pytest.mark.parametrize("repair", ["domains", "none"])
def test_a_later_module_learns_on_the_backbone_of_the_run(world, monkeypatch, repair, capsys):  # noqa: F811
    out, seen = world / "runs/one", []
    assert train.main(flags(world, repair=repair, sparsity=0.03)) == 0
    (world / "dutch.txt").write_text((world / "data/german.txt").read_text()[::-1])
    recover = Trainer.recover

    def noted(self, *given):
        seen.append(self.student)
        return recover(self, *given)

    monkeypatch.setattr(Trainer, "recover", noted)
    texts = watched(monkeypatch)
    before = backbone_of(out)
    assert train.main(["--add", str(world / "dutch.txt"), "--out", str(out), "--steps", "5"]) == 0
    assert len(seen) == 5 and len(set(map(id, seen))) == 1 and not texts
    student = seen[0].state_dict()
    assert all(torch.equal(t, student[name]) for name, t in before.items())
    assert "dutch" in json.loads((out / "results.json").read_text())["swap"]


# The score that knows what can be repaired --------------------------------------------------------------------------


def cost_of(H, W, C, left, ridge):
    """What it costs to keep only the neurons `left`: min over down of |e C^1/2|^2 + lambda |W - W'|^2 in the same measure."""
    root = np.linalg.cholesky(C)
    more = np.vstack([H, np.sqrt(ridge) * np.eye(H.shape[1])])
    target = more @ W @ root
    fitted, *_ = np.linalg.lstsq(more[:, left], target, rcond=None)
    return np.square(target - more[:, left] @ fitted).sum()


def test_what_is_irreplaceable_is_found_by_brute_force():
    rng = np.random.default_rng(0)
    n, F, D = 80, 7, 5
    H = rng.normal(size=(n, F)) @ rng.normal(size=(F, F))
    W = rng.normal(size=(F, D))  # down, transposed
    C = rng.normal(size=(D, D))
    C = C @ C.T + 0.1 * np.eye(D)
    gram = H.T @ H
    ridge = 0.01 * gram.diagonal().mean()
    left, lost, level = list(range(F)), np.zeros(F), 0.0
    while left:
        now = cost_of(H, W, C, left, ridge)
        costs = {j: cost_of(H, W, C, [k for k in left if k != j], ridge) - now for j in left}
        out = min(costs, key=costs.get)
        level = max(level, costs[out])
        lost[out] = level
        left.remove(out)
    alone = np.einsum("fd,de,fe->f", W, C, W) * gram.diagonal()
    given = [torch.from_numpy(x) for x in (gram, W.T.copy(), C)]
    found = scores.irreplaceable(*given, at_once=1)
    np.testing.assert_allclose(found, np.minimum(lost / alone, 1), rtol=2e-3)
    assert found.min() < 0.5 * found.max()
    assert scores.irreplaceable(*given, at_once=3).shape == (7,) and (scores.irreplaceable(*given) <= 1).all()


def test_of_two_equal_neurons_the_first_to_go_costs_nothing():
    rng = np.random.default_rng(0)
    H, down = rng.normal(size=(300, 8)), torch.from_numpy(rng.normal(size=(6, 8)))
    H[:, 5] = H[:, 2]
    found = scores.irreplaceable(torch.from_numpy(H.T @ H), down, torch.eye(6).double(), at_once=1)
    first, second = found[[2, 5]].sort().values
    assert first < 0.03 and second > 0.5 and found[[0, 1, 3, 4, 6, 7]].min() > 0.5


@pytest.mark.parametrize("memory", [False, True])
def test_what_the_surgeon_knows_of_down_is_what_autograd_says(tiny, memory):
    """H^T H of down's inputs, and the outer products of the gradients behind each block, each token as `Regression` has it."""
    model, tokens = tiny(), torch.randint(0, 131, (3, 20))
    memories = None
    if memory:
        torch.manual_seed(4)
        module = koff.MemoryModule(model.config, 1, 0, 0.0, 4)
        memories = module.requires_grad_(False).by_block(torch.float32)
    torch.manual_seed(7)
    found = scores.Statistics(model, 1, memories, grams=True)
    found.add(tokens)
    moved = {i: torch.zeros(3, 20, 24, requires_grad=True) for i in (1, 2)}  # added behind each block
    after, inputs, hooks = {}, {}, []

    def add(i, out):
        after[i] = out.detach()
        return out + moved[i]

    def keep(i, x):
        inputs[i] = x.detach()

    for i in moved:
        hooks.append(model.layers[i].register_forward_hook(lambda _, args, out, i=i: add(i, out)))
        down = model.layers[i].mlp.down_proj
        hooks.append(down.register_forward_pre_hook(lambda _, args, i=i: keep(i, args[0])))
    log_p = model(tokens, memories=memories).flatten(0, 1).log_softmax(-1)
    for hook in hooks:
        hook.remove()
    torch.manual_seed(7)
    drawn = torch.multinomial(log_p.detach().exp(), 1)
    gradients = torch.autograd.grad(-log_p.gather(1, drawn).sum(), list(moved.values()))
    assert list(found.gram) == list(found.curvature) == [1, 2]
    for i, gradient in zip(moved, gradients, strict=True):
        gram, curvature = np.zeros((40, 40)), np.zeros((24, 24))
        for x, h, g in zip(*(t.flatten(0, 1).double().numpy() for t in (after[i], inputs[i], gradient)), strict=True):
            square = np.square(x).mean()
            gram += np.outer(h, h) / square
            curvature += np.outer(g, g) * square
        np.testing.assert_allclose(found.gram[i], gram, atol=1e-5 * np.abs(gram).max())
        np.testing.assert_allclose(found.curvature[i], curvature, atol=1e-4 * np.abs(curvature).max())


def test_a_neuron_is_judged_by_what_can_be_repaired_and_the_rest_like_the_mean_neuron(tiny):
    model = tiny()
    gates, texts = (
        koff.Gates(model.config, 1, "neuron"),
        [[torch.randint(0, 131, (4, 32))] * 2, [torch.randint(0, 131, (4, 32))]],
    )
    torch.manual_seed(5)
    fisher = scores.fisher_scores(model, gates, texts)
    torch.manual_seed(5)
    surgeon = scores.surgeon_scores(model, gates, texts)
    share = surgeon["neuron"] / fisher["neuron"]
    assert (share <= 1).all() and (share > 0).all() and share.std() > 0.05
    for name in ("k", "v", "down"):  # the mean neuron's share
        torch.testing.assert_close(surgeon[name], fisher[name] * share.mean())


# What has no closed form --------------------------------------------------------------------------------------------


def make_olmo2(folder):
    """The model of the tests' world as an OLMo 2."""
    config = {**CONFIG, "model_type": "olmo2"}
    torch.manual_seed(0)
    parameters = Model(parse_config(config)).named_parameters()
    state = {f"model.{name}": torch.randn(p.shape) * 0.2 + (p.ndim == 1) for name, p in parameters}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def test_where_a_norm_follows_down_a_run_says_to_leave_it_out(world, tiny, capsys):  # noqa: F811
    make_olmo2(world / "base")
    assert train.main(flags(world)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "olmo2 has a norm behind down" in said and "--repair none --solve-tokens 0" in said
    for more in (dict(solve_tokens=0), dict(repair="none")):  # one of the two is left
        assert train.main(flags(world, **more)) == 2
    assert not (world / "runs").exists()
    for more in (dict(solve_tokens=0), dict(rank=0)):  # nothing is to be solved
        assert train.main(flags(world, out=world / "runs" / min(more), repair="none", **more)) == 0
    model = tiny(**KINDS["olmo2"])
    student, kept = pruned(model, [7])
    with pytest.raises(BadInput, match="olmo2 has a norm"):
        solved(model, student, kept, [torch.randint(0, 131, (2, 16))])


@dataclass
class Shifted(Memory):
    """A memory with something that the closed form knows nothing of."""

    shift: torch.Tensor | None = None


class ShiftedModule(koff.MemoryModule):
    def __init__(self, config, *rest):
        super().__init__(config, *rest)
        self.shift = torch.nn.Parameter(torch.zeros(self.blocks, config.hidden_size))

    def by_block(self, dtype):
        blocks = super().by_block(dtype).items()
        return {i: Shifted(m.lora, m.keys, m.values, self.shift[i - self.first_block].to(dtype)) for i, m in blocks}


def test_a_memory_with_another_tensor_is_not_solved_for(world, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setitem(koff.MEMORIES, "shifted", ShiftedModule)
    assert train.main(flags(world, memory_kind="shifted")) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "have a tensor 'shift'" in said and "say --solve-tokens 0" in said
    assert not (world / "runs").exists()
    with pytest.raises(BadInput, match="'shift'"):
        solve.check_solvable(parse_config(CONFIG), {0: Memory(), 1: Shifted(shift=torch.zeros(24))})
    solve.check_solvable(parse_config(CONFIG), {0: Memory(), 1: Shifted()})  # a field without a tensor is none


# In a run -----------------------------------------------------------------------------------------------------------


def lora(trainer, name):
    modules = trainer.modules.values()
    return [getattr(module, "lora_" + part)[name].clone() for module in modules for part in "ab"]


def test_a_trainer_solves_once_the_mask_is_final(world):  # noqa: F811
    trainer, text = trainer_of(world, gate_share=0.5, lora="kv+mlp")
    start(trainer, text)
    tokens = torch.arange(32).view(2, 16)
    for index in range(4):
        trainer.learn(tokens, "german", index)
    freeze(trainer)
    before, others = lora(trainer, "down"), lora(trainer, "up")
    solve.solve_module(trainer, "french", text["french"])
    solve.solve_module(trainer, "german", text["german"])
    moved = lora(trainer, "down")
    assert not any(map(torch.equal, before, moved)) and all(map(torch.equal, others, lora(trainer, "up")))
    trainer.recover(tokens, "german", 4)  # AdamW begins anew with what was solved, and goes on with the rest
    module, state = trainer.modules["german"], trainer.optimizers["german"].state
    assert {name: state[module.lora_a[name]]["step"].item() for name in ("down", "up")} == {"down": 1, "up": 5}
    assert not any(map(torch.equal, moved[2:], lora(trainer, "down")[2:]))


def test_a_run_repairs_and_solves_between_its_two_kinds_of_steps(world, monkeypatch):  # noqa: F811
    came = []

    def noted(name, work):
        return lambda *given: came.append(name) or work(*given)

    for name in ("learn", "recover"):
        monkeypatch.setattr(Trainer, name, noted(name, getattr(Trainer, name)))
    monkeypatch.setattr(train, "solve_module", noted("solve", train.solve_module))
    monkeypatch.setattr(train, "repair_student", noted("repair", train.repair_student))
    assert train.main(flags(world, gate_share=0.5)) == 0
    assert came == 4 * ["learn"] + ["repair"] + 2 * ["solve"] + 4 * ["recover"]


@pytest.mark.parametrize("tokens", [40, 10**6])  # some of the text, all of it
def test_it_is_solved_on_windows_of_the_whole_text(world, monkeypatch, tokens):  # noqa: F811
    trainer, text = trainer_of(world, solve_tokens=tokens, solve_ridge=0.25, steps=0, curvature_tokens=0)
    freeze(trainer)
    monkeypatch.setattr(solve.batches_of, "__defaults__", (48,))
    monkeypatch.setattr(solve, "solve_memories", lambda *given: given)
    model, student, module, kept, batches, ridge, curvature = solve.solve_module(trainer, "french", text["french"])
    assert (model, student, module) == (trainer.model, trainer.student, trainer.modules["french"])
    assert kept is trainer.kept and ridge == 0.25 and curvature is None
    expected = windows(text["french"], 16, 3 if tokens == 40 else None)
    assert torch.equal(torch.cat(batches), torch.from_numpy(expected)) and len(batches[0]) == 3
    assert expected[-1].tolist() == text["french"][: len(text["french"]) // 16 * 16][-16:].tolist()


def test_the_size_of_a_module_does_not_change_the_mask(world):  # noqa: F811
    masks = []
    for more in (dict(rank=2), dict(rank=4, lora="mlp"), dict(kv_tokens=0)):
        trainer, text = trainer_of(world, steps=0, **more)
        start(trainer, text)
        masks.append(trainer.gates.final_mask(0.05))
    for mask in masks[1:]:
        assert all(torch.equal(mask[name], masks[0][name]) for name in mask)


def test_spare_rank_can_still_learn(tiny):
    """Where the solution needs less than the rank, the rest of A is random: with B = 0 it adds nothing, but has a gradient."""
    model = tiny()
    student, kept = pruned(model, torch.arange(37), down=list(range(4, 24)))
    module, _ = solved(model, student, kept, [torch.randint(0, 131, (4, 32))], rank=16)
    assert (module.lora_b["down"][:, :, 3:] == 0).all() and (module.lora_a["down"][:, 3:].abs().sum(-1) > 0).all()
    tokens = torch.randint(0, 131, (2, 32))
    memories = koff.materialise_memories(module.by_block(torch.float32), kept)
    student(tokens, memories=memories).square().sum().backward()
    assert (module.lora_b["down"].grad[:, :4, 3:].abs().sum(1) > 0).all()


def test_a_mask_may_be_learned_and_the_modules_solved_only(world, capsys):  # noqa: F811
    more = dict(order="prune-first", gate_share=1.0)
    assert train.main(flags(world, **more)) == 0
    assert "solved german" in capsys.readouterr().out
    assert train.main(flags(world, out=world / "runs/two", solve_tokens=0, **more)) == 2
    assert "the memories get no step to learn in" in capsys.readouterr().err


@pytest.mark.parametrize("more", [dict(rank=0), dict(solve_tokens=0), dict(memory_blocks=1), dict(lora="down")])
def test_what_is_solved_and_what_is_not(world, more, capsys):  # noqa: F811
    assert train.main(flags(world, steps=0, **more)) == 0
    printed = capsys.readouterr().out
    assert ("solved german: explains" in printed) == ("memory_blocks" in more or "lora" in more)
    log = [json.loads(line) for line in (world / "runs/one/log.jsonl").read_text().splitlines()]
    solved = [entry["solved"] for entry in log if "solved" in entry]
    assert solved == (["french", "german"] if "solved french" in printed else [])
    assert [list(entry["repaired"]) for entry in log if "repaired" in entry] == [["1", "2"]]


@pytest.mark.parametrize("steps,gate_share", [(8, 0.5), (8, 0.0), (0, 0.75)])
@pytest.mark.parametrize("how", ["kill", "signal"])
def test_a_run_that_is_stopped_while_it_solves_ends_as_any_other(world, monkeypatch, how, steps, gate_share, capsys):  # noqa: F811
    more = dict(steps=steps, gate_share=gate_share, sparsity=0.03)
    assert train.main(flags(world, **more)) == 0
    whole, solve_one = outputs(world / "runs/one"), train.solve_module

    def interrupted(trainer, domain, ids):
        if domain == "german" and how == "kill":
            raise Killed
        if domain == "french" and how == "signal":
            signal.raise_signal(signal.SIGTERM)
        return solve_one(trainer, domain, ids)

    monkeypatch.setattr(train, "solve_module", interrupted)
    argv = flags(world, out=world / "runs/two", **more)
    if how == "kill":
        with pytest.raises(Killed):
            train.main(argv)
    else:
        assert train.main(argv) == 143
        assert "stopped after french was solved" in capsys.readouterr().err
    monkeypatch.setattr(train, "solve_module", solve_one)
    assert train.main(argv) == 0
    assert (how == "signal") == ("solved french" not in capsys.readouterr().out)
    assert outputs(world / "runs/two") == whole
    logs = [(world / "runs" / name / "log.jsonl").read_text() for name in ("one", "two")]
    assert logs[0] == logs[1]


def test_what_was_solved_is_not_solved_again_after_a_kill(world, monkeypatch, capsys):  # noqa: F811
    argv = flags(world, steps=8, gate_share=0.5, save_every=100, sparsity=0.03)
    with in_step(monkeypatch, 6, killed), pytest.raises(Killed):
        train.main(argv)
    assert "solved german" in capsys.readouterr().out
    log = world / "runs/one/log.jsonl"
    before = log.read_text().splitlines()
    assert train.main(argv) == 0
    printed = capsys.readouterr().out
    assert "at step 4" in printed and "solved german" not in printed
    assert log.read_text().splitlines()[: len(before)] == before and len(before) == 1 + 1 + 2


def test_a_later_module_is_solved_first(world, capsys):  # noqa: F811
    assert train.main(flags(world)) == 0
    text = world / "dutch.txt"
    text.write_text((world / "data/german.txt").read_text())
    capsys.readouterr()
    assert train.main(["--add", str(text), "--out", str(world / "runs/one"), "--steps", "0"]) == 0
    printed = capsys.readouterr().out
    assert "solved dutch" in printed and "solved german" not in printed
