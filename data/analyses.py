"""What a mask closes (LAPE), and what the backbone alone still is (CKA, neighbours, centroids)."""

import contextlib
import json
import math

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from data import BadInput, atomic
from data.corpus import windows
from data.router import Router
from data.run import opened
from data.tables import save, table


def lape(counts, tokens, share=0.01, percentile=0.95):
    """Language Activation Probability Entropy (Tang et al. 2024, arXiv 2402.16438), as their code has it, in float64.

    counts [languages, N, F]: tokens with silu(gate) > 0, of tokens [languages]. Returns the entropy [N, F] in nats of a
    neuron's activation probabilities scaled to one (0 if it is never active, which makes it look specific), and bool
    [languages, N, F], the language-specific neurons. These are the `share` of lowest entropy among neurons whose
    probability exceeds the `percentile` of all probabilities in some language; they belong to each such language.
    """
    p = counts.double() / tokens.double().view(-1, 1, 1)
    entropy = torch.special.entr((p / p.sum(0)).nan_to_num(0.0)).sum(0)
    often = p > p.flatten().kthvalue(max(1, round(percentile * p.numel()))).values
    order = entropy.masked_fill(~often.any(0), math.inf).flatten().argsort(stable=True)
    chosen = torch.zeros(len(order), dtype=torch.bool)
    chosen[order[: round(share * len(order))]] = True
    return entropy, often & chosen.view_as(entropy)


def closed_by_entropy(entropy, mask, share=0.15):
    """{"gate", "up", "either": {"specific", "general", "all": P(closed)}} for the neurons of the gated blocks.

    entropy [N, F]; mask {name: bool [N, F]}, True where open; a gate on a neuron is both its gate's and its up's.
    "specific" are the `share` of lowest entropy, "general" of highest, "all" the local sparsity. Entropy alone decides,
    without the filter of `lape`, so that a neuron that is never active (0) is specific; of equals the earlier block and
    neuron counts as lower, so that the two groups never overlap.
    """
    order = entropy.flatten().argsort(stable=True)
    n = round(share * len(order))
    groups = {"specific": order[:n], "general": order[len(order) - n :], "all": order}
    closed = {name: ~mask["neuron" if "neuron" in mask else name].flatten() for name in ("gate", "up")}
    closed["either"] = closed["gate"] | closed["up"]
    return {name: {g: c[i].double().mean().item() for g, i in groups.items()} for name, c in closed.items()}


def cka(x, y):
    """Linear CKA of x [n, D] and y [n, E] (Kornblith et al. 2019, arXiv 1905.00414), 0 to 1: 1 if they are the same but
    for rotation, scale and shift. With fewer texts than dimensions it is near 1 by itself."""
    x, y = (t.double() - t.double().mean(0) for t in (x, y))
    return ((x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())).item()


def knn_overlap(x, y, k):
    """Share of the k < n nearest neighbours by cosine that x [n, D] and y [n, E] have in common, mean over the n points
    (mutual kNN of Huh et al. 2024, arXiv 2405.07987). By chance it is k / (n - 1)."""
    x, y = (nn.functional.normalize(t.double(), dim=1) for t in (x, y))
    common = 0
    for rows in torch.arange(len(x)).split(1024):  # n x n cosines of many texts would fill the memory
        near = []
        for t in (x, y):
            cosine = t[rows] @ t.T
            cosine[torch.arange(len(rows)), rows] = -math.inf  # nobody is his own neighbour
            near.append(cosine.topk(k).indices)
        common += (near[0].unsqueeze(2) == near[1].unsqueeze(1)).sum().item()
    return common / (k * len(x))


def centroid_cosine(x, y, labels):
    """[classes]: cosine between a class's mean in x [n, D] and in y [n, D], both less the mean of all n points.

    Without that centring the direction that all hidden states of a model share brings every cosine close to 1.
    """
    x, y = (t.double() - t.double().mean(0) for t in (x, y))
    means = [torch.stack([t[labels == c].mean(0) for c in labels.unique()]) for t in (x, y)]
    return nn.functional.cosine_similarity(*means, dim=1)


@torch.no_grad()
def activations(model, tokens, name, size=8):
    """tokens [n, T] -> int64 [N, F]: at how many of them silu(gate) > 0, that is gate > 0, in block and neuron."""
    counts = torch.zeros(len(model.layers), model.config.intermediate_size, dtype=torch.int64, device=tokens.device)
    with contextlib.ExitStack() as hooks:
        for row, block in zip(counts, model.layers, strict=True):

            def count(module, inputs, gate, row=row):
                row += (gate > 0).sum((0, 1))

            hooks.enter_context(block.mlp.gate_proj.register_forward_hook(count))
        for part in tqdm(tokens.split(size), desc=name):
            model.hidden(part)
    return counts


def lape_report(args):
    """Does the mask close the neurons that few domains use? Counted on --tokens of each domain's training text."""
    run, base, domains = opened(args.run, args.device)
    length, (gates, mask) = run.settings.seq_len, run.gates(base)
    if args.tokens < length or len(domains) < 2 or not {"neuron", "gate"} & set(mask):
        raise BadInput(f"{args.run}: lape needs gates on the MLP, two domains and --tokens of at least {length}.")
    x = {d: windows(split.train, length, args.tokens // length) for d, split in domains.items()}
    counts = torch.stack([activations(base, torch.from_numpy(w).to(run.device), d).cpu() for d, w in x.items()])
    seen = torch.tensor([w.size for w in x.values()])
    with atomic(run.folder / "lape.safetensors") as partial:
        save_file({"counts": counts, "tokens": seen}, partial, {"domains": json.dumps(list(x))})
    entropy, specific = lape(counts, seen)
    closed = closed_by_entropy(entropy[gates.first :], mask)
    own = {d: {"tokens": w.size, "specific": int(of.sum())} for (d, w), of in zip(x.items(), specific, strict=True)}
    never, one = int((counts[:, gates.first :].sum(0) == 0).sum()), int(specific.any(0).sum())
    rows = {d: [f"{n:,}" for n in row.values()] for d, row in own.items()} | {"neurons, each once": ["", f"{one:,}"]}
    shares = {name: [f"{x:.1%}" for x in row.values()] for name, row in closed.items()}
    groups = ["15% most specific", "15% most general", "all: local sparsity"]
    text = ["## LAPE: language-specific neurons of the unpruned model", table("", ["tokens", "neurons"], rows)]
    text += [f"## P(closed) in blocks {gates.first} to {len(base.layers) - 1}", table("", groups, shares)]
    text += [f"{never:,} neurons there are never active, which counts as specific.\n"]
    found = {"domains": own, "specific": one, "never_active": never, "closed": closed}
    save(run.folder, {"lape.md": "\n\n".join(text), "lape.json": found})


@torch.no_grad()
def embeddings(model, ids, name, size=64):
    """ids [n, T] -> float32 [n, D]: mean over a text's tokens of the hidden states after the last norm."""
    states = (model.hidden(part) for part in tqdm(ids.split(size), desc=name))
    return torch.cat([model.norm(x).float().mean(1) for x in states]).cpu()


def probes(args, k=10):
    """Is the backbone without a module still the model that it was? At most --texts held-out windows of each domain."""
    run, base, domains = opened(args.run, args.device)
    x = {d: windows(split.heldout, Router.WINDOW, max(0, args.texts)) for d, split in domains.items()}
    if len(x) < 2 or min(map(len, x.values())) <= k:
        raise BadInput(f"{args.run}: probes needs two domains and over {k} texts of each; raise --texts or add text.")
    ids = torch.from_numpy(np.concatenate(list(x.values()))).to(run.device)
    label = torch.arange(len(x)).repeat_interleave(torch.tensor([len(w) for w in x.values()]))
    a, b = embeddings(base, ids, "unpruned"), embeddings(run.backbone, ids, "backbone")
    centroid, found = centroid_cosine(a, b, label), {}
    parts = {d: label == i for i, d in enumerate(x)} | {"all texts": label >= 0}
    for (d, own), c in zip(parts.items(), [*centroid.tolist(), centroid.mean().item()], strict=True):
        u, v = a[own], b[own]
        found[d] = dict(texts=len(u), cka=cka(u, v), knn=knn_overlap(u, v, k), centroid=c)
    rows = {d: [str(f["texts"]), *(f"{f[m]:.4f}" for m in ("cka", "knn", "centroid"))] for d, f in found.items()}
    text = table("", ["texts", "linear CKA", f"{k}-NN overlap", "centroid cosine"], rows)
    text = f"## The backbone without a module against the unpruned model\n\n{text}\n"
    save(run.folder, {"probes.md": text, "probes.json": found})
