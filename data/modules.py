"""The modules of a finished run: `python eval.py modules RUN`, `... rename RUN OLD NEW` and `... remove RUN NAME`.

A module is there if its file and its row of the router are there. Wherever the commands below are interrupted, each
module has exactly one name, or none.
"""

import os

from data import BadInput, atomic
from data.corpus import domain_name
from data.run import Run, held, paths_of
from data.tables import parameters_of, table


def list_modules(args):
    """Print a table of the modules: their shape, their size and the text that they were trained on."""
    run = Run(args.run, "cpu")
    settings = run.settings
    rows = {}
    for name, module in run.modules.items():
        blocks = f"{min(module)} to {max(module)}"
        text = run.router.paths.get(name, settings.data)  # the router knows the text of a domain that came later
        rows[name] = [str(settings.rank), str(settings.kv_tokens), blocks, f"{parameters_of(module):,}", str(text)]
    print(table("", ["LoRA rank", "KV tokens", "blocks", "parameters", "text"], rows))


def remove_module(args):
    """Delete the module `args.module`."""
    with held(args.run, "cpu") as run:
        if args.module not in run.router.domains:
            run.module(args.module)  # BadInput, which says what there is
        if run.names == [args.module]:
            raise BadInput(f"{args.module} is the only module of {run.folder}; delete the folder instead.")
        # The file first, which may have to be gone; it is no error if it was lost before.
        run.module_path(args.module).unlink(missing_ok=True)
        run.router.remove(args.module)
        save_router(run)


def rename_module(args):
    """Give the module `args.module` the name `args.name`."""
    old = args.module
    new = args.name
    with held(args.run, "cpu") as run:
        run.module(old)
        path = run.module_path(new)
        # domain_name refuses what can be no file name; "../x" is one, but of another folder.
        if domain_name(path) != new or run.router.knows(new):
            raise BadInput(f"{run.folder} cannot have another module {new!r}; give a new name.")
        # The text is still called as the domain was: from now on only the router knows where to find it.
        text = run.router.paths.get(old) or os.path.abspath(paths_of(run)[old])
        run.router.rename(old, new, str(text))
        with atomic(path) as partial:
            partial.write_bytes(run.module_path(old).read_bytes())
        save_router(run)
        run.module_path(old).unlink()


def save_router(run):
    """Save the changed router, and say which modules there are now."""
    run.router.save(run.folder / "router.safetensors")
    print(f"{run.folder} holds {', '.join(run.router.domains)}; eval.py report {run.folder} makes its tables again.")
