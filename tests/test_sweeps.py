"""What the paper compares: the switches do what they say, and a sweep is its runs, whatever interrupts it."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file

import koff
import train
from data import run, starts, sweeps, tables
from data.settings import Settings
from data.sweeps import SWEEPS
from test_train import (  # noqa: F401 (a fixture)
    Killed,
    changed,
    flags,
    freeze,
    in_step,
    killed,
    open_run,
    outputs,
    tensors,
    trainer_of,
    world,
)
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
        run.fitting_gates(s)


def test_prune_first_trains_no_memory_until_the_mask_is_final(world):  # noqa: F811
    trainer, text = trainer_of(world, order="prune-first", gate_share=0.5)
    starts.start(trainer, text)
    start = tensors(trainer)
    tokens = torch.arange(32).view(2, 16)
    for index in range(4):
        trainer.learn(tokens, "german", index)
    learnt = tensors(trainer)
    assert {who for who, _ in changed(start, learnt)} == {"gates"}
    freeze(trainer)
    trainer.recover(tokens, "german", 4)
    assert {who for who, _ in changed(learnt, tensors(trainer))} == {"german"}


@pytest.mark.parametrize("memory_blocks,shared", [(3, 0), (1, 1), (0, 1)])
def test_memories_in_other_blocks_than_the_gates(world, memory_blocks, shared):  # noqa: F811
    more = dict(memory_blocks=memory_blocks, out=world / "runs/placed")
    trainer, _ = trainer_of(world, **more)
    assert (trainer.gates.first_block, trainer.split) == (1, shared)
    assert train.main(flags(world, **more)) == 0
    module = load_file(world / "runs/placed/modules/german.safetensors")
    expected = {3: 3, 1: 1, 0: 2}[memory_blocks]
    assert {int(n.split(".")[1]) for n in module} == set(range(3 - expected, 3))
    assert json.loads((world / "runs/placed/results.json").read_text())["perplexity"]["koff"]["german"] > 1


def test_the_temperature_falls_while_the_gates_learn(world, monkeypatch):  # noqa: F811
    betas, learn = [], Trainer.learn
    monkeypatch.setattr(Trainer, "learn", lambda self, *more: betas.append(self.gates.beta) or learn(self, *more))
    assert train.main(flags(world, beta=2.0, beta_end=0.5, gate_share=0.5)) == 0
    assert betas == pytest.approx([2.0, 1.625, 1.25, 0.875])
    finished, base, _ = run.open_finished(world / "runs/one")
    assert finished.gates(base)[0].beta == 0.5  # with which their sparsity is reported


def test_the_target_rises_and_a_penalty_answers_to_it(world):  # noqa: F811
    tokens = torch.arange(32).view(2, 16)
    for rise, targets in (1.0, [0.0125, 0.025, 0.0375, 0.05, 0.05]), (0.5, [0.025] + [0.05] * 4), (0.0, [0.05] * 5):
        trainer, _ = trainer_of(world, rise=rise, gate_share=0.5)
        assert [trainer.target(index) for index in range(5)] == pytest.approx(targets)
    multipliers = {}
    for kind in koff.PENALTIES:
        trainer, _ = trainer_of(world, constraint=kind)
        trainer.learn(tokens, "german", 7)
        multipliers[kind] = trainer.penalty.multiplier.item()
    assert multipliers["hinge"] == 20 < multipliers["scaled"] and multipliers["lagrangian"] > 0  # it began at 0


def test_part_of_the_domains_and_of_their_text(world, capsys):  # noqa: F811
    _, text = trainer_of(world)
    trainer, part = trainer_of(world, domains="german", text_share=0.5)
    assert trainer.domains == ["german"] and len(part["german"]) == len(text["german"]) // 2
    _, mixed = open_run(flags(world, retention="domains", retention_every=2, gate_share=0.5))
    assert len(mixed.general) == sum(map(len, text.values()))
    assert train.main(flags(world, domains="german", out=world / "runs/german")) == 0
    assert train.main(flags(world, domains="klingon", out=world / "runs/klingon")) == 2
    assert "has no domain 'klingon'" in capsys.readouterr().err
    assert train.main(flags(world, domains="3", out=world / "runs/three")) == 2
    assert "--domains is 3, and" in capsys.readouterr().err


def test_a_sweep_goes_on_where_it_was_interrupted(world, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setitem(SWEEPS, "small", SMALL)
    argv = flags(world, out=world / "whole")
    argv = [*argv[: argv.index("--steps")], *argv[argv.index("--steps") + 2 :], "--sweep", "small", "--seeds", "2"]
    assert train.main(argv) == 0
    recover, pressed = Trainer.recover, []

    def interrupted(self, tokens, domain, index):
        if self.s.rank and index == 4 and not pressed:
            pressed.append(True)
            signal.raise_signal(signal.SIGINT)
        return recover(self, tokens, domain, index)

    again = [str(world / "parts") if x == str(world / "whole") else x for x in argv]
    monkeypatch.setattr(Trainer, "recover", interrupted)  # the second row is the first with a module
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
    argv = flags(world, steps=40, gate_share=0.15, save_every=15)
    with in_step(monkeypatch, 25, killed), pytest.raises(Killed):
        train.main(argv)
    assert train.main(argv) == 0
    lines = [json.loads(line) for line in (world / "runs/one/log.jsonl").open()]
    assert [line["solved"] for line in lines if "solved" in line] == ["french", "german"]
    assert [list(line["repaired"]) for line in lines if "repaired" in line] == [["1", "2"]]
    assert len(lines) == 3 + 4
    lines = [line for line in lines if "loss" in line]
    names = {"step", "domain", "loss", "retention", "physical", "paper", "lambda", "rates"}
    assert [line["step"] for line in lines] == [0, 10, 20, 30] and all(line.keys() == names for line in lines)
    results = json.loads((world / "runs/one/results.json").read_text())
    reached = next(line["step"] for line in lines if line["physical"] >= 0.95 * results["sparsity"]["physical"])
    assert reached == 10 and tables.summary(world / "runs/one")["settled"] is None  # that was the mask
    results["settings"]["gate_share"] = 1.0  # as if these had been the gates
    (world / "runs/one/results.json").write_text(json.dumps(results))
    assert tables.summary(world / "runs/one")["settled"] == reached


def test_a_line_of_the_log_says_whose_loss_it_is_and_under_which_rates(world, monkeypatch):  # noqa: F811
    seen = {}  # {kind of step: {index: (domain, loss)}}

    def noted(name, step):
        def one_step(self, tokens, domain, index, *rest):
            loss = step(self, tokens, domain, index, *rest)
            seen.setdefault(name, {})[index] = domain, loss.item()
            return loss

        return one_step

    for name in ("learn", "retain", "recover"):
        monkeypatch.setattr(Trainer, name, noted(name, getattr(Trainer, name)))
    rates = dict(gate_rate=0.05, lora_rate=0.01, kv_rate=0.02, decay=0.5)
    more = dict(steps=41, gate_share=0.5, retention="domains", retention_every=6, solve_tokens=0, repair="none")
    assert train.main(flags(world, **more, **rates)) == 0
    lines = [json.loads(line) for line in (world / "runs/one/log.jsonl").open()]
    assert [(line["step"], (line["domain"], line["loss"])) for line in lines] == [
        (index, (seen["learn"] | seen["recover"])[index]) for index in (0, 10, 20, 30, 40)
    ]
    # The last loss on general text since the line before; later there is none.
    assert sorted(seen["retain"]) == [5, 11, 17]
    assert [line["retention"] for line in lines] == [None, seen["retain"][5][1], seen["retain"][17][1], None, None]
    for line in lines:
        left = min(1, (41 - line["step"]) / 20.5)
        assert line["rates"] == pytest.approx({"gates": 0.05, "lora": 0.01 * left, "kv": 0.02 * left})


def test_without_memories_no_step_follows_the_final_mask(world, monkeypatch):  # noqa: F811
    taken = []

    def counted(step):
        return lambda self, tokens, domain, index, *rest: (
            taken.append(index) or step(self, tokens, domain, index, *rest)
        )

    for name in ("learn", "recover"):
        monkeypatch.setattr(Trainer, name, counted(getattr(Trainer, name)))
    argv = [*flags(world, steps=30, gate_share=0.5), "--no-memory"]
    assert train.main(argv) == 0
    assert taken == list(range(15)) and train.main(argv) == 0 and len(taken) == 15
    lines = [json.loads(line) for line in (world / "runs/one/log.jsonl").open()]
    assert lines.pop().keys() == {"step", "repaired"}
    assert [line["step"] for line in lines] == [0, 10] and all(line["loss"] > 0 for line in lines)
