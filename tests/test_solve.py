"""Memories in closed form, against numpy's least squares, the SVD, random rivals, and a case that can be exact."""

import json
import signal
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import koff
import train
from data import BadInput, solve
from data.corpus import windows
from data.families import parse_config
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


def regression(H, R, rank, ridge):
    """(H A^T B^T, the share of R that it says it explains)."""
    gram, cross = torch.from_numpy(H.T @ H), torch.from_numpy(H.T @ R)
    a, b, explained = solve.reduced_rank_regression(gram, cross, rank, ridge)
    assert a.shape == (min(rank, R.shape[1]), H.shape[1]) and b.shape == (R.shape[1], len(a))
    assert torch.allclose(a.norm(dim=1), b.norm(dim=0))
    return H @ a.T.numpy() @ b.T.numpy(), explained.item() / np.square(R).sum()


@pytest.mark.parametrize("ridge", [1e-12, 0.1])
@pytest.mark.parametrize("rank", [1, 4, 9, 20])
def test_the_regression_is_numpys_least_squares_and_the_svd_of_what_it_fits(data, rank, ridge):
    H, R = data
    # Ridge regression as plain least squares: one more row for each of the F coefficients.
    root = np.sqrt(ridge * np.square(H).sum() / 12)
    more = np.vstack([H, root * np.eye(12)])
    W, *_ = np.linalg.lstsq(more, np.vstack([R, np.zeros((12, 9))]), rcond=None)
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
    a, b, explained = solve.reduced_rank_regression(torch.from_numpy(H.T @ H), torch.zeros(12, 9).double(), 3, 0.01)
    assert (b @ a).abs().max() == 0 and explained == 0


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
    explained = solve.solve_memories(model, student, module, kept, batches, ridge)
    return module, explained


@pytest.mark.parametrize("kind", SOLVED)
def test_it_is_exact_where_the_removed_neurons_are_linear_in_those_that_stay(tiny, kind):
    """Every second neuron is a multiple of the one before: without it, down can say the same of that one alone."""
    model = tiny(**KINDS[kind])
    closed = torch.arange(1, 40, 2)
    factor = torch.linspace(-2, 2, 20)[:, None]
    for block in model.layers:
        for projection, multiple in ((block.mlp.gate_proj, 1), (block.mlp.up_proj, factor)):
            for p in projection.parameters():  # the matrix, and its bias where there is one
                rows = p.view(40, -1)
                rows[closed] = multiple * rows[closed - 1]
    student, kept = pruned(model, closed)
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
    for size in (1, 5):
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_stays_on_its_device_and_asks_for_no_number(tiny, dtype):
    with torch.device("meta"):
        model = tiny().to(dtype)
        shape = {name: range(channels - 3) for name, (channels, _) in model.config.shapes.items()}
        index = {name: torch.empty(len(rows), dtype=torch.int64) for name, rows in shape.items()}
        kept = {i: {**index, "neuron": index["gate"]} for i in (1, 2)}
        student = koff.materialise(model, kept)
    tokens = torch.zeros(2, 16, dtype=torch.int64, device="meta")
    module, explained = solved(model, student, kept, [tokens, tokens], kv_tokens=3)
    assert all(share.is_meta for share in explained.values()) and all(p.is_meta for p in module.parameters())
    index["down"] = torch.arange(len(shape["down"]))  # on the CPU: that it is elsewhere is noticed
    with pytest.raises(Exception, match="device"):
        solved(model, student, {i: {**index, "neuron": index["gate"]} for i in (1, 2)}, [tokens])


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
    assert said.count("\n") == 1 and "olmo2 has a norm behind down" in said and "say --solve-tokens 0" in said
    assert not (world / "runs").exists()
    for more in (dict(solve_tokens=0), dict(rank=0)):  # nothing is to be solved
        assert train.main(flags(world, out=world / "runs" / min(more), **more)) == 0
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
    trainer, text = trainer_of(world, gate_share=0.5)
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


def test_a_run_solves_between_its_two_kinds_of_steps(world, monkeypatch):  # noqa: F811
    came = []

    def noted(name, work):
        return lambda *given: came.append(name) or work(*given)

    for name in ("learn", "recover"):
        monkeypatch.setattr(Trainer, name, noted(name, getattr(Trainer, name)))
    monkeypatch.setattr(train, "solve_module", noted("solve", train.solve_module))
    assert train.main(flags(world, gate_share=0.5)) == 0
    assert came == 4 * ["learn"] + 2 * ["solve"] + 4 * ["recover"]


@pytest.mark.parametrize("tokens", [40, 10**6])  # some of the text, all of it
def test_it_is_solved_on_windows_of_the_whole_text(world, monkeypatch, tokens):  # noqa: F811
    trainer, text = trainer_of(world, solve_tokens=tokens, solve_ridge=0.25, steps=0)
    freeze(trainer)
    monkeypatch.setattr(solve, "AT_ONCE", 48)
    monkeypatch.setattr(solve, "solve_memories", lambda *given: given)
    model, student, module, kept, batches, ridge = solve.solve_module(trainer, "french", text["french"])
    assert (model, student, module) == (trainer.model, trainer.student, trainer.modules["french"])
    assert kept is trainer.kept and ridge == 0.25
    expected = windows(text["french"], 16, 3 if tokens == 40 else None)
    assert torch.equal(torch.cat(batches), torch.from_numpy(expected)) and len(batches[0]) == 3
    assert expected[-1].tolist() == text["french"][: len(text["french"]) // 16 * 16][-16:].tolist()


def test_the_size_of_a_module_does_not_change_the_mask(world):  # noqa: F811
    masks = []
    for more in (dict(rank=2), dict(rank=4, lora="down"), dict(kv_tokens=0)):
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
    assert [entry["solved"] for entry in log] == (["french", "german"] if "solved french" in printed else [])


@pytest.mark.parametrize("steps,gate_share", [(8, 0.5), (8, 0.0), (0, 0.75)])
@pytest.mark.parametrize("how", ["kill", "signal"])
def test_a_run_that_is_stopped_while_it_solves_ends_as_any_other(world, monkeypatch, how, steps, gate_share, capsys):  # noqa: F811
    more = dict(steps=steps, gate_share=gate_share, ramp=0.0)
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
    argv = flags(world, steps=8, gate_share=0.5, save_every=100)
    with in_step(monkeypatch, 6, killed), pytest.raises(Killed):
        train.main(argv)
    assert "solved german" in capsys.readouterr().out
    assert train.main(argv) == 0
    printed = capsys.readouterr().out
    assert "at step 4" in printed and "solved german" not in printed


def test_a_later_module_is_solved_first(world, capsys):  # noqa: F811
    assert train.main(flags(world)) == 0
    text = world / "dutch.txt"
    text.write_text((world / "data/german.txt").read_text())
    capsys.readouterr()
    assert train.main(["--add", str(text), "--out", str(world / "runs/one"), "--steps", "0"]) == 0
    printed = capsys.readouterr().out
    assert "solved dutch" in printed and "solved german" not in printed
