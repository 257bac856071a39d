"""The modules of a finished run: `python eval.py modules RUN` and `python eval.py remove RUN NAME`.

A module exists if its file and its row of the router do.
"""

from data import BadInput
from data.run import Run, held
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
            run.memories(args.module)  # BadInput, which lists the modules
        if run.names == [args.module]:
            raise BadInput(f"{args.module} is the only module of {run.folder}; delete the folder instead.")
        # The file first, which may have to be gone; it is no error if it was lost before.
        run.module_path(args.module).unlink(missing_ok=True)
        run.router.remove(args.module)
        save_router(run)


def save_router(run):
    """Save the changed router, and say which modules there are now."""
    run.router.save(run.folder / "router.safetensors")
    print(f"{run.folder} holds {', '.join(run.router.domains)}; eval.py report {run.folder} makes its tables again.")
