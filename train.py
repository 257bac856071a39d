"""Split a pretrained model into a sparse backbone and one memory module per domain.

    python train.py                                the embedded default: a tiny model, six languages, minutes
    python train.py --preset best --model DIR      a real model
    python train.py --sweep ablations              a named set of runs and one table of them
    python train.py --add dutch.txt --out RUN      one more module for a finished run
    python train.py --help                         every setting, its default and where that comes from

The run folder (out/<preset> unless --out names one) gets the backbone, the modules, the router and the report. Ctrl-C
saves; the same command continues. Read `Trainer.learn`, `retain` and `recover`, the three kinds of step, and `solve`,
which comes between them; then `loop`.
"""

import argparse
import contextlib
import math
import os
import shutil
import sys
import time
import zipfile
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import koff
from data import BadInput, atomic, discard, only_process, out_of_memory, run_script
from data.checkpoint import check_backbone, digest, load, read_config, save_backbone, save_gates, save_module, value_of
from data.corpus import batch, domain_name, windows
from data.dryrun import dry_run, enough_memory
from data.fast import keep_pages
from data.hub import model_folder
from data.progress import Log, stop_signals
from data.router import Router
from data.run import (
    Text,
    TextReader,
    check_complete,
    check_same,
    erase,
    finished,
    fitting_gates,
    held,
    pick_device,
    pick_dtype,
    read_training_text,
    starting_context,
    texts_of,
    tidy,
)
from data.settings import GROUPS, PRESETS, ROOT, Settings, absolute, flag
from data.sweeps import SWEEPS, sweep
from eval import evaluate

SOLVE_AT_ONCE = 4096  # tokens: without gradients more of them fit than in a step

# One step ------------------------------------------------------------------------------------------------------------


class Trainer:
    """The trainables of a run, in float32, and one optimizer over them. The model itself is frozen.

    At first the gates and the modules learn together (`learn`, `retain`). Then the mask is frozen, and the modules go
    on learning on the materialised student (`recover`).
    """

    def __init__(self, model, s, domains):
        self.s = s
        self.device = model.head.device
        self.domains = list(domains)
        self.layers = model.config.num_hidden_layers
        # From `split` on the student differs from the teacher: there the first gate or the first memory sits.
        first_gated, first_memory, self.split = s.first_blocks(self.layers)
        self.model = model
        torch.manual_seed(s.seed)  # of LoRA's first numbers
        with self.device:
            self.gates = koff.Gates(model.config, first_gated, s.granularity, s.beta, s.gated)
        self.modules = nn.ModuleList()
        with torch.device("cpu") if s.offload else self.device:
            for _ in self.domains if s.memory else ():
                module = koff.MemoryModule(model.config, first_memory, s.rank, s.alpha, s.kv_tokens, s.lora)
                self.modules.append(module)
        self.optimizer = self.make_optimizer()
        self.penalty = koff.Penalty(s.constraint, s.penalty, s.scaled, self.device)

        # {domain: `koff.text_context`}: the text with which a KV memory begins. The teacher has read it too, so that
        # the loss is about what was cut, and not about what context adds.
        self.contexts = {}
        self.mask = None  # the final mask {name: bool [N, channels]}, once it is frozen,
        self.kept = None  # the channels that it leaves,
        self.student = None  # and the materialised model
        self.solved = 0  # so many domains have got their LoRA on `down` in closed form
        self.visits = [0] * len(self.domains)
        self.recent = torch.zeros(len(self.domains), device=self.device)  # running mean of each domain's loss
        self.worst = 0  # number of the domain whose mean was highest when this round of domains began
        self.at_work = None  # with --offload: the domain whose module is on the device

    def make_optimizer(self):
        """AdamW with three groups, each with its own rate: LoRA, gates, keys and values."""
        parameters = {
            "lora": [],
            "gates": list(self.gates.parameters()),
            "kv": [],
        }
        for module in self.modules:
            for name, group in module.parameter_groups().items():
                parameters[name] += group
        rates = {
            "lora": self.s.lora_rate,
            "gates": self.s.gate_rate,
            "kv": self.s.kv_rate,
        }
        groups = []
        for name, members in parameters.items():
            rate = rates[name]
            if members:
                groups.append({"params": members, "lr": rate, "peak": rate, "name": name})
        fused = self.device.type != "meta"  # on which the tests run a step without numbers
        # betas: a module sees only its own domain's steps, some hundred in a short run. A mean of squares over the
        # usual 1,000 steps would come too late.
        return torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.99), fused=fused)

    def read_contexts(self, text):
        """Fill `contexts`, from {domain: ids}."""
        s = self.s
        if s.kv_from_text:
            for domain in self.domains:
                self.contexts[domain] = starting_context(self.model, text[domain], s, self.modules[0].first)

    def initialise(self, text):
        """The two starts that look at data, {domain: ids}: gates by their score, KV memories from a passage of it."""
        s = self.s
        if s.gate_init in koff.SCORES:
            # Equally many sequences of each domain, drawn with another seed than the batches of the training.
            texts = []
            rounds = math.ceil(s.fisher_sequences / (s.batch * len(text)))
            for ids in text.values():
                batches = [batch(ids, turn, s.batch, s.seq_len, s.seed + 1) for turn in range(rounds)]
                texts.append([self.on_device(tokens) for tokens in batches])
            torch.manual_seed(s.seed)  # what a score draws does not depend on how large the modules are
            try:
                scores = koff.SCORES[s.gate_init](self.model, self.gates, texts)
            except RuntimeError as error:
                if "probability tensor" not in str(error):  # NaN among them, from which no token can be drawn
                    raise
                raise BadInput(f"{s.model} predicts NaN; download it again, or say --dtype float32.") from None
            self.gates.start_from(scores)
        self.read_contexts(text)
        for domain, context in self.contexts.items():
            self.modules[self.domains.index(domain)].init_kv(context)

    def on_device(self, ids):
        """numpy ids of any shape -> tensor."""
        return torch.from_numpy(ids).to(self.device)

    def step(self, tokens, domain, index, generator=None):
        """Step number `index`, on tokens [B, T] of `domain`. Returns the loss, a scalar on the device."""
        if self.mask is None:
            loss = self.learn(tokens, domain, index, generator)
        else:
            loss = self.recover(tokens, domain, index)
        self.recent[self.domains.index(domain)].lerp_(loss, 0.2)
        return loss

    def learn(self, tokens, domain, index, generator=None):
        """Eq. 1: the gates and the domain's module learn together; with --order prune-first the gates alone."""
        loss = self.gated_loss(tokens, domain, self.joint_module(domain), generator)
        sparsity = self.gates.sparsity(count=self.s.count)  # in expectation
        self.update(loss + self.penalty(sparsity, self.target(index)), index)
        return loss.detach()

    def retain(self, tokens, domain, index, generator=None):
        """Eq. 2: general text, with the module of some domain attached, moves the gates only.

        There is no penalty here: Omega and its lambda belong to the domains' steps.
        """
        with torch.no_grad():  # here the module stays as it is: no gradient can reach its parameters
            module = self.joint_module(domain)
        loss = self.gated_loss(tokens, domain, module, generator)
        self.update(loss, index)
        return loss.detach()

    def recover(self, tokens, domain, index):
        """The mask is frozen: only the domain's module learns, on the model from which the closed channels are gone."""
        module = koff.materialise_module(self.module(domain), self.kept)
        shared, teacher = self.ask_teacher(tokens, domain)
        loss = self.student_loss(self.student, shared, teacher, tokens, None, module)
        self.update(loss, index)
        return loss.detach()

    def joint_module(self, domain):
        """The module that is attached while the gates learn; None with --order prune-first, and without modules."""
        if self.s.memory and self.s.order == "joint":
            return self.module(domain)
        return None

    def gated_loss(self, tokens, domain, module, generator):
        """The distillation loss under one draw of the gates, a scalar. module: that of the domain, or None."""
        shared, teacher = self.ask_teacher(tokens, domain if module else None)
        z = self.gates.sample(shared.dtype, generator)
        return self.student_loss(self.model, shared, teacher, tokens, z, module)

    @torch.no_grad()
    def ask_teacher(self, tokens, domain):
        """(hidden states [B, T, D] before the first block that differs, `koff.teacher_topk`) of tokens [B, T].

        Below `split` there are neither gates nor memories: teacher and student share what is computed there.
        """
        shared = self.model.run(self.model.embed_tokens(tokens), 0, self.split)
        context = self.contexts.get(domain) if self.s.teacher_context else None
        hidden = self.model.run(shared, self.split, self.layers, module=context)
        teacher = koff.teacher_topk(self.model, hidden.flatten(0, 1), self.s.top)
        return shared, teacher

    def student_loss(self, student, shared, teacher, tokens, z, module):
        """The distillation loss of the student from block `split` on, a scalar."""
        checkpointing = self.s.checkpointing
        hidden = student.run(shared, self.split, self.layers, z, module, checkpointing=checkpointing)
        # The final norm and the output matrix have no gates: the model's are the student's too.
        return koff.distill(self.model, hidden, teacher, tokens, self.s.objective, self.s.tail)

    def update(self, loss, index):
        """One optimizer step. LoRA's and the KV memory's rates fall to 0 in the last `decay` of the steps."""
        falling = max(1.0, self.s.decay * self.s.steps)  # so many steps
        left = (self.s.steps - index) / falling
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"]
            if group["name"] != "gates":
                group["lr"] *= min(1.0, left)
        loss.backward()
        self.optimizer.step()
        # None, not zero: AdamW would move the modules of other domains by their momentum if their gradient were 0.
        self.optimizer.zero_grad(set_to_none=True)

    def target(self, index):
        """What should be closed, in expectation, at step `index`: a ramp, but for the plain hinge."""
        if self.s.constraint == "hinge":
            return self.s.sparsity
        rising = self.s.ramp * max(1, self.s.steps)  # so many steps
        share = min(1.0, (index + 1) / rising)
        return self.s.sparsity * share

    def start_step(self, index):
        """What changes with the number of the step: the gates' temperature, and whether the mask is frozen by now."""
        s = self.s
        learning = s.steps * (1 - s.fix_mask)  # the steps in which the gates learn
        if s.beta_end:
            share = min(1.0, index / max(1.0, learning))
            self.gates.beta = s.beta + (s.beta_end - s.beta) * share
        if self.mask is None and index >= learning:
            self.freeze_mask(self.gates.final_mask(s.sparsity, s.count, s.multiple))

    def freeze_mask(self, mask):
        """From now on the student is the materialised model: what `mask` closes takes no more arithmetic."""
        self.mask = {}
        for name, is_open in mask.items():
            self.mask[name] = is_open.to(self.device)
        self.kept = koff.kept_channels(mask, self.model.config, self.gates.first, self.device)
        self.student = koff.materialise(self.model, self.kept)
        self.compile(self.student)

    def unsolved(self):
        """The domains whose LoRA on `down` waits for its closed form: none until the mask is frozen."""
        if self.mask is None or not (self.modules and self.s.rank and self.s.solve_tokens):
            return []
        return self.domains[self.solved :]

    def solve(self, domain, ids):
        """LoRA on `down` of the next of `unsolved`, from its training text. Returns what `koff.solve_memories` does."""
        s = self.s
        tokens = windows(ids, s.seq_len, math.ceil(s.solve_tokens / s.seq_len))  # the whole text, if it has fewer
        batches = self.on_device(tokens).split(max(1, SOLVE_AT_ONCE // s.seq_len))
        module = self.memory_module(domain)
        # Uncompiled: it calls the blocks in ways that no step does.
        eager = torch.compiler.set_stance("force_eager") if s.compile else contextlib.nullcontext()
        with eager:
            explained = koff.solve_memories(self.model, self.student, module, self.kept, batches, s.solve_ridge)
        for p in (module.lora_a["down"], module.lora_b["down"]):  # AdamW's means were those of other numbers
            self.optimizer.state[p] = {}
        self.solved += 1
        return explained

    def compile(self, model):
        """With --compile: torch compiles each block of `model` when it is first called."""
        if not self.s.compile:
            return
        # Blocks share what was compiled for the same shapes and gradients. torch keeps 8 such variants, those of an
        # earlier phase or run among them; for any other a block runs uncompiled. But there are some ways to call a
        # block, and once the mask is frozen each has its own shapes.
        torch.compiler.reset()
        torch._dynamo.config.cache_size_limit = self.layers + 16  # later versions also call it recompile_limit
        for block in model.layers:
            block.compile()

    def next_domain(self, index):
        """(domain, number of its batch) for step `index`.

        A round visits each domain once, in a new order, and then `focus` times the one whose loss had been highest
        when the round began. The first round has no such turns: nothing is known yet.
        """
        if index >= len(self.domains):
            index += self.s.focus
        turn, place = divmod(index, len(self.domains) + self.s.focus)
        if place == 0 and turn and self.s.focus:
            # A running mean that began at 0 is too low by the factor 1 - 0.8^visits.
            visits = torch.tensor(self.visits, device=self.device)
            mean = self.recent / (1 - 0.8**visits)
            self.worst = mean.argmax().item()  # a GPU waits here, once a round
        rng = np.random.default_rng([self.s.seed, turn])  # a function of the round: resuming needs no saved state
        order = rng.permutation(len(self.domains))
        if place < len(order):
            d = order[place]
        else:
            d = self.worst
        self.visits[d] += 1
        return self.domains[d], self.visits[d] - 1

    def memory_module(self, domain):
        """Its `MemoryModule`, on the device; with --offload the one that was there before makes room."""
        if self.s.offload and domain != self.at_work:
            if self.at_work:
                self.move(self.at_work, "cpu")
            self.move(domain, self.device)
            self.at_work = domain
        return self.modules[self.domains.index(domain)]

    def module(self, domain):
        """{block: `Memory`} of a domain, in the dtype of the model, with gradients to its `MemoryModule`."""
        return self.memory_module(domain).by_block(self.model.head.dtype)

    def move(self, domain, device):
        """Move a module and its AdamW state."""
        for p in self.modules[self.domains.index(domain)].parameters():
            p.data = p.data.to(device)
            state = self.optimizer.state[p]
            for name in state:
                state[name] = state[name].to(device)

    def state(self):
        """What a checkpoint needs to go on bit for bit (the noise follows from the number of the step)."""
        return {
            "gates": self.gates.state_dict(),
            "modules": self.modules.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],  # the rest of it follows from the settings
            "penalty": self.penalty.multipliers,
            "last": self.penalty.last,
            "recent": self.recent,
            "worst": self.worst,
            "visits": self.visits,
            "solved": self.solved,
        }

    def restore(self, state):
        """Go on from what `state` said. An exception, of any kind, where that was not said of a run like this one."""
        self.gates.load_state_dict(state["gates"])
        self.modules.load_state_dict(state["modules"])
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state["optimizer"]})
        for p, means in self.optimizer.state.items():
            if means:  # it has been in a step
                moved_like(p, means["exp_avg"])
                moved_like(p, means["exp_avg_sq"])
        self.penalty.multipliers = moved_like(self.penalty.multipliers, state["penalty"])
        if state["last"] is not None:  # else no step was one of the gates
            self.penalty.last = moved_like(self.penalty.multipliers, state["last"])
        self.recent = moved_like(self.recent, state["recent"])
        self.worst = counted(state["worst"], len(self.domains) - 1)
        self.solved = counted(state["solved"], len(self.domains))
        self.visits = [counted(n, self.s.steps) for n, _ in zip(state["visits"], self.domains, strict=True)]


def moved_like(expected, tensor):
    """A tensor of a checkpoint on the device of `expected`; ValueError if it has another shape."""
    if tensor.shape != expected.shape:
        raise ValueError(f"a tensor of shape {list(tensor.shape)} is not {list(expected.shape)}")
    return tensor.to(expected.device)


def counted(n, most):
    """A whole number of a checkpoint; ValueError unless it is one from 0 to `most`."""
    if type(n) is not int or not 0 <= n <= most:
        raise ValueError(f"{n!r} is not a number from 0 to {most}")
    return n


# The loop ------------------------------------------------------------------------------------------------------------


def loop(trainer, text, out, begun):
    """Begin, or continue the checkpoint in `out`, and train on a `Text` to the last step. Returns when the run began,
    with all pauses taken out. After Ctrl-C or SIGTERM it saves, then raises KeyboardInterrupt."""
    s = trainer.s
    start, begun = resume(trainer, text, out, begun)
    trainer.compile(trainer.model)  # not before: the start calls the blocks in ways that no step does
    # Without modules there is nothing left to learn once the mask is frozen.
    last = s.steps
    if not s.memory:
        last = s.gate_steps
    log = Log(out, start, trainer.domains[: trainer.solved])
    resumed = time.perf_counter()
    bar = tqdm(total=last, initial=start, desc=out.name)
    with stop_signals() as signals, bar:
        for index in range(start, last):
            trainer.start_step(index)
            solve(trainer, text, out, begun, index, signals, log)
            done = index + 1  # steps, after this one
            # A resumed run sees what it would have seen: noise and order follow from seed and step, and how often each
            # domain was visited is in the checkpoint.
            domain, turn = trainer.next_domain(index)
            tokens = batch(text.train[domain], turn, s.batch, s.seq_len, s.seed)
            tokens = trainer.on_device(tokens)  # [B, T]
            generator = torch.Generator(trainer.device).manual_seed((s.seed * 1_000_003 + index) % 2**63)
            loss = trainer.step(tokens, domain, index, generator)

            # Eq. 2, now and then. Once the mask is frozen there are no gates left that it could move.
            if text.general is not None and trainer.mask is None and done % s.retention_every == 0:
                number = index // s.retention_every
                general = batch(text.general, number, s.retention_batch or s.batch, s.seq_len, s.seed)
                rng = np.random.default_rng([s.seed, index, 1])
                anyone = trainer.domains[rng.integers(len(trainer.domains))]
                trainer.retain(trainer.on_device(general), anyone, index, generator)

            bar.update()
            if index % 10 == 0:  # reading numbers makes a GPU wait, so not at every step
                line = log.write(index, domain, trainer, loss)
                tokens_seen = s.batch * s.seq_len * (done - start)
                speed = tokens_seen / (time.perf_counter() - resumed)
                bar.set_postfix_str(f"{line}, {speed:,.0f} tokens/s", refresh=False)
            stop = list(signals)  # asked once: one can come at any moment
            if stop or done % s.save_every == 0 or done == last:
                log.check(index, domain, trainer, loss)  # a checkpoint is worth keeping only if this is a number
                save_checkpoint(trainer, text, out, begun, done)
            if stop:
                bar.close()
                print(f"stopped after step {done}", file=sys.stderr)
                raise KeyboardInterrupt(stop[0])
        trainer.start_step(s.steps)  # past the last step the mask is frozen, whatever --fix-mask is
        solve(trainer, text, out, begun, s.steps, signals, log)
        if signals:  # while the last step was saved
            raise KeyboardInterrupt(signals[0])
    return begun


def solve(trainer, text, out, begun, index, signals, log):
    """Where the mask has just been frozen, before step `index`: LoRA on `down` of each module gets its closed form."""
    for domain in trainer.unsolved():
        try:
            explained = trainer.solve(domain, text.train[domain])
        except torch.linalg.LinAlgError as error:
            raise BadInput(f"{domain} cannot be solved for ({error}); lower the rates, and say --fresh.") from None
        tqdm.write(log.write_solved(index, domain, explained))
        if signals or not trainer.unsolved():  # with a real model it took minutes
            save_checkpoint(trainer, text, out, begun, index)
        if signals:
            print(f"stopped after {domain} was solved", file=sys.stderr)
            raise KeyboardInterrupt(signals[0])


def save_checkpoint(trainer, text, out, begun, step):
    """Save all that a run needs to go on with step number `step`."""
    place = {"step": step, "seconds": time.perf_counter() - begun, "inputs": text.inputs}
    with atomic(out / "checkpoint.pt") as partial:
        torch.save(trainer.state() | place, partial)


def resume(trainer, text, out, begun):
    """Load the checkpoint of a run folder, or start anew. Returns (the first step to do, when the run began)."""
    trainer.s.to_file(out / "settings.json")
    path = out / "checkpoint.pt"
    if not path.exists():
        trainer.initialise(text.train)
        return 0, begun
    try:
        with zipfile.ZipFile(path) as file:
            if torn := file.testzip():  # torch writes checksums, and does not read them
                raise ValueError(f"{torn} has another checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
        before = state["inputs"]
        for name in {**before, **text.inputs}:
            check_same(out, name, before.get(name), text.inputs.get(name))
        trainer.restore(state)
        step = counted(state["step"], trainer.s.steps)
        begun -= float(state["seconds"])
    except Exception as error:  # what is torn fails in many ways
        if isinstance(error, BadInput) or out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0] or repr(error)
        what = "is damaged, or of another version"
        raise BadInput(f"{path} {what} ({reason}); remove it, and the training begins again.") from None
    trainer.read_contexts(text.train)
    print(f"continuing {out} at step {step}")
    return step, begun


# A run, from its settings to its report ------------------------------------------------------------------------------


@dataclass
class Opened:
    """What a training needs. `folder`: that of the pretrained model."""

    trainer: Trainer
    text: Text
    folder: Path


def open_run(s, out, paths=None):
    """Check everything that a run needs, before anything is written. `paths`: see `read_training_text`."""
    if str(out) != str(out).encode(errors="replace").decode():
        raise BadInput(f"--out {out} is not UTF-8, which safetensors needs; give another name.")
    # The order matters: what is cheap to check comes first, gigabytes of weights come last.
    fitting_gates(s, read_config(model_folder(s.model, weights=False)))
    device = pick_device(s.device)
    folder = model_folder(s.model)
    config = read_config(folder)  # once more: what ends a turn stands in a file that comes with the weights
    text = read_training_text(s, TextReader(folder, config, out), paths)
    text.inputs["model"] = digest(folder)
    model = load(folder, pick_dtype(s.dtype, device), device)
    trainer = Trainer(model, s, text.train)
    # Everything is in order. The first thing that is written is the cache of token ids, so that the next run need not
    # tokenise.
    for split in text.splits.values():
        split.store()
    return Opened(trainer, text, folder)


def train(s, out, fresh=False):
    """Train, save and evaluate the run `s` in the folder `out`."""
    begun = time.perf_counter()  # no clock that somebody can turn back
    opened = open_run(s, out)
    out.mkdir(parents=True, exist_ok=True)
    with only_process(out):
        if finished(s, out, fresh):  # by another process, since this one began
            return
        tidy(out)
        if fresh:  # nothing of an old run goes before the new one is known to work
            erase(out, s)
        saved = (out / "router.safetensors").exists()  # the last part: it was stopped in its evaluation
        if saved and not (out / "checkpoint.pt").exists():
            begun = None  # nothing there knows how long it took
        else:
            with enough_memory(opened.trainer):
                begun = loop(opened.trainer, opened.text, out, begun)
        if not saved:  # else there may be modules that came later
            save(opened, out)
        del opened  # what follows needs the memory
        evaluate(out, begun, s.device)
        (out / "checkpoint.pt").unlink(missing_ok=True)  # its optimizer state is larger than all that is left


@torch.no_grad()
def save(opened, out):
    """Write backbone, gates, modules and router."""
    trainer = opened.trainer
    text = opened.text
    about = {"koff_model": text.inputs["model"], "koff_domains": len(text.train)}
    fingerprint = save_backbone(out / "backbone", trainer.student, opened.folder, **about)
    save_gates(out / "gates.safetensors", trainer.gates, trainer.mask)
    save_modules(trainer, out, fingerprint)
    router = Router()
    for name, ids in text.train.items():
        router.add(name, ids, text.splits[name].key)
    router.save(out / "router.safetensors")


@torch.no_grad()
def save_modules(trainer, out, fingerprint):
    for domain in trainer.domains if trainer.s.memory else ():
        module = koff.materialise_module(trainer.module(domain), trainer.kept)
        save_module(out / "modules" / f"{domain}.safetensors", module, fingerprint)


# One more domain on a finished run -----------------------------------------------------------------------------------

MAY_DIFFER = (  # settings in which a module can differ from the run that it joins
    "solve_tokens", "solve_ridge", "steps", "batch", "seq_len", "text", "lora_rate", "kv_rate", "decay", "seed",
    "device", "checkpointing", "compile",
)  # fmt: skip


def add(path, out, given, fresh=False):
    """Train one more module, for the text at `path`, on the finished run in `out`.

    One file of a module comes; router, report and its results change; no other file does. `given`: settings that
    differ from the run's, of `MAY_DIFFER`.
    """
    device = given.get("device") or Settings.from_file(out / "settings.json").device
    path = Path(os.path.abspath(path))  # links stay: what they lead to may have another name
    name = domain_name(path)
    with held(out, device) as run:
        # BadInput now, rather than in the evaluation, where a module is missing or a text has changed.
        check_complete(run)
        texts_of(run)
        work = out / "later" / name
        s = settings_to_add(run, given)
        stopped = work / "settings.json"
        if stopped.exists() and not fresh and Settings.from_file(stopped) != s:
            raise BadInput(f"{work} holds a stopped training with other settings; give the same or --fresh.")
        # Both are there where this very command was stopped in its evaluation: then only that is left to do.
        if fresh or not work.exists() or run.router.paths.get(name) != str(path):
            train_module(run, s, name, path, work, fresh)
        evaluate(out, device=device)
        shutil.rmtree(work)


def train_module(run, s, name, path, work, fresh):
    """Train a module on the backbone of a run and make it part of the run. `work`: the folder of this training."""
    if run.router.knows(name):
        raise BadInput(f"{run.folder} has a domain {name} already; remove it first, or rename the text.")
    opened = open_run(s, run.folder, paths={name: path})
    text = opened.text
    check_same(run.folder, "model", run.config.raw.get("koff_model"), text.inputs["model"])
    check_backbone(run.folder / "backbone", run.config)
    if fresh:
        discard(work)
    fingerprint = run.config.raw["koff_fingerprint"]
    text.inputs["backbone"] = fingerprint
    # The backbone stays as it is: with its mask frozen from the start, every step is one of `Trainer.recover`.
    _, mask = run.gates(opened.trainer.model)
    opened.trainer.freeze_mask(mask)
    with enough_memory(opened.trainer):
        loop(opened.trainer, text, work, time.perf_counter())
    # The router comes after the module: it is its row there that makes the module part of the run.
    save_modules(opened.trainer, run.folder, fingerprint)
    run.router.add(name, text.train[name], text.splits[name].key)
    run.router.paths[name] = str(path)
    run.router.save(run.folder / "router.safetensors")


def settings_to_add(run, given):
    """The settings of a later module: those of its run, but for `given`. BadInput for what cannot be."""
    for setting in given:
        if setting not in MAY_DIFFER:
            allowed = ", ".join(MAY_DIFFER)
            raise BadInput(f"{flag(setting)} cannot differ from that of {run.folder}; with --add give only {allowed}.")
    if not run.names:
        raise BadInput(f"{run.folder} has no modules to which one could be added; train a run with memories.")
    # How many domains there were at first, whatever came or went.
    first = value_of(run.config.raw, "koff_domains", int, None, run.folder / "backbone/config.json")
    steps = math.ceil(run.settings.steps / first)  # as many as each of them got
    changed = {"steps": steps, **given}
    # One domain and no gates: what chooses among domains, or starts or moves gates, has nothing to do.
    return replace(run.settings, **changed, gate_init="constant", focus=0, order="joint", retention="")


# The command line ----------------------------------------------------------------------------------------------------


def parse(argv):
    """Command line -> its arguments, among them `settings`, all of the run, and those that were given: `given`, by the
    preset or a flag, and `flags`, by a flag.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, help="named settings; flags override them [handbook]")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--sweep", choices=SWEEPS, help="train a named set of runs instead of one, and compare them")
    other.add_argument("--add", type=Path, metavar="TEXT", help="train one more module on the finished run in --out")
    parser.add_argument("--seeds", type=int, default=1, help="of a sweep: runs of each row, from --seed on [1]")
    parser.add_argument("--out", type=Path, help="run folder [out/<preset or sweep>]")
    parser.add_argument("--fresh", action="store_true", help="start again, whatever the run folder holds")
    parser.add_argument("--dry-run", action="store_true", help="print sizes and memory, from config.json alone")
    for f in fields(Settings):
        if f.name in GROUPS:
            group = parser.add_argument_group(GROUPS[f.name])
        default = f.default
        if f.name in ("model", "data"):
            default = Path(default).relative_to(ROOT)
        about = {
            "default": argparse.SUPPRESS,
            "help": f"{f.metadata['help']} [{default}]",
        }  # SUPPRESS: what is not given leaves no trace, so that no default overrides a preset
        if isinstance(f.default, bool):
            group.add_argument(flag(f.name), action=argparse.BooleanOptionalAction, **about)
        else:
            group.add_argument(flag(f.name), type=type(f.default), choices=f.metadata["choices"], **about)
    args = parser.parse_args(argv)
    if args.dry_run and (args.sweep or args.add):
        parser.error("--dry-run is for a single run, without --sweep and --add")
    if args.seeds < 1 or (args.seeds > 1 and not args.sweep):
        parser.error("--seeds is for a --sweep, and at least 1")
    if args.preset and args.add:
        parser.error("--add takes the settings of its run, without --preset")
    args.preset = args.preset or "handbook"
    names = [f.name for f in fields(Settings)]
    args.flags = {name: getattr(args, name) for name in names if hasattr(args, name)}
    for name in args.flags if args.sweep else ():
        if all(name in row for row in SWEEPS[args.sweep].rows.values()):
            parser.error(f"{flag(name)} does nothing: each row of --sweep {args.sweep} has its own")
    args.given = absolute({**PRESETS[args.preset], **args.flags})
    args.settings = Settings(**args.given)
    args.out = args.out or Path("out", args.sweep or args.preset)
    return args


def command(argv):
    args = parse(argv)
    s = args.settings
    if args.dry_run:
        dry_run(s, Trainer)
        return
    keep_pages()
    if args.add:
        add(args.add, args.out, args.flags, args.fresh)
    elif args.sweep:
        sweep(args.sweep, args.given, args.out, args.fresh, train, args.seeds)
    elif finished(s, args.out, args.fresh):
        print(f"{(args.out / 'report.md').read_text()}\n{args.out} is finished; --fresh trains it again")
    else:
        train(s, args.out, args.fresh)


def main(argv=None):
    stopped = "the same command, less --fresh, goes on from what was saved"
    return run_script("train.py", lambda: command(argv), stopped) or 0


if __name__ == "__main__":
    sys.exit(main())
