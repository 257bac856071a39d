"""What a fork adds to a registry of koff.py is a choice of the command line, and decides the run."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import eval as evaluation
import koff
import train
from data.checkpoint import load
from data.run import Run
from test_train import Killed, flags, in_step, killed, outputs, world  # noqa: F401


def trained(world, name="one", **more):  # noqa: F811
    """The folder of a finished run in which all steps learn the gates."""
    out = world / "runs" / name
    assert train.main(flags(world, out=out, **{"gate_share": 1.0, **more})) == 0
    return out


def log_of(out):
    """{step: its entry in the log}."""
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {entry["step"]: entry for entry in entries if "loss" in entry}


# Gate families ------------------------------------------------------------------------------------------------------


def test_a_family_of_gates(world, monkeypatch):  # noqa: F811
    """Straight-through Bernoulli gates: 0 or 1, with the gradient of their probability."""
    drawn = []

    def probability(log_alpha, beta):
        return torch.sigmoid(log_alpha / beta)

    def draw(log_alpha, beta, u):
        p = probability(log_alpha, beta)
        drawn.append((u < p).float() + p - p.detach())
        return drawn[-1]

    monkeypatch.setitem(koff.FAMILIES, "bernoulli", (probability, draw))
    out = trained(world, gate_family="bernoulli")
    assert len(drawn) == 8 * 4  # steps, and k, v, neuron and down
    values = torch.cat([z.detach().flatten() for z in drawn])
    assert set(values.round(decimals=5).tolist()) == {0.0, 1.0}
    run = Run(out)
    gates, mask = run.gates(load(world / "base"))
    for name, p in gates.p_open().items():
        assert torch.equal(p, torch.sigmoid(gates.log_alpha[name] / run.settings.beta))
    assert gates.sparsity(mask) >= 0.05
    usual, _ = Run(trained(world, "usual")).gates(load(world / "base"))
    assert not torch.equal(gates.log_alpha["neuron"], usual.log_alpha["neuron"])


# Penalties ----------------------------------------------------------------------------------------------------------


class Rising(nn.Module):
    """A square whose lambda grows by a tenth at each call."""

    def __init__(self, start):
        super().__init__()
        self.start = start
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("multiplier", torch.tensor(start))

    def forward(self, sparsity, target):
        self.calls += 1
        self.multiplier = self.start * 1.1**self.calls
        return self.multiplier * (target - sparsity).square()


def test_a_penalty_with_buffers_goes_on_after_a_kill(world, monkeypatch):  # noqa: F811
    monkeypatch.setitem(koff.PENALTIES, "rising", Rising)
    more = dict(constraint="rising", penalty=30.0, steps=12)
    whole = trained(world, "whole", **more)
    with in_step(monkeypatch, 8, killed), pytest.raises(Killed):
        trained(world, "killed", **more)
    saved = torch.load(world / "runs/killed/checkpoint.pt", weights_only=True)
    assert saved["step"] == 6 and saved["parts"]["penalty"]["calls"] == 6
    resumed = trained(world, "killed", **more)
    for out in (whole, resumed):
        lambdas = {step: entry["lambda"] for step, entry in log_of(out).items()}
        assert lambdas == pytest.approx({0: 30 * 1.1, 10: 30 * 1.1**11})
    assert outputs(resumed) == outputs(whole)
    assert outputs(trained(world, "usual", **{**more, "constraint": "hinge"})) != outputs(whole)


# Objectives ---------------------------------------------------------------------------------------------------------


def test_an_objective(world, monkeypatch):  # noqa: F811
    """Three times the KL: the first loss is three times that of the KL, on the same batch and the same gates."""
    rows = []

    def thrice(logits, index, log_p, log_p_rest, next_tokens):
        rows.append((logits.shape, index.shape, log_p.shape, log_p_rest.shape, next_tokens.shape))
        return 3 * koff.kl_topk(logits, index, log_p, log_p_rest)

    monkeypatch.setitem(koff.OBJECTIVES, "thrice", thrice)
    ours, usual = trained(world, objective="thrice"), trained(world, "usual")
    assert set(rows) == {((32, 4096), (32, 20), (32, 20), (32, 1), (32,))}  # 2 x 16 tokens, --top 20
    assert log_of(usual)[0]["loss"] > 1e-3
    assert log_of(ours)[0]["loss"] == pytest.approx(3 * log_of(usual)[0]["loss"], rel=1e-5)
    assert outputs(ours) != outputs(usual)


# Scores -------------------------------------------------------------------------------------------------------------


def test_a_score(world, monkeypatch):  # noqa: F811
    """Where the gates do not learn, those of the lowest scores close, and no other."""
    given = []

    def score(model, gates, texts):
        given.extend(tokens.shape for batches in texts for tokens in batches)
        generator = torch.Generator().manual_seed(7)
        found = {name: torch.rand(a.shape, generator=generator) for name, a in gates.log_alpha.items()}
        score.found = found
        return found

    monkeypatch.setitem(koff.SCORES, "drawn", score)
    out = trained(world, gate_init="drawn", gate_rate=0.0, multiple=1)
    assert given == 2 * [(2, 16)]  # 4 sequences in batches of 2, of two domains
    saved = load_file(out / "gates.safetensors")
    is_open = torch.cat([saved[f"mask.{name}"].flatten() for name in score.found]).bool()
    scores = torch.cat([rows.flatten() for rows in score.found.values()])
    assert (~is_open).sum() > 10 and scores[~is_open].max() < scores[is_open].min()


# Kinds of memory ----------------------------------------------------------------------------------------------------


class FrozenA(koff.MemoryModule):
    """LoRA whose A stays as it was drawn: only B learns (LoRA-FA, arXiv 2308.03303)."""

    def parameter_groups(self):
        return {**super().parameter_groups(), "lora": list(self.lora_b.values())}


def test_a_kind_of_memory(world, monkeypatch):  # noqa: F811
    monkeypatch.setitem(koff.MEMORIES, "frozen-a", FrozenA)
    runs = {
        "drawn": trained(world, "drawn", lora="kv+mlp", solve_tokens=0, steps=0),
        "ours": trained(world, "ours", lora="kv+mlp", solve_tokens=0, memory_kind="frozen-a"),
        "usual": trained(world, "usual", lora="kv+mlp", solve_tokens=0),
    }
    modules = {name: load_file(out / "modules/german.safetensors") for name, out in runs.items()}
    for i in (1, 2):
        for name in ("k", "v", "gate", "up"):
            drawn, ours, usual = (module[f"layers.{i}.{name}.lora_A"] for module in modules.values())
            assert torch.equal(ours, drawn) and not torch.equal(usual, drawn)
    assert all(modules["ours"][f"layers.1.{name}.lora_B"].any() for name in ("k", "v", "gate", "up"))  # B has learnt
    assert torch.equal(Run(runs["ours"]).memories("german")[2].lora["k"][0], modules["drawn"]["layers.2.k.lora_A"])


# Names --------------------------------------------------------------------------------------------------------------

REGISTRIES = {
    "gate_family": koff.FAMILIES,
    "constraint": koff.PENALTIES,
    "objective": koff.OBJECTIVES,
    "gate_init": koff.SCORES,
    "memory_kind": koff.MEMORIES,
}


@pytest.mark.parametrize("setting", REGISTRIES)
def test_a_name_that_is_in_no_registry_is_refused(world, setting, capsys):  # noqa: F811
    with pytest.raises(SystemExit):
        train.main(flags(world, **{setting: "unheard"}))
    said = capsys.readouterr().err
    assert "invalid choice: 'unheard'" in said and all(name in said for name in REGISTRIES[setting])


def test_a_run_of_a_fork_is_refused_without_the_fork(world, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setitem(koff.PENALTIES, "rising", Rising)
    out = trained(world, constraint="rising")
    monkeypatch.delitem(koff.PENALTIES, "rising")
    assert evaluation.main(["report", str(out)]) == 2
    assert "cannot be used by this version (--constraint is 'rising'" in capsys.readouterr().err
