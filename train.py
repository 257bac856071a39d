"""Split a pretrained model into a sparse backbone and one memory module per domain: `python train.py --help`.

Read `Trainer.learn`, `retain` and `recover`, the three kinds of step; then `loop`, the whole training. The rest of a
run's life is in data/: its command line (command.py), log and checkpoints (progress.py), its folder (life.py).
"""

import sys

import numpy as np
import torch

import koff
from data import fast, run_script
from data.command import carry_out, parse
from data.corpus import batch
from data.offload import Offload
from data.solve import repair_student, solve_module
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
        self.depth = len(model.layers)
        _, _, self.split = s.first_blocks(self.depth)  # the first block with a gate or a memory
        self.device = model.head.device
        self.objective = koff.OBJECTIVES[s.objective]
        torch.manual_seed(s.seed)  # LoRA's start is random
        with self.device:
            self.gates = s.new_gates(model.config)
            self.penalty = koff.PENALTIES[s.constraint](s.penalty)  # its kind, its first lambda
        self.gate_optimizer = self.adamw({"gates": self.gates.parameters()})
        self.modules = {}  # {domain: `koff.MemoryModule`}; empty with --no-memory
        self.optimizers = {}
        place = torch.device("cpu") if s.offload else self.device
        for domain in self.domains if s.memory else ():
            with place:
                self.modules[domain] = s.new_module(model.config)
            self.optimizers[domain] = self.adamw(self.modules[domain].parameter_groups())
        if s.offload:
            self.modules = Offload(self.modules, self.optimizers, self.device)
        self.turns = Turns(self.domains, s.seed, s.focus, self.device)  # which domain learns next: round robin

        # Modules are attached from the start; with --order prune-first, from `freeze_mask` on.
        self.attached = s.memory and s.order == "joint"
        self.contexts = {}  # {domain: keys and values of the text that its KV memory starts from} (data/starts.py)
        self.mask = None  # once it is frozen: the final mask {name: bool [N, channels]},
        self.kept = None  # the channels that it leaves (`koff.kept_channels`),
        self.student = None  # and the materialised model

    def adamw(self, groups):
        """AdamW over parameters {name: [...]}, each group with its own rate."""
        peaks = {"gates": self.s.gate_rate, "lora": self.s.lora_rate, "kv": self.s.kv_rate}
        members = []
        for name, parameters in groups.items():
            members.append({"params": list(parameters), "lr": peaks[name], "peak": peaks[name], "name": name})
        # A module sees only its own domain's steps. The usual beta2 = 0.999 averages over about 1,000 steps, more than
        # a module gets in a short run. (Fused AdamW does not work on "meta", where the tests run steps.)
        fused = self.device.type != "meta"
        return torch.optim.AdamW(members, weight_decay=0.0, betas=(0.9, 0.99), fused=fused)

    def learn(self, tokens, domain, index, generator=None):
        """Eq. 1: the gates and the domain's module learn together. Returns the KL, a scalar.

        tokens [B, T]; index: the number of the step; generator: for the gates' noise.
        """
        shared, teacher = self.ask_teacher(tokens, domain)
        z = self.gates.sample(shared.dtype, generator)
        hidden = self.ask_student(self.model, shared, z, self.memories(domain))
        # `koff.distill`. Objectives other than the KL need the tokens.
        kl = fast.distill(self.model, hidden, teacher, tokens, self.objective)
        sparsity = self.gates.sparsity(count=self.s.count)  # in expectation
        self.update(kl + self.penalty(sparsity, self.target(index)), domain, index)
        return kl.detach()

    def retain(self, tokens, domain, index, generator=None):
        """Eq. 2: general text, with a random domain's module attached, moves the gates only.

        The loss has no Omega; only `learn` pushes towards the target sparsity.
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
        """Once the mask is frozen, only the domain's module learns, on the model without the closed channels."""
        shared, teacher = self.ask_teacher(tokens, domain)
        memories = koff.materialise_memories(self.memories(domain), self.kept)
        hidden = self.ask_student(self.student, shared, None, memories)
        kl = fast.distill(self.model, hidden, teacher, tokens, self.objective)
        self.update(kl, domain, index)
        return kl.detach()

    @torch.no_grad()
    def ask_teacher(self, tokens, domain):
        """(hidden states [B, T, D] before block `split`, `koff.teacher_topk`) of tokens [B, T].

        By default the teacher has also read the text from which the domain's KV memory starts. The loss then measures
        what was cut, and not what context adds.
        """
        shared = self.model.run(self.model.embed_tokens(tokens), 0, self.split)
        context = self.contexts.get(domain) if self.attached and self.s.teacher_context else None
        hidden = self.model.run(shared, self.split, self.depth, memories=context)
        return shared, fast.teacher_topk(self.model, hidden.flatten(0, 1), self.s.top)

    def ask_student(self, student, shared, z, memories):
        """The student's hidden states [B, T, D] after the last block."""
        return student.run(shared, self.split, self.depth, z, memories, checkpointing=self.s.checkpointing)

    def memories(self, domain):
        """{block: `Memory`} of a domain, with gradients to its module; None if no module is attached."""
        return self.modules[domain].by_block(self.model.head.dtype) if self.attached else None

    def update(self, loss, domain, index):
        """One AdamW step. Parameters that the loss did not reach have no gradient, and AdamW skips them: the module in
        `retain`, the gates in `recover`."""
        falling = max(1.0, self.s.decay * self.s.steps)
        left = min(1.0, (self.s.steps - index) / falling)  # 1 at first; falls to 0 over the share --decay at the end
        loss.backward()
        self.gate_optimizer.step()
        self.gate_optimizer.zero_grad()
        if self.attached:
            for group in self.optimizers[domain].param_groups:
                group["lr"] = left * group["peak"]
            self.optimizers[domain].step()
            self.optimizers[domain].zero_grad()

    def target(self, index):
        """The expected sparsity that the penalty asks for. It rises linearly over --rise of the gates' steps."""
        rising = self.s.rise * self.s.gate_steps
        share = min(1.0, (index + 1) / rising) if rising else 1.0
        return self.s.sparsity * share

    def temperature(self, index):
        """beta at step `index`: constant, or falling to --beta-end while the gates learn."""
        s = self.s
        if not s.beta_end:
            return s.beta
        share = min(1.0, index / max(1.0, s.steps * s.gate_share))
        return s.beta + (s.beta_end - s.beta) * share

    def freeze_mask(self, mask, student=None):
        """From now on the student is the materialised model (or `student`), and modules are attached."""
        self.mask = {name: is_open.to(self.device) for name, is_open in mask.items()}
        self.kept = koff.kept_channels(mask, self.model.config, self.gates.first_block, self.device)
        self.student = student or koff.materialise(self.model, self.kept)
        self.attached = self.s.memory


# The loop ------------------------------------------------------------------------------------------------------------


def loop(trainer, text, progress):
    """The whole training on `text` (`Text` of data/run.py), with a `Progress`.

    Progress has set gates and KV memories to their start (data/starts.py), or restored a checkpoint. It knows which
    steps are done, logs and saves.
    """
    s = trainer.s
    # Gates and modules learn together (Eq. 1). Now and then general text moves the gates (Eq. 2).
    for index in progress.steps(0, s.gate_steps):
        trainer.gates.beta = trainer.temperature(index)
        domain, tokens = domain_batch(trainer, text, index)
        generator = noise(trainer, index)
        loss = trainer.learn(tokens, domain, index, generator)
        retention = None
        if text.general is not None and (index + 1) % s.retention_every == 0:
            any_domain, general = general_batch(trainer, text, index)
            retention = trainer.retain(general, any_domain, index, generator)
        progress.after_step(index, domain, loss, retention)

    # The mask is final: closed channels leave the model. (With --add it already is: data/later.py freezes the run's.)
    if trainer.mask is None:
        trainer.freeze_mask(fast.final_mask(trainer.gates, s.sparsity, s.count, s.multiple))
        # Ours: least squares mends what is left of the backbone,
        if text.repair:
            progress.after_repair(repair_student(trainer, text.repair))
    # and gives LoRA on `down` in closed form.
    for domain in progress.unsolved():
        explained = solve_module(trainer, domain, text.train[domain])
        progress.after_solving(domain, explained)

    # The modules go on learning, on the smaller model. (With --no-memory there are no such steps.)
    for index in progress.steps(s.gate_steps, s.steps):
        domain, tokens = domain_batch(trainer, text, index)
        loss = trainer.recover(tokens, domain, index)
        progress.after_step(index, domain, loss)


# Noise and batches follow from the seed and the number of the step, so a resumed run repeats them. The next domain may
# depend on the losses so far; a checkpoint keeps these (data/turns.py).


def domain_batch(trainer, text, index):
    """(domain, its tokens [B, T]) for step `index`."""
    s = trainer.s
    domain, number = trainer.turns.next(index)
    tokens = batch(text.train[domain], number, s.batch, s.seq_len, s.seed)
    return domain, torch.from_numpy(tokens).to(trainer.device)


def general_batch(trainer, text, index):
    """(a random domain, general tokens [B, T]) for the retention at step `index`."""
    s = trainer.s
    rng = np.random.default_rng([s.seed, index, 1])  # 1: a stream of its own
    any_domain = trainer.domains[rng.integers(len(trainer.domains))]
    tokens = batch(text.general, index // s.retention_every, s.retention_batch or s.batch, s.seq_len, s.seed)
    return any_domain, torch.from_numpy(tokens).to(trainer.device)


def noise(trainer, index):
    """The generator of the gates' noise. Multiplying by a large prime gives different seeds different streams."""
    return torch.Generator(trainer.device).manual_seed((trainer.s.seed * 1_000_003 + index) % 2**63)


# The command line: data/command.py -----------------------------------------------------------------------------------


def command(argv):
    args = parse(argv)
    fast.enable()
    carry_out(args, Trainer, loop, evaluate)


def main(argv=None):
    return run_script("train.py", lambda: command(argv), "run the same command without --fresh to continue")


if __name__ == "__main__":
    sys.exit(main())
