"""A run as other libraries read it: a dense checkpoint for transformers, adapters for peft."""

import json
from dataclasses import replace

import torch
from safetensors.torch import save_file
from torch import nn

import koff
from data import BadInput, atomic, checkpoint, read_tensors
from data.checkpoint import load
from data.run import Run
from model import BlockMemory, Model, matrix, widen


@torch.no_grad()
def expand(small, kept):
    """The inverse of `compact`: a model of the pretrained shapes, zeros for what is closed, for other libraries."""
    c = small.config
    raw = {name: value for name, value in c.raw.items() if not name.startswith("koff_")}
    state = {name: t for name, t in small.state_dict().items() if not name.endswith("_kept")}
    for i, index in kept.items():
        for name, (rows, _) in c.shapes.items():
            for own in (f"{matrix(i, name)}.weight", f"{matrix(i, name)}.bias"):
                if own in state:
                    state[own] = widen(state[own], index[name], rows, 0)
        down = f"{matrix(i, 'down')}.weight"
        state[down] = widen(state[down], index["neuron"], c.intermediate_size, 1)
    with torch.device("meta"):
        model = Model(replace(c, kept=(), raw=raw))
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False)


def expand_memory(blocks, kept, config):
    """The inverse of `compact_memory`: {block: BlockMemory} for the model that `expand` makes."""
    return koff.laid_out(blocks, kept, lambda t, dim, index, name: widen(t, index, config.shapes[name][0], dim))


@torch.no_grad()
def merge(model, blocks):
    """Add the LoRA of {block: BlockMemory} to the weights of `model`, which it may share with another."""
    for i, m in blocks.items():
        for name, (a, b) in m.lora.items():
            linear = model.get_submodule(matrix(i, name))
            linear.weight = nn.Parameter(linear.weight + b @ a, requires_grad=False)


def save_lora(folder, blocks, base):
    """Write the LoRA of {block: BlockMemory} as an adapter that peft attaches to the dense model in `base`."""
    state, names = {}, sorted({f"{name}_proj" for m in blocks.values() for name in m.lora})
    for i, m in blocks.items():
        for name, (a, b) in m.lora.items():
            own = f"base_model.model.model.{matrix(i, name)}"
            state |= {f"{own}.lora_A.weight": a.contiguous(), f"{own}.lora_B.weight": b.contiguous()}
    rank = len(next(iter(state.values())))
    save_adapter(folder, state, dict(
        peft_type="LORA", base_model_name_or_path=str(base), r=rank, lora_alpha=rank,  # the scale is in B already
        target_modules=names, layers_to_transform=list(blocks), layers_pattern="layers",
    ))  # fmt: skip


def save_cartridge(folder, blocks, base):
    """Write the KV memory of all blocks as peft's CARTRIDGE: [M, (block, keys or values, head, channel)]."""
    pairs = [t for i in sorted(blocks) for t in (blocks[i].keys, blocks[i].values)]  # each [G, M, hd]
    (G, M, hd), rows = pairs[0].shape, torch.stack(pairs).permute(2, 0, 1, 3)
    save_adapter(folder, {"prompt_embeddings": rows.reshape(M, -1).contiguous()}, dict(
        peft_type="CARTRIDGE", base_model_name_or_path=str(base), num_virtual_tokens=M, num_frozen_tokens=0,
        num_layers=len(blocks), num_attention_heads=G, token_dim=G * hd,
    ))  # fmt: skip


def save_adapter(folder, state, config):
    folder.mkdir(parents=True)
    save_file(state, folder / "adapter_model.safetensors", {"format": "pt"})
    config |= dict(task_type="CAUSAL_LM", inference_mode=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def load_adapter(folder, blocks):
    """What `save_lora` or `save_cartridge` wrote, as {block: BlockMemory} with the shapes that `blocks` has."""
    state, _ = read_tensors(folder / "adapter_model.safetensors")
    if "prompt_embeddings" in state:
        G, M, hd = blocks[0].keys.shape
        pairs = state["prompt_embeddings"].view(M, len(blocks), 2, G, hd).permute(1, 2, 3, 0, 4)
        return {i: BlockMemory({}, *pair) for i, pair in zip(sorted(blocks), pairs, strict=True)}
    out = {i: BlockMemory({}) for i in blocks}
    for name, a in state.items():
        own, _, half = name.partition(".lora_")
        _, _, _, _, i, _, projection = own.split(".")
        if half == "A.weight":
            out[int(i)].lora[projection.removesuffix("_proj")] = a, state[f"{own}.lora_B.weight"]
    return out


@torch.inference_mode()
def export(args):
    """Write a run as other libraries read it, read it again, and compare it with the run before it gets its name."""
    run = Run(args.run, "cpu", torch.float32)
    small, kind = run.backbone, f"{args.form}-{args.module}" if args.module else args.form
    if (out := args.out or run.folder / "export" / kind).exists():
        raise BadInput(f"{out} is there already; remove it or name another --out.")
    kept = koff.kept_channels(run.gates(small)[1], small.config, run.settings.first(len(small.layers))[0], "cpu")
    write = export_dense if args.form == "hf" else export_adapters
    with atomic(out) as partial:
        write(partial, run, expand(small, kept), kept, args.module)
    on = "" if args.form == "hf" else f"; for the model that eval.py export {run.folder} hf writes"
    print(f"{out}, read again and compared with the run{on}")


def export_dense(folder, run, dense, kept, module):
    """The `dense` model with zeros for the channels that are not `kept`; a `module`'s LoRA is merged."""
    lora = {i: BlockMemory(m.lora) for i, m in run.module(module).items()} if module else None
    if lora:
        merge(dense, expand_memory(lora, kept, dense.config))
    check("the dense model", run, lora, dense)
    dense = dense.to(getattr(torch, run.backbone.config.raw["dtype"]))
    checkpoint.save_backbone(folder, dense, run.folder / "backbone")
    again = load(folder, dense.head.dtype).state_dict()
    if any(not torch.equal(again[name], t) for name, t in dense.state_dict().items()):
        raise BadInput(f"{folder} was not written as it is; check the disk and try again.")
    if lora and run.settings.kv_tokens:
        print(f"{module}: a checkpoint has no place for its keys and values; what is merged is LoRA.")


def export_adapters(folder, run, dense, kept, module):
    """For each module, or one `module`, a folder of its LoRA and one of its keys and values if all blocks have them."""
    s, base, layers = run.settings, (run.folder / "export/hf").resolve(), len(dense.layers)
    for name in [module] if module else run.names:
        blocks, parts = run.module(name), {}
        if s.rank:
            parts[name] = save_lora, {i: BlockMemory(m.lora) for i, m in blocks.items()}
        if s.kv_tokens and len(blocks) == layers:
            kv = {i: BlockMemory({}, m.keys, m.values) for i, m in blocks.items()}
            parts[f"{name}-kv"] = save_cartridge, kv
        elif s.kv_tokens:
            there = f"{s.kv_tokens} keys and values in {len(blocks)} of {layers} blocks"
            print(f"{name}: peft attaches keys and values to all blocks or none; {there} stay here.")
        for part, (write, memory) in parts.items():
            write(folder / part, expand_memory(memory, kept, dense.config), base)
            check(part, run, memory, dense, load_adapter(folder / part, memory))
    if not folder.exists():
        raise BadInput(f"{run.folder} has nothing that peft could attach; export hf is all that there is.")


def check(what, run, blocks, model, memory=None):
    """BadInput unless `model` with `memory` has the logits of the run with `blocks`, to 1e-4 in float32."""
    tokens = torch.randint(run.tokenizer.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    ours, theirs = run.backbone(tokens, memory=blocks), model(tokens, memory=memory)
    worst, size = (ours - theirs).abs().max().item(), ours.abs().max().item()
    if not worst <= 1e-4 * max(1.0, size):
        raise BadInput(f"{what} differs from the run by {worst:.2g} in a logit of {size:.2g}; it was not kept.")
