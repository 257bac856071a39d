"""Write a run for other libraries: `python eval.py export RUN hf`, or peft or gguf in place of hf.

A run is saved without its closed channels (`koff.materialise`), and no other library knows matrices of such shapes. An
export puts zeros in their place (`expand`), and every matrix has its pretrained shape again:

    hf      a dense checkpoint for transformers; with --module the LoRA of that module is merged into it
    peft    adapters for the dense checkpoint: for each module one of kind LORA, and one of kind CARTRIDGE if all blocks
            have keys and values
    gguf    for llama.cpp: the backbone, in which MLPs alone keep their smaller shapes, and for each module its LoRA as
            an adapter (`data/llamacpp.py`; it needs the package gguf)

A LoRA that was made beside keys and values restores less without them (data/RESULTS.md, llama.cpp).
LoRA and keys and values act together, unmerged, through two libraries (`generate` of transformers 5.24 with peft 0.21.2
leaves keys and values out, 5.23 does not):

    model.load_adapter("RUN/export/peft/NAME")                          # transformers: LoRA
    model = PeftModel.from_pretrained(model, "RUN/export/peft/NAME-kv")  # peft: keys and values

Each row of a batch may have the LoRA of its own module: model(tokens, adapter_names=["german", "__base__"]). Only a
PeftModel with adapters of kind LORA does that; `load_adapter` of transformers ignores the names.

vLLM (0.33: its source was read, it was not run) serves hf with all adapters of kind LORA, and refuses CARTRIDGE:
`vllm serve RUN/export/hf --enable-lora --max-lora-rank 128 --lora-modules german=RUN/export/peft/german`. The highest
rank is 1, 8, 16 (the default), 32, 64, 128, 256, 320 or 512; --max-loras (1) is the number of modules in one batch.
Ollama (0.33.0-rc2, also read) takes gguf by a Modelfile: FROM ./backbone.gguf, and one ADAPTER ./german.gguf.

llama.cpp changes modules without loading them again: `llama-server -m backbone.gguf --lora NAME.gguf ...` numbers them,
and a request names one by {"lora": [{"id": 0, "scale": 1}]}, or none by scale 0. Without that field all act at once.

An export appears under its name only after two checks: the tensors to be written give the logits of the run
(`check_logits`), and the written file holds those tensors bit for bit (`check_tensors`). tests/test_export.py loads the
results into transformers and peft.
"""

from dataclasses import replace

import torch
from safetensors.torch import load_file, save_file

import koff
from data import BadInput, atomic, fast, llamacpp
from data.checkpoint import load, refuse_other_tensors, save_backbone
from data.families import read_config
from data.run import Run
from data.special_tokens import CONFIG, LISTS, read_json, special_tokens
from data.tables import save
from model import Memory, Model, matrix_name

ALONE = "A LoRA that was made beside them restores less alone; --kv-tokens 0 trains one for this."

# From the smaller shapes back to the pretrained ones -----------------------------------------------------------------


def with_zeros(tensor, index, width, dim):
    """Zeros, with size `width` in dimension `dim`, and the slices of `tensor` at `index` there."""
    shape = list(tensor.shape)
    shape[dim] = width
    return tensor.new_zeros(shape).index_copy(dim, index, tensor)


def expand(small, kept):
    """The inverse of `koff.materialise`: a model of the pretrained shapes with zeros in the closed channels.

    kept: {block: {projection: int64}}, the open channels, from `koff.kept_channels`.
    """
    config = small.config
    state = dict(small.state_dict())
    for i, index in kept.items():
        for name, (channels, _) in config.shapes.items():
            matrix = matrix_name(i, name)
            state.pop(f"{matrix}.kept", None)
            for key in (f"{matrix}.weight", f"{matrix}.bias"):
                if key in state:
                    state[key] = with_zeros(state[key], index[name], channels, dim=0)
        # A neuron is a row of gate and of up, but a column of down.
        down = f"{matrix_name(i, 'down')}.weight"
        state[down] = with_zeros(state[down], index["neuron"], config.intermediate_size, dim=1)
    raw = dict(config.raw)
    raw.pop("koff_kept", None)  # with it the loader would expect the smaller shapes
    with torch.device("meta"):
        dense = Model(replace(config, rows_left=(), raw=raw))
    dense.load_state_dict(state, assign=True)
    return dense.requires_grad_(False)


def expand_memories(memories, kept, config):
    """The inverse of `koff.materialise_memories`: {block: Memory} for the model that `expand` makes."""
    dense = dict(memories)  # a block without gates keeps its memory as it is
    for i in memories.keys() & kept.keys():
        lora = {}
        for name, (a, b) in memories[i].lora.items():
            if name == "down":
                a = with_zeros(a, kept[i]["neuron"], config.intermediate_size, dim=1)
            channels, _ = config.shapes[name]
            lora[name] = (a, with_zeros(b, kept[i][name], channels, dim=0))
        dense[i] = replace(memories[i], lora=lora)
    return dense


# Adapters in peft's layout -------------------------------------------------------------------------------------------


def save_lora(folder, memories, base):
    """Write the LoRA of {block: Memory} as an adapter of kind LORA for the dense model in `base`.

    Ranks may differ from block to block. Zeros fill all up to the largest one. Otherwise llama.cpp, which reads no
    alpha_pattern, would multiply each B by lora_alpha / its own rank.
    """
    rank = max(len(a) for memory in memories.values() for a, _ in memory.lora.values())
    tensors = {}
    for i, memory in memories.items():
        for name, (a, b) in memory.lora.items():
            matrix = f"base_model.model.model.{matrix_name(i, name)}"
            used = torch.arange(len(a))
            tensors[f"{matrix}.lora_A.weight"] = with_zeros(a, used, rank, dim=0)  # [r, fan-in]
            tensors[f"{matrix}.lora_B.weight"] = with_zeros(b, used, rank, dim=1)  # [channels, r]
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,  # peft multiplies by lora_alpha / r, but our B already contains the scale
        "target_modules": [f"{name}_proj" for name in memory.lora],  # the same in every block
        "layers_to_transform": list(memories),
        "layers_pattern": "layers",
    }
    save_adapter(folder, tensors, config, base)


def save_cartridge(folder, memories, base):
    """Write the keys and values of all blocks as an adapter of kind CARTRIDGE for the dense model in `base`."""
    pairs = [torch.stack([memories[i].keys, memories[i].values]) for i in range(len(memories))]
    kv = torch.stack(pairs)
    L, _, G, M, hd = kv.shape  # blocks, keys and values, heads, tokens, channels
    rows = kv.permute(3, 0, 1, 2, 4).reshape(M, -1)  # peft has one row per memory token
    config = {
        "peft_type": "CARTRIDGE",
        "num_virtual_tokens": M,
        "num_frozen_tokens": 0,
        "num_layers": L,
        "num_attention_heads": G,
        "token_dim": G * hd,
    }
    save_adapter(folder, {"prompt_embeddings": rows}, config, base)


def save_adapter(folder, tensors, config, base):
    """Write an adapter in peft's layout, then read it back and compare.

    This replaces a comparison of logits: the same tensors have just passed `check_logits`.
    """
    config |= {"task_type": "CAUSAL_LM", "inference_mode": True, "base_model_name_or_path": str(base)}
    save(folder, {"adapter_config.json": config})
    file = folder / "adapter_model.safetensors"
    save_file(tensors, file, {"format": "pt"})
    check_tensors(file, load_file(file), tensors)


# The command ---------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def export(args):
    """Write the run in the folder `args.run` for another library, `args.form`. Options: see eval.py.

    BadInput if the new folder exists already, or if the result differs from the run.
    """
    run = Run(args.run, "cpu", torch.float32)
    kind = f"{args.form}-{args.module}" if args.module else args.form
    out = args.out or run.folder / "export" / kind
    if out.exists():
        raise BadInput(f"{out} is there already; remove it or name another --out.")
    gates, mask = run.gates(run.backbone)
    kept = koff.kept_channels(mask, run.backbone.config, gates.first_block, "cpu")
    dense = expand(run.backbone, kept)
    names = [args.module] if args.module else run.names
    with atomic(out) as partial:
        if args.form == "hf":
            export_dense(partial, run, dense, kept, args.module)
        elif args.form == "peft":
            export_adapters(partial, run, dense, kept, names)
        else:
            export_gguf(partial, run, dense, kept, names, args)
    print(f"{out}, read again and compared with the run")
    if args.form == "peft":
        print(f"for the model that eval.py export {run.folder} hf writes")
        if any(out.glob("*-kv")):
            print("keys and values: transformers 5.24 with peft 0.21.2 leaves them out of generate(); 5.23 does not")


def lora_of(run, name, target):
    """{block: Memory} with the LoRA of the module `name` alone. BadInput for a tensor that `target` cannot hold."""
    memories = run.memories(name)
    refuse_other_tensors(memories, f"{target} has no place for it")
    return {i: Memory(memory.lora) for i, memory in memories.items()}


def has_lora(memories):
    """Whether any {block: `Memory`} has LoRA. (Modules that came later may have another rank than the run.)"""
    return any(memory.lora for memory in memories.values())


def export_dense(folder, run, dense, kept, name):
    """Write the `dense` model of the run as a checkpoint, with the LoRA of the module `name` merged if it is given."""
    lora = None
    if name:
        # Only LoRA can be merged, so the result is compared with the run under that LoRA alone.
        lora = lora_of(run, name, "a checkpoint")
        if not has_lora(lora):
            raise BadInput(f"{name} has no LoRA to merge; a checkpoint has no place for keys and values.")
        dense, _ = fast.merged(dense, expand_memories(lora, kept, dense.config))
    check_logits("the dense model", run, lora, dense)
    # The check was in float32. The checkpoint has the dtype of the saved backbone.
    dense = dense.to(getattr(torch, dense.config.raw["dtype"]))
    save_backbone(folder, dense, run.folder / "backbone", koff_backbone=run.config.raw["koff_fingerprint"])
    check_tensors(folder, load(folder, dense.head.dtype).state_dict(), dense.state_dict())
    name_tokenizer_class(folder)
    if name and run.settings.kv_tokens:
        print(f"{name}: only its LoRA is merged; a checkpoint has no place for keys and values. {ALONE}")


def name_tokenizer_class(folder):
    """Let tokenizer_config.json name the class that takes tokenizer.json as it is.

    transformers 5 builds some tokenizers by itself, such as GPT2Tokenizer, without the pre-tokenizer of the file.
    """
    names, _ = special_tokens(folder)
    config = read_json(folder / CONFIG) | names
    for name in ("auto_map", *LISTS):  # versions read them differently, and all their tokens are in tokenizer.json
        config.pop(name, None)
    save(folder, {CONFIG: config | {"tokenizer_class": "PreTrainedTokenizerFast"}}, show=False)


def export_adapters(folder, run, dense, kept, names):
    """Write the modules `names` as adapters for the `dense` model: NAME with LoRA, NAME-kv with keys and values."""
    base = (run.folder / "export/hf").resolve()
    tokens = run.settings.kv_tokens
    blocks = len(dense.layers)
    fingerprint = run.config.raw["koff_fingerprint"]
    if (base / "config.json").exists() and read_config(base).raw.get("koff_backbone") != fingerprint:
        raise BadInput(f"{base} is of another run, which was here before; remove it, and export hf again.")
    for name in names:
        if tokens and f"{name}-kv" in names:
            raise BadInput(f"{name}-kv is the name of {name}'s keys and values, too; rename that module first.")
        refuse_other_tensors(run.memories(name), "peft has no place for it")
        memories = expand_memories(run.memories(name), kept, dense.config)
        check_logits(name, run, run.memories(name), dense, memories)
        # Two adapters: no kind in peft holds both LoRA and keys and values.
        if has_lora(memories):
            save_lora(folder / name, memories, base)
        if tokens and len(memories) == blocks:
            save_cartridge(folder / f"{name}-kv", memories, base)
        elif tokens:
            # Zero keys in the other blocks would change them: a query attends to zero keys, too.
            there = f"{tokens} keys and values in {len(memories)} of {blocks} blocks"
            print(f"{name}: peft attaches keys and values to all blocks or none; {there} stay here.")
    if not folder.exists():
        raise BadInput(f"{run.folder} has nothing that peft could attach; export hf is all that there is.")


def export_gguf(folder, run, dense, kept, names, args):
    """Write backbone.gguf, unless args.module is given, and the LoRA of the modules `names` as NAME.gguf."""
    if args.module and not has_lora(run.memories(args.module)):
        raise BadInput(f"{args.module} has no LoRA; a GGUF has no place for keys and values.")
    folder.mkdir()
    left = llamacpp.neurons_left(kept, dense.config, args.dtype)
    model = koff.materialise(dense, left)
    if not args.module:
        check_logits("backbone.gguf", run, None, model)
        check_tensors(folder, *llamacpp.write_backbone(folder / "backbone.gguf", run, model, args.dtype))
    for name in names:
        lora = lora_of(run, name, "a GGUF")
        if not has_lora(lora):
            continue
        memories = koff.materialise_memories(expand_memories(lora, kept, dense.config), left)
        check_logits(name, run, lora, model, memories)
        check_tensors(folder, *llamacpp.write_adapter(folder / f"{name}.gguf", memories, model.config))
    if names and run.settings.kv_tokens:
        print(f"{', '.join(names)}: keys and values stay here; a GGUF has no place for them. {ALONE}")


# The two checks ------------------------------------------------------------------------------------------------------


def check_logits(name, run, memories, dense, dense_memories=None):
    """BadInput unless `dense` with `dense_memories` has the logits of the run with `memories`.

    Both are in float32, but sum in a different order. We allow differences up to 1e-4 of the largest logit.
    """
    tokens = torch.randint(run.tokenizer.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    expected = run.backbone(tokens, memories=memories)
    size = expected.abs().max()
    difference = (dense(tokens, memories=dense_memories) - expected).abs().max()
    if not difference <= 1e-4 * size:  # not ">": that would accept NaN
        raise BadInput(f"{name} differs from the run by {difference:.2g} in a logit of {size:.2g}; it was not kept.")


def check_tensors(path, written, expected):
    """BadInput unless the tensors `written` to a file are the `expected` ones, bit for bit."""
    for name, tensor in expected.items():
        if not torch.equal(written[name], tensor):
            raise BadInput(f"{path} was not written as it is; check the disk and try again.")
