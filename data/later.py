"""One more domain for a finished run, or one less: `train.py --add dutch.txt --out RUN`, `eval.py remove RUN dutch`.

The backbone stays as it is. The new module is trained under its final mask, and joins the run as one more file and one
more row of the router.
"""

import math
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

from data import BadInput, discard
from data.corpus import domain_name
from data.dryrun import enough_memory
from data.families import value_of
from data.life import save_modules
from data.progress import Progress
from data.run import check_complete, check_model, held, open_training, texts_of
from data.settings import Settings, flag

MAY_DIFFER = (  # settings in which a module can differ from the run that it joins
    "solve_tokens", "solve_ridge", "curvature_tokens", "rank", "alpha", "steps", "batch", "seq_len",
    "text_share", "lora_rate", "kv_rate", "decay", "seed", "device", "checkpointing",
)  # fmt: skip


def add(path, out, given, fresh, Trainer, loop, evaluate):
    """Add a module for the text at `path` to the finished run in `out`.

    given: settings of `MAY_DIFFER` that differ from the run's. Trainer, loop, evaluate: those of train.py and eval.py.
    """
    device = given.get("device") or Settings.from_file(out / "settings.json").device
    path = Path(os.path.abspath(path))  # links stay: their targets may have another name
    name = domain_name(path)
    with held(out, device) as run:
        # Say now, rather than in the evaluation, that a module is missing or a text has changed.
        check_complete(run)
        texts_of(run)
        work = out / "later" / name
        s = settings_to_add(run, given)
        stopped = work / "settings.json"
        if stopped.exists() and not fresh and Settings.from_file(stopped) != s:
            raise BadInput(f"{work} holds a stopped training with other settings; give the same or --fresh.")
        # If both are there, this very command was stopped in its evaluation, and only that is left to do.
        if fresh or not work.exists() or run.router.paths.get(name) != str(path):
            join(run, s, name, path, work, fresh, Trainer, loop)
        evaluate(out, device=device)
        shutil.rmtree(work)


def join(run, s, name, path, work, fresh, Trainer, loop):
    """Train a module on the backbone of a run and make it part of the run. `work`: the folder of this training."""
    if run.router.knows(name):
        raise BadInput(f"{run.folder} has a domain {name} already; remove it first, or rename the text.")
    opened = open_training(s, run.folder, paths={name: path})
    text = opened.text
    check_model(run, opened.folder)
    if fresh:
        discard(work)
    fingerprint = run.config.raw["koff_fingerprint"]
    text.inputs["backbone"] = fingerprint
    # The mask is final from the start, so every step is one of `Trainer.recover`.
    _, mask = run.gates(opened.model)
    trainer = Trainer(opened.model, s, text.train)
    trainer.freeze_mask(mask, run.backbone)
    with enough_memory(trainer), Progress(trainer, text, work, time.perf_counter()) as progress:
        loop(trainer, text, progress)
    # The router comes last: its row makes the module part of the run.
    save_modules(trainer, run.folder, fingerprint)
    run.router.add(name, text.train[name], text.splits[name].key)
    run.router.paths[name] = str(path)
    run.router.save(run.folder / "router.safetensors")


def settings_to_add(run, given):
    """The settings of a later module: its run's, except for `given`. BadInput for a setting that cannot differ."""
    for setting in given:
        if setting not in MAY_DIFFER:
            allowed = ", ".join(MAY_DIFFER)
            raise BadInput(f"{flag(setting)} cannot differ from that of {run.folder}; with --add give only {allowed}.")
    if not run.names:
        raise BadInput(f"{run.folder} has no modules to which one could be added; train a run with memories.")
    # As many steps as each of the first domains got, whichever came or went since.
    domains = value_of(run.config.raw, "koff_domains", int, None, run.folder / "backbone/config.json")
    steps = math.ceil(run.settings.steps / domains)
    # With one domain and no gates, settings that choose domains or concern gates are irrelevant.
    irrelevant = dict(gate_init="constant", gate_share=0.0, rise=0.0, focus=0, order="joint", retention="")
    irrelevant["repair"] = "none"  # the backbone is the run's
    return replace(run.settings, **{"steps": steps, **given}, **irrelevant)


def remove(args):
    """Delete the module `args.module` of the run `args.run`."""
    with held(args.run, "cpu") as run:
        name = args.module
        if name not in run.router.domains:
            run.memories(name)  # BadInput, which lists the modules
        if run.names == [name]:
            raise BadInput(f"{name} is the only module of {run.folder}; delete the folder instead.")
        run.module_path(name).unlink(missing_ok=True)  # it may have been lost before
        run.router.remove(name)
        run.router.save(run.folder / "router.safetensors")
        print(
            f"{run.folder} holds {', '.join(run.router.domains)}; eval.py report {run.folder} makes its tables again."
        )
