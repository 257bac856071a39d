"""The command line of train.py, and a run from its settings to its report.

Trainer, loop and evaluate are arguments here, because data/ does not import train.py and eval.py.
"""

import argparse
import time
from dataclasses import fields
from functools import partial
from pathlib import Path

from data.dryrun import dry_run, enough_memory
from data.later import add
from data.life import finished, is_saved, is_stopped, save_run, training_in
from data.progress import Progress
from data.run import open_training
from data.settings import GROUPS, PRESETS, ROOT, Settings, absolute, flag
from data.sweeps import SWEEPS, sweep

USAGE = """Split a pretrained model into a sparse backbone and one memory module per domain.

    python train.py                                the embedded default: a tiny model, six languages, minutes
    python train.py --preset best --model DIR      a real model
    python train.py --sweep ablations              a named set of runs and one table of them
    python train.py --add dutch.txt --out RUN      one more module for a finished run

The run folder (out/<preset> unless --out names one) gets the backbone, the modules, the router and the report. Ctrl-C
saves; the same command continues.
"""


def parse(argv):
    """The arguments of a command line. Three are added: `flags`, the settings that were typed; `given`, these over the
    preset's; `settings`, the complete `Settings`."""
    parser = argparse.ArgumentParser(description=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, help="named settings; flags override them [handbook]")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--sweep", choices=SWEEPS, help="train a named set of runs instead of one, and compare them")
    other.add_argument("--add", type=Path, metavar="TEXT", help="train one more module on the finished run in --out")
    parser.add_argument("--seeds", type=int, default=1, help="with --sweep: seeds per row, from --seed on [1]")
    parser.add_argument("--out", type=Path, help="run folder [out/<preset or sweep>]")
    parser.add_argument("--fresh", action="store_true", help="start again, whatever the run folder holds")
    parser.add_argument("--dry-run", action="store_true", help="print sizes and memory, from config.json alone")
    for f in fields(Settings):
        if f.name in GROUPS:
            group = parser.add_argument_group(GROUPS[f.name])
        default = Path(f.default).relative_to(ROOT) if f.name in ("model", "data") else f.default
        # SUPPRESS: a flag that is not given leaves no trace, so no default overrides a preset.
        options = {"default": argparse.SUPPRESS, "help": f"{f.metadata['help']} [{default}]"}
        if isinstance(f.default, bool):
            group.add_argument(flag(f.name), action=argparse.BooleanOptionalAction, **options)
        else:
            group.add_argument(flag(f.name), type=type(f.default), choices=f.metadata["choices"], **options)
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


def train(s, out, fresh=False, *, Trainer, loop, evaluate):
    """Train, save and evaluate the run `s` in the folder `out`."""
    begun = time.perf_counter()  # monotonic
    opened = open_training(s, out)
    trainer = Trainer(opened.model, s, opened.text.train)
    with training_in(out, s, fresh) as unfinished:
        if not unfinished:
            return
        saved = is_saved(out)  # trained and saved, but stopped before its report
        if saved and not is_stopped(out):
            begun = None  # unknown: no file says how long it took
        else:
            with enough_memory(trainer), Progress(trainer, opened.text, out, begun) as progress:
                loop(trainer, opened.text, progress)
            begun = progress.begun  # pauses taken out
        if not saved:  # modules that came later stay
            save_run(trainer, opened.text, opened.folder, out)
        del opened, trainer  # the evaluation needs the memory
        evaluate(out, begun, s.device)


def carry_out(args, Trainer, loop, evaluate):
    """Dry run, sweep, one more module or a run, as the parsed arguments say."""
    train_run = partial(train, Trainer=Trainer, loop=loop, evaluate=evaluate)
    if args.dry_run:
        dry_run(args.settings, Trainer)
    elif args.add:
        add(args.add, args.out, args.flags, args.fresh, Trainer, loop, evaluate)
    elif args.sweep:
        sweep(args.sweep, args.given, args.out, args.fresh, train_run, args.seeds)
    elif finished(args.settings, args.out, args.fresh):
        print(f"{(args.out / 'report.md').read_text()}\n{args.out} is finished; --fresh trains it again")
    else:
        train_run(args.settings, args.out, args.fresh)
