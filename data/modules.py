"""The modules of a run: list, rename, remove."""

from data import BadInput, atomic
from data.corpus import domain_name
from data.run import Run, texts_of
from data.tables import parameters_of, table


def list_modules(args):
    run = Run(args.run, "cpu")
    s, rows = run.settings, {}
    for name, blocks in run.modules.items():
        shape = [str(s.rank), str(s.kv_tokens), f"{min(blocks)} to {max(blocks)}", f"{parameters_of(blocks):,}"]
        rows[name] = [*shape, str(run.router.paths.get(name, s.data))]
    print(table("", ["LoRA rank", "KV tokens", "blocks", "parameters", "text"], rows))


def change_module(args):
    """Remove a module, or give it another name.

    A module is one whose file and whose row of the router are there: wherever this is interrupted, it has one name.
    """
    run, old, new = Run(args.run, "cpu"), args.module, args.name if args.command == "rename" else None
    path, router = run.module_path(old), run.router
    run.module(old)
    if new is None:
        if len(run.names) == 1:
            raise BadInput(f"{old} is the only module of {run.folder}; delete the folder instead.")
        router.remove(old)
    else:
        renamed = run.module_path(new)
        if domain_name(renamed) != new or new in router.domains:
            raise BadInput(f"{run.folder} cannot have another module {new!r}; give a new name.")
        router.paths[new] = router.paths.pop(old, None) or str(texts_of(run)[old].resolve())
        router.domains[router.domains.index(old)] = new
        with atomic(renamed) as partial:
            partial.write_bytes(path.read_bytes())
    router.save(run.folder / "router.safetensors")
    path.unlink()
    print(f"{run.folder} holds {', '.join(router.domains)}; eval.py report {run.folder} makes its tables again.")
