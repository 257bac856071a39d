"""What the paper compares: the switches do what they say, and a sweep is its runs, whatever interrupts it."""

import json

import pytest
import torch
from safetensors.torch import load_file

import train
from data import run, settings, sweeps, tables
from data.families import read_config
from data.settings import Settings
from data.sweeps import SWEEPS
from test_train import Killed, flags, open_run, outputs, trainer_of, world  # noqa: F401 (a fixture)
from train import Trainer

SMALL = sweeps.Sweep(
    {"pruning only": sweeps.PRUNING, "both": {}, "+ KV": dict(rank=0)},
    common=dict(steps=6),
)


@pytest.mark.parametrize("name", SWEEPS)
def test_every_run_of_every_sweep_can_be_made(name):
    chosen = SWEEPS[name]
    made = [Settings(**{**chosen.common, **own}) for own in chosen.rows.values()]
    assert len(set(made)) == len(made)  # no row twice
    for s in made:
        run.fitting_gates(s, read_config(s.model))


def test_prune_first_trains_no_memory_until_the_mask_is_fixed(world):  # noqa: F811
    trainer, text = trainer_of(world, order="prune-first", gate_share=0.5)
    trainer.initialise(text)
    start = {n: p.clone() for n, p in trainer.modules.state_dict().items()}
    tokens = torch.arange(32).view(2, 16)
    for index in range(4):
        trainer.start_step(index)
        trainer.step(tokens, "german", index)
    assert all(torch.equal(p, start[n]) for n, p in trainer.modules.state_dict().items())
    gates = {n: p.clone() for n, p in trainer.gates.state_dict().items()}
    trainer.start_step(4)
    trainer.step(tokens, "german", 4)
    assert any(not torch.equal(p, start[n]) for n, p in trainer.modules.state_dict().items())
    assert all(torch.equal(p, gates[n]) for n, p in trainer.gates.state_dict().items())


@pytest.mark.parametrize("memory_blocks,shared", [(-1, 0), (3, 0), (1, 1), (0, 1)])
def test_memories_in_other_blocks_than_the_gates(world, memory_blocks, shared):  # noqa: F811
    more = dict(memory_blocks=memory_blocks, out=world / "runs/placed")
    trainer, _ = trainer_of(world, **more)
    assert (trainer.gates.first, trainer.split) == (1, shared)
    assert train.main(flags(world, **more)) == 0
    module = load_file(world / "runs/placed/modules/german.safetensors")
    expected = {-1: 3, 3: 3, 1: 1, 0: 2}[memory_blocks]
    assert {int(n.split(".")[1]) for n in module} == set(range(3 - expected, 3))
    assert json.loads((world / "runs/placed/results.json").read_text())["perplexity"]["koff"]["german"] > 1


def test_annealing_and_the_constraints(world):  # noqa: F811
    trainer, _ = trainer_of(world, beta=2.0, beta_end=0.5, gate_share=0.5)
    tokens = torch.arange(32).view(2, 16)
    betas = []
    for index in range(4):
        trainer.start_step(index)
        betas.append(trainer.gates.beta)
    assert betas == pytest.approx([2.0, 1.625, 1.25, 0.875])
    targets = {
        kind: trainer_of(world, constraint=kind, ramp=0.5, gate_share=0.5)[0].target(0) for kind in settings.CONSTRAINTS
    }
    assert targets == pytest.approx({"progressive": 0.0125, "hinge": 0.05, "lagrangian": 0.0125})
    lagrangian, _ = trainer_of(world, constraint="lagrangian")
    lagrangian.step(tokens, "german", 7)
    assert (lagrangian.penalty.multipliers > 0).all()


def test_part_of_the_domains_and_of_their_text(world, capsys):  # noqa: F811
    _, text = trainer_of(world)
    trainer, part = trainer_of(world, domains="german", text=0.5)
    assert trainer.domains == ["german"] and len(part["german"]) == len(text["german"]) // 2
    opened = open_run(flags(world, retention="domains", retention_every=2))
    assert len(opened.text.general) == sum(map(len, text.values()))
    assert train.main(flags(world, domains="german", out=world / "runs/german")) == 0
    assert train.main(flags(world, domains="klingon", out=world / "runs/klingon")) == 2
    assert "has no domain 'klingon'" in capsys.readouterr().err
    assert train.main(flags(world, domains="3", out=world / "runs/three")) == 2
    assert "--domains is 3, and" in capsys.readouterr().err


def test_a_sweep_goes_on_where_it_was_interrupted(world, monkeypatch, capsys):  # noqa: F811
    import signal

    monkeypatch.setitem(SWEEPS, "small", SMALL)
    argv = flags(world, out=world / "whole")
    argv = [*argv[: argv.index("--steps")], *argv[argv.index("--steps") + 2 :], "--sweep", "small", "--seeds", "2"]
    assert train.main(argv) == 0
    step, pressed = Trainer.step, []

    def interrupted(self, tokens, domain, index, *rest, **kwargs):
        if self.s.memory and self.s.rank and index == 4 and not pressed:
            pressed.append(True)
            signal.raise_signal(signal.SIGINT)
        return step(self, tokens, domain, index, *rest, **kwargs)

    again = [str(world / "parts") if x == str(world / "whole") else x for x in argv]
    monkeypatch.setattr(Trainer, "step", interrupted)
    assert train.main(again) == 130
    assert list(json.loads((world / "parts/sweep.json").read_text())["rows"]) == ["pruning only"]
    assert train.main(again) == 0
    assert outputs(world / "parts") == outputs(world / "whole")
    rows = json.loads((world / "parts/sweep.json").read_text())["rows"]
    assert {label: len(row["runs"]) for label, row in rows.items()} == dict.fromkeys(SMALL.rows, 2)
    assert rows["pruning only"]["koff"] is None and all(
        len(row["physical"]) == len(row["runs"]) for row in rows.values()
    )
    made = [p.stat().st_mtime_ns for p in sorted((world / "parts").rglob("results.json"))]
    assert train.main(again) == 0 and "+/-" in capsys.readouterr().out
    assert [p.stat().st_mtime_ns for p in sorted((world / "parts").rglob("results.json"))] == made
    assert train.main([str(world / "whole/both-seed0") if x == str(world / "parts") else x for x in again]) == 2
    assert "is a run, not a sweep" in capsys.readouterr().err
    assert train.main([*again, "--lora-rate", "1"]) == 2
    assert "--lora-rate differs" in capsys.readouterr().err
    # With --fresh, too, what was stopped goes on without what had been there before.
    pressed.clear()
    assert train.main([*again, "--fresh"]) == 130
    assert len(list((world / "parts").rglob("results.json"))) == len(rows["pruning only"]["runs"])
    assert train.main(again) == 0 and outputs(world / "parts") == outputs(world / "whole")


def test_the_curve_of_a_run_has_one_line_every_ten_steps_also_after_a_kill(world, monkeypatch):  # noqa: F811
    step = Trainer.step

    def killed(self, tokens, domain, index, *rest, **kwargs):
        if index == 25:
            raise Killed
        return step(self, tokens, domain, index, *rest, **kwargs)

    monkeypatch.setattr(Trainer, "step", killed)
    argv = flags(world, steps=40, save_every=15)
    with pytest.raises(Killed):
        train.main(argv)
    monkeypatch.setattr(Trainer, "step", step)
    assert train.main(argv) == 0
    lines = [json.loads(line) for line in (world / "runs/one/log.jsonl").open()]
    assert [line["solved"] for line in lines if "loss" not in line] == ["french", "german"]
    lines = [line for line in lines if "loss" in line]
    assert [line["step"] for line in lines] == [0, 10, 20, 30] and set(lines[0]) == {
        "step",
        "loss",
        "physical",
        "paper",
        "lambda",
    }
    results = json.loads((world / "runs/one/results.json").read_text())
    reached = next(line["step"] for line in lines if line["physical"] >= 0.95 * results["sparsity"]["physical"])
    assert reached == 10 and tables.summary(world / "runs/one")["settled"] is None  # that was the mask
    results["settings"]["gate_share"] = 0.0  # as if these had been the gates
    (world / "runs/one/results.json").write_text(json.dumps(results))
    assert tables.summary(world / "runs/one")["settled"] == reached


def test_without_memories_no_step_follows_the_fixed_mask(world, monkeypatch):  # noqa: F811
    step, taken = Trainer.step, []

    def counted(self, tokens, domain, index, *rest, **kwargs):
        taken.append(index)
        return step(self, tokens, domain, index, *rest, **kwargs)

    monkeypatch.setattr(Trainer, "step", counted)
    argv = [*flags(world, steps=30, gate_share=0.5), "--no-memory"]
    assert train.main(argv) == 0
    assert taken == list(range(15)) and train.main(argv) == 0 and len(taken) == 15
    lines = [json.loads(line) for line in (world / "runs/one/log.jsonl").open()]
    assert [line["step"] for line in lines] == [0, 10] and all(line["loss"] > 0 for line in lines)
