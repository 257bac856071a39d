"""Split a pretrained model into a sparse backbone and one memory module per domain.

    python train.py                                the embedded default: a tiny model, six languages, minutes
    python train.py --preset best --model DIR      a real model
    python train.py --sweep ablations              a named set of runs and one table of them
    python train.py --add dutch.txt --out RUN      one more module for a finished run
    python train.py --help                         every setting, its default and its source

The run folder (out/<preset> unless --out names one) gets the backbone, the modules, the router and the report. Ctrl-C
saves; the same command continues.

Read `Trainer.learn`, `retain` and `recover`, the three kinds of step; then `loop`, which is the whole training. The
rest of a run's life is in data/: opening it (run.py), its log and checkpoints (progress.py), its folder (life.py).
"""

import argparse
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

import koff
from data import fast, run_script
from data.corpus import batch
from data.dryrun import dry_run, enough_memory
from data.later import add
from data.life import finished, is_saved, is_stopped, save_run, training_in
from data.offload import Offload
from data.progress import Progress
from data.run import open_training
from data.settings import GROUPS, PRESETS, ROOT, Settings, absolute, flag
from data.solve import solve_module
from data.starts import start_gates, start_kv, starting_context
from data.sweeps import SWEEPS, sweep
from data.turns import Turns
from eval import evaluate

# One step ------------------------------------------------------------------------------------------------------------


class Trainer:
    """The trainable parts of a run, in float32, each with its AdamW. The pretrained model is frozen.

    First the gates and the modules learn together (`learn`, `retain`). Then the mask is frozen, and the modules go on
    learning on the materialised student (`recover`).
    """

    def __init__(self, model, s, domains):
        self.s = s
        self.model = model
        self.domains = list(domains)
        self.blocks = len(model.layers)
        _, _, self.split = s.first_blocks(self.blocks)  # below this block teacher and student are the same
        self.device = model.head.device
        self.objective = koff.OBJECTIVES[s.objective]
        torch.manual_seed(s.seed)  # LoRA's start is random
        with self.device:
            self.gates = s.new_gates(model.config)
            self.penalty = koff.PENALTIES[s.constraint](s.penalty)
        self.gate_optimizer = self.adamw({"gates": self.gates.parameters()})
        self.modules = {}  # {domain: `koff.MemoryModule`}; empty with --no-memory
        self.optimizers = {}
        for domain in self.domains if s.memory else ():
            with torch.device("cpu") if s.offload else self.device:
                self.modules[domain] = s.new_module(model.config)
            self.optimizers[domain] = self.adamw(self.modules[domain].parameter_groups())
        self.offload = Offload(self.modules, self.optimizers, self.device) if s.offload else None
        self.turns = Turns(self.domains, s.seed, s.focus, self.device)

        # Are modules attached? With --order prune-first only once the mask is frozen.
        self.attached = s.memory and s.order == "joint"
        self.contexts = {}  # {domain: the text that its KV memory starts from, as keys and values}
        self.mask = None  # once it is frozen: the final mask {name: bool [N, channels]},
        self.kept = None  # the channels that it leaves (`koff.kept_channels`),
        self.student = None  # and the materialised model

    def adamw(self, groups):
        """AdamW over parameters {name: [...]}, each group with its own rate."""
        peaks = {"gates": self.s.gate_rate, "lora": self.s.lora_rate, "kv": self.s.kv_rate}
        members = []
        for name, parameters in groups.items():
            members.append({"params": list(parameters), "lr": peaks[name], "peak": peaks[name], "name": name})
        # A module sees only its own domain's steps, a few hundred in a short run. The usual beta2 = 0.999 averages over
        # 1,000 steps, more than a module ever gets.
        fused = self.device.type != "meta"  # there the tests run a step without numbers
        return torch.optim.AdamW(members, weight_decay=0.0, betas=(0.9, 0.99), fused=fused)

    def learn(self, tokens, domain, index, generator=None):
        """Eq. 1: the gates and the domain's module learn together. tokens [B, T]; returns the KL, a scalar."""
        shared, teacher = self.ask_teacher(tokens, domain)
        z = self.gates.sample(shared.dtype, generator)
        hidden = self.ask_student(self.model, shared, z, self.memories(domain))
        kl = fast.distill(self.model, hidden, teacher, tokens, self.objective)
        sparsity = self.gates.sparsity(count=self.s.count)  # in expectation
        self.update(kl + self.penalty(sparsity, self.target(index)), domain, index)
        return kl.detach()

    def retain(self, tokens, domain, index, generator=None):
        """Eq. 2: general text, with any domain's module attached, moves the gates only.

        Without Omega: it and its lambda belong to the domains' steps.
        """
        shared, teacher = self.ask_teacher(tokens, domain)
        z = self.gates.sample(shared.dtype, generator)
        with torch.no_grad():  # no gradient reaches the module
            memories = self.memories(domain)
        hidden = self.ask_student(self.model, shared, z, memories)
        kl = fast.distill(self.model, hidden, teacher, tokens, self.objective)
        self.update(kl, domain, index)
        return kl.detach()

    def recover(self, tokens, domain, index):
        """Under the frozen mask only the domain's module learns, on the model without the closed channels."""
        shared, teacher = self.ask_teacher(tokens, domain)
        memories = koff.materialise_memories(self.memories(domain), self.kept)
        hidden = self.ask_student(self.student, shared, None, memories)
        kl = fast.distill(self.model, hidden, teacher, tokens, self.objective)
        self.update(kl, domain, index)
        return kl.detach()

    @torch.no_grad()
    def ask_teacher(self, tokens, domain):
        """(hidden states [B, T, D] before block `split`, `koff.teacher_topk`) of tokens [B, T].

        The teacher has read the text that the domain's KV memory starts from, unless --no-teacher-context: so the loss
        measures what was cut, not what context adds.
        """
        shared = self.model.run(self.model.embed_tokens(tokens), 0, self.split)
        context = self.contexts.get(domain) if self.attached and self.s.teacher_context else None
        hidden = self.model.run(shared, self.split, self.blocks, memories=context)
        return shared, fast.teacher_topk(self.model, hidden.flatten(0, 1), self.s.top)

    def ask_student(self, student, shared, z, memories):
        """The student's hidden states [B, T, D] after the last block."""
        return student.run(shared, self.split, self.blocks, z, memories, checkpointing=self.s.checkpointing)

    def memories(self, domain):
        """{block: `Memory`} of a domain, with gradients to its module; None if no module is attached."""
        return self.module(domain).by_block(self.model.head.dtype) if self.attached else None

    def module(self, domain):
        """The domain's `koff.MemoryModule`, on the device."""
        if self.offload:
            self.offload.fetch(domain)
        return self.modules[domain]

    def update(self, loss, domain, index):
        """One AdamW step for every part that the loss reaches. The module's rates fall to 0 in the last steps."""
        falling = max(1.0, self.s.decay * self.s.steps)
        left = min(1.0, (self.s.steps - index) / falling)
        loss.backward()
        self.gate_optimizer.step()
        self.gate_optimizer.zero_grad()
        if self.attached:
            for group in self.optimizers[domain].param_groups:
                group["lr"] = left * group["peak"]
            self.optimizers[domain].step()
            self.optimizers[domain].zero_grad()

    def target(self, index):
        """The expected sparsity that the penalty asks for at step `index`: it rises over --ramp of the steps."""
        rising = self.s.ramp * self.s.steps
        share = min(1.0, (index + 1) / rising) if rising else 1.0
        return self.s.sparsity * share

    def temperature(self, index):
        """beta at step `index`: constant, or falling to --beta-end while the gates learn."""
        s = self.s
        if not s.beta_end:
            return s.beta
        share = min(1.0, index / max(1.0, s.steps * s.gate_share))
        return s.beta + (s.beta_end - s.beta) * share

    def initialise(self, text):
        """The starts that look at data, {domain: ids}: gates from a score, KV memories from a passage of text."""
        if koff.SCORES[self.s.gate_init]:
            start_gates(self.gates, self.model, text, self.s)
        self.read_contexts(text)
        for domain, context in self.contexts.items():
            start_kv(self.modules[domain], context)

    def read_contexts(self, text):
        """Fill `contexts`, from {domain: ids}."""
        _, first_memory, _ = self.s.first_blocks(self.blocks)
        for domain in self.domains if self.s.kv_from_text else ():
            self.contexts[domain] = starting_context(self.model, text[domain], self.s, first_memory)

    def freeze_mask(self, mask):
        """From now on the student is the materialised model, and modules are attached."""
        self.mask = {name: is_open.to(self.device) for name, is_open in mask.items()}
        self.kept = koff.kept_channels(mask, self.model.config, self.gates.first_block, self.device)
        self.student = koff.materialise(self.model, self.kept)
        self.attached = self.s.memory

    def solve(self, domain, text):
        """Ours: the closed form of the module's LoRA on `down`, from {domain: ids}."""
        module = self.module(domain)
        optimizer = self.optimizers[domain]
        return solve_module(domain, self.model, self.student, self.kept, module, optimizer, text[domain], self.s)

    def parts(self):
        """{name: part}: everything with a state that a checkpoint has to keep."""
        parts = {"gates": self.gates, "gate optimizer": self.gate_optimizer, "penalty": self.penalty}
        parts["turns"] = self.turns
        for domain in self.modules:
            parts[f"module {domain}"] = self.modules[domain]
            parts[f"optimizer {domain}"] = self.optimizers[domain]
        return parts

    def rates(self, domain):
        """{name: learning rate} at the last step."""
        optimizers = [self.gate_optimizer]
        if self.attached:
            optimizers.append(self.optimizers[domain])
        return {group["name"]: group["lr"] for optimizer in optimizers for group in optimizer.param_groups}


# The loop ------------------------------------------------------------------------------------------------------------


def loop(trainer, text, out, begun):
    """The whole training, on a `Text`. It starts, or goes on from the checkpoint in `out`; see `Progress`."""
    s = trainer.s
    with Progress(trainer, text, out, begun) as progress:
        # Gates and modules learn together (Eq. 1). Now and then general text moves the gates (Eq. 2).
        for index in progress.steps(0, s.gate_steps):
            trainer.gates.beta = trainer.temperature(index)
            domain, tokens = domain_batch(trainer, text, index)
            generator = noise(trainer, index)
            loss = trainer.learn(tokens, domain, index, generator)
            trainer.turns.saw(domain, loss)
            retention = None
            if text.general is not None and (index + 1) % s.retention_every == 0:
                anyone, general = general_batch(trainer, text, index)
                retention = trainer.retain(general, anyone, index, generator)
            progress.after_step(index, domain, loss, retention)

        # The mask is final: closed channels leave the model.
        if trainer.mask is None:
            trainer.freeze_mask(fast.round_neurons(trainer.gates, s.sparsity, s.count, s.multiple))
        for domain in progress.unsolved():
            progress.after_solving(domain, trainer.solve(domain, text.train))

        # The modules go on learning, on the smaller model.
        for index in progress.steps(s.gate_steps, s.steps):
            domain, tokens = domain_batch(trainer, text, index)
            loss = trainer.recover(tokens, domain, index)
            trainer.turns.saw(domain, loss)
            progress.after_step(index, domain, loss)
    return progress.begun


# Batches and noise are functions of the seed and the number of the step. So a resumed run sees what it would have seen.


def domain_batch(trainer, text, index):
    """(domain, its tokens [B, T]) for step `index`."""
    s = trainer.s
    domain, number = trainer.turns.next(index)
    tokens = batch(text.train[domain], number, s.batch, s.seq_len, s.seed)
    return domain, torch.from_numpy(tokens).to(trainer.device)


def general_batch(trainer, text, index):
    """(any domain, general tokens [B, T]) for the retention at step `index`."""
    s = trainer.s
    rng = np.random.default_rng([s.seed, index, 1])
    anyone = trainer.domains[rng.integers(len(trainer.domains))]
    tokens = batch(text.general, index // s.retention_every, s.retention_batch or s.batch, s.seq_len, s.seed)
    return anyone, torch.from_numpy(tokens).to(trainer.device)


def noise(trainer, index):
    """The generator of the gates' noise at step `index`. The prime keeps the steps of different seeds apart."""
    return torch.Generator(trainer.device).manual_seed((trainer.s.seed * 1_000_003 + index) % 2**63)


# A run, and one more module ------------------------------------------------------------------------------------------


def train(s, out, fresh=False):
    """Train, save and evaluate the run `s` in the folder `out`."""
    begun = time.perf_counter()  # monotonic
    opened = open_training(s, out)
    trainer = Trainer(opened.model, s, opened.text.train)
    with training_in(out, s, fresh) as ours:
        if not ours:
            return
        saved = is_saved(out)  # then it was stopped in its evaluation, and modules may have been added since
        if saved and not is_stopped(out):
            begun = None  # no file says how long it took
        else:
            with enough_memory(trainer):
                begun = loop(trainer, opened.text, out, begun)
        if not saved:
            save_run(trainer, opened.text, opened.folder, out)
        del opened, trainer  # the evaluation needs the memory
        evaluate(out, begun, s.device)


def train_module(s, opened, mask, out):
    """Train one more module under a mask that is final from the start; returns its `Trainer`. See data/later.py."""
    trainer = Trainer(opened.model, s, opened.text.train)
    trainer.freeze_mask(mask)
    with enough_memory(trainer):
        loop(trainer, opened.text, out, time.perf_counter())
    return trainer


# The command line ----------------------------------------------------------------------------------------------------


def parse(argv):
    """Command line -> its arguments. Added to them: `settings`, all of the run; `given`, those of preset and flags;
    `flags`, those of flags alone."""
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
        default = Path(f.default).relative_to(ROOT) if f.name in ("model", "data") else f.default
        # SUPPRESS: a flag that is not given leaves no trace, so no default overrides a preset.
        about = {"default": argparse.SUPPRESS, "help": f"{f.metadata['help']} [{default}]"}
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
    args.flags = {f.name: getattr(args, f.name) for f in fields(Settings) if hasattr(args, f.name)}
    for name in args.flags if args.sweep else ():
        if all(name in row for row in SWEEPS[args.sweep].rows.values()):
            parser.error(f"{flag(name)} does nothing: each row of --sweep {args.sweep} has its own")
    args.given = absolute({**PRESETS[args.preset], **args.flags})
    args.settings = Settings(**args.given)
    args.out = args.out or Path("out", args.sweep or args.preset)
    return args


def command(argv):
    args = parse(argv)
    fast.enable()
    if args.dry_run:
        dry_run(args.settings, Trainer)
    elif args.add:
        add(args.add, args.out, args.flags, args.fresh, train_module, evaluate)
    elif args.sweep:
        sweep(args.sweep, args.given, args.out, args.fresh, train, args.seeds)
    elif finished(args.settings, args.out, args.fresh):
        print(f"{(args.out / 'report.md').read_text()}\n{args.out} is finished; --fresh trains it again")
    else:
        train(args.settings, args.out, args.fresh)


def main(argv=None):
    stopped = "the same command, less --fresh, goes on from what was saved"
    return run_script("train.py", lambda: command(argv), stopped) or 0


if __name__ == "__main__":
    sys.exit(main())
