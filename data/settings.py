"""Every setting of a run with its default (`Settings`), and presets, which are named settings."""

import json
import math
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import koff
from data import MALFORMED, BadInput, atomic, objectives, penalties, scores  # noqa: F401 (they add to the registries of koff.py)

ROOT = Path(__file__).resolve().parent.parent
PATHS = ("model", "data", "retention", "repair")  # settings that can name a file or a folder
LORA = {  # which projections get a LoRA. `down` is in all: for it alone LoRA has a closed form (data/solve.py).
    "kv+mlp": ("k", "v", "gate", "up", "down"),
    "mlp": ("gate", "up", "down"),
    "down": ("down",),
}
MOST = 10**9  # upper bound of every number without one of its own


def option(default, text, choices=None, low=None, high=MOST):
    """A field of `Settings`: its default, its line in --help, its bounds. choices: names, or a registry of koff.py."""
    return field(default=default, metadata={"help": text, "choices": choices, "low": low, "high": high})


def flag(name):
    """The command line's spelling of a setting."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class Settings:
    """Every choice of a run; the command line is made of it. "paper" marks the paper's values, "measured" our own."""

    # The model and its text
    model: str = option(
        str(ROOT / "data/base"),
        "pretrained model: a folder (Hugging Face layout, safetensors) or owner/name on the Hub",
    )
    data: str = option(str(ROOT / "data/handbook"), "folder with one <domain>.txt, .jsonl or sub-folder per domain")
    domains: str = option("", "domains to use: comma-separated names, or how many; empty: all")
    text_share: float = option(1.0, "share of the training text that is used", low=0.001, high=1)

    # The mask
    blocks: int = option(0, "number of upper blocks with gates and memories; 0: all (paper: 16 or 18 of 28)", low=0)
    sparsity: float = option(0.25, "share of all parameters to remove (paper: 0.12 of 3B)", low=0, high=0.99)
    count: str = option(
        "physical", "physical: parameters missing from the backbone; paper: closed channels x fan-in", koff.COUNTS
    )
    gated: str = option(
        "kv+mlp", "projections with gates (paper: kv+mlp); without mlp only a small share can be removed", koff.GATED
    )
    granularity: str = option("neuron", "gate whole MLP neurons, or each projection (paper)", ("neuron", "projection"))
    gate_family: str = option("hard-concrete", "distribution of the gates", koff.FAMILIES)
    gate_init: str = option("surgeon", "initial log alpha: ranked by a score, or equal for all gates", koff.SCORES)
    fisher_sequences: int = option(48, "sequences of the calibration pass for the score (measured)", low=1)
    multiple: int = option(
        8, "round the neurons kept in a block to a multiple of this (only with --granularity neuron)", low=1
    )
    beta: float = option(
        2 / 3,
        "temperature of the gates (Louizos; at the paper's 2, expected and actual sparsity differ)",
        low=0.05,
        high=10,
    )
    beta_end: float = option(0.0, "temperature at the end of gate learning; 0: constant", low=0)
    gate_share: float = option(
        0.0, "share of the steps, from the start, in which the gates learn; 0: the score decides", low=0, high=1
    )
    rise: float = option(
        0.8, "share of the gates' steps in which the target rises to --sparsity; 0: at once", low=0, high=1
    )
    constraint: str = option(
        "scaled", "penalty: hinge (fixed lambda), scaled (adaptive lambda) or lagrangian", koff.PENALTIES
    )
    penalty: float = option(
        20.0, "initial lambda (measured; paper: 60); with lagrangian, lambda_2 starts at three times this", low=1
    )

    # The memory modules
    memory: bool = option(True, "train memory modules; --no-memory prunes only")
    memory_kind: str = option("lora+kv", "kind of memory", koff.MEMORIES)
    memory_blocks: int = option(0, "number of upper blocks with memories; 0: same as --blocks", low=0)
    lora: str = option("down", "projections with LoRA (paper: kv+mlp)", LORA)
    rank: int = option(77, "LoRA rank (paper: 256 for 3B); 0: no LoRA", low=0)
    alpha: float = option(77.0, "LoRA alpha; the update is scaled by alpha / rank (paper: 128 / 256)", low=0)
    kv_tokens: int = option(16, "memory tokens per block (paper: 256); 0: none", low=0)
    kv_init: str = option(
        "text", "start of the KV memory: text of the domain, or N(0, 0.02) (paper)", ("text", "normal")
    )
    kv_passages: int = option(
        16, "candidate passages from which a KV memory may start; 1: the beginning of the text", low=1
    )
    kv_places: int = option(
        32, "places of 32 tokens in the text on which they are compared; 0: 64 tokens of each candidate's part", low=0
    )
    order: str = option(
        "joint",
        "joint: gates and memories together (paper); prune-first: memories afterwards",
        ("joint", "prune-first"),
    )

    # Least squares, once the mask is final
    repair: str = option(
        "domains",
        "mend o_proj and down of the backbone on the domains' text, or on a text of your own; none: frozen (paper)",
    )
    repair_tokens: int = option(24576, "tokens for the repair, in all", low=1)
    solve_tokens: int = option(16384, "tokens per domain for least-squares LoRA on down; 0: skip this step", low=0)
    curvature_tokens: int = option(
        1024, "tokens per domain for the measure in which a LoRA's error is least; 0: plain squares", low=0
    )
    solve_ridge: float = option(
        0.003, "ridge of least squares, relative to the mean diagonal of H^T H (measured)", low=1e-6, high=1e6
    )

    # The loss
    objective: str = option(
        "kl",
        "kl, kl-renormalise, kl-drop: KL to the teacher (paper), three treatments of tokens outside the top K; "
        "next-token: language modelling; blend: the mean of kl and next-token",
        koff.OBJECTIVES,
    )
    teacher_context: bool = option(True, "let the teacher read the text from which a KV memory starts")
    top: int = option(100, "K, the number of the teacher's top tokens in the KL (paper)", low=1)
    retention: str = option("", 'general text for Eq. 2; "domains": a mix of the domains\' own text; empty: none')
    retention_every: int = option(20, "steps between retention batches (paper)", low=1)
    retention_batch: int = option(0, "sequences per retention batch; 0: same as --batch", low=0)

    # The training
    steps: int = option(36, "training steps, each on one batch of one domain; 0: none", low=0)
    focus: int = option(0, "extra steps per round for the domain with the highest loss (measured)", low=0)
    batch: int = option(4, "sequences per batch (paper: 2)", low=1)
    seq_len: int = option(256, "tokens per sequence (paper: 512)", low=8)
    lora_rate: float = option(2e-4, "AdamW rate of LoRA (measured; paper: 1e-5 over 150M tokens)", low=0, high=10)
    gate_rate: float = option(0.1, "AdamW rate of log alpha (measured; paper: 1e-2)", low=0, high=10)
    kv_rate: float = option(1e-3, "AdamW rate of the KV memory (measured; paper: 1e-2)", low=0, high=10)
    decay: float = option(0.5, "final share of the steps, over which the LoRA and KV rates fall to 0", low=0, high=1)
    seed: int = option(0, "seed of data order, gate noise and LoRA's start", low=0, high=2**63 - 1)

    # The machine
    device: str = option("auto", "cpu or cuda; auto: cuda if there is one")
    dtype: str = option(
        "auto",
        "dtype of the frozen weights; auto: bfloat16 if the device is fast at it",
        ("auto", "bfloat16", "float32"),
    )
    checkpointing: bool = option(False, "recompute the student in backward: less memory, more time")
    offload: bool = option(False, "keep idle modules and their AdamW state off the GPU")
    save_every: int = option(200, "steps between checkpoints", low=1)

    # The report
    eval_windows: int = option(12, "held-out windows per domain in the report", low=1)
    eval_len: int = option(256, "tokens in a held-out window", low=8)

    def __post_init__(self):
        for f in fields(self):
            check_value(f, getattr(self, f.name))
        # Each value may be fine by itself, and the run impossible or void: say which two contradict each other.
        lora_learns = self.rank and self.lora_rate
        kv_learns = self.kv_tokens and self.kv_rate
        steps_remain = self.gate_steps < self.steps
        memories_change = steps_remain or not self.steps or (self.rank and self.solve_tokens)
        contradictions = {
            "--rank 0 and --kv-tokens 0 contradict --memory: nothing is left of it; say --no-memory.":
                self.memory and not (self.rank or self.kv_tokens),
            "--rank and --alpha 0 contradict each other: LoRA would add nothing; say --rank 0.":
                self.memory and self.rank and not self.alpha,
            "--lora-rate 0 or --kv-rate 0 leaves nothing of the memories to learn; say --steps 0, or --no-memory.":
                self.memory and self.steps and not (lora_learns or kv_learns),
            "--top 1 contradicts --objective kl-renormalise: a single outcome always has probability one.":
                self.top == 1 and self.objective == "kl-renormalise",
            "--beta-end contradicts --beta: the temperature falls; give less.":
                self.beta_end > self.beta,
            "--order prune-first contradicts --gate-share: the memories get no step to learn in; lower it.":
                self.order == "prune-first" and not memories_change,
            "--no-memory contradicts --order prune-first, which trains the memories afterwards.":
                not self.memory and self.order == "prune-first",
            "--no-memory contradicts --gate-rate 0: nothing would learn; say --steps 0.":
                not self.memory and self.steps and not self.gate_rate,
            f"--retention contradicts --retention-every: the gates learn for {self.gate_steps} steps only; lower it.":
                self.retention and self.steps and self.retention_every > self.gate_steps,
            "--retention contradicts --gate-rate 0: it moves gates only.":
                self.retention and not self.gate_rate,
            "--kv-tokens is larger than --seq-len; a memory longer than the text is no memory.":
                self.kv_tokens > self.seq_len,
        }  # fmt: skip
        for sentence, contradicts in contradictions.items():
            if contradicts:
                raise BadInput(sentence)

    @property
    def gate_steps(self):
        """The number of steps in which the gates learn; then the mask is final."""
        return math.ceil(self.steps * self.gate_share)

    @property
    def kv_from_text(self):
        """Whether there are KV memories that start from text."""
        return self.memory and self.kv_tokens > 0 and self.kv_init == "text"

    def first_blocks(self, layers):
        """(first gated block, first block with a memory, split) of a model with that many layers.

        Blocks below `split` are the same in teacher and student.
        """
        first_gated = layers - self.blocks if self.blocks else 0
        first_memory = layers - self.memory_blocks if self.memory_blocks else first_gated
        split = min(first_gated, first_memory) if self.memory else first_gated
        return first_gated, first_memory, split

    @property
    def solves(self):
        """Whether least squares solves for a part of each module."""
        return self.memory and self.rank > 0 and self.solve_tokens > 0

    def new_gates(self, config):
        """The run's gates on a model of that config, at their start."""
        first_gated, _, _ = self.first_blocks(config.num_hidden_layers)
        return koff.Gates(config, first_gated, self.granularity, self.beta, self.gated, self.gate_family)

    def new_module(self, config):
        """A memory module of the run, at its random start."""
        _, first_memory, _ = self.first_blocks(config.num_hidden_layers)
        kind = koff.MEMORIES[self.memory_kind]
        return kind(config, first_memory, self.rank, self.alpha, self.kv_tokens, LORA[self.lora])

    def to_file(self, path):
        """Write the settings as JSON."""
        with atomic(path) as partial:
            partial.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def from_file(cls, path):
        """The settings that a run was saved with, also by an earlier version or a fork."""
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            if "model" not in saved:  # other programs, too, have a settings.json
                raise ValueError("it names no model")
            return cls.from_saved(saved)
        except FileNotFoundError:
            raise BadInput(f"{path} does not exist; name the folder of a run that train.py made.") from None
        except (OSError, BadInput, *MALFORMED) as error:
            raise BadInput(f"{path} cannot be used by this version ({error}); train in another folder.") from None

    @classmethod
    def from_saved(cls, saved):
        """Settings from a saved dict. Missing names get their defaults, earlier names are read as today's."""
        values = dict(saved)
        for name, before in NOT_THERE.items():
            values.setdefault(name, before)
        for name, today in EARLIER.items():
            if name in saved:
                del values[name]
                values |= today(saved)
        unknown = values.keys() - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"it has the unknown setting {min(unknown)}")
        return cls(**values)


def earlier_constraint(saved):
    """Before, a switch said whether lambda adapts, and only the kind "progressive" let the target rise."""
    if saved["constraint"] == "lagrangian":
        return {}
    constraint = "scaled" if saved["scaled"] else "hinge"
    rise = {} if saved["constraint"] == "progressive" else {"rise": 0.0}
    return {"constraint": constraint, **rise}


def earlier_ramp(saved):
    """Before, the ramp was a share of all steps."""
    gate_share = saved["gate_share"] if "gate_share" in saved else 1 - saved["fix_mask"]
    return {"rise": min(1.0, saved["ramp"] / gate_share) if gate_share else 0.0}


# Settings that were not there before, as runs without them were made.
NOT_THERE = {
    "repair": "none", "repair_tokens": 1, "curvature_tokens": 0, "kv_passages": 1,
    "kv_places": 0,
}  # fmt: skip

# Settings that have another name or form by now: {earlier name: all saved values -> today's settings}.
EARLIER = {
    "text": lambda saved: {"text_share": saved["text"]},
    "fix_mask": lambda saved: {"gate_share": round(1 - saved["fix_mask"], 9)},
    "ramp": earlier_ramp,
    "scaled": earlier_constraint,
    "tail": lambda saved: {} if saved["tail"] == "bucket" else {"objective": f"{saved['objective']}-{saved['tail']}"},
    "compile": lambda saved: {},
    "placement": lambda saved: {},
}


def absolute(given):
    """Given settings {name: value} with absolute paths: a run may be looked at from another folder."""
    found = {}
    for name in PATHS:
        value = given.get(name)
        # Otherwise it is no path but, say, a Hub id.
        if value and value not in ("domains", "none") and Path(value).exists():
            found[name] = os.path.abspath(value)  # links stay: their targets may have another name
    return {**given, **found}


# Each group of settings in --help begins with this field.
GROUPS = {
    "model": "the model and its text",
    "blocks": "the mask",
    "memory": "the memory modules",
    "repair": "least squares",
    "objective": "the loss",
    "steps": "the training",
    "device": "the machine",
    "eval_windows": "the report",
}


def check_value(f, value):
    """BadInput unless the value of a field is within its bounds and among its choices.

    A saved settings.json is checked here too, where argparse has not seen it.
    """
    low = f.metadata["low"]
    high = f.metadata["high"]
    kind = type(f.default)
    if type(value) is not kind and (kind, type(value)) != (float, int):
        raise BadInput(f"{flag(f.name)} is {value!r}; give a {kind.__name__}.")
    choices = f.metadata["choices"]
    if low is not None and not low <= value <= high:  # NaN is refused too
        given = f"at least {low}" if value < low and high == MOST else f"{low} to {high}"
        raise BadInput(f"{flag(f.name)} is {value}; give {given}.")
    if choices and value not in choices:
        raise BadInput(f"{flag(f.name)} is {value!r}; give one of {', '.join(choices)}.")


# The best recipe that we know for a real model (measured on SmolLM2-135M).
BEST = dict(
    sparsity=0.12, rank=68, alpha=68.0, kv_tokens=64, kv_passages=8, repair_tokens=98304, solve_tokens=32768,
    curvature_tokens=2048, solve_ridge=0.03, steps=240, focus=6, batch=2, lora_rate=6e-4, eval_len=512,
)  # fmt: skip

# 150M tokens. Where the paper leaves something open, our choices are: log alpha starts at 3, lambda is scaled, the mask
# is frozen at the end, the top K are renormalised. The modules are only trained.
PAPER = dict(
    blocks=16, sparsity=0.12, count="paper", granularity="projection", gate_init="constant", multiple=1, beta=2.0,
    constraint="scaled", rise=0.0, penalty=60.0, gate_share=1.0, lora="kv+mlp", rank=256, alpha=128.0, kv_tokens=256,
    kv_init="normal", kv_passages=1, repair="none", solve_tokens=0, curvature_tokens=0,
    teacher_context=False, objective="kl-renormalise", steps=146_500, batch=2, seq_len=512, lora_rate=1e-5,
    gate_rate=1e-2, kv_rate=1e-2, decay=0.0, eval_len=512,
)  # fmt: skip

LARGE = BEST | dict(  # the paper's module and batch; steps and LoRA's rate are a guess: none of these was run here
    blocks=16, rank=256, alpha=128.0, kv_tokens=256, seq_len=512, steps=20_000, lora_rate=2e-4
)  # fmt: skip

PRESETS = {
    "handbook": {},
    "quick": dict(steps=24, eval_windows=2, fisher_sequences=12, kv_passages=4, repair_tokens=6144, solve_tokens=4096),
    "solved": dict(steps=0, rank=40, alpha=40.0, kv_passages=8, repair_tokens=12288, solve_tokens=5120),
    "best": BEST,
    "paper": PAPER,
    "paper-matched": PAPER | dict(count="physical"),
    "smollm2-135m": BEST | dict(model="HuggingFaceTB/SmolLM2-135M"),
    "smollm2-360m": BEST | dict(model="HuggingFaceTB/SmolLM2-360M", rank=104, alpha=104.0),
    "qwen2.5-0.5b": BEST | dict(model="Qwen/Qwen2.5-0.5B", rank=112, alpha=112.0),
    "qwen3-0.6b": BEST | dict(model="Qwen/Qwen3-0.6B", rank=168, alpha=168.0),
    "qwen2.5-3b": LARGE | dict(model="Qwen/Qwen2.5-3B", blocks=20),
    "llama-3.2-3b": LARGE | dict(model="meta-llama/Llama-3.2-3B"),
    "llama-3.1-8b": LARGE | dict(model="meta-llama/Llama-3.1-8B", batch=1, checkpointing=True),
}
