"""Training: what moves and what does not, resume, the two stand-ins for a GPU, and every kind of bad input.

python -m pytest tests/test_train.py              the dry run of a small model
python -m pytest tests/test_train.py -m slow      that of real ones, the paper's among them
"""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import bench
import eval as evaluation
import koff
import train
from data import corpus, fast, objectives, run, settings, starts
from data.families import parse_config, read_config
from data.settings import PRESETS, Settings
from data.turns import Turns
from model import Cache, Model
from train import Trainer

ROOT = Path(__file__).resolve().parent.parent
CONFIG = dict(
    model_type="llama", vocab_size=4096, hidden_size=24, intermediate_size=40, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256, eos_token_id=0,
    tie_word_embeddings=True,
)  # fmt: skip


def make_world(folder):
    """A tiny random checkpoint with the shipped tokenizer, in `base`, and text of two domains, in `data`."""
    base, data = folder / "base", folder / "data"
    base.mkdir(), data.mkdir()
    torch.manual_seed(0)
    model = Model(parse_config(CONFIG))
    save_file({f"model.{n}": torch.randn_like(p) * 0.2 + (p.ndim == 1) for n, p in model.named_parameters()},
              base / "model.safetensors")  # fmt: skip
    (base / "config.json").write_text(json.dumps(CONFIG))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "data/base" / name, base)
    for name in ("german", "french"):
        lines = (ROOT / f"data/handbook/{name}.txt").read_text(encoding="utf-8").splitlines()
        (data / f"{name}.txt").write_text("\n".join(lines[:120]) + "\n", encoding="utf-8")


@pytest.fixture
def world(tmp_path):
    make_world(tmp_path)
    return tmp_path


def flags(world, **more):
    """The flags of a run of eight steps in it."""
    given = dict(
        model=world / "base", data=world / "data", out=world / "runs/one", blocks=2, sparsity=0.05, steps=8, batch=2,
        seq_len=16, eval_len=16, rank=2, alpha=2.0, kv_tokens=3, top=20, fisher_sequences=4, dtype="float32",
        eval_windows=2, save_every=3,
    )  # fmt: skip
    return [x for name, value in {**given, **more}.items() for x in (f"--{name.replace('_', '-')}", str(value))]


def trainer_of(world, **more):
    trainer, text = open_run(flags(world, **more))
    return trainer, text.train


def open_run(argv):
    """(trainer, `Text`) of a run that has not begun."""
    args = train.parse(argv)
    opened = run.open_training(args.settings, args.out)
    return Trainer(opened.model, args.settings, opened.text.train), opened.text


def freeze(trainer):
    """As `train.loop` does where the gates have learnt."""
    s = trainer.s
    trainer.freeze_mask(fast.final_mask(trainer.gates, s.sparsity, s.count, s.multiple))


def learners(trainer):
    """{"gates" or a domain: what learns}."""
    return {"gates": trainer.gates, **trainer.modules}


def tensors(trainer):
    """{(gates or domain, parameter): its numbers now}."""
    return {(who, n): p.detach().clone() for who, part in learners(trainer).items() for n, p in part.named_parameters()}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


# What moves ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora,matrices", [("down", 2), ("kv+mlp", 10)])
def test_every_trainable_is_in_exactly_one_group_and_the_model_is_frozen(world, lora, matrices):
    trainer, _ = trainer_of(world, lora=lora)
    optimizers = {"gates": trainer.gate_optimizer, **trainer.optimizers}
    assert list(optimizers) == ["gates", "french", "german"]
    for who, part in learners(trainer).items():
        grouped = [id(p) for group in optimizers[who].param_groups for p in group["params"]]
        assert sorted(grouped) == sorted(map(id, part.parameters())) and len(set(grouped)) == len(grouped)
        names = {g["name"]: len(g["params"]) for g in optimizers[who].param_groups}
        assert names == ({"gates": 4} if who == "gates" else {"lora": matrices, "kv": 2})
    assert not any(p.requires_grad for p in trainer.model.parameters())


def test_a_step_moves_gates_and_its_own_module_only(world):
    trainer, text = trainer_of(world, lora="kv+mlp")
    starts.start(trainer, text)
    weights = {n: p.clone() for n, p in trainer.model.named_parameters()}
    tokens = torch.from_numpy(corpus.batch(text["german"], 0, 2, 16, 0))
    for index in range(3):  # after the first, AdamW would move a module with zero gradients by its momentum
        trainer.learn(tokens, "french", index)
    before = tensors(trainer)
    trainer.learn(tokens, "german", 3)
    moved = changed(before, tensors(trainer))
    assert {who for who, _ in moved} == {"gates", "german"}
    assert {"keys", "values", "lora_b.k", "lora_b.down"} <= {name for who, name in moved if who == "german"}
    assert all(torch.equal(p, weights[n]) for n, p in trainer.model.named_parameters())


def test_retention_moves_gates_only_and_the_final_mask_stops_them(world):
    trainer, text = trainer_of(world)
    starts.start(trainer, text)
    tokens = torch.from_numpy(corpus.batch(text["german"], 0, 2, 16, 0))
    before = tensors(trainer)
    trainer.retain(tokens, "german", 0)
    after = tensors(trainer)
    assert trainer.penalty.multiplier.item() == 20  # Omega and its lambda belong to the domains' steps
    assert {who for who, _ in changed(before, after)} == {"gates"}
    freeze(trainer)
    trainer.recover(tokens, "german", 7)
    assert {who for who, _ in changed(after, tensors(trainer))} == {"german"}


def test_lambda_grows_while_behind_and_shrinks_while_not(world):
    trainer, text = trainer_of(world)
    tokens = torch.from_numpy(corpus.batch(text["german"], 0, 2, 16, 0))
    for a in trainer.gates.log_alpha.values():
        a.data.fill_(9.0)
    trainer.learn(tokens, "german", 7)
    assert trainer.penalty.multiplier.item() == pytest.approx(20 * 1.03)
    for a in trainer.gates.log_alpha.values():
        a.data.fill_(-9.0)
    trainer.learn(tokens, "german", 7)
    assert trainer.penalty.multiplier.item() == pytest.approx(20, rel=1e-5)


# The whole line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, dict(granularity="projection", count="paper", objective="kl-drop"),
                                  dict(objective="blend", gate_init="constant", kv_init="normal"),
                                  dict(objective="next-token", dtype="bfloat16", seed=3)])  # fmt: skip
def test_a_run_writes_what_the_readme_promises(world, more, capsys):
    out = world / "runs/one"
    more["gate_share"] = 0.5
    assert train.main(flags(world, retention=world / "data/french.txt", retention_every=2, **more)) == 0
    results = json.loads((out / "results.json").read_text())
    assert set(results["perplexity"]) == {"unpruned", "backbone", "koff", "routed"}
    assert set(results["swap"]["german"]) == {"german", "french"}
    assert results["sparsity"][more.get("count", "physical")] == pytest.approx(0.05, abs=2e-3)
    assert results["perplexity"]["koff"]["german"] == results["swap"]["german"]["german"]
    report = (out / "report.md").read_text().strip()
    assert report in capsys.readouterr().out
    assert f"they had reached {results['sparsity']['expected']:.4f} in expectation" in report
    assert {p.name for p in (out / "modules").iterdir()} == {"german.safetensors", "french.safetensors"}
    assert not list(out.rglob("*.part")) and not (out / "checkpoint.pt").exists()


def test_without_memory_and_without_training(world, capsys):
    assert train.main([*flags(world), "--no-memory"]) == 0
    results = json.loads((world / "runs/one/results.json").read_text())
    assert results["swap"] == {} and results["perplexity"]["koff"] == {}
    assert evaluation.main(["generate", str(world / "runs/one"), "Der Kernel", "--tokens", "3"]) == 0
    assert "none in this run" in capsys.readouterr().err
    shutil.copy(world / "data/german.txt", world / "data/dutch.txt")  # of no concern
    assert evaluation.main(["report", str(world / "runs/one")]) == 0
    (world / "data/dutch.txt").unlink()
    (world / "data/french.txt").rename(world / "french.txt")
    assert evaluation.main(["report", str(world / "runs/one")]) == 2
    assert "has no french, on which" in capsys.readouterr().err
    (world / "french.txt").rename(world / "data/french.txt")
    assert train.main(flags(world, steps=0, solve_tokens=0, out=world / "runs/control")) == 0
    module = load_file(world / "runs/control/modules/german.safetensors")
    assert all((t == 0).all() for n, t in module.items() if n.endswith("lora_B"))


def test_the_controls_are_ratios_on_the_same_predictions():
    rng = np.random.default_rng(0)
    losses = {name: rng.random((3, 9)) for name in ("unpruned", "unpruned, text KV", "own", "routed early")}
    found = evaluation.controls(losses, M=3, W=5)

    def ratio(name, start):
        return math.exp(losses[name][:, start:].mean() - losses["unpruned"][:, start:].mean())

    assert found == pytest.approx({
        "unpruned, with 3 tokens of text as KV memory": ratio("unpruned, text KV", 0),
        "KOFF, without the first 3 predictions": ratio("own", 3),
        "KOFF, routed by the first 5 tokens, these not scored": ratio("routed early", 4),
        "KOFF, own module, the same predictions": ratio("own", 4),
    })  # fmt: skip
    assert list(evaluation.controls(losses, M=3, W=50)) == list(found)[:2]  # no window is so long
    del losses["unpruned, text KV"]
    assert list(evaluation.controls(losses, M=0, W=5)) == list(found)[2:]


def test_the_teacher_has_read_the_text_that_a_kv_memory_starts_from(world):
    def first_loss(*more, **settings):
        trainer, text = open_run([*flags(world, **settings), *more])
        starts.start(trainer, text.train)
        for log_alpha in trainer.gates.log_alpha.values():
            log_alpha.data.fill_(1000.0)  # nothing is cut
        tokens = torch.from_numpy(corpus.batch(text.train["german"], 0, 2, 16, 0))
        return trainer.learn(tokens, "german", 0).item()

    assert abs(first_loss()) < 1e-6  # teacher and student are the same
    assert first_loss("--no-teacher-context") > 1e-4
    assert first_loss(kv_init="normal") > 1e-6  # no text, no context
    assert abs(first_loss(order="prune-first")) < 1e-6  # no module at first: neither has it


@pytest.mark.parametrize("kv_passages", (1, 3))
def test_the_text_that_the_unpruned_model_gets_is_the_start_of_the_modules(world, monkeypatch, kv_passages):
    seen = []  # what the unpruned model had as KV memory, of each domain
    whole = evaluation.losses_of

    def watched(variants, *rest):
        seen.append(variants["unpruned, text KV"][1])
        return whole(variants, *rest)

    monkeypatch.setattr(evaluation, "losses_of", watched)
    settings = dict(steps=0, rank=0, save_every=1, kv_passages=kv_passages)  # nothing will have moved since the start
    assert train.main(flags(world, **settings)) == 0
    finished, _, text = run.open_finished(world / "runs/one")
    for domain, ours in zip(text, seen, strict=True):
        for i, memory in finished.memories(domain).items():
            assert torch.equal(ours[i].keys, memory.keys) and torch.equal(ours[i].values, memory.values)
            assert not ours[i].lora


def test_a_report_without_controls(world, capsys):
    assert train.main(flags(world, kv_tokens=0, steps=2)) == 0  # windows of 16 tokens: none is left to be scored
    assert "Controls" not in capsys.readouterr().out


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def outputs(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.safetensors")}


@contextlib.contextmanager
def in_step(monkeypatch, number, act):
    """Under it `act` is called before step `number` of every training, of which the first is number 0."""

    def acting(work):
        def step(self, tokens, domain, index, *rest):
            if index == number:
                act()
            return work(self, tokens, domain, index, *rest)

        return step

    with monkeypatch.context() as patch:
        for name in ("learn", "recover"):
            patch.setattr(Trainer, name, acting(getattr(Trainer, name)))
        yield


def killed():
    raise Killed


@pytest.mark.parametrize("gate_share", [0.25, 0.75])  # killed under the final mask, and while the gates learn
def test_resume_after_a_kill_is_the_uninterrupted_run_bit_for_bit(world, monkeypatch, gate_share):
    more = dict(retention=world / "data/french.txt", retention_every=2, gate_share=gate_share, focus=1)
    assert train.main(flags(world, **more)) == 0
    whole = outputs(world / "runs/one")
    with in_step(monkeypatch, 5, killed), pytest.raises(Killed):
        train.main(flags(world, out=world / "runs/two", **more))
    # No chance to save: the checkpoint of step 3 is what is left.
    assert torch.load(world / "runs/two/checkpoint.pt", weights_only=True)["step"] == 3
    assert train.main(flags(world, out=world / "runs/two", **more)) == 0
    assert outputs(world / "runs/two") == whole
    assert train.main(flags(world, out=world / "runs/three", seed=1, **more)) == 0
    assert outputs(world / "runs/three") != whole


@contextlib.contextmanager
def ctrl_c_in_step_5(monkeypatch):
    """Ctrl-C is pressed in the fifth step of every training under it."""
    with in_step(monkeypatch, 4, lambda: signal.raise_signal(signal.SIGINT)):
        yield


def test_ctrl_c_saves_and_the_same_command_continues(world, monkeypatch, capsys):
    with ctrl_c_in_step_5(monkeypatch):
        assert train.main(flags(world)) == 130
    assert "stopped after step 5" in capsys.readouterr().err
    assert train.main(flags(world)) == 0
    assert "continuing" in capsys.readouterr().out
    assert train.main(flags(world)) == 0
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize("step,value", [(5, "nan"), (12, "nan"), (7, "inf")])
def test_a_loss_that_is_no_number_stops_before_the_checkpoint_is_overwritten(world, monkeypatch, capsys, step, value):
    def broken(work):
        def one_step(self, tokens, domain, index, *rest):
            loss = work(self, tokens, domain, index, *rest)
            return loss * float(value) if index >= step else loss

        return one_step

    for name in ("learn", "recover"):
        monkeypatch.setattr(Trainer, name, broken(getattr(Trainer, name)))
    assert train.main(flags(world, steps=20, gate_share=0.5)) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert f"the loss is {value} at step" in err and "on " in err and "--lora-rate" in err
    saved = torch.load(world / "runs/one/checkpoint.pt", weights_only=True)["step"]
    assert 0 < saved <= step
    assert not (world / "runs/one/backbone").exists()


# Stand-ins for a GPU ------------------------------------------------------------------------------------------------


@pytest.fixture
def on_meta(world):
    """A trainer whose every tensor is on the meta device, and a materialised backbone: a tensor that the code makes
    elsewhere does not fit them, as it would not on a GPU."""
    with torch.device("meta"):
        model = Model(parse_config(CONFIG)).to(torch.bfloat16).requires_grad_(False)
        kept = [None, None, {"k": 8, "v": 9, "neuron": 30, "down": 20}]
        small = Model(parse_config({**CONFIG, "koff_kept": kept})).to(torch.bfloat16)
    trainer = Trainer(model, train.parse(flags(world)).settings, ["german", "french"])
    trainer.student = small
    return trainer


@torch.no_grad()
def student_loss(trainer, tokens, objective="blend"):
    """(the loss in its plain form, the memories of german)."""
    model = trainer.model
    shared = model.run(model.embed_tokens(tokens), 0, trainer.split)
    hidden = model.run(shared, trainer.split, trainer.depth)
    teacher = koff.teacher_topk(model, hidden.flatten(0, 1), trainer.s.top)
    memories = trainer.memories("german")
    hidden = trainer.ask_student(model, shared, trainer.gates.sample(shared.dtype), memories)
    return fast.distill(model, hidden, teacher, tokens, koff.OBJECTIVES[objective]), memories


def test_no_tensor_is_made_on_another_device(on_meta):
    model, tokens = on_meta.model, torch.zeros(2, 16, dtype=torch.int64, device="meta")
    for objective in koff.OBJECTIVES:
        loss, memory = student_loss(on_meta, tokens, objective)
        assert loss.is_meta
    cache = Cache(2)
    with torch.no_grad():
        assert on_meta.penalty(on_meta.gates.sparsity(), 0.1).is_meta
        assert model(tokens, memories=memory, cache=cache).is_meta
        assert model(tokens[:, :1], memories=memory, cache=cache).shape == (2, 1, 4096)
        assert on_meta.student(tokens).is_meta
    first = on_meta.split
    shared = model.run(model.embed_tokens(tokens), 0, first)
    losses = objectives.token_losses(model, memory, shared, first, tokens)
    assert losses.is_meta and losses.shape == (2, 15)


def test_a_cpu_index_is_noticed(on_meta):
    with pytest.raises(Exception, match="device"):
        student_loss(on_meta, torch.zeros(2, 16, dtype=torch.int64))


def meta_step(world, **more):
    with torch.device("meta"):
        model = Model(parse_config(CONFIG)).requires_grad_(False)
    s = train.parse(flags(world, **more)).settings
    trainer = Trainer(model, s, ["german", "french"])
    tokens = torch.zeros(2, 16, dtype=torch.int64, device="meta")
    losses = [trainer.learn(tokens, "german", index) for index in (0, 1)]
    losses += [trainer.retain(tokens, "german", 1)]
    trainer.freeze_mask({n: torch.arange(a.numel()).view(a.shape) % 3 > 0 for n, a in trainer.gates.log_alpha.items()})
    losses += [trainer.recover(tokens, "german", 7)]
    trainer.turns.saw("german", losses[-1])
    return trainer, losses


@pytest.mark.parametrize("more", [{}, dict(granularity="projection", objective="blend"), dict(objective="kl-drop")])
def test_a_whole_step_on_the_meta_device_asks_for_no_number(world, more):
    trainer, losses = meta_step(world, **more)
    assert all(loss.is_meta for loss in losses) and all(p.is_meta for p in trainer.gates.parameters())


def test_on_the_meta_device_an_item_in_the_step_is_noticed(world, monkeypatch):
    distill = fast.distill

    def curious(*args):
        loss = distill(*args)
        loss.item()
        return loss

    monkeypatch.setattr(fast, "distill", curious)
    with pytest.raises(Exception, match="meta"):
        meta_step(world)


# Bad input ----------------------------------------------------------------------------------------------------------


def no_weights(world):
    (world / "base/model.safetensors").unlink()


def truncated(world):
    path = world / "base/model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])


def wrong_shape(world):
    state = load_file(world / "base/model.safetensors")
    save_file(state | {"model.norm.weight": torch.ones(5)}, world / "base/model.safetensors")


def unknown_type(world):
    (world / "base/config.json").write_text(json.dumps({**CONFIG, "model_type": "mamba"}))


def few_rows(world):
    (world / "base/config.json").write_text(json.dumps({**CONFIG, "vocab_size": 4000}))


def config_with(**more):
    return lambda world: (world / "base/config.json").write_text(json.dumps({**CONFIG, **more}))


def list_config(world):
    (world / "base/config.json").write_text("[]")


def half_llama3(world):
    (world / "base/config.json").write_text(json.dumps({**CONFIG, "rope_scaling": {"type": "llama3", "factor": 8}}))


def empty_domain(world):
    (world / "data/german.txt").write_text(" \n")


def one_domain(world):
    (world / "data/german.txt").unlink()


def short_text(world):
    (world / "data/german.txt").write_text("zu kurz\n" * 5)


def short_tail(world):
    (world / "data/german.txt").write_text("zu kurz\n" * 150)


def not_utf8(world):
    (world / "data/german.txt").write_bytes("für".encode("latin-1") * 500)


def no_data(world):
    shutil.rmtree(world / "data")


def nothing(world):
    pass


def foreign_folder(world):
    (world / "runs/one").mkdir(parents=True)
    (world / "runs/one/thesis.tex").write_text("mine")


def bad_line(world):
    (world / "data/german.txt").rename(world / "data/german.jsonl")


BAD = {
    "missing weights": (no_weights, {}, "model.safetensors does not exist"),
    "truncated": (truncated, {}, "truncated"),
    "wrong shape": (wrong_shape, {}, r"model.norm.weight has shape [5]"),
    "unknown type": (unknown_type, {}, "model_type 'mamba'"),
    "empty domain": (empty_domain, {}, "german.txt is empty"),
    "one domain": (one_domain, {}, "only one domain, french"),
    "short text": (short_text, {}, "german.txt: its training text has"),
    "short held-out text": (short_tail, {}, "german.txt: its held-out text has"),
    "not UTF-8": (not_utf8, {}, "is not UTF-8 at byte 1"),
    "not JSON": (bad_line, {}, "german.jsonl:1 is not a JSON object"),
    "no data": (no_data, {}, "is not a folder"),
    "no model": (nothing, dict(model="nowhere"), "nowhere/config.json cannot be read"),
    "no retention text": (
        nothing,
        dict(retention="nowhere.txt", retention_every=2, gate_share=0.5),
        "nowhere.txt does not exist",
    ),
    "unreachable": (nothing, dict(sparsity=0.9), "cannot be reached"),
    "too many blocks": (nothing, dict(blocks=9), "has 3 blocks"),
    "a device that is none": (nothing, dict(device="gpu"), "is not there"),
    "a number that is none": (nothing, dict(device="cpu:x"), "is not there"),
    "a device of another torch": (nothing, dict(device="hpu"), "is not there"),
    "sizes that no model has": (config_with(hidden_size=2**62), {}, "no model has the sizes"),
    "rows that no matrix has": (config_with(koff_kept=[1, 2, 3]), {}, "is a backbone"),
    "no GPU": (nothing, dict(device="cuda"), "is not there"),
    "ids beyond the embedding": (few_rows, {}, "the model has no row for the token"),
    "beyond the context": (nothing, dict(eval_len=254), "257 tokens, --kv-tokens included, exceed"),
    "a config that is no config": (list_config, {}, "is not a valid config.json"),
    "no numbers for llama3": (half_llama3, {}, "llama3 RoPE scaling: low_freq_factor is None"),
    "a file for a folder": (nothing, dict(model=ROOT / "train.py"), "Not a directory"),
    "nothing to remember": (nothing, dict(rank=0, kv_tokens=0), "contradict"),
    "out of range": (nothing, dict(batch=0), "--batch is 0; give at least 1"),
    "not a number": (nothing, dict(sparsity="nan"), "--sparsity is nan"),
    "a foreign folder": (foreign_folder, {}, "holds something that is not a run"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_exit_2_and_nothing_is_written(world, case, capsys):
    damage, more, message = BAD[case]
    damage(world)
    before = sorted(world.rglob("*"))
    assert train.main(flags(world, **more)) == 2
    out, err = capsys.readouterr()
    assert message in err and err.startswith("train.py: ") and err.count("\n") == 1 and not out
    assert sorted(world.rglob("*")) == before


def test_a_model_that_predicts_nan_is_named(world, capsys):
    config_with(rope_theta=1e-300)(world)
    assert train.main(flags(world)) == 2
    assert f"{world / 'base'} predicts NaN; download it again" in capsys.readouterr().err


def test_a_model_whose_logits_overflow_later_in_the_text_is_named_too(world, capsys):
    """One logit is beyond float32 where a channel is larger than in the tokens on which the model is tried first."""
    trainer, text = trainer_of(world)
    tokens = torch.from_numpy(corpus.windows(text["french"], 16))
    with torch.no_grad():
        size = trainer.model.norm(trainer.model.hidden(tokens)).abs().amax(1)  # [windows, D]
    channel = torch.where(size[0] > 1, size.median(0).values / size[0], 0).argmax()
    unused = np.setdiff1d(np.arange(4096), np.concatenate(list(text.values())))[0]
    path = world / "base/model.safetensors"
    state = load_file(path)
    state["model.embed_tokens.weight"][unused, channel] = 3e38 / size[0, channel]
    save_file(state, path)
    assert train.main(flags(world)) == 2
    assert f"{world / 'base'} predicts NaN; download it again" in capsys.readouterr().err.splitlines()[-1]


def test_an_output_folder_with_another_run_is_left_alone(world, capsys):
    assert train.main(flags(world)) == 0
    before = {p: p.read_bytes() for p in (world / "runs").rglob("*") if p.is_file()}
    capsys.readouterr()
    assert train.main(flags(world, rank=3)) == 2
    assert "holds another run (--rank differs)" in capsys.readouterr().err
    assert train.main([*flags(world, rank=3, model="nowhere"), "--fresh"]) == 2
    assert {p: p.read_bytes() for p in (world / "runs").rglob("*") if p.is_file()} == before
    assert train.main([*flags(world, rank=3), "--fresh"]) == 0


def test_evaluation_of_what_is_no_finished_run(world, capsys):
    out = world / "runs/one"
    cases = ["settings.json does not exist", "it has the unknown setting wrong", "is not finished"]
    for message in cases:
        assert evaluation.main(["report", str(out)]) == 2
        assert message in capsys.readouterr().err
        out.mkdir(parents=True, exist_ok=True)
        values = {"model": "base", "wrong": 1} if message == cases[0] else asdict(Settings())
        (out / "settings.json").write_text(json.dumps(values))
    assert evaluation.main(["compare", str(out)]) == 2
    assert "results.json cannot be read" in capsys.readouterr().err


def test_finished_runs_are_compared_and_generate_text(world, capsys):
    for seed in (0, 1):
        assert train.main(flags(world, seed=seed, multiple=1, out=world / f"runs/{seed}")) == 0
    (world / "base").rename(world / "elsewhere")  # the run alone has to be enough
    capsys.readouterr()
    assert evaluation.main(["compare", str(world / "runs/0"), str(world / "runs/1")]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 5 and rows[-1].startswith("| mean +/- std")
    swaps = [json.loads((world / f"runs/{i}/results.json").read_text())["perplexity"] for i in (0, 1)]
    koff = [np.mean([p["koff"][d] / x for d, x in p["unpruned"].items()]) for p in swaps]
    assert f"| {np.mean(koff):.3f} +/- {np.std(koff, ddof=1):.3f} |" in rows[-1] and " 0.050 |" in rows[-1]
    assert evaluation.main(["compare", *[str(world / f"runs/{i}") for i in (0, 0, 1)]]) == 0
    assert capsys.readouterr().out.splitlines() == rows  # each run counts once
    other = json.loads((world / "runs/1/results.json").read_text())
    fewer = {**other, "perplexity": {kind: {"german": 1.0} for kind in other["perplexity"]}}
    (world / "runs/1/results.json").write_text(json.dumps(fewer))  # nor has what has another domain
    assert evaluation.main(["compare", str(world / "runs/0"), str(world / "runs/1")]) == 0
    assert "+/-" not in capsys.readouterr().out
    other["settings"]["rank"] = 7  # runs that differ by more than the seed have no mean
    (world / "runs/1/results.json").write_text(json.dumps(other))
    assert evaluation.main(["compare", str(world / "runs/0"), str(world / "runs/1")]) == 0
    assert "mean" not in capsys.readouterr().out
    one = str(world / "runs/0")
    for wrong in (["--top-p", "0"], ["--temperature", "-1"], ["--tokens", "0"]):
        assert evaluation.main(["generate", one, "Der Kernel", *wrong]) == 2
        assert "give a --temperature of at least 0" in capsys.readouterr().err
    assert evaluation.main(["generate", one, "Der Kernel", "--tokens", "400"]) == 2
    assert "exceed the model's context of 256" in capsys.readouterr().err
    for more in (["--module", "german"], ["--temperature", "1", "--top-p", "0.9"]):
        assert evaluation.main(["generate", str(world / "runs/0"), "Der Kernel", "--tokens", "5", *more]) == 0
        assert capsys.readouterr().out.startswith("Der Kernel")
    assert evaluation.main(["generate", str(world / "runs/0"), "Der Kernel", "--module", "dutch"]) == 2
    assert "has no module 'dutch'; it has french, german" in capsys.readouterr().err
    (world / "runs/0/router.safetensors").write_bytes(b"short")
    assert evaluation.main(["generate", str(world / "runs/0"), "Der Kernel"]) == 2
    assert "router.safetensors cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("capability,fast", [((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 1), True)])
def test_auto_is_bfloat16_on_a_gpu_that_multiplies_it(monkeypatch, capability, fast):
    gpu = torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", {gpu: capability}.__getitem__)
    assert run.pick_dtype("auto", gpu) == (torch.bfloat16 if fast else torch.float32)
    assert run.pick_dtype("bfloat16", gpu) == torch.bfloat16 and run.pick_dtype("float32", gpu) == torch.float32


@pytest.mark.parametrize("fast", [True, False])
def test_auto_is_bfloat16_on_a_cpu_that_multiplies_it(monkeypatch, fast):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    assert run.pick_dtype("auto", cpu) == (torch.bfloat16 if fast else torch.float32)
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert run.pick_dtype("auto", cpu) == torch.float32


def test_a_wrong_flag_on_the_command_line(world):
    done = subprocess.run([sys.executable, "train.py", "--ranc", "3"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "--ranc" in done.stderr and "Traceback" not in done.stderr


def test_an_old_python_or_torch_is_named(monkeypatch):
    from data import check_versions

    check_versions()
    for name, version in ("python", (3, 9, 1)), ("torch", "2.4.1+cpu"):
        with pytest.raises(SystemExit) as stopped:
            check_versions(**{name: version})
        assert stopped.value.code == 2


def test_settings_are_the_command_line(world):
    args = train.parse(["--preset", "best", "--rank", "8", "--no-memory", "--dry-run"])
    s, out = args.settings, args.out
    assert (s.sparsity, s.rank, s.memory, out) == (0.12, 8, False, Path("out/best"))
    assert (args.sweep, args.seeds, args.fresh, args.dry_run) == (None, 1, False, True)
    best = Settings(**settings.PRESETS["best"])
    assert train.parse([]).settings == Settings() and replace(s, rank=68, memory=True) == best


class Operations(TorchDispatchMode):
    """What torch's own formulas count, {"mm": operations, ...}."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if count := flop_registry.get(function.overloadpacket):
            self.found[function.overloadpacket.__name__] += count(*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize("kv_tokens", [0, 3])
def test_the_operations_that_the_benchmark_counts_are_those_that_torch_counts(world, kv_tokens):
    trainer, _ = trainer_of(world, kv_tokens=kv_tokens)
    with Operations() as counted:
        trainer.learn(torch.arange(32).view(2, 16), "german", 0)
    linear, _ = bench.operations(trainer.model.config, trainer.s)
    assert counted.found["mm"] == linear


def test_a_round_visits_every_domain_once_and_the_worst_again():
    """Also when its turn in a round comes last: a running mean that began at 0 would lag behind that of the other."""
    turns = Turns(["french", "german"], seed=0, focus=1, device="cpu")
    seen = []
    for i in range(92):
        domain, turn = turns.next(i)
        seen.append((domain, turn))
        turns.saw(domain, torch.tensor(2.0 if domain == "german" else 1.9))  # german is worse
    assert sorted(d for d, _ in seen[:2]) == ["french", "german"]  # nobody comes twice before all have been measured
    rounds = [[d for d, _ in seen[i : i + 3]] for i in range(2, 92, 3)]
    assert all(sorted(r[:2]) == ["french", "german"] and r[2] == "german" for r in rounds)
    assert len({tuple(r) for r in rounds}) == 2  # the order changes
    for domain in turns.domains:
        assert [t for d, t in seen if d == domain] == list(range(61 if domain == "german" else 31))


def test_turns_go_on_from_their_state_and_from_no_others():
    whole = Turns(["a", "b", "c"], seed=3, focus=2, device="cpu")
    losses = torch.rand(60, generator=torch.Generator().manual_seed(0))

    def turns(of, indices):
        seen = []
        for index in indices:
            seen.append(of.next(index))
            of.saw(seen[-1][0], losses[index])
        return seen

    turns(whole, range(13))  # in the middle of a round
    again = Turns(["a", "b", "c"], seed=3, focus=2, device="cpu")
    again.load_state_dict({name: value.clone() for name, value in whole.state_dict().items()})
    assert turns(again, range(13, 60)) == turns(whole, range(13, 60))
    with pytest.raises(ValueError, match="it is not of 2 domains"):
        Turns(["a", "b"], seed=3, focus=2, device="cpu").load_state_dict(whole.state_dict())


@pytest.mark.parametrize("switch", ["--offload", "--checkpointing"])
def test_a_switch_for_the_machine_changes_no_number(world, switch):
    losses = []
    for more in ([], [switch]):
        trainer, text = open_run([*flags(world), *more])
        starts.start(trainer, text.train)
        tokens = torch.arange(32).view(2, 16)
        for index, domain in enumerate(["german", "french", "german"]):
            losses.append(trainer.learn(tokens, domain, index, torch.Generator().manual_seed(index)).item())
        freeze(trainer)
        for index, domain in enumerate(["french", "german", "french"], 3):
            losses.append(trainer.recover(tokens, domain, index).item())
    assert losses[:6] == losses[6:] and len(set(losses)) == 6


def test_offloading_moves_one_memory_in_and_the_last_one_out(world, monkeypatch):
    trainer, _ = open_run([*flags(world), "--offload"])
    for domain in ("german", "french"):  # both have AdamW state
        trainer.learn(torch.arange(32).view(2, 16), domain, 0)
    moved, where, to = [], trainer.device, torch.Tensor.to
    state = {}
    for domain, module in trainer.modules.items():
        state[domain] = [x for p in module.parameters() for x in (p, *trainer.optimizers[domain].state[p].values())]
    spy = lambda x, target, *more, **kw: moved.append((x.data_ptr(), str(target))) or to(x, target, *more, **kw)  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "to", spy)
    trainer.modules["german"]
    assert sorted(moved) == sorted(
        [(x.data_ptr(), "cpu") for x in state["french"]] + [(x.data_ptr(), str(where)) for x in state["german"]]
    )
    moved.clear()
    trainer.modules["german"]
    assert not moved


def test_the_recent_loss_follows_the_domains_own_steps(world, monkeypatch):
    """And not the retention's."""
    turns = Turns(["french", "german"], seed=0, focus=0, device="cpu")
    turns.saw("german", torch.tensor(3.0))
    assert turns.recent.tolist() == pytest.approx([0, 0.2 * 3])
    own, seen = [], []
    saw = Turns.saw
    monkeypatch.setattr(Turns, "saw", lambda self, *what: seen.append(what) or saw(self, *what))
    for name in ("learn", "recover"):
        step = getattr(Trainer, name)

        def noted(self, tokens, domain, *rest, step=step):
            own.append((domain, step(self, tokens, domain, *rest)))
            return own[-1][1]

        monkeypatch.setattr(Trainer, name, noted)
    assert train.main(flags(world, retention="domains", retention_every=1, gate_share=0.5)) == 0
    assert seen == own and len(own) == 8


def test_batches_cover_an_epoch_once_and_follow_from_their_number():
    ids = np.arange(1000)
    rows = np.concatenate([corpus.batch(ids, i, 4, 10, seed=0) for i in range(24)])
    assert len({row[0] for row in rows}) == 96 and (np.diff(rows, axis=1) == 1).all()
    assert (corpus.batch(ids, 30, 4, 10, 0) == corpus.batch(ids, 30, 4, 10, 0)).all()
    assert not (corpus.batch(ids, 0, 4, 10, 0) == corpus.batch(ids, 0, 4, 10, 1)).all()


# Sizes before a run -------------------------------------------------------------------------------------------------


def shape(hidden, intermediate, layers, heads, groups, vocabulary, kind="qwen2", head_dim=None, tied=True):
    return dict(
        model_type=kind, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=groups, head_dim=head_dim or hidden // heads,
        vocab_size=vocabulary, tie_word_embeddings=tied, max_position_embeddings=8192, eos_token_id=0,
    )  # fmt: skip


SHAPES = {  # preset: the shape in the model's config.json, and how many parameters its name or its card gives it
    "smollm2-135m": (shape(576, 1536, 30, 9, 3, 49152, "llama"), 134.5e6),
    "smollm2-360m": (shape(960, 2560, 32, 15, 5, 49152, "llama"), 361.8e6),
    "qwen2.5-0.5b": (shape(896, 4864, 24, 14, 2, 151936), 0.49e9),
    "qwen3-0.6b": (shape(1024, 3072, 28, 16, 8, 151936, "qwen3", head_dim=128), 0.6e9),
    "qwen2.5-3b": (shape(2048, 11008, 36, 16, 2, 151936), 3.09e9),
    "llama-3.2-3b": (shape(3072, 8192, 28, 24, 8, 128256, "llama"), 3.21e9),
    "llama-3.1-8b": (shape(4096, 14336, 32, 32, 8, 128256, "llama", tied=False), 8.03e9),
}
PAPERS = {"llama-3.1-8b": 277e6, "llama-3.2-3b": 180e6}  # parameters of a module, section 3


@pytest.fixture
def preset(request, tmp_path, monkeypatch):
    """(settings of a preset, its model's config.json, parameters), and the model is there: all but its weights."""
    s, (config, parameters) = Settings(**PRESETS[request.param]), SHAPES[request.param]
    (folder := tmp_path / s.model).mkdir(parents=True)  # a folder of that name comes before the Hub
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    return s, config, parameters


@pytest.mark.parametrize("preset", SHAPES, indirect=True)
def test_a_preset_fits_its_model(preset, request):
    s, _, parameters = preset
    config = read_config(s.model)
    gates = run.fitting_gates(s)
    with torch.device("meta"):
        size = koff.count_parameters(s.new_module(config))
        papers = koff.count_parameters(replace(s, lora="kv+mlp").new_module(config))
    assert gates.total == pytest.approx(parameters, rel=0.02)
    assert size < 0.8 * s.sparsity * gates.total  # else nothing is gained
    name = request.node.callspec.params["preset"]
    assert name not in PAPERS or abs(papers - PAPERS[name]) < 0.5e6


def dry_run(argv, capsys):
    """(the text that a dry run prints, {what: GB} in it)."""
    assert train.main(["--dry-run", *argv]) == 0
    printed = capsys.readouterr().out
    return printed, {what: float(size) for size, what in re.findall(r"^ *([\d.]+) GB  (.*)$", printed, re.M)}


def check_dry_run(argv, s, config, capsys):
    """What a dry run prints adds up, and no knob that it names raises the peak."""
    printed, sizes = dry_run(argv, capsys)
    with torch.device("meta"):
        parameters, module = (koff.count_parameters(make(config)) for make in (Model, s.new_module))
    assert printed.startswith(f"{parameters:,} parameters; ") and f"\n{module:,} parameters a module, " in printed
    peak = sizes.pop("peak memory")
    knobs = re.search("^less with: (.*)$", printed, re.M)[1].split(", ")
    phases = [sizes.pop(what) for what in list(sizes) if re.search("score|step|repairing|solving", what)]
    assert len(phases) == 4 + (s.gate_share > 0) and peak == pytest.approx(sum(sizes.values()) + max(phases), abs=0.005)
    bytes_each = 4 if s.dtype == "float32" else 2
    assert next(iter(sizes.values())) == pytest.approx(bytes_each * parameters / 1e9, abs=0.001)
    useless = {"--checkpointing": s.checkpointing, "--batch": s.batch == 1}
    expected = [k for k in ("--batch", "--seq-len", "--checkpointing", "--offload") if not useless.get(k)]
    assert [knob.split()[0] for knob in knobs] == expected
    peaks = [dry_run([*argv, *knob.split()], capsys)[1]["peak memory"] for knob in knobs]
    assert max(peaks) <= peak < 80 and min(peaks) < peak


def test_a_dry_run_adds_up(tmp_path, capsys):
    """Of a model with few blocks, and a vocabulary that makes its sizes visible."""
    config = shape(512, 1024, 2, 8, 4, 50_000)
    (tmp_path / "config.json").write_text(json.dumps(config))
    argv = ["--model", str(tmp_path), "--sparsity", "0.05", "--seq-len", "64", "--solve-tokens", "1024"]
    check_dry_run(argv, train.parse(argv).settings, parse_config(config), capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]  # it was enough


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["smollm2-135m", "qwen3-0.6b", *PAPERS], indirect=True)
def test_a_dry_run_of_a_preset_adds_up(preset, request, capsys):
    s, config, _ = preset
    check_dry_run(["--preset", request.node.callspec.params["preset"]], s, parse_config(config), capsys)
    assert [path.name for path in Path(s.model).iterdir()] == ["config.json"]


STEPS = """
import sys, koff, torch, train
sys.path.append("tests")
from bench import memory_above
from data import fast
from data.checkpoint import load
from data.solve import repair_student, solve_module

def steps(argv, T):
    s = train.parse(argv).settings
    trainer = train.Trainer(load(s.model, torch.bfloat16), s, list("abcdef"))
    tokens = torch.randint(0, 1000, (s.batch, T))
    koff.SCORES[s.gate_init](trainer.model, trainer.gates, [[tokens]])
    if s.gate_steps:
        trainer.learn(tokens, "a", 0)
    trainer.freeze_mask(fast.final_mask(trainer.gates, s.sparsity, s.count, s.multiple))
    ids = torch.randint(0, 1000, (s.repair_tokens + T,)).numpy()
    repair_student(trainer, {domain: ids for domain in "abcdef"})
    solve_module(trainer, "a", ids)
    for domain in "abcdef":
        trainer.recover(tokens, domain, 0)

steps([], 8)  # the program itself comes into memory
grown = memory_above([])
steps(sys.argv[1:], 512)
print(grown())
"""


@pytest.mark.skipif("KOFF_SMOLLM2" not in os.environ, reason="set KOFF_SMOLLM2 to the folder of SmolLM2-135M")
@pytest.mark.parametrize("more", [[], ["--checkpointing"]])
def test_a_dry_run_estimates_the_peak_that_is_then_measured(more, capsys):
    few = ["--repair-tokens", "8192", "--solve-tokens", "8192"]
    flags = ["--preset", "best", "--model", os.environ["KOFF_SMOLLM2"], "--seq-len", "512", *few, *more]
    assert train.main(["--dry-run", *flags]) == 0
    estimate = float(re.search(r"([\d.]+) GB  peak memory", capsys.readouterr().out)[1])
    command, env = [sys.executable, "-c", STEPS, *flags], os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert int(done.stdout) / 1e9 == pytest.approx(estimate, rel=0.15)
