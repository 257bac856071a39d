"""How fast and how lean: time to quality, a step, solving, inference, growth; beside transformers + peft on the same work.

    python tests/bench.py --model DIR                 everything, an hour on two cores; Markdown tables
    python tests/bench.py quality                     seconds to 1.008 of the unpruned perplexity, on the shipped default
    python tests/bench.py --model DIR step            a training step, ours and the peer's
    python tests/bench.py --model DIR solve           least squares, of a module and of the backbone
    python tests/bench.py --model DIR inference       prefill and decoding: transformers, dense, compact, with a module
    python tests/bench.py --model DIR growth          our step against length, KV tokens, rank, domains, vocabulary

`--before DIR` adds an earlier checkout of this project to `quality` and `solve`. Every subject runs in processes of its
own, in turns with the others, those of `inference` in turns in one; the fastest round counts, so that all figures of a
table are of one time. Memory is the peak of the resident set above what it is with the weights loaded.
"""

import argparse
import contextlib
import ctypes
import itertools
import json
import math
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

ROOT = Path(os.environ.get("CHECKOUT", Path(__file__).resolve().parent.parent))  # whose code a subject measures
sys.path.insert(0, str(ROOT))

import koff
from data import BadInput, fast, starts
from data.checkpoint import load, load_module, save_module
from data.corpus import batch, windows
from data.families import read_config
from data.progress import Progress
from data.run import open_training, pick_dtype
from data.settings import LORA, PRESETS, Settings
from data.solve import solve_module
from data.tables import table
from data.tokenizer import Tokenizer
from eval import losses_of, perplexity
from model import Cache, Model
from train import Trainer, loop

TARGET = 1.008  # of `quality`: perplexity with a text's own module / unpruned, averaged over the domains
FIVE = dict(lora="kv+mlp")
SIZES = {64: dict(rank=64, alpha=64.0, kv_tokens=64), 256: dict(rank=256, alpha=128.0, kv_tokens=256)}
DTYPE = pick_dtype("auto", torch.device("cpu"))
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}  # what `fast.keep_pages` asks for


def upper_blocks(model):
    """The settings of a step: gates and memories in the upper 18 blocks, or in all if the model has fewer."""
    blocks = min(18, read_config(model).num_hidden_layers)
    return dict(blocks=blocks, sparsity=0.12, batch=2, seq_len=512)


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
    loras = 2 * s.rank if "k" in LORA[s.lora] else 0
    unneeded = c.hidden_size * (q_width + 2 * c.shapes["k"][0] + loras)  # of the first gated block's input
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


def our_solve(model, settings, backbone=False):
    """Least squares for one module, or for the backbone."""
    fast.enable()
    s = Settings(model=model, **settings)
    model = load(model, DTYPE)
    trainer = Trainer(model, s, ["one"])
    freeze_random_mask(trainer)
    tokens = s.repair_tokens if backbone else s.solve_tokens
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, tokens)

    def work(ids):
        if backbone:
            from data.solve import repair_student  # an earlier checkout has none

            repair_student(trainer, {"one": ids})
        else:
            solve_module(trainer, "one", ids)

    work(ids[: s.seq_len])  # the program itself comes into memory
    memory = memory_above(model.parameters())
    begun = time.perf_counter()
    work(ids)
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
        s = Settings(
            model=folder, **{**upper_blocks(folder), "kv_tokens": 64, "sparsity": sparsity, "fisher_sequences": 12}
        )
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


# Subjects of `quality`. Each prints lines of seconds and quality as it goes, and returns {"seconds": to the target, inf if
# it was not reached, "best": the best quality, "ran": seconds in all} ------------------------------------------------


class Race:
    """A clock that began with this process. It stands still while a quality is measured."""

    def __init__(self, limit=math.inf):
        begun = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        self.begun = int(begun) / os.sysconf("SC_CLK_TCK")  # seconds after the machine's start
        self.limit = limit
        self.result = {"seconds": math.inf, "best": math.inf, "ran": 0.0}

    def now(self):
        return time.clock_gettime(time.CLOCK_BOOTTIME) - self.begun

    @contextlib.contextmanager
    def paused(self):
        before = self.now()
        yield
        self.begun += self.now() - before

    def over(self, text, s, losses):
        """Measure the quality. Is it good enough, or the time over?

        losses: (domain, windows x [n, T]) -> those of "own" and "unpruned", as in `eval.losses_of`.
        """
        ratios = []
        with self.paused():
            for domain in text.train:
                both = losses(domain, windows(text.splits[domain].heldout, s.eval_len, s.eval_windows))
                ratios.append(perplexity(both["own"]) / perplexity(both["unpruned"]))
        now, quality = self.now(), float(np.mean(ratios))
        print(f"{now:.1f} {quality:.4f}", flush=True)
        reached = now if quality <= TARGET else math.inf
        self.result = {"seconds": reached, "best": min(quality, self.result["best"]), "ran": now}
        return quality <= TARGET or now > self.limit


class Over(Exception):
    pass


class Checked(Progress):
    """A `Progress` that checks the quality once all modules are solved, and after every ten steps from there."""

    def after_solving(self, domain, explained):
        super().after_solving(domain, explained)
        if not self.unsolved():
            self.check_quality()

    def after_step(self, index, *more):
        super().after_step(index, *more)
        done = index + 1 - self.trainer.s.gate_steps
        if done > 0 and (done % 10 == 0 or index + 1 == self.last):
            self.check_quality()

    @torch.no_grad()
    def check_quality(self):
        trainer = self.trainer

        def losses(domain, x):
            own = koff.materialise_memories(trainer.memories(domain), trainer.kept)
            return losses_of({"unpruned": (trainer.model, None), "own": (trainer.student, own)}, x, trainer.split)

        if self.race.over(self.text, trainer.s, losses):
            raise Over


def our_quality(preset):
    """As train.py does it, in a new folder: no token ids are cached."""
    race = Race()
    fast.enable()
    s = Settings(**PRESETS[preset])
    with tempfile.TemporaryDirectory() as at, contextlib.suppress(Over):
        out = Path(at, "run")
        opened = open_training(s, out)
        trainer = Trainer(opened.model, s, opened.text.train)
        out.mkdir()
        with Checked(trainer, opened.text, out, time.perf_counter()) as progress:
            progress.race = race
            loop(trainer, opened.text, progress)
    return race.result


def peer_quality(limit, rate=2e-3):
    """Our default as a user of transformers and peft would write it: our mask, and LoRA on `down` trained by our KL.

    Token ids and mask are given, they take no time. The parameters of our KV memory become further ranks.
    """
    race = Race(limit)
    s = Settings()
    with race.paused(), tempfile.TemporaryDirectory() as at:
        opened = open_training(s, Path(at, "run"))
        text, gates = opened.text, s.new_gates(opened.model.config)
        starts.start_gates(gates, opened.model, text.train, s)
        mask = fast.final_mask(gates, s.sparsity, s.count, s.multiple)

    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    teacher, model = (AutoModelForCausalLM.from_pretrained(s.model, dtype=DTYPE) for _ in range(2))
    teacher.requires_grad_(False)
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            closed = {name: ~is_open[i] for name, is_open in mask.items()}
            layer.self_attn.k_proj.weight[closed["k"]] = 0
            layer.self_attn.v_proj.weight[closed["v"]] = 0
            layer.mlp.gate_proj.weight[closed["neuron"]] = 0
            layer.mlp.up_proj.weight[closed["neuron"]] = 0
            layer.mlp.down_proj.weight[:, closed["neuron"]] = 0
            layer.mlp.down_proj.weight[closed["down"]] = 0
    c, domains = model.config, list(text.train)
    kv = 2 * s.kv_tokens * c.num_key_value_heads * c.head_dim
    r = s.rank + round(kv / (c.intermediate_size + c.hidden_size))
    lora = LoraConfig(r=r, lora_alpha=r, target_modules=["down_proj"])
    model = get_peft_model(model, lora, adapter_name=domains[0])
    for domain in domains[1:]:
        model.add_adapter(domain, lora)
    trained = [p for name, p in model.named_parameters() if "lora_" in name]  # AdamW skips those without a gradient
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)

    @torch.no_grad()
    def losses(domain, x):
        model.set_adapter(domain)
        x, found = torch.from_numpy(x), {}
        for name, which in {"own": model, "unpruned": teacher}.items():
            logits = which(x).logits[:, :-1].float()
            found[name] = F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), reduction="none").double()
        return found

    for index in itertools.count():
        if index % 50 == 0 and race.over(text, s, losses):
            return race.result
        domain = domains[index % len(domains)]
        tokens = torch.from_numpy(batch(text.train[domain], index // len(domains), s.batch, s.seq_len, s.seed))
        with torch.no_grad():
            logits = teacher(tokens).logits.float().flatten(0, 1)
            top = logits.topk(s.top).indices
            log_p = koff.top_and_rest(logits, top)
        model.set_adapter(domain)
        koff.kl_topk(model(tokens).logits.float().flatten(0, 1), top, *log_p).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


# Tables --------------------------------------------------------------------------------------------------------------


def measured(subject, arguments, environment):
    """What a subject returns that runs in a process of its own. environment: `KEPT`, a "CHECKOUT", or nothing."""
    command = [sys.executable, __file__, "--subject", subject.__name__, json.dumps(arguments)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{subject.__name__}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def in_turns(subjects, rounds):
    """{name: (subject, its arguments, its environment)} -> {name: {figure: the least of all rounds}}."""
    found = {name: [] for name in subjects}
    for name, subject in tqdm(list(subjects.items()) * rounds, leave=False):
        found[name].append(measured(*subject))
    return {name: {figure: min(r[figure] for r in all_) for figure in all_[0]} for name, all_ in found.items()}


def quality(args, rounds):
    subjects = {
        "ours, --preset solved": (our_quality, {"preset": "solved"}, KEPT),
        "ours, default": (our_quality, {"preset": "handbook"}, KEPT),
    }
    if args.before:
        subjects["before, default"] = (our_quality, {"preset": "handbook"}, KEPT | {"CHECKOUT": args.before})
    subjects["transformers + peft"] = (peer_quality, {"limit": args.limit}, KEPT)
    found, rows = in_turns(subjects, rounds), {}
    before = found["before, default"]["seconds"] if args.before else math.inf
    for name, r in found.items():
        reached = r["seconds"] < math.inf
        seconds = r["seconds"] if reached else r["ran"]
        said = f"{seconds:.1f}" if reached else f"not reached in {seconds:.0f} s, best {r['best']:.4f}"
        against = f"{'' if reached else 'over '}{seconds / before:.2f} x"
        rows[name] = [said, against if before < math.inf else "-"]
    print(f"\n**Seconds until perplexity with a text's own module is {TARGET} of the unpruned model's**\n")
    print(table("", [f"seconds to {TARGET}", "/ before"], rows))


def step(args, rounds):
    for rank, size in SIZES.items():
        given = dict(model=args.model, settings={**upper_blocks(args.model), **FIVE, **size})
        down = {**given["settings"], "lora": "down"}
        s = Settings(**given["settings"])
        subjects = {
            "ours": (our_step, given, KEPT),
            "ours, mask fixed": (our_step, {**given, "closed": True}, KEPT),
            "ours, mask fixed, LoRA on down": (our_step, {**given, "settings": down, "closed": True}, KEPT),
            "peer, float32 adapters": (peer_step, given, {}),
            "peer, float32, pages kept": (peer_step, given, KEPT),
            "peer, bfloat16 adapters": (peer_step, {**given, "adapters": "bfloat16"}, {}),
            "peer, bfloat16, pages kept": (peer_step, {**given, "adapters": "bfloat16"}, KEPT),
        }
        found = in_turns(subjects | {"products": (rate, {}, KEPT)}, rounds)
        peak, rows = found.pop("products")["rate"], {}
        for name, r in found.items():
            against = [f"{r[x] / found['ours'][x]:.2f} x" for x in ("seconds", "memory")]
            rows[name] = [f"{r['seconds']:.2f}", f"{s.batch * s.seq_len / r['seconds']:.0f}", against[0]]
            rows[name] += [f"{r['memory'] / 1e6:.0f}", against[1]]
        columns = ["s a step", "tokens/s", "time / ours", "MB", "memory / ours"]
        share = sum(operations(read_config(args.model), s)) / found["ours"]["seconds"] / peak
        print(f"\n**Training step, rank {rank}, {s.kv_tokens} KV tokens, {s.batch} x {s.seq_len} tokens, {DTYPE}**\n")
        print(table("", columns, rows))
        print(f"\nOurs runs at {share:.0%} of the {peak / 1e9:.0f} GFLOP/s that matrix products alone reach.")


def solve(args, rounds):
    subjects = {}
    for tokens in (16384, 65536):
        usual = {**upper_blocks(args.model), **SIZES[64], "lora": "down"}
        module = dict(model=args.model, settings={**usual, "solve_tokens": tokens})
        backbone = dict(model=args.model, settings={**usual, "repair_tokens": tokens}, backbone=True)
        subjects["a module", tokens] = (our_solve, module, KEPT)
        if args.before:
            subjects["a module, before", tokens] = (our_solve, module, KEPT | {"CHECKOUT": args.before})
        subjects["the backbone", tokens] = (our_solve, backbone, KEPT)
    found, rows = in_turns(subjects, rounds), {}
    for (what, tokens), r in found.items():
        before = found.get(("a module, before", tokens), {}) if what == "a module" else {}
        against = [f"{r[x] / before[x]:.2f} x" if before else "-" for x in ("seconds", "memory")]
        rows[f"{what}, {tokens:,} tokens"] = [f"{r['seconds']:.1f}", against[0], f"{r['memory'] / 1e6:.0f}", against[1]]
    print("\n**Least squares**\n")
    print(table("", ["seconds", "/ before", "MB", "/ before"], rows))


def inference(args, rounds):
    found = measured(in_inference, dict(model=args.model, rounds=3 * rounds), KEPT)
    swap, merge, dense = found.pop("swap"), found.pop("merge"), found["ours, dense"]
    rows = {
        name: [x for key in ("prefill", "decode") for x in (f"{r[key] * 1e3:.1f}", f"{r[key] / dense[key]:.2f} x")]
        for name, r in found.items()
    }
    print("\n**Inference, one sequence**\n")
    print(table("", ["ms for 512 tokens", "/ dense", "ms a new token", "/ dense"], rows))
    times = f"its file takes {swap * 1e3:.1f} ms, adding its LoRA to the matrices {merge * 1e3:.1f} ms"
    print(f"\nReading a module from {times}.")


def growth(args, rounds):
    usual = {**upper_blocks(args.model), **FIVE, **SIZES[64], "batch": 1}
    vocabulary = read_config(args.model).vocab_size
    axes = {
        "tokens in a sequence": {x: dict(settings={**usual, "seq_len": x}) for x in (256, 512, 1024, 2048, 4096)},
        "KV tokens": {x: dict(settings={**usual, "kv_tokens": x, "seq_len": 1024}) for x in (0, 64, 256, 1024)},
        "rank": {x: dict(settings={**usual, "rank": x}) for x in (8, 64, 256)},
        "domains": {x: dict(settings=usual, domains=x) for x in (2, 6, 12)},
        "vocabulary": {x: dict(settings=usual, vocabulary=x) for x in (vocabulary // 4, vocabulary, 4 * vocabulary)},
    }
    for axis, points in axes.items():
        subjects = {x: (our_step, dict(model=args.model, times=2, **more), KEPT) for x, more in points.items()}
        rows = {
            f"{x:,}": [f"{r['seconds']:.2f}", f"{(r['memory'] - r['own']) / 1e6:.0f}", f"{r['own'] / 1e6:.0f}"]
            for x, r in in_turns(subjects, rounds).items()
        }
        print(f"\n**Growth: {axis}**\n")
        print(table(axis, ["s a step", "MB of the step", "MB of the modules and AdamW"], rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = {"quality": quality, "step": step, "solve": solve, "inference": inference, "growth": growth}
    parser.add_argument("sections", nargs="*", metavar="section", help=f"of {', '.join(sections)} [all]")
    parser.add_argument("--model", default=str(ROOT / "data/base"), help="folder of the model [data/base]")
    parser.add_argument("--before", type=os.path.abspath, help="an earlier checkout, to be compared with")
    parser.add_argument("--limit", type=float, default=600, help="seconds that the peer of quality has [600]")
    parser.add_argument("--rounds", type=int, help="processes for each subject [2; in quality 1]")
    args = parser.parse_args()
    if unknown := set(args.sections) - set(sections):
        parser.error(f"there is no section {', '.join(unknown)}; give {', '.join(sections)}")
    try:
        read_config(args.model)
    except BadInput as error:
        parser.error(str(error))
    for name in args.sections or sections:
        sections[name](args, args.rounds or (1 if name == "quality" else 2))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--subject"]:
        print(json.dumps(globals()[sys.argv[2]](**json.loads(sys.argv[3]))))
    else:
        main()
