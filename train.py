"""Split a pretrained model into a sparse backbone and one memory module per domain.

    python train.py                                the embedded default: a tiny model, six languages, minutes
    python train.py --preset best --model DIR      a real model
    python train.py --sweep ablations              a named set of runs and one table of them
    python train.py --add dutch.txt --out RUN      one more module for a finished run
    python train.py --help                         every setting, its default and where that comes from

The run folder (out/<preset> unless --out names one) gets the backbone, the modules, the router and the report. Ctrl-C
saves; the same command continues. The loop is `loop`, one step of it is `Trainer.step`.
"""

import argparse
import contextlib
import json
import math
import shutil
import signal
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import eval as evaluation
import koff
from data import BadInput, atomic, discard, run_script
from data.checkpoint import load, save_backbone, save_gates, save_module
from data.corpus import batch, domain_name, find_domains, load_text
from data.download import located
from data.dryrun import dry_run
from data.router import Router
from data.run import Run, finished, fitting, keep_pages, pick_device, pick_dtype, reading
from data.settings import HERE, PRESETS, Settings
from data.sweeps import SWEEPS, Answers, sweep
from data.tokenizer import Tokenizer

# One step ------------------------------------------------------------------------------------------------------------


def later(tensor):
    """Begin to copy numbers from the device. The function that gives them is for later: no GPU is waited for."""
    copy = tensor.detach().to("cpu", non_blocking=True, copy=True)
    done = torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None

    def numbers():
        if done:
            done.synchronize()
        return copy.tolist()

    return numbers


def on_device(ids, device):
    """numpy ids of any shape -> tensor; a GPU takes them from pinned memory when it gets there."""
    tokens = torch.from_numpy(ids)
    return tokens.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tokens.to(device)


class Trainer:
    """The trainables of a run, float32, and one optimizer over them in three groups. The model itself is frozen."""

    def __init__(self, model, s, domains, answers=None):
        c, device = model.config, model.head.device
        self.s, self.device, self.domains, self.answers = s, device, list(domains), answers
        self.first, memory_first, self.split = s.first(c.num_hidden_layers)
        self.model = self.compiled(model)
        torch.manual_seed(s.seed)
        with device:
            self.gates = koff.Gates(c, self.first, s.granularity, s.beta, s.gated)
        with torch.device("cpu") if s.offload else device:
            n = len(self.domains) if s.memory else 0
            self.memories = nn.ModuleList(koff.Memory(c, memory_first, s.rank, s.alpha, s.kv_tokens) for _ in range(n))
        self.share = self.gates.uniform_share(s.sparsity, s.count) if s.budget == "module" else 0.0
        kind = {"lora": [], "gates": list(self.gates.parameters()), "kv": []}
        for name, p in self.memories.named_parameters():
            kind["lora" if "lora" in name else "kv"].append(p)
        rate = {"lora": s.lora_rate, "gates": s.gate_rate, "kv": s.kv_rate}
        groups = [dict(params=kind[n], lr=rate[n], peak=rate[n], name=n) for n in kind if kind[n]]
        # A module sees only its own domain's steps, some hundred in a short run: variances over 1,000 would come late.
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.99), fused=device.type != "meta")
        self.penalty = koff.Penalty(s.constraint, s.penalty, s.scaled, device)
        self.mask = self.kept = self.student = None  # the final mask, once it is fixed, and what it leaves of the model
        self.visits, self.recent = [0] * len(self.domains), torch.zeros(len(self.domains), device=device)
        self.before = self.at_work = None  # the losses before this round; the domain whose memory is on the device

    def memory(self, domain):
        """Its module, on the device; with --offload the one that was there before makes room."""
        if self.s.offload and domain != self.at_work:
            for name, device in ((self.at_work, "cpu"), (domain, self.device)):
                for p in self.memories[self.domains.index(name)].parameters() if name else ():
                    p.data = p.data.to(device)
                    self.optimizer.state[p] = {key: x.to(device) for key, x in self.optimizer.state[p].items()}
            self.at_work = domain
        return self.memories[self.domains.index(domain)]

    def initialise(self, text):
        """The two starts that look at data, {domain: ids}: gates by Fisher score, KV memories from text."""
        s, device = self.s, self.device
        if s.gate_init == "fisher":
            rounds = -(-s.fisher_sequences // (s.batch * len(text)))
            drawn = (batch(ids, r, s.batch, s.seq_len, s.seed + 1) for r in range(rounds) for ids in text.values())
            self.gates.spread(koff.fisher_scores(self.model, self.gates, (on_device(x, device) for x in drawn)))
        if s.kv_tokens and s.kv_init == "text":
            for domain, memory in zip(self.domains, self.memories, strict=False):  # no memories with --no-memory
                memory.init_from_text(self.model, on_device(text[domain][: s.kv_tokens].astype(np.int64), device))

    def next_domain(self, index):
        """(domain, number of its batch) for step `index`.

        A round visits each domain once, in a new order, and then `focus` times the one whose loss had been highest.
        """
        turn, place = divmod(index, len(self.domains) + self.s.focus)
        order = np.random.default_rng([self.s.seed, turn]).permutation(len(self.domains))
        if place == 0:
            self.before = later(self.recent)
        d = order[place] if place < len(order) else int(np.argmax(self.before()))
        self.visits[d] += 1
        return self.domains[d], self.visits[d] - 1

    def target(self, index):
        """What should be closed, in expectation, at step `index`: a ramp, but for the plain hinge."""
        ramp = (index + 1) / (self.s.ramp * max(1, self.s.steps)) if self.s.constraint != "hinge" else 1.0
        return self.s.sparsity * min(1.0, ramp)

    def fix(self, index):
        """Once only the last `fix_mask` share of the steps is left, the final 0/1 mask takes the place of the gates."""
        if self.mask is None and index >= self.s.steps * (1 - self.s.fix_mask):
            self.close(self.gates.final_mask(self.s.sparsity, self.s.count, self.s.budget, self.s.multiple))

    def close(self, mask):
        """The student becomes the compact backbone: what `mask` closes takes no more arithmetic."""
        self.mask = {name: m.to(self.device) for name, m in mask.items()}
        self.kept = koff.kept_channels(mask, self.model.config, self.first, self.device)
        self.student = self.compiled(koff.compact(self.model, self.kept))

    def compiled(self, model):
        for block in model.layers if self.s.compile else ():
            block.compile()
        return model

    def step(self, tokens, domain, index, generator=None, retention=False):
        """One optimizer step on tokens [B, T] of `domain`. Returns the loss, a scalar on the device.

        Nothing here asks the device for a number (but `Answers`, in a sweep), so that a GPU never waits for Python. A
        retention step (Eq. 2) moves the gates only.
        """
        s, model, last = self.s, self.model, self.model.config.num_hidden_layers
        fixed = self.mask is not None
        if fixed and (retention or not s.memory):  # nothing is left to learn
            return torch.zeros((), device=tokens.device)
        falling = min(1.0, (s.steps - index) / max(1.0, s.decay * s.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * (1.0 if group["name"] == "gates" else falling)

        if s.beta_end:
            learnt = min(1.0, index / max(1.0, s.steps * (1 - s.fix_mask)))
            self.gates.beta = s.beta + (s.beta_end - s.beta) * learnt

        def teacher():
            return koff.teacher_answer(model, model.run(shared, self.split, last).flatten(0, 1), s.top)

        with torch.no_grad():  # the lower blocks have neither gates nor memory: teacher and student share them
            shared, answer = model.run(model.embed_tokens(tokens), 0, self.split), None
            if s.objective != "next-token":
                answer = self.answers(tokens, teacher) if self.answers else teacher()
        memory = None
        if s.memory and (fixed or s.order == "joint"):
            with torch.set_grad_enabled(not retention):
                memory = self.memory(domain).by_block(shared.dtype)
        if fixed:
            memory = koff.compact_memory(memory, self.kept)
        student, z = (self.student, None) if fixed else (model, self.gates.sample(shared.dtype, generator))
        hidden = student.run(shared, self.split, last, z, memory, checkpointing=s.checkpointing)
        loss = objective = koff.distill(model, hidden, answer, tokens, s.objective, s.tail)
        if not (fixed or retention):  # lambda Omega(z) of Eq. 1
            target = self.target(index)
            share = self.share * target / s.sparsity if s.sparsity else 0.0
            objective = loss + self.penalty(self.gates.behind(target, s.count, s.budget, share))
        objective.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)  # None, not zero: the modules of other domains stand still
        if not retention:
            self.recent[self.domains.index(domain)].lerp_(loss.detach(), 0.2)
        return loss.detach()

    def state(self):
        parts = {"gates": self.gates, "memories": self.memories, "optimizer": self.optimizer}
        more = {"penalty": self.penalty.multipliers, "recent": self.recent}
        more |= {"before": self.before(), "visits": self.visits}
        return {name: part.state_dict() for name, part in parts.items()} | more

    def restore(self, state):
        for name in ("gates", "memories", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.penalty.multipliers, self.recent = (state[name].to(self.device) for name in ("penalty", "recent"))
        self.before, self.visits = lambda: state["before"], state["visits"]


# The loop ------------------------------------------------------------------------------------------------------------


def open_run(s, out, answers=None, paths=None):
    """Check everything that a run needs, before anything is written. Returns (trainer, {domain: ids}, general ids).

    `paths` {domain: its text}: where it is not that of `s.data`.
    """
    (config, _), device = fitting(s), pick_device(s.device)
    tokenizer = Tokenizer.from_folder(s.model)
    if max(tokenizer.vocab_size - 1, *config.eos_token_ids, 0) >= config.vocab_size:
        raise BadInput(f"{s.model}: tokenizer.json has ids beyond the model's {config.vocab_size} rows; pair them.")
    if (longest := max(s.seq_len, s.eval_len) + s.kv_tokens) > config.max_position_embeddings:
        limit = config.max_position_embeddings
        raise BadInput(f"{longest} tokens, --kv-tokens included, exceed the model's context of {limit}; lower them.")
    how = reading(out, tokenizer, config, located(s.model))
    train = max(max(s.batch, s.retention_batch) * (s.seq_len + 1), 10 * Router.WINDOW)
    need = (math.ceil(train / s.text), max(s.eval_len, Router.WINDOW))
    paths = paths or find_domains(s.data, s.domains, least=1 if s.domains else 2)
    domains = {name: load_text(path, need=need, **how) for name, path in paths.items()}
    splits = list(domains.values())
    text = {name: split.train[: int(len(split.train) * s.text)] for name, split in domains.items()}
    general = np.concatenate(list(text.values())) if s.retention == "domains" else None
    if s.retention not in ("", "domains"):
        splits.append(load_text(s.retention, need=(train, 0), **how))
        general = splits[-1].train
    dtype = pick_dtype(s.dtype, device)
    trainer = Trainer(load(s.model, dtype, device), s, domains, answers and Answers(answers, s, dtype))
    for split in splits:
        split.store()
    return trainer, text, general


def train(s, out, fresh=False, answers=None):
    """Train, save and evaluate the run `s` in the folder `out`. Returns False if Ctrl-C stopped it.

    `answers`: folder in which several runs keep the teacher's answers, or None.
    """
    begun = time.time()
    trainer, text, general = open_run(s, out, answers)
    if fresh:  # nothing of an old run goes before the new one is known to work
        old = ("checkpoint.pt", "log.jsonl", "*.safetensors", "*.json", "*.md", "*.png")
        old += ("modules", "backbone", "later", "export", "bench", "tensorboard")
        for path in (path for pattern in old for path in out.glob(pattern)):
            discard(path)
    if (begun := loop(trainer, text, general, out, begun)) is None:
        return False
    save(trainer, text, out)
    del trainer  # what follows needs the memory
    evaluation.evaluate(out, begun, s.device)
    (out / "checkpoint.pt").unlink(missing_ok=True)  # with its optimizer state it is larger than all that is left
    return True


def board_in(folder, start):
    """A TensorBoard of the run's curves from step `start` on, where tensorboard is installed; else None."""
    with contextlib.suppress(ImportError):
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(folder, purge_step=start)


def record(log, board, step, numbers):
    """Add a line to the log, and its points to the curves of the TensorBoard, if any. Returns the line."""
    line = dict(zip(("step", "loss", "physical", "paper", "lambda"), (step, *numbers), strict=True))
    with open(log, "a") as file:
        file.write(json.dumps(line) + "\n")
    for name in list(line)[1:] if board else ():
        board.add_scalar(name, line[name], step)
    return line


def loop(trainer, text, general, out, begun):
    """Begin, or continue the checkpoint in `out`, and train to the last step. Returns when the run began, with all
    pauses taken out; None if Ctrl-C stopped it."""
    s, device, start = trainer.s, trainer.device, 0
    last = s.steps if s.memory else math.ceil(s.steps * (1 - s.fix_mask))  # gates learn until the mask is fixed
    checkpoint, log = out / "checkpoint.pt", out / "log.jsonl"
    with atomic(out / "settings.json") as partial:
        partial.write_text(json.dumps(asdict(s), indent=1) + "\n")
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        trainer.restore(state)
        start, begun = state["step"], begun - state["seconds"]
        del state
        print(f"continuing {out} at step {start}")
    else:
        trainer.initialise(text)

    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    with atomic(log) as partial:  # what was written after the checkpoint comes again
        partial.write_text("".join(line for line in lines if json.loads(line)["step"] < start))
    board = board_in(out / "tensorboard", start)
    stop, shown, bar = [], None, tqdm(total=last, initial=start, desc=out.name, mininterval=1)
    resumed = time.time()
    before = signal.signal(signal.SIGINT, lambda *_: stop.append(True))  # never in the middle of an optimizer step
    try:
        for index in range(start, last):
            trainer.fix(index)
            domain, turn = trainer.next_domain(index)
            generator = torch.Generator(device).manual_seed(s.seed * 1_000_003 + index)
            tokens = batch(text[domain], turn, s.batch, s.seq_len, s.seed)
            loss = trainer.step(on_device(tokens, device), domain, index, generator)
            if general is not None and (index + 1) % s.retention_every == 0:
                tokens = batch(general, index // s.retention_every, s.retention_batch or s.batch, s.seq_len, s.seed)
                anyone = trainer.domains[np.random.default_rng([s.seed, index, 1]).integers(len(text))]
                trainer.step(on_device(tokens, device), anyone, index, generator, retention=True)
            bar.update()
            if index % 10 == 0:
                sparsities = (trainer.gates.sparsity(trainer.mask, count) for count in ("physical", "paper"))
                shown = later(torch.stack([x.float() for x in (loss, *sparsities, trainer.penalty.multipliers[0])]))
            saving = stop or (index + 1) % s.save_every == 0 or index + 1 == last
            if shown and (index % 10 == 9 or saving):
                line = record(log, board, index - index % 10, shown())
                rate, shown = s.batch * s.seq_len * (index + 1 - start) / (time.time() - resumed), None
                sparsity = f"sparsity {line['physical']:.3f} physical, {line['paper']:.3f} paper"
                bar.set_postfix_str(f"loss {line['loss']:.3f}, {sparsity}, {rate:,.0f} tokens/s", refresh=False)
            if saving:
                with atomic(checkpoint) as partial:
                    torch.save(trainer.state() | {"step": index + 1, "seconds": time.time() - begun}, partial)
            if saving and stop:
                print(f"\nstopped after step {index + 1}; the same command, less --fresh, continues", file=sys.stderr)
                return None
    finally:
        signal.signal(signal.SIGINT, before)
        bar.close()
        board and board.close()
    return begun


@torch.no_grad()
def save(trainer, text, out):
    """Close the gates, compact, and write backbone, modules, gates and router."""
    s = trainer.s
    trainer.fix(s.steps)
    fingerprint = save_backbone(out / "backbone", trainer.student, located(s.model))
    save_gates(out / "gates.safetensors", trainer.gates, trainer.mask)
    save_modules(trainer, out, fingerprint)
    Router.fit(text).save(out / "router.safetensors")


@torch.no_grad()
def save_modules(trainer, out, fingerprint):
    for domain in trainer.domains if trainer.s.memory else ():
        blocks = koff.compact_memory(trainer.memory(domain).by_block(trainer.model.head.dtype), trainer.kept)
        save_module(out / "modules" / f"{domain}.safetensors", blocks, fingerprint)


# A domain later -----------------------------------------------------------------------------------------------------

LATER = (  # what may differ from the run that a module joins
    "steps", "batch", "seq_len", "text", "lora_rate", "kv_rate", "decay", "seed", "device", "checkpointing", "compile",
)  # fmt: skip


def add(path, out, given, fresh=False):
    """Train one more module, for the text at `path`, on the finished run in `out`. False if Ctrl-C stopped it.

    Router, report and its results change, no other file. `given`: the settings that differ from the run's, of `LATER`.
    """
    device = given.get("device", Settings.from_file(out / "settings.json").device)
    run, name = Run(out, device), domain_name(path)
    if wrong := [flag for flag in given if flag not in LATER]:
        flag = "--" + wrong[0].replace("_", "-")
        raise BadInput(f"{flag} cannot differ from that of {out}; with --add give only {', '.join(LATER)}.")
    if not run.names:
        raise BadInput(f"{out} has no modules to which one could be added; train a run with memories.")
    if name in run.router.domains:
        raise BadInput(f"{out} has a domain {name} already; remove it first, or rename the text.")
    steps = 3 * -(-run.settings.steps // len(run.names))  # three times what each of the first got (measured)
    s = replace(run.settings, **{"steps": steps, **given}, gate_init="constant", focus=0, order="joint", retention="")
    work = out / "later" / name
    if fresh:
        discard(work)
    if (work / "settings.json").exists() and Settings.from_file(work / "settings.json") != s:
        raise BadInput(f"{work} holds a stopped training with other settings; give the same or --fresh.")
    trainer, text, _ = open_run(s, out, paths={name: path})
    trainer.close(run.gates(trainer.model)[1])
    cut, about = dict(trainer.student.named_parameters()), run.backbone.config.raw
    saved_as = getattr(torch, about["dtype"])
    if any(not torch.equal(t, cut[n].to(saved_as).to(t.dtype)) for n, t in run.backbone.named_parameters()):
        raise BadInput(f"{out}/backbone was not cut from {s.model}; give the model that it was trained with.")
    if loop(trainer, text, None, work, time.time()) is None:
        return False
    save_modules(trainer, out, about["koff_fingerprint"])
    run.router.add(name, text[name])
    run.router.paths[name] = str(path.resolve())
    run.router.save(out / "router.safetensors")
    del trainer
    shutil.rmtree(work)
    evaluation.evaluate(out, device=s.device)
    return True


# One run or many -----------------------------------------------------------------------------------------------------


def parse(argv):
    """Command line -> (settings, run folder, {"given", "flags", "sweep", "add", "fresh", "dry_run"})."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="handbook", help="named settings; flags override them")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--sweep", choices=SWEEPS, help="train a named set of runs instead of one, and compare them")
    other.add_argument("--add", type=Path, metavar="TEXT", help="train one more module on the finished run in --out")
    parser.add_argument("--out", type=Path, help="run folder [out/<preset or sweep>]")
    parser.add_argument("--fresh", action="store_true", help="start again, whatever the run folder holds")
    parser.add_argument("--dry-run", action="store_true", help="print sizes and memory, from config.json alone")
    for f in fields(Settings):
        kind = {"type": type(f.default), "choices": f.metadata["choices"]}
        if isinstance(f.default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        shown = Path(f.default).relative_to(HERE) if f.name in ("model", "data") else f.default
        flag, text = "--" + f.name.replace("_", "-"), f"{f.metadata['help']} [{shown}]"
        parser.add_argument(flag, default=argparse.SUPPRESS, help=text, **kind)
    given = vars(parser.parse_args(argv))
    preset, out = given.pop("preset"), given.pop("out")
    do = {name: given.pop(name) for name in ("sweep", "add", "fresh", "dry_run")}
    do |= {"flags": given, "given": {**PRESETS[preset], **given}}
    return Settings(**do["given"]), out or Path("out", do["sweep"] or preset), do


def run(argv):
    s, out, do = parse(argv)
    if do["dry_run"]:
        return dry_run(s, Trainer)
    keep_pages()
    if do["add"]:
        return 0 if add(do["add"], out, do["flags"], do["fresh"]) else 130
    if do["sweep"]:
        return 0 if sweep(do["sweep"], do["given"], out, do["fresh"], train) else 130
    if finished(s, out, do["fresh"]):
        print(f"{(out / 'report.md').read_text()}\n{out} is finished; --fresh trains it again")
        return 0
    return 0 if train(s, out, do["fresh"]) else 130


def main(argv=None):
    return run_script("train.py", lambda: run(argv), "the same command, less --fresh, goes on from what was saved")


if __name__ == "__main__":
    sys.exit(main())
