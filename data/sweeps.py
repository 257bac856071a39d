"""Named sets of runs, each with one table: the paper's ablations and its other comparisons.

`python train.py --sweep NAME` trains the runs that are not finished. To try something new, add a set to `SWEEPS`.
"""

import re
from dataclasses import dataclass, field

from data import BadInput, only_process
from data.corpus import find_domains
from data.life import erase, finished
from data.run import fitting_gates
from data.settings import Settings
from data.tables import save, side_by_side, together
from koff import GATED


@dataclass(frozen=True)
class Sweep:
    """rows: {label: the settings of this row}; common: settings of all rows."""

    rows: dict
    common: dict = field(default_factory=dict)


def each(setting, *values, **more):
    """{label: settings}: one row for each value of a setting."""
    name = setting.replace("_", " ")
    return {f"{name} {value}": {setting: value, **more} for value in values}


PRUNING = dict(memory=False, steps=0)
LEARNED = dict(gate_share=1.0, gate_init="fisher", rise=0.12, steps=250)  # gates that learn to the last step
JOINT = dict(gate_share=0.3)

# What is each part worth? Each row leaves something out.
ABLATIONS = {
    "pruning only, gates learned": dict(LEARNED, memory=False, repair="none"),
    "pruning only": dict(PRUNING, repair="none"),
    "pruning only, repaired": PRUNING,
    "KV of text": dict(steps=0, solve_tokens=0),
    "LoRA, solved": dict(steps=0, kv_tokens=0),
    "LoRA + KV, solved": dict(steps=0),
    "LoRA + KV, solved, not repaired": dict(steps=0, repair="none"),
    "LoRA, solved and trained": dict(kv_tokens=0),
    "LoRA + KV, solved and trained": {},
    "the same, not repaired": dict(repair="none"),
    "the same, mask by the Fisher score": dict(gate_init="fisher"),
    "the same, gates learned first": JOINT,
    "the same, LoRA on five projections": dict(lora="kv+mlp", rank=19, alpha=19.0),
}

# Retention: how often, and in batches of which size. (The paper compares 20, 50 and 100, in many more steps.)
INTERVALS = {}
for every in (1, 2, 5):
    for size in (1, 2, 4):
        INTERVALS[f"every {every}, batch {size}"] = dict(retention_every=every, retention_batch=size)

QUALITY = {}
for sparsity in (0.05, 0.1, 0.15, 0.2, 0.25, 0.3):
    QUALITY[f"sparsity {sparsity}, pruning only"] = dict(LEARNED, memory=False, repair="none", sparsity=sparsity)
    QUALITY[f"sparsity {sparsity}, repaired"] = dict(PRUNING, sparsity=sparsity)
    QUALITY[f"sparsity {sparsity}, solved"] = dict(steps=0, sparsity=sparsity)
    QUALITY[f"sparsity {sparsity}, both"] = dict(sparsity=sparsity)

SWEEPS = {
    "ablations": Sweep(ABLATIONS),
    # Four ways at each sparsity: `eval.py plot` draws four curves.
    "sparsity": Sweep(QUALITY),
    # Other ways to do the same. Gates, where a row is about them, learn for a third of the steps.
    "choices": Sweep(
        {"both": {}, "gates learned": JOINT, "prune first": dict(JOINT, order="prune-first")}
        | {"retention": dict(JOINT, retention="domains", retention_every=1)}
        | {"teacher has not read the text": dict(teacher_context=False)}
        | {"plain squares": dict(curvature_tokens=0), "trained, not solved": dict(solve_tokens=0)}
        | {"beta 2 to 0.5": dict(JOINT, beta=2.0, beta_end=0.5)}
        | {"upper four blocks": dict(blocks=4)}
        | each("beta", 2.0, **JOINT)
        | each("objective", "next-token", "blend", "kl-renormalise", "kl-drop")
        | {"target at once": dict(JOINT, rise=0.0)}
        | each("constraint", "hinge", "lagrangian", **JOINT)
        | each("gated", "kv", "qkv", sparsity=0.02)
        | each("gated", "kv+mlp+o")
        | each("granularity", "projection")
        | each("gate_init", "constant", **JOINT)
        | each("kv_init", "normal")
        | each("kv_passages", 1)
    ),
    # How many steps does each set of gates take to its target, under a constant lambda?
    "convergence": Sweep(
        each("gated", *GATED, sparsity=0.02),
        common=dict(
            constraint="hinge", rise=0.0, penalty=60.0, gate_init="constant", granularity="projection",
            gate_share=1.0, repair="none", solve_tokens=0,
        ),
    ),
    "domains": Sweep(each("domains", "1", "2", "3", "4", "5", "6")),
    "text": Sweep(each("text_share", 0.1, 0.25, 0.5, 1.0)),
    "retention": Sweep(INTERVALS, common=dict(retention="domains", gate_share=1.0)),
    "lambda": Sweep(
        each("penalty", 15.0, 40.0, 60.0, 80.0, 120.0),
        common=dict(constraint="hinge", rise=0.0, gate_share=1.0),
    ),
}  # fmt: skip


def runs_of(name, given, out, seeds):
    """{label: {run folder: its `Settings`}}. A row's own settings override `given`, which override the common ones."""
    chosen = SWEEPS[name]
    first_seed = given.get("seed", 0)
    runs = {}
    for label, own in chosen.rows.items():
        runs[label] = {}
        file_name = re.sub(r"[^a-z0-9.]+", "-", label.lower()).strip("-")
        for seed in range(first_seed, first_seed + seeds):
            settings = {**chosen.common, **given, **own, "seed": seed}
            runs[label][out / f"{file_name}-seed{seed}"] = Settings(**settings)
    return runs


def sweep(name, given, out, fresh, train, seeds):
    """Train every unfinished run of a sweep by `train(settings, folder)`. Its table is in sweep.md and sweep.json.

    All runs see the same batches in the same order, except with --focus, which looks at the losses. One seed shows a
    direction, three show whether it exceeds the noise.
    """
    if (out / "settings.json").exists():
        raise BadInput(f"{out} is a run, not a sweep; name another folder with --out.")
    runs = runs_of(name, given, out, seeds)
    settings_of = {}  # {run folder: its `Settings`}
    for members in runs.values():
        settings_of |= members
    for folder, s in settings_of.items():  # refuse impossible runs now, before hours are spent
        find_domains(s.data, s.domains)
        fitting_gates(s)
        finished(s, folder, fresh)  # BadInput if the folder holds another run
    # Remove all old runs before the first new one starts. Otherwise a stopped sweep would go on with both.
    for folder, s in settings_of.items():
        if fresh and folder.exists():
            with only_process(folder):
                erase(folder, s)
    # Write the table after each row: a long sweep can be read while it runs.
    done = {}
    for label, members in runs.items():
        for folder, s in members.items():
            if not finished(s, folder):
                print(f"\n{label}, seed {s.seed}")
                train(s, folder)
        done[label] = list(members)
        save_table(out, name, done)
    print(f"\n{(out / 'sweep.md').read_text()}")


def save_table(out, name, runs):
    """Write the table of the runs {label: [folder, one per seed]}: sweep.md to read, sweep.json for the pictures."""
    rows = {}
    described = {}
    for label, folders in runs.items():
        rows[label] = together(folders)
        described[label] = {"runs": [str(folder) for folder in folders], **rows[label]}
    text = f"## Sweep {name}\n\n{side_by_side(rows)}\n"
    save(out, {"sweep.md": text, "sweep.json": {"sweep": name, "rows": described}}, show=False)
