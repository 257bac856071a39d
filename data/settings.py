"""What a run can be told: every setting with its default (`Settings`), and presets, which are named settings."""

import json
import math
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from data import BadInput, atomic
from koff import GATED, LORA, OBJECTIVES, SCORES, TAILS

ROOT = Path(__file__).resolve().parent.parent
PATHS = ("model", "data", "retention")  # settings that can name a file or a folder
CONSTRAINTS = ("progressive", "hinge", "lagrangian")


MOST = 10**9  # of any number that has no bound of its own


def option(default, text, *choices, low=None, high=MOST):
    """A field of `Settings`: its default, its line in --help, what it can be."""
    return field(default=default, metadata={"help": text, "choices": choices or None, "low": low, "high": high})


def flag(name):
    """How the command line spells a setting."""
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
    domains: str = option("", "some of the domains there: names with commas, or how many; empty: all")
    text: float = option(1.0, "share of the training text that is used", low=0.001, high=1)

    # The mask
    blocks: int = option(0, "how many upper blocks carry gates and memories; 0: all (paper: 16 or 18 of 28)", low=0)
    sparsity: float = option(0.25, "share of all parameters to remove (paper: 0.12 of 3B)", low=0, high=0.99)
    count: str = option("physical", "what that share counts: parameters gone, or the paper's", "physical", "paper")
    gated: str = option("kv+mlp", "projections with gates (paper: kv+mlp); without mlp little can go", *GATED)
    granularity: str = option("neuron", "gate MLP neurons, or each projection (paper)", "neuron", "projection")
    gate_init: str = option("fisher", "start of log alpha: by a score, or 3 for every gate", *SCORES, "constant")
    fisher_sequences: int = option(48, "sequences of the calibration pass for it (measured)", low=1)
    multiple: int = option(8, "a block keeps a multiple of this many neurons (granularity neuron)", low=1)
    beta: float = option(
        2 / 3, "temperature of the gates (Louizos; at the paper's 2 the cost misleads)", low=0.05, high=10
    )
    beta_end: float = option(0.0, "temperature to which it falls while gates learn; 0: it does not", low=0)
    ramp: float = option(0.12, "share of the steps in which the target rises to --sparsity", low=0.01, high=1)
    fix_mask: float = option(0.85, "last share of the steps, under the final 0/1 mask (measured)", low=0, high=0.99)
    constraint: str = option("progressive", "hinge with a rising target, or at once, or lagrangian", *CONSTRAINTS)
    penalty: float = option(20.0, "first lambda (measured; paper: 60); lagrangian: a third of lambda_2", low=1)
    scaled: bool = option(True, "lambda x 1.03 a step while behind and not moving, / 1.03 at the target")

    # The memory modules
    memory: bool = option(True, "train memory modules; --no-memory prunes only")
    memory_blocks: int = option(0, "how many carry memories, if it is another number; 0: as --blocks; -1: all", low=-1)
    lora: str = option("kv+mlp", "projections with LoRA (paper: kv+mlp)", *LORA)
    rank: int = option(40, "LoRA rank (paper: 256 for 3B); 0: no LoRA", low=0)
    alpha: float = option(40.0, "LoRA alpha; the update is scaled by alpha / rank (paper: 128 / 256)", low=0)
    kv_tokens: int = option(16, "memory tokens per block (paper: 256); 0: none", low=0)
    kv_init: str = option("text", "start of the KV memory: text of the domain, or N(0, 0.02) (paper)", "text", "normal")
    kv_passages: int = option(1, "passages of that text that are tried; 1: its beginning", low=1)
    order: str = option("joint", "gates and memories together (paper), or memories after", "joint", "prune-first")

    # Memories by least squares, once the mask is fixed
    solve_tokens: int = option(16384, "tokens a domain to solve for LoRA on down, at the final mask; 0: do not", low=0)
    solve_ridge: float = option(0.01, "ridge of it, over the mean of the diagonal (measured)", low=1e-6, high=1e6)

    # The loss
    objective: str = option("kl", "KL to the teacher (paper), next token, or half of each", *OBJECTIVES)
    teacher_context: bool = option(True, "in a step the teacher, too, has read the text that a KV memory starts from")
    top: int = option(100, "how many outcomes of the teacher are kept (paper)", low=1)
    tail: str = option("bucket", "the mass outside them, see koff.TAILS", *TAILS)
    retention: str = option("", "general text for retention batches (Eq. 2); domains: a mix of theirs; empty: none")
    retention_every: int = option(20, "steps between retention batches (paper)", low=1)
    retention_batch: int = option(0, "sequences in one of them; 0: as --batch", low=0)

    # The training
    steps: int = option(250, "training steps, each on one batch of one domain; 0: none", low=0)
    focus: int = option(0, "extra steps a round for the domain furthest from the teacher (measured)", low=0)
    batch: int = option(4, "sequences per batch (paper: 2)", low=1)
    seq_len: int = option(256, "tokens per sequence (paper: 512)", low=8)
    lora_rate: float = option(2e-3, "AdamW rate of LoRA (measured; paper: 1e-5 over 150M tokens)", low=0, high=10)
    gate_rate: float = option(0.1, "AdamW rate of log alpha (measured; paper: 1e-2)", low=0, high=10)
    kv_rate: float = option(3e-3, "AdamW rate of the KV memory (measured; paper: 1e-2)", low=0, high=10)
    decay: float = option(0.5, "last share of the steps, in which LoRA's and KV's rates fall to 0", low=0, high=1)
    seed: int = option(0, "seed of data order, gate noise and first LoRA", low=0, high=2**63 - 1)

    # The machine
    device: str = option("auto", "cpu or cuda; auto: cuda where there is one")
    dtype: str = option("auto", "of the frozen weights; auto: bfloat16 if fast here", "auto", "bfloat16", "float32")
    checkpointing: bool = option(False, "recompute the student in backward: less memory, more time")
    offload: bool = option(False, "keep the modules that are not at work, and their AdamW state, off the GPU")
    compile: bool = option(False, "torch.compile the blocks; a minute first, more with many blocks")
    save_every: int = option(200, "steps between checkpoints", low=1)

    # The report
    eval_windows: int = option(12, "held-out windows per domain in the report", low=1)
    eval_len: int = option(256, "their length in tokens", low=8)

    def __post_init__(self):
        for f in fields(self):
            check_value(f, getattr(self, f.name))
        # Each value may be fine by itself and the run impossible, or void: say which two contradict each other.
        gates_learn = self.gate_steps
        lora_learns = self.rank and self.lora_rate
        kv_learns = self.kv_tokens and self.kv_rate
        steps_remain = gates_learn < self.steps or (self.fix_mask and not self.steps)  # of none all remain
        memories_change = steps_remain or (self.rank and self.solve_tokens)
        contradictions = {
            "--rank 0 and --kv-tokens 0 contradict --memory: nothing is left of it; say --no-memory.":
                self.memory and not (self.rank or self.kv_tokens),
            "--rank and --alpha 0 contradict each other: LoRA would add nothing; say --rank 0.":
                self.memory and self.rank and not self.alpha,
            "--lora-rate 0 or --kv-rate 0 leaves nothing of the memories to learn; say --steps 0, or --no-memory.":
                self.memory and self.steps and not (lora_learns or kv_learns),
            "--top 1 contradicts --tail renormalise: a single outcome has probability one, whatever the student says.":
                self.top == 1 and self.tail == "renormalise",
            "--beta-end contradicts --beta: the temperature falls; give less.":
                self.beta_end > self.beta,
            "--ramp and --fix-mask contradict each other: the mask would be fixed during the ramp.":
                self.constraint != "hinge" and self.ramp + self.fix_mask > 1,  # the plain hinge has no ramp
            "--order prune-first contradicts --fix-mask: it leaves no step for the memories to learn in; raise it.":
                self.order == "prune-first" and not memories_change,
            "--no-memory contradicts --order prune-first, which trains the memories afterwards.":
                not self.memory and self.order == "prune-first",
            "--no-memory contradicts --gate-rate 0: nothing would learn; say --steps 0.":
                not self.memory and self.steps and not self.gate_rate,
            f"--retention contradicts --retention-every: the gates learn for {gates_learn} steps only; lower it.":
                self.retention and self.steps and self.retention_every > gates_learn,
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
        """How many of the steps come before the mask is fixed."""
        return math.ceil(self.steps * (1 - self.fix_mask))

    @property
    def kv_from_text(self):
        """Whether there are KV memories that start from text."""
        return self.memory and self.kv_tokens > 0 and self.kv_init == "text"

    def first_blocks(self, layers):
        """(first gated block, first with a memory, split): blocks below `split` are the teacher's, unchanged."""
        first_gated = layers - self.blocks if self.blocks else 0
        if self.memory_blocks == 0:
            first_memory = first_gated
        elif self.memory_blocks == -1:
            first_memory = 0
        else:
            first_memory = layers - self.memory_blocks
        # Without modules only the gates make a difference.
        split = min(first_gated, first_memory) if self.memory else first_gated
        return first_gated, first_memory, split

    def to_file(self, path):
        """Write the settings as JSON."""
        with atomic(path) as partial:
            partial.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def from_file(cls, path):
        """The settings that a run was saved with."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.keys() != {f.name for f in fields(cls)}:
                raise ValueError("it has other names")
            return cls(**values)
        except FileNotFoundError:
            raise BadInput(f"{path} does not exist; name the folder of a run that train.py made.") from None
        except (OSError, ValueError, TypeError, AttributeError, BadInput, RecursionError) as error:
            raise BadInput(f"{path} is not the settings of this version ({error}); train in another folder.") from None


def absolute(given):
    """Settings as they were given, {name: value}, but with absolute paths: a run may be looked at from elsewhere."""
    found = {}
    for name in PATHS:
        value = given.get(name)
        if value and value != "domains" and Path(value).exists():  # else it is no path: an id on the Hub, say
            found[name] = os.path.abspath(value)  # links stay: what they lead to may have another name
    return {**given, **found}


# In --help each group of settings begins with the field that is named here.
GROUPS = {
    "model": "the model and its text",
    "blocks": "the mask",
    "memory": "the memory modules",
    "solve_tokens": "memories by least squares",
    "objective": "the loss",
    "steps": "the training",
    "device": "the machine",
    "eval_windows": "the report",
}


def check_value(f, value):
    """BadInput unless the value of a field is within its bounds and among its choices.

    A folder's settings.json comes this way too: argparse alone would not be enough.
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
    sparsity=0.12, rank=36, alpha=36.0, kv_tokens=64, solve_tokens=32768, solve_ridge=0.03, steps=1600, focus=8,
    batch=2, lora_rate=1e-3, eval_len=512, kv_passages=8,
)  # fmt: skip

# 150M tokens. What it leaves open is ours: log alpha starts at 3, lambda is scaled, the mask is fixed at the end.
# Its modules are trained only.
PAPER = dict(
    blocks=16, sparsity=0.12, count="paper", granularity="projection", gate_init="constant", multiple=1, beta=2.0,
    constraint="hinge", penalty=60.0, fix_mask=0.0, rank=256, alpha=128.0, kv_tokens=256, kv_init="normal",
    solve_tokens=0, teacher_context=False, tail="renormalise", steps=146_500, batch=2, seq_len=512, lora_rate=1e-5,
    gate_rate=1e-2, kv_rate=1e-2, decay=0.0, eval_len=512,
)  # fmt: skip

LARGE = BEST | dict(  # the paper's module and batch; steps and LoRA's rate are a guess: none of these was run here
    blocks=16, rank=256, alpha=128.0, kv_tokens=256, seq_len=512, steps=20_000, lora_rate=2e-4
)  # fmt: skip

PRESETS = {
    "handbook": {},
    "quick": dict(steps=30, eval_windows=2, fisher_sequences=12),
    "solved": dict(steps=0),
    "best": BEST,
    "paper": PAPER,
    "paper-matched": PAPER | dict(count="physical"),
    "smollm2-135m": BEST | dict(model="HuggingFaceTB/SmolLM2-135M"),
    "smollm2-360m": BEST | dict(model="HuggingFaceTB/SmolLM2-360M", rank=60, alpha=60.0),
    "qwen2.5-0.5b": BEST | dict(model="Qwen/Qwen2.5-0.5B", rank=64, alpha=64.0),
    "qwen3-0.6b": BEST | dict(model="Qwen/Qwen3-0.6B", rank=64, alpha=64.0),
    "qwen2.5-3b": LARGE | dict(model="Qwen/Qwen2.5-3B", blocks=20),
    "llama-3.2-3b": LARGE | dict(model="meta-llama/Llama-3.2-3B"),
    "llama-3.1-8b": LARGE | dict(model="meta-llama/Llama-3.1-8B", batch=1, checkpointing=True),
}
