"""The modules of a finished run: `python eval.py modules RUN`, `... rename RUN OLD NEW` and `... remove RUN NAME`.

A module is there if its file and its row of the router are there. Both commands below change the router between writing
and deleting files: wherever they are interrupted, each module has exactly one name.
"""

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
        run.module(args.module)  # BadInput if the run has none of this name
        if len(run.names) == 1:
            raise BadInput(f"{args.module} is the only module of {run.folder}; delete the folder instead.")
        run.router.remove(args.module)
        finish(run, args.module)


def rename_module(args):
    """Give the module `args.module` the name `args.name`."""
    old = args.module
    new = args.name
    with held(args.run, "cpu") as run:
        run.module(old)
        path = run.module_path(new)
        # domain_name refuses what can be no file name; "../x" is one, but of another folder.
        if domain_name(path) != new or new in run.router.domains:
            raise BadInput(f"{run.folder} cannot have another module {new!r}; give a new name.")
        # The text is still called as the domain was: from now on only the router knows where to find it.
        text = run.router.paths.get(old) or paths_of(run)[old].resolve()
        run.router.rename(old, new, str(text))
        with atomic(path) as partial:
            partial.write_bytes(run.module_path(old).read_bytes())
        finish(run, old)


def finish(run, old):
    """Save the changed router, then delete the file of the module `old`, which it knows no longer."""
    run.router.save(run.folder / "router.safetensors")
    run.module_path(old).unlink()
    print(f"{run.folder} holds {', '.join(run.router.domains)}; eval.py report {run.folder} makes its tables again.")
