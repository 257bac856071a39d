"""Split a pretrained model into a sparse backbone and one memory module per domain.

    python train.py                         the embedded default: a tiny model, six languages, minutes on a laptop
    python train.py --preset smollm2 --model DIR
    python train.py --help                  every setting, its default and where that comes from

The run folder (out/<preset> unless --out names one) gets the backbone, the modules, the router and the report. Ctrl-C
saves; the same command continues. The loop is `train`, one step of it is `Trainer.step`.
"""

import argparse
import json
import signal
import sys
import time
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import koff
from data import BadInput, atomic
from data.corpus import batch, check_length, load_domains, load_text
from data.tokenizer import Tokenizer
from model import load

HERE = Path(__file__).resolve().parent


def option(default, text, choices=None):
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Settings:
    """Every choice of a run. The command line is made of it. 'paper' marks values of the paper, 'lab' measured ones."""

    model: str = option(str(HERE / "data/base"), "folder of the pretrained model (Hugging Face layout, safetensors)")
    data: str = option(str(HERE / "data/handbook"), "folder with one <domain>.txt, .jsonl or sub-folder per domain")
    retention: str = option("", "general text for retention batches; empty: none (Eq. 2)")
    retention_every: int = option(20, "steps between retention batches (paper)")
    blocks: int = option(4, "how many upper blocks carry gates and memories (paper: 18 of 28; here about two thirds)")
    sparsity: float = option(0.25, "share of all parameters to remove (paper: 0.12 of 3B)")
    count: str = option(
        "physical",
        "what --sparsity counts: parameters gone, or the paper's closed channels x fan-in",
        ("physical", "paper"),
    )
    granularity: str = option(
        "neuron", "gate whole MLP neurons (lab), or each projection on its own (paper)", ("neuron", "projection")
    )
    budget: str = option(
        "global", "all gates compete for one target, or each module meets it (paper)", ("global", "module")
    )
    gate_init: str = option(
        "fisher", "start of log alpha: spread by Fisher score (lab), or constant", ("fisher", "constant")
    )
    fisher_sequences: int = option(48, "sequences of the calibration pass (lab)")
    beta: float = option(
        2 / 3, "temperature of the Hard Concrete (Louizos; the paper's 2.0 parts expected and final sparsity)"
    )
    ramp: float = option(0.5, "share of the steps over which the target rises to --sparsity (lab)")
    fix_mask: float = option(0.25, "last share of the steps, trained under the final 0/1 mask (lab: 0 to 0.4 alike)")
    penalty: float = option(
        60.0, "start of lambda (paper); it grows by 3% a step while behind the ramp, else shrinks (lab)"
    )
    memory: bool = option(True, "train memories; --no-memory is pruning only")
    rank: int = option(24, "LoRA rank (paper: 256 for 3B)")
    alpha: float = option(24.0, "LoRA alpha; the update is scaled by alpha / rank (paper: 128 / 256)")
    kv_tokens: int = option(16, "memory tokens per block (paper: 256)")
    kv_init: str = option(
        "text", "start of the KV memory: the domain's own text (lab), or N(0, 0.02) (paper)", ("text", "normal")
    )
    objective: str = option(
        "kl", "what is learned: KL to the teacher (paper), next token, half of each", ("kl", "next-token", "blend")
    )
    top: int = option(100, "logits of the teacher that are kept (paper)")
    tail: str = option(
        "bucket", "the teacher's mass outside of them, see koff.divergence (lab)", ("bucket", "renormalise", "drop")
    )
    steps: int = option(500, "training steps, one batch of one domain each")
    batch: int = option(4, "sequences per batch (paper: 2)")
    seq_len: int = option(256, "tokens per sequence (paper: 512)")
    lora_rate: float = option(2e-3, "AdamW rate of the LoRA matrices (lab; paper: 1e-5 over 150M tokens)")
    gate_rate: float = option(2e-2, "AdamW rate of log alpha (paper: 1e-2 over many more steps)")
    kv_rate: float = option(3e-3, "AdamW rate of the KV memory (lab; paper: 1e-2)")
    decay: float = option(0.5, "last share of the steps, in which the memories' rates fall linearly to zero")
    seed: int = option(0, "seed of data order, gate noise and initial LoRA")
    device: str = option("auto", "cpu, cuda or mps; auto takes cuda where there is one")
    dtype: str = option(
        "auto",
        "of the frozen weights; auto: bfloat16 where the processor multiplies it, else float32",
        ("auto", "bfloat16", "float32"),
    )
    checkpointing: bool = option(False, "recompute the student's blocks in backward: less memory, a third more time")
    eval_windows: int = option(12, "held-out windows per domain in the report")
    save_every: int = option(200, "steps between checkpoints")

    def __post_init__(self):
        for name, low, high in [("sparsity", 0, 0.99), ("ramp", 0.01, 1), ("fix_mask", 0, 0.9), ("decay", 0, 1)]:
            if not low <= getattr(self, name) <= high:
                raise BadInput(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; give a number from {low} to {high}."
                )
        for name, low in [
            ("steps", 1),
            ("batch", 1),
            ("seq_len", 8),
            ("blocks", 1),
            ("top", 1),
            ("rank", 0),
            ("kv_tokens", 0),
            ("save_every", 1),
            ("eval_windows", 1),
            ("retention_every", 1),
            ("fisher_sequences", 1),
        ]:
            if getattr(self, name) < low:
                raise BadInput(f"--{name.replace('_', '-')} is {getattr(self, name)}; give at least {low}.")
        if self.beta <= 0 or self.penalty <= 0:
            raise BadInput("--beta and --penalty have to be above 0.")
        if self.memory and not (self.rank or self.kv_tokens):
            raise BadInput("--rank 0 with --kv-tokens 0 leaves no memory; say --no-memory if that is what you want.")
        if self.ramp > 1 - self.fix_mask:
            raise BadInput(
                "--ramp and --fix-mask overlap: the mask would be fixed before its target is reached; their sum is at most 1."
            )


PRESETS = {
    "handbook": {},
    "quick": {"steps": 30, "eval_windows": 2, "fisher_sequences": 12},
    "smollm2": {
        "blocks": 18,
        "sparsity": 0.12,
        "rank": 64,
        "alpha": 64.0,
        "kv_tokens": 64,
        "steps": 1000,
        "batch": 2,
        "seq_len": 256,
    },
}


def pick_dtype(name, device):
    if name != "auto":
        return getattr(torch, name)
    native = device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())
    return torch.bfloat16 if native else torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# One step.


class Trainer:
    """The trainables of a run, float32, and one optimizer over them in three groups. The model itself is frozen."""

    def __init__(self, model, s, domains):
        c, device = model.config, model.embed_tokens.weight.device
        if s.blocks > c.num_hidden_layers:
            raise BadInput(f"--blocks is {s.blocks}, the model has {c.num_hidden_layers} blocks; give at most that.")
        self.model, self.s, self.first, self.domains = model, s, c.num_hidden_layers - s.blocks, list(domains)
        self.gates = koff.Gates(c, self.first, s.granularity, s.beta)
        self.gates.check_target(s.sparsity, s.count)
        self.share = self.gates.uniform_share(s.sparsity, s.count)
        self.gates.to(device)
        torch.manual_seed(s.seed)
        made = {d: koff.Memory(c, self.first, s.rank, s.alpha, s.kv_tokens) for d in self.domains} if s.memory else {}
        self.memories = MemoryDict(made).to(device)
        lora = [p for m in made.values() for part in (m.lora_a, m.lora_b) for p in part.values()]
        kv = [p for m in made.values() for p in (m.keys, m.values) if p is not None]
        groups = [
            ("lora", lora, s.lora_rate),
            ("gates", list(self.gates.parameters()), s.gate_rate),
            ("kv", kv, s.kv_rate),
        ]
        groups = [{"params": params, "lr": rate, "rate": rate, "name": name} for name, params, rate in groups if params]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        self.penalty = torch.tensor(s.penalty, device=device)
        self.mask = None  # the final one, once it is fixed

    def initialise(self, text):
        """The two starts that look at data: gates by Fisher score, KV memory from text. `text`: domain -> ids."""
        s, device = self.s, self.penalty.device
        if s.gate_init == "fisher":
            rounds = -(-s.fisher_sequences // (s.batch * len(text)))
            drawn = (batch(ids, r, s.batch, s.seq_len, s.seed + 1) for r in range(rounds) for ids in text.values())
            self.gates.spread(
                koff.fisher_scores(self.model, self.gates, (torch.from_numpy(x).to(device) for x in drawn))
            )
        if s.memory and s.kv_tokens and s.kv_init == "text":
            for domain, memory in self.memories.items():
                memory.init_from_text(
                    self.model, torch.from_numpy(text[domain][: s.kv_tokens].astype(np.int64)).to(device)
                )

    def target(self, index):
        """The ramp: what should be closed, in expectation, at step `index`."""
        return self.s.sparsity * min(1.0, (index + 1) / (self.s.ramp * self.s.steps))

    def step(self, tokens, domain, index, generator=None, retention=False):
        """One optimizer step on tokens [B, T] of `domain`. Returns (loss, expected sparsity), scalars on the device.

        Nothing here asks the device for a number, so that a GPU never waits for Python. A retention step (Eq. 2) moves
        the gates only.
        """
        s, model, last = self.s, self.model, self.model.config.num_hidden_layers
        fixed = index >= s.steps * (1 - s.fix_mask)
        if fixed and self.mask is None:
            self.mask = {
                n: m.to(tokens.device) for n, m in self.gates.final_mask(s.sparsity, s.count, s.budget).items()
            }
        for group in self.optimizer.param_groups:
            left = (s.steps - index) / max(1, s.decay * s.steps)
            group["lr"] = group["rate"] * (1.0 if group["name"] == "gates" else min(1.0, left))

        with torch.no_grad():  # the lower blocks have neither gates nor memory: teacher and student share them
            shared = model.run(model.embed_tokens(tokens), 0, self.first)
            answer = None
            if s.objective != "next-token":
                answer = koff.teacher_answer(model, model.run(shared, self.first, last).flatten(0, 1), s.top)
        z = self.gates.by_block(self.mask, shared.dtype) if fixed else self.gates.sample(shared.dtype, generator)
        with torch.set_grad_enabled(not retention):
            memory = self.memories[domain].by_block(shared.dtype) if s.memory else None
        if not (fixed and (retention or not s.memory)):  # else nothing is left to learn
            hidden = model.run(shared, self.first, last, z, memory, checkpointing=s.checkpointing)
            loss = koff.distill(model, hidden, answer, tokens, s.objective, s.tail)
            share = self.share * self.target(index) / s.sparsity if s.sparsity else 0.0
            behind = self.gates.behind(self.target(index), s.count, s.budget, share)  # Omega(z) of Eq. 1
            (loss if fixed else loss + self.penalty * behind).backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)  # None, not zero: the modules of other domains stand still
        else:
            loss = torch.zeros((), device=tokens.device)
        with torch.no_grad():
            expected = self.gates.sparsity(count=s.count)
            late = expected < self.target(index) - 0.002
            self.penalty.mul_(torch.where(late, 1.03, 1 / 1.03)).clamp_(1.0, 1e6)
        return loss.detach(), expected

    def state(self):
        parts = {"gates": self.gates, "memories": self.memories, "optimizer": self.optimizer}
        return {name: part.state_dict() for name, part in parts.items()} | {"penalty": self.penalty}

    def restore(self, state):
        for name in ("gates", "memories", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.penalty.copy_(state["penalty"])


class MemoryDict(nn.Module):
    """Domain -> Memory. (nn.ModuleDict refuses names such as `keys` or `a.b`, which a domain may well have.)"""

    def __init__(self, memories):
        super().__init__()
        self.names = list(memories)
        self.list = nn.ModuleList(memories.values())

    def __getitem__(self, domain):
        return self.list[self.names.index(domain)]

    def items(self):
        return zip(self.names, self.list, strict=True)


# ---------------------------------------------------------------------------------------------------------------------
# The loop.


def schedule(index, domains, seed):
    """(domain, number of its batch) of step `index`: every round visits each domain once, in a new order."""
    turn, place = divmod(index, len(domains))
    return domains[np.random.default_rng([seed, turn]).permutation(len(domains))[place]], turn


def train(s, out):
    """Train, save and evaluate the run `s` in the folder `out`. Returns False if Ctrl-C stopped it."""
    device = torch.device(s.device if s.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = Tokenizer.from_folder(s.model)
    model = load(s.model, pick_dtype(s.dtype, device), device)
    cache = Path(out).parent / "tokens"
    eos = model.config.eos_token_ids[0] if model.config.eos_token_ids else None
    domains = load_domains(s.data, tokenizer, cache, separator=eos)
    if len(domains) < 2:
        raise BadInput(
            f"{s.data} holds one domain only ({next(iter(domains))}); knowledge is offloaded to at least two."
        )
    for name, split in domains.items():
        check_length(name, split, s.seq_len, s.batch)
    retention = load_text(s.retention, tokenizer, cache, separator=eos) if s.retention else None
    if retention:
        check_length("the retention text", retention, s.seq_len, s.batch)
    text = {name: split.train for name, split in domains.items()}
    trainer, start, seconds = Trainer(model, s, domains), 0, 0.0

    out.mkdir(parents=True, exist_ok=True)
    with atomic(out / "settings.json") as partial:
        partial.write_text(json.dumps(asdict(s), indent=1) + "\n")
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        trainer.restore(state)
        start, seconds = state["step"], state["seconds"]
        print(f"continuing {out} at step {start}")
    else:
        trainer.initialise(text)

    stop = []
    previous = signal.signal(signal.SIGINT, lambda *_: stop.append(True))  # never in the middle of an optimizer step
    begun, bar = time.time() - seconds, tqdm(total=s.steps, initial=start, desc=out.name)
    try:
        for index in range(start, s.steps):
            domain, turn = schedule(index, trainer.domains, s.seed)
            generator = torch.Generator(device).manual_seed(s.seed * 1_000_003 + index)
            tokens = torch.from_numpy(batch(text[domain], turn, s.batch, s.seq_len, s.seed)).to(device)
            loss, expected = trainer.step(tokens, domain, index, generator)
            if retention and (index + 1) % s.retention_every == 0:
                general = batch(retention.train, index // s.retention_every, s.batch, s.seq_len, s.seed)
                anyone = trainer.domains[np.random.default_rng([s.seed, index, 1]).integers(len(domains))]
                trainer.step(torch.from_numpy(general).to(device), anyone, index, generator, retention=True)
            bar.update()
            if (index + 1) % 10 == 0 or index + 1 == s.steps:
                other = trainer.gates.sparsity(count="paper" if s.count == "physical" else "physical")
                both = f"{expected.item():.3f}/{other.item():.3f}"
                rate = s.batch * s.seq_len * (index + 1) / (time.time() - begun)
                bar.set_postfix_str(f"loss {loss.item():.3f}, expected sparsity {both}, {rate:,.0f} tokens/s")
            if stop or (index + 1) % s.save_every == 0 or index + 1 == s.steps:
                with atomic(checkpoint) as partial:
                    torch.save(trainer.state() | {"step": index + 1, "seconds": time.time() - begun}, partial)
            if stop and index + 1 < s.steps:
                bar.close()
                print(f"\nstopped after step {index + 1}; the same command continues")
                return False
    finally:
        signal.signal(signal.SIGINT, previous)
    bar.close()
    save(trainer, tokenizer, text, out)
    import eval as evaluation  # eval.py reads what `save` wrote, as it would for any finished run

    evaluation.evaluate(out, seconds=time.time() - begun)
    return True


@torch.no_grad()
def save(trainer, tokenizer, text, out):
    """Close the gates, compact, and write backbone, modules, gates and router."""
    s = trainer.s
    mask = trainer.gates.final_mask(s.sparsity, s.count, s.budget)
    small = koff.compact(trainer.model, mask, trainer.first)
    fingerprint = koff.save_backbone(out / "backbone", small, Path(s.model, "tokenizer.json"))
    koff.save_gates(out / "gates.safetensors", trainer.gates, mask)
    for domain, memory in trainer.memories.items():
        blocks = koff.compact_memory(memory.by_block(trainer.model.head.dtype), mask, trainer.first)
        koff.save_module(out / "modules" / f"{domain}.safetensors", blocks, fingerprint)
    koff.save_router(out / "router.safetensors", koff.Router.fit(text))


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="handbook", help="named settings; flags override them")
    parser.add_argument("--out", type=Path, help="run folder [out/<preset>]")
    parser.add_argument("--fresh", action="store_true", help="start again, whatever the run folder holds")
    for f in fields(Settings):
        assert f.default is not MISSING
        kind = (
            {"action": argparse.BooleanOptionalAction}
            if isinstance(f.default, bool)
            else {"type": type(f.default), "choices": f.metadata["choices"]}
        )
        shown = Path(f.default).name if f.name in ("model", "data") else f.default
        parser.add_argument(
            "--" + f.name.replace("_", "-"), default=None, help=f"{f.metadata['help']} [{shown}]", **kind
        )
    given = vars(parser.parse_args(argv))
    preset, out, fresh = given.pop("preset"), given.pop("out"), given.pop("fresh")
    settings = Settings(**{**PRESETS[preset], **{name: value for name, value in given.items() if value is not None}})
    return settings, out or Path("out", preset), fresh


def main(argv=None):
    try:
        settings, out, fresh = parse(argv)
        before = out / "settings.json"
        if out.exists() and not before.exists() and any(out.iterdir()):
            raise BadInput(f"{out} holds something that is not a run; name another folder with --out.")
        if before.exists() and not fresh:
            old = json.loads(before.read_text())
            changed = [name for name, value in asdict(settings).items() if old.get(name) != value]
            if changed:
                raise BadInput(
                    f"{out} holds another run (--{changed[0].replace('_', '-')} differs); name another folder with --out, or --fresh to start again."
                )
            if (out / "results.json").exists():
                print((out / "report.md").read_text() + f"\n{out} is finished; --fresh trains it again")
                return 0
        if fresh:
            (out / "checkpoint.pt").unlink(missing_ok=True)
        return 0 if train(settings, out) else 130
    except BadInput as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
