"""Named sets of runs, each with one table: the paper's ablations, and what else it compares.

`python train.py --sweep NAME` trains those that are not finished. To try something new, add a set to `SWEEPS`.
"""

import re
from dataclasses import dataclass, field

from data import BadInput, only_process
from data.corpus import find_domains
from data.families import read_config
from data.hub import model_folder
from data.life import erase, finished
from data.run import fitting_gates
from data.settings import Settings
from data.tables import save, side_by_side, together
from koff import GATED


@dataclass(frozen=True)
class Sweep:
    """rows: {label: its own settings}; common: settings of all rows."""

    rows: dict
    common: dict = field(default_factory=dict)


def each(setting, *values, **more):
    """{label: settings}, one row for each value of a setting."""
    name = setting.replace("_", " ")
    return {f"{name} {value}": {setting: value, **more} for value in values}


PRUNING = dict(memory=False, gate_share=1.0)  # gates that learn to the last step: the stronger baseline

# The paper's table of ablations, and more: each row leaves something out.
ABLATIONS = {
    "pruning only": PRUNING,
    "KV of text": dict(steps=0, solve_tokens=0),
    "LoRA, solved": dict(steps=0, kv_tokens=0),
    "LoRA + KV, solved": dict(steps=0),
    "LoRA + KV, solved under the learned mask": dict(order="prune-first", gate_share=1.0),
    "LoRA, trained": dict(solve_tokens=0, kv_tokens=0),
    "KV, trained": dict(rank=0),
    "LoRA + KV, trained": dict(solve_tokens=0),
    "LoRA, both": dict(kv_tokens=0),
    "LoRA + KV, both": {},
    "the same, teacher has not read the text": dict(teacher_context=False),
    "the same, mask not learned": dict(gate_rate=0.0, gate_share=0.01, ramp=0.01),  # the gates' start decides it
    "the same, prune first, recover afterwards": dict(order="prune-first"),
    "the same, with retention": dict(retention="domains", retention_every=1),
}

# How often, and how much at a time. (The paper compares 20, 50 and 100 of many more steps.)
INTERVALS = {}
for every in (1, 2, 5):
    for size in (1, 2, 4):
        INTERVALS[f"every {every}, batch {size}"] = dict(retention_every=every, retention_batch=size)

QUALITY = {}
for sparsity in (0.05, 0.1, 0.15, 0.2, 0.25, 0.3):
    QUALITY[f"sparsity {sparsity}, pruning only"] = dict(PRUNING, sparsity=sparsity)
    QUALITY[f"sparsity {sparsity}, solved"] = dict(steps=0, sparsity=sparsity)
    QUALITY[f"sparsity {sparsity}, trained"] = dict(solve_tokens=0, sparsity=sparsity)
    QUALITY[f"sparsity {sparsity}, both"] = dict(sparsity=sparsity)

SWEEPS = {
    "ablations": Sweep(ABLATIONS),
    # At each sparsity four ways, of which `eval.py plot` makes four curves.
    "sparsity": Sweep(QUALITY),
    "choices": Sweep(
        {"both": {}, "beta 2 to 0.5": dict(beta=2.0, beta_end=0.5)}
        # These ranks make the shipped model's modules as large as the default's; for another choose them anew.
        | {"upper four blocks": dict(blocks=4, rank=60, alpha=60.0)}
        | {"LoRA on down only": dict(lora="down", rank=150, alpha=150.0)}
        | each("beta", 2.0)
        | each("objective", "next-token", "blend", "kl-renormalise", "kl-drop")
        | {"target at once": dict(ramp=0.0)}
        | each("constraint", "hinge", "lagrangian")
        | each("gated", "kv", "qkv", sparsity=0.02)
        | each("gated", "kv+mlp+o")
        | each("granularity", "projection")
        | each("gate_init", "constant")
        | each("kv_init", "normal")
        | each("kv_passages", 8)
    ),
    # How many steps a set of gates takes to its target, under a constant lambda.
    "convergence": Sweep(
        each("gated", *GATED, sparsity=0.02),
        common=dict(
            constraint="hinge", ramp=0.0, penalty=60.0, gate_init="constant", granularity="projection",
            gate_share=1.0, solve_tokens=0,
        ),
    ),
    "domains": Sweep(each("domains", "1", "2", "3", "4", "5", "6")),
    "text": Sweep(each("text_share", 0.1, 0.25, 0.5, 1.0)),
    "retention": Sweep(INTERVALS, common=dict(retention="domains", gate_share=1.0)),
    "lambda": Sweep(each("penalty", 15.0, 40.0, 60.0, 80.0, 120.0), common=dict(constraint="hinge", ramp=0.0)),
}  # fmt: skip


def runs_of(name, given, out, seeds):
    """{label: {run folder: its `Settings`}}. A row's own settings win over `given`, and these over the sweep's."""
    chosen = SWEEPS[name]
    first_seed = given.get("seed", 0)
    runs = {}
    for label, own in chosen.rows.items():
        runs[label] = {}
        for seed in range(first_seed, first_seed + seeds):
            file_name = re.sub(r"[^a-z0-9.]+", "-", label.lower()).strip("-")
            settings = {**chosen.common, **given, **own, "seed": seed}
            runs[label][out / f"{file_name}-seed{seed}"] = Settings(**settings)
    return runs


def sweep(name, given, out, fresh, train, seeds):
    """Train every run of a sweep that is not finished, with its table in sweep.md and sweep.json after each row.

    One seed shows a direction, three whether it is more than noise.

    `train(settings, folder)` trains one. All see the same batches in the same order, but for --focus, which
    looks at the losses.
    """
    if (out / "settings.json").exists():
        raise BadInput(f"{out} is a run, not a sweep; name another folder with --out.")
    runs = runs_of(name, given, out, seeds)
    every = {folder: s for members in runs.values() for folder, s in members.items()}
    for folder, s in every.items():  # what cannot work shows before hours are spent
        find_domains(s.data, s.domains)
        fitting_gates(s, read_config(model_folder(s.model, weights=False)))
        finished(s, folder, fresh)  # BadInput if the folder holds another run
    # All old runs go before the first new one comes: else a sweep that was stopped would go on with both.
    for folder, s in every.items() if fresh else ():
        if folder.exists():
            with only_process(folder):
                erase(folder, s)
    # The table is written again after each row, so that a long sweep can be read while it runs.
    done = {}
    for label, members in runs.items():
        for folder, s in members.items():
            if finished(s, folder):
                continue
            print(f"\n{label}, seed {s.seed}")
            train(s, folder)
        done[label] = list(members)
        save_table(out, name, done)
    print(f"\n{(out / 'sweep.md').read_text()}")


def save_table(out, name, runs):
    """Write the table of a sweep, {label: [folder, one per seed]}: sweep.md to read, sweep.json for the pictures."""
    rows = {}
    described = {}
    for label, folders in runs.items():
        rows[label] = together(folders)
        described[label] = {"runs": [str(folder) for folder in folders], **rows[label]}
    text = f"## Sweep {name}\n\n{side_by_side(rows)}\n"
    save(out, {"sweep.md": text, "sweep.json": {"sweep": name, "rows": described}}, show=False)
