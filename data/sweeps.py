"""Named sets of runs, each with one table: the paper's ablations and what else it compares."""

import hashlib
import re
from pathlib import Path

from safetensors.torch import save_file

from data import BadInput, atomic, discard, read_tensors
from data.run import finished, fitting
from data.settings import PRESETS, Settings
from data.tables import save, side_by_side, together
from koff import GATED

# The paper's protocol on whatever model, text, share of it, steps and module size a sweep is given.
SIZES = ("blocks", "sparsity", "rank", "alpha", "kv_tokens", "steps", "batch", "seq_len", "eval_len")

MATCHED = {name: value for name, value in PRESETS["paper-matched"].items() if name not in SIZES} | dict(focus=0)

PRUNED = dict(memory=False, fix_mask=0.0)  # gates that learn to the last step: the stronger baseline

PARTS = {
    "pruning only": PRUNED,
    "pruning + LoRA": dict(kv_tokens=0),
    "pruning + KV": dict(rank=0),
    "both": {},
    "prune first, recover afterwards": dict(order="prune-first"),
}


def each(setting, *values, **more):
    """{row: settings}, one row for each value of a setting."""
    return {f"{setting.replace('_', ' ')} {value}": {setting: value, **more} for value in values}


# sweep: (settings of all its runs, {row: its own settings}, {row: how many seeds, where not one})
SWEEPS = {
    "ablations": (  # the paper's table
        dict(steps=200, eval_windows=6),
        PARTS | {"memory in all layers": dict(memory_blocks=-1), "both, with retention": dict(retention="domains")},
        dict.fromkeys(PARTS, 3),
    ),
    "paper": (  # the ablations that carry a claim, the paper's protocol, and sparsity against quality
        dict(eval_windows=4),
        PARTS | {"paper-matched, pruning only": MATCHED | dict(memory=False), "paper-matched": MATCHED}
        | each("sparsity", 0.05, 0.2, 0.3),
        {},
    ),
    "sparsity": ({}, each("sparsity", 0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3), {}),
    "choices": (
        {},
        {"both": {}, "no training, text KV attached": dict(steps=0), "beta 2 to 0.5": dict(beta=2.0, beta_end=0.5)}
        | each("beta", 2.0) | each("objective", "next-token", "blend") | each("constraint", "hinge", "lagrangian")
        | each("gated", *GATED[:2], sparsity=0.02) | each("gated", GATED[3]) | each("granularity", "projection")
        | each("gate_init", "constant") | each("kv_init", "normal") | each("tail", "renormalise", "drop"),
        {},
    ),
    "convergence": (  # how many steps a set of gates takes to its target, under a constant lambda
        dict(constraint="hinge", scaled=False, gate_init="constant", granularity="projection", fix_mask=0.0),
        each("gated", *GATED, sparsity=0.02),
        {},
    ),
    "domains": ({}, each("domains", "1", "2", "3", "4", "5", "6"), {}),
    "text": ({}, each("text", 0.1, 0.25, 0.5, 1.0), {}),
    "retention": (
        dict(retention="domains"),
        {f"every {n}, batch {b}": dict(retention_every=n, retention_batch=b) for n in (20, 50, 100) for b in (1, 2, 4)},
        {},
    ),
    "lambda": (dict(scaled=False, constraint="hinge"), each("penalty", 15.0, 40.0, 60.0, 80.0, 120.0), {}),
}  # fmt: skip


class Answers:
    """The teacher's answers on disk, each computed once for all runs of a sweep that meet the same tokens."""

    def __init__(self, folder, s, dtype):
        self.folder, self.about = Path(folder), f"{s.model} {dtype} {s.top}"

    def __call__(self, tokens, compute):
        digest = hashlib.sha256(self.about.encode() + tokens.cpu().numpy().tobytes()).hexdigest()
        path = self.folder / f"{digest[:24]}.safetensors"
        if not path.exists():
            index, log_p, rest = compute()
            with atomic(path) as partial:
                save_file({"index": index.int(), "log_p": log_p, "rest": rest}, partial)
            return index, log_p, rest
        saved, _ = read_tensors(path, device=tokens.device)
        return saved["index"].long(), saved["log_p"], saved["rest"]


def sweep(name, given, out, fresh, train):
    """Train every run of a sweep that is not finished, with its table in sweep.md and sweep.json after each.

    They share data order, seeds and the teacher's answers. A run's own settings win over the command line, and that
    over those of the sweep. Returns False if Ctrl-C stopped it.
    """
    if (out / "settings.json").exists():
        raise BadInput(f"{out} is a run, not a sweep; name another folder with --out.")
    (common, rows, seeds), first = SWEEPS[name], given.get("seed", 0)
    runs, done = {}, {}
    for label, own in rows.items():
        for seed in range(first, first + seeds.get(label, 1)):
            folder = out / f"{re.sub(r'[^a-z0-9.]+', '-', label.lower()).strip('-')}-seed{seed}"
            s = runs.setdefault(label, {})[folder] = Settings(**{**common, **given, **own, "seed": seed})
            fitting(s)  # what cannot work shows before hours are spent
            finished(s, folder, fresh)
    if fresh:
        discard(out / ".teacher")
    for label, members in runs.items():
        for folder, s in members.items():
            if not finished(s, folder, fresh):
                print(f"\n{label}, seed {s.seed}")
                if not train(s, folder, fresh, out / ".teacher"):
                    return False
        done[label] = list(members)
        save_sweep(out, name, done)
    print(f"\n{(out / 'sweep.md').read_text()}")
    return True


def save_sweep(out, name, runs):
    """Write the table of a sweep, {label: [folder, one per seed]}: sweep.md to read, sweep.json for the pictures."""
    rows = {label: together(folders) for label, folders in runs.items()}
    text = f"## Sweep {name}\n\n{side_by_side(rows)}\n"
    rows = {label: {"runs": [str(folder) for folder in runs[label]]} | row for label, row in rows.items()}
    save(out, {"sweep.md": text, "sweep.json": {"sweep": name, "rows": rows}}, show=False)
