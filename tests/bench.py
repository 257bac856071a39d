"""How fast and how lean: a training step, inference and growth, beside transformers + peft on the same work.

    python tests/bench.py --model DIR                 everything, half an hour on two cores; Markdown tables
    python tests/bench.py --model DIR step            a training step, ours and the peer's
    python tests/bench.py --model DIR solve           LoRA on down by least squares, against the number of tokens
    python tests/bench.py --model DIR inference       prefill and decoding: transformers, dense, compact, with a module
    python tests/bench.py --model DIR growth          our step against length, KV tokens, rank, domains, vocabulary

Every subject of `step` runs in processes of its own, in turns with the others, those of `inference` in turns in one;
the fastest round counts, so that all figures of a table are of one time. Memory is the peak of the resident set above
what it is with the weights loaded.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import koff
from data import BadInput, fast, starts
from data.checkpoint import load, load_module, save_module
from data.families import read_config
from data.run import pick_dtype
from data.settings import LORA, Settings
from data.solve import solve_module
from data.tables import table
from data.tokenizer import Tokenizer
from model import Cache, Model
from train import Trainer

STEP = dict(blocks=18, sparsity=0.12, batch=2, seq_len=512)
SIZES = {64: dict(rank=64, alpha=64.0, kv_tokens=64), 256: dict(rank=256, alpha=128.0, kv_tokens=256)}
DTYPE = pick_dtype("auto", torch.device("cpu"))
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}  # what `fast.keep_pages` asks for


def operations(config, s):
    """(in linear layers, in attention): operations of one training step, two for each multiply-add, none counted twice.

    Lower blocks run once, the teacher's upper blocks and head forward, the student's forward and backward. Frozen
    weights have no gradient, and nothing below the first gated block has. Attention counts the pairs that are visible.
    """
    c, n = config, config.num_hidden_layers
    tokens, q_width = s.batch * s.seq_len, c.num_attention_heads * c.head_dim
    block = sum(rows * columns for rows, columns in c.shapes.values())
    lora = s.rank * sum(sum(c.shapes[name]) for name in LORA[s.lora])
    head = c.vocab_size * c.hidden_size
    unneeded = c.hidden_size * (q_width + 2 * c.shapes["k"][0] + 2 * s.rank)  # of the first gated block's input
    upper = n - s.first_blocks(n)[0]
    forward = (n + upper) * block + upper * lora + 2 * head
    backward = upper * (block + 2 * lora) - unneeded + head
    pairs = s.seq_len * (s.seq_len + 1) // 2
    seen = n * pairs + 3 * upper * (pairs + s.seq_len * s.kv_tokens)  # backward has four products, forward two
    return 2 * tokens * (forward + backward), 2 * 2 * q_width * s.batch * seen


def memory_above(parameters):
    """Forget the peak so far. The function returned gives the bytes by which the resident set has grown at most."""

    def status(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    for p in parameters:
        p.sum()  # now the weights are there: they may have been a mapped file so far
    # What loading took and gave back: an allocator that keeps its pages would use them again, and nothing would grow.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    return lambda: status("VmHWM") - before


def fastest(work, times):
    work(), work()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


# Subjects: each runs in a process of its own and returns what it measured --------------------------------------------


def rate():
    """Operations per second of the fastest of some matrix products."""
    best = 0.0
    for m, k, n in (2048, 2048, 2048), (1024, 576, 1536), (1024, 1536, 576):
        a, b = torch.randn(m, k, dtype=DTYPE), torch.randn(n, k, dtype=DTYPE)
        best = max(best, 2 * m * k * n / fastest(lambda a=a, b=b: F.linear(a, b), 30))
    return {"rate": best}


def freeze(trainer):
    """As `train.loop` does where the gates have learnt."""
    s = trainer.s
    trainer.freeze_mask(fast.final_mask(trainer.gates, s.sparsity, s.count, s.multiple))


def freeze_random_mask(trainer):
    """Gates of all kinds close. (They begin equal, and would close in order: every channel of `down` first.)"""
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(a.shape, generator=generator) for name, a in trainer.gates.log_alpha.items()}
    starts.spread_by_rank(trainer.gates, scores)
    freeze(trainer)


def our_step(model, settings, domains=1, closed=False, vocabulary=None, times=4):
    fast.enable()  # as train.py does
    s = Settings(model=model, **settings)
    if vocabulary:  # numbers do not matter
        with torch.device("meta"):
            model = Model(replace(read_config(model), vocab_size=vocabulary)).to(DTYPE).requires_grad_(False)
        model.to_empty(device="cpu")
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.02)
    else:
        model = load(model, DTYPE)
    memory = memory_above(model.parameters())
    trainer = Trainer(model, s, [f"d{i}" for i in range(domains)])
    tokens = torch.randint(0, model.config.vocab_size, (s.batch, s.seq_len))
    one_step = trainer.learn
    if closed:
        freeze_random_mask(trainer)
        one_step = trainer.recover
    for domain in trainer.domains:  # all of AdamW's state
        one_step(tokens, domain, 0)
    own = 12 * sum(koff.count_parameters(module) for module in trainer.modules.values())
    return {"seconds": fastest(lambda: one_step(tokens, "d0", 0), times), "memory": memory(), "own": own}


def our_solve(model, settings):
    fast.enable()
    s = Settings(model=model, **settings)
    model = load(model, DTYPE)
    trainer = Trainer(model, s, ["one"])
    freeze_random_mask(trainer)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, s.solve_tokens)
    memory = memory_above(model.parameters())
    begun = time.perf_counter()
    solve_module(trainer, "one", ids)
    return {"seconds": time.perf_counter() - begun, "memory": memory()}


def peer_step(model, settings, adapters="float32", times=4):
    """The same step as a user of transformers and peft would write it, without gates."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, DynamicCache

    s = Settings(model=model, **settings)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=DTYPE)
    c, memory = base.config, memory_above(base.parameters())
    first, dtype = s.first_blocks(c.num_hidden_layers)[0], getattr(torch, adapters)
    names, upper = [f"{x}_proj" for x in ("k", "v", "gate", "up", "down")], list(range(first, c.num_hidden_layers))
    lora = LoraConfig(r=s.rank, lora_alpha=s.alpha, target_modules=names, layers_to_transform=upper)
    model = get_peft_model(base, lora, autocast_adapter_dtype=adapters == "float32")
    shape = (2, 1, c.num_key_value_heads, s.kv_tokens, base.model.layers[0].self_attn.head_dim)
    past = [(torch.randn(shape, dtype=dtype) * 0.02).requires_grad_(i >= first) for i in range(c.num_hidden_layers)]
    trained = [p for p in model.parameters() if p.requires_grad] + past[first:]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    tokens = torch.randint(0, c.vocab_size, (s.batch, s.seq_len))

    def step():
        with torch.no_grad(), model.disable_adapter():
            log_p, index = model(tokens).logits.float().log_softmax(-1).topk(s.top)
        cache = DynamicCache()
        for i, both in enumerate(past):
            cache.update(*both.to(DTYPE).expand(-1, s.batch, -1, -1, -1), i)
        log_q = model(tokens, past_key_values=cache).logits.float().log_softmax(-1).gather(-1, index)
        loss = (log_p.exp() * (log_p - log_q)).sum() / tokens.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return {"seconds": fastest(step, times), "memory": memory()}


def in_inference(model, rounds, prompt=512, new=128):
    """{name: {"prefill": seconds for the prompt, "decode": for a new token, greedy}}, and the seconds that a module
    takes to be read from its file ("swap") and to be added to the matrices ("merge").

    (All in one process, in turns, since a ratio of 0.9 is less than what two minutes change on a shared machine.)
    """
    from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

    fast.enable()
    folder, peer = model, AutoModelForCausalLM.from_pretrained(model, dtype=DTYPE)
    text = (ROOT / "data/handbook/english.txt").read_text(encoding="utf-8")[:100_000]
    ids = np.array(Tokenizer.from_folder(folder).encode(text))

    def theirs(x, cache):
        return peer(x, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)

    def ours(model, memory=None):
        def forward(x, cache):
            hidden = model.run(model.embed_tokens(x), 0, len(model.layers), memories=memory, cache=cache)
            return model.logits(hidden[:, -1]).argmax(-1, keepdim=True)

        return forward, lambda: Cache(new)

    subjects = {
        "transformers, dynamic cache": (theirs, lambda: DynamicCache(config=peer.config)),
        "transformers, static cache": (theirs, lambda: StaticCache(config=peer.config, max_cache_len=prompt + new)),
        "ours, dense": ours(load(folder, DTYPE)),
    }
    for sparsity in (0.12, 0.30):
        s = Settings(model=folder, **{**STEP, "kv_tokens": 64, "sparsity": sparsity, "fisher_sequences": 12})
        trainer = Trainer(load(folder, DTYPE), s, ["one"])
        starts.start(trainer, {"one": ids})  # what closes are mostly neurons, as in a run
        freeze(trainer)
        with torch.no_grad(), tempfile.TemporaryDirectory() as at:
            path, config = Path(at, "one.safetensors"), replace(trainer.model.config, raw={"koff_fingerprint": "here"})
            save_module(path, koff.materialise_memories(trainer.memories("one"), trainer.kept), "here")
            memory = load_module(path, config, DTYPE)
            swap = fastest(lambda a=(path, config, DTYPE): load_module(*a), 20)
        merge = fastest(lambda a=(trainer.student, memory): fast.merged(*a), 20)
        subjects[f"compact, {sparsity:.0%}"] = ours(trainer.student)
        subjects[f"compact, {sparsity:.0%}, LoRA beside the matrices"] = ours(trainer.student, memory)
        subjects[f"compact, {sparsity:.0%}, with a module"] = ours(*fast.merged(trainer.student, memory))
    found = {name: {"prefill": [], "decode": []} for name in subjects}
    with torch.inference_mode():
        for name in list(subjects) * rounds:
            (forward, start), seconds = subjects[name], found[name]
            for _ in range(3):
                begun, cache = time.perf_counter(), start()
                x = forward(torch.from_numpy(ids[None, :prompt]), cache)
                seconds["prefill"].append(time.perf_counter() - begun)
            begun = time.perf_counter()
            for _ in range(new):
                x = forward(x, cache)
            seconds["decode"].append((time.perf_counter() - begun) / new)
    return {"swap": swap, "merge": merge} | {name: {key: min(x) for key, x in r.items()} for name, r in found.items()}


# Tables --------------------------------------------------------------------------------------------------------------


def measured(subject, arguments, kept):
    """What a subject returns that runs in a process of its own; `kept`: its allocator keeps its pages."""
    command = [sys.executable, __file__, "--subject", subject.__name__, json.dumps(arguments)]
    done = subprocess.run(command, env=os.environ | (KEPT if kept else {}), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{subject.__name__}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def in_turns(subjects, rounds):
    """{name: (subject, its arguments, allocator kept?)} -> {name: {figure: the least of all rounds}}."""
    found = {name: [] for name in subjects}
    for name, subject in tqdm(list(subjects.items()) * rounds, leave=False):
        found[name].append(measured(*subject))
    return {name: {figure: min(r[figure] for r in all_) for figure in all_[0]} for name, all_ in found.items()}


def step(model, rounds):
    for rank, size in SIZES.items():
        given = dict(model=model, settings={**STEP, **size})
        s = Settings(**given["settings"])
        subjects = {
            "ours": (our_step, given, True),
            "ours, mask fixed": (our_step, {**given, "closed": True}, True),
            "peer, float32 adapters": (peer_step, given, False),
            "peer, float32, pages kept": (peer_step, given, True),
            "peer, bfloat16 adapters": (peer_step, {**given, "adapters": "bfloat16"}, False),
            "peer, bfloat16, pages kept": (peer_step, {**given, "adapters": "bfloat16"}, True),
        }
        found = in_turns(subjects | {"products": (rate, {}, True)}, rounds)
        peak, rows = found.pop("products")["rate"], {}
        for name, r in found.items():
            against = [f"{r[x] / found['ours'][x]:.2f} x" for x in ("seconds", "memory")]
            rows[name] = [f"{r['seconds']:.2f}", f"{s.batch * s.seq_len / r['seconds']:.0f}", against[0]]
            rows[name] += [f"{r['memory'] / 1e6:.0f}", against[1]]
        columns = ["s a step", "tokens/s", "time / ours", "MB", "memory / ours"]
        share = sum(operations(read_config(model), s)) / found["ours"]["seconds"] / peak
        print(f"\n**Training step, rank {rank}, {s.kv_tokens} KV tokens, {s.batch} x {s.seq_len} tokens, {DTYPE}**\n")
        print(table("", columns, rows))
        print(f"\nOurs runs at {share:.0%} of the {peak / 1e9:.0f} GFLOP/s that matrix products alone reach.")


def solve(model, rounds):
    subjects = {}
    for tokens in (4096, 16384, 32768, 65536):
        subjects[tokens] = (our_solve, dict(model=model, settings={**STEP, **SIZES[64], "solve_tokens": tokens}), True)
    rows = {}
    for tokens, r in in_turns(subjects, rounds).items():
        rows[f"{tokens:,}"] = [f"{r['seconds']:.1f}", f"{r['memory'] / 1e6:.0f}"]
    print("\n**LoRA on down by least squares**\n")
    print(table("tokens of a domain", ["s a domain", "MB"], rows))


def inference(model, rounds):
    found = measured(in_inference, dict(model=model, rounds=3 * rounds), True)
    swap, merge, dense = found.pop("swap"), found.pop("merge"), found["ours, dense"]
    rows = {
        name: [x for key in ("prefill", "decode") for x in (f"{r[key] * 1e3:.1f}", f"{r[key] / dense[key]:.2f} x")]
        for name, r in found.items()
    }
    print("\n**Inference, one sequence**\n")
    print(table("", ["ms for 512 tokens", "/ dense", "ms a new token", "/ dense"], rows))
    times = f"its file takes {swap * 1e3:.1f} ms, adding its LoRA to the matrices {merge * 1e3:.1f} ms"
    print(f"\nReading a module from {times}.")


def growth(model, rounds):
    usual = {**STEP, **SIZES[64], "batch": 1}
    vocabulary = read_config(model).vocab_size
    axes = {
        "tokens in a sequence": {x: dict(settings={**usual, "seq_len": x}) for x in (256, 512, 1024, 2048, 4096)},
        "KV tokens": {x: dict(settings={**usual, "kv_tokens": x, "seq_len": 1024}) for x in (0, 64, 256, 1024)},
        "rank": {x: dict(settings={**usual, "rank": x}) for x in (8, 64, 256)},
        "domains": {x: dict(settings=usual, domains=x) for x in (2, 6, 12)},
        "vocabulary": {x: dict(settings=usual, vocabulary=x) for x in (vocabulary // 4, vocabulary, 4 * vocabulary)},
    }
    for axis, points in axes.items():
        subjects = {x: (our_step, dict(model=model, times=2, **more), True) for x, more in points.items()}
        rows = {
            f"{x:,}": [f"{r['seconds']:.2f}", f"{(r['memory'] - r['own']) / 1e6:.0f}", f"{r['own'] / 1e6:.0f}"]
            for x, r in in_turns(subjects, rounds).items()
        }
        print(f"\n**Growth: {axis}**\n")
        print(table(axis, ["s a step", "MB of the step", "MB of the modules and AdamW"], rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = {"step": step, "solve": solve, "inference": inference, "growth": growth}
    parser.add_argument("sections", nargs="*", metavar="section", help=f"of {', '.join(sections)} [all]")
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--rounds", type=int, default=2, help="processes for each subject [2]")
    args = parser.parse_args()
    if unknown := set(args.sections) - set(sections):
        parser.error(f"there is no section {', '.join(unknown)}; give {', '.join(sections)}")
    try:
        read_config(args.model)
    except BadInput as error:
        parser.error(str(error))
    for name in args.sections or sections:
        sections[name](args.model, args.rounds)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--subject"]:
        print(json.dumps(globals()[sys.argv[2]](**json.loads(sys.argv[3]))))
    else:
        main()
