"""The life of a run's folder: whose it is, whether it is complete, what --fresh removes, and how a run is saved."""

import contextlib
from dataclasses import asdict
from pathlib import Path

import koff
from data import BadInput, discard, discard_all, only_process, read_tensors
from data.checkpoint import BESIDE, SINGLE, save_backbone, save_gates, save_module
from data.router import Router
from data.settings import Settings, flag


def check_same(folder, what, before, now):
    """BadInput unless the hash of an input is the same as when the run in the folder began."""
    if before != now:
        raise BadInput(f"{folder} began with another {what}; bring that back, or train anew (--fresh).")


def is_stopped(out):
    """Whether the folder holds a stopped training."""
    return (out / "checkpoint.pt").exists()


def is_saved(out):
    """Whether the folder holds a trained run. The router is the last part to be saved."""
    return (out / "router.safetensors").exists()


def finished(s, out, fresh=False):
    """Whether the run `s` in `out` is complete, report included. BadInput if the folder holds something else."""
    ours = out / "settings.json"
    if Path(s.data).resolve() in out.resolve().parents:
        raise BadInput(f"{out} lies within the text in {s.data}; name another folder with --out.")
    if not ours.exists():
        # Hidden files do not count: a lock, a cache.
        if out.exists() and (not out.is_dir() or any(out.glob("[!.]*"))):
            raise BadInput(f"{out} holds something that is not a run; name another folder with --out.")
        return False
    old = Settings.from_file(ours)
    if fresh:
        return False
    # The same command finds its own run again. Any other would mix two runs in one folder.
    for name, value in asdict(s).items():
        # A stopped run's model and text may have moved: its checkpoint has their hashes.
        moved = is_stopped(out) and name in ("model", "data")
        if getattr(old, name) != value and not moved:
            raise BadInput(f"{out} holds another run ({flag(name)} differs); name another --out, or say --fresh.")
    return not is_stopped(out) and is_saved(out) and (out / "results.json").exists()


@contextlib.contextmanager
def training_in(out, s, fresh):
    """Lock the folder of the run `s`, and prepare it for a start or a continuation. Yields False if it is finished."""
    out.mkdir(parents=True, exist_ok=True)
    with only_process(out):
        if finished(s, out, fresh):  # another process may have completed it before we held the lock
            yield False
            return
        tidy(out)
        if fresh:  # only now, because all checks of the new run have passed
            erase(out, s)
        yield True
        discard(out / "checkpoint.pt")  # its optimizer state is larger than everything else


# The files of a run that --fresh removes. Benchmarks and exports stay.
WRITTEN = [
    "checkpoint.pt", "log.jsonl", "gates.safetensors", "router.safetensors", "results.json", "report.md",
    "later/*/settings.json", "later/*/checkpoint.pt", "later/*/log.jsonl",
    "backbone/config.json", *[f"backbone/{name}" for name in (SINGLE, *BESIDE)], "lape.safetensors", "lape.json",
    "lape.md", "probes.json", "probes.md", "layers.png", "swap.png", "curves.png", "lape.png",
]  # fmt: skip


def tidy(out):
    """Remove half-written files of killed processes (see `atomic`). The folder is locked: nobody is writing there."""
    # not export/, where another process may be writing
    folders = ("", "backbone/", "backbone/*/", "modules/", "later/*/")
    discard_all(out, [f"{folder}.*.????????.part" for folder in folders])


def erase(out, s):
    """Remove an old run from the folder of the new run `s`. Other files stay."""
    # Without these files the rest counts as a run that has not begun, even if the process is killed in between.
    discard_all(out, ["results.json", "router.safetensors", "checkpoint.pt"])
    s.to_file(out / "settings.json")
    discard_all(out, WRITTEN)
    for path in out.glob("modules/*.safetensors"):
        with contextlib.suppress(BadInput):
            if "backbone" in read_tensors(path)[1]:  # a module of ours
                discard(path)


# Saving --------------------------------------------------------------------------------------------------------------


def save_run(trainer, text, pretrained, out):
    """Write backbone, gates, modules and router of a trained run. pretrained: the folder of its model."""
    about = {"koff_model": text.inputs["model"], "koff_domains": len(text.train)}
    fingerprint = save_backbone(out / "backbone", trainer.student, pretrained, **about)
    save_gates(out / "gates.safetensors", trainer.gates, trainer.mask)
    save_modules(trainer, out, fingerprint)
    router = Router(text.train.values())
    for name, ids in text.train.items():
        router.add(name, ids, text.splits[name].key)
    router.save(out / "router.safetensors")


def save_modules(trainer, out, fingerprint):
    for domain in trainer.modules:
        memories = koff.materialise_memories(trainer.memories(domain), trainer.kept)
        save_module(out / "modules" / f"{domain}.safetensors", memories, fingerprint)
