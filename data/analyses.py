"""Two looks at a finished run: which neurons its mask closed (`eval.py lape`), and what its backbone alone still is.

LAPE tells neurons that few domains use from those that all use. The probes (`eval.py probes`) compare hidden states of
the backbone with those of the unpruned model, by CKA, nearest neighbours and centroids.
"""

import contextlib
import json
import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

from data import BadInput, atomic
from data.corpus import windows
from data.router import Router
from data.run import open_finished
from data.tables import save, table

# LAPE ----------------------------------------------------------------------------------------------------------------


def lape(counts, tokens, share=0.01, percentile=0.95):
    """Language Activation Probability Entropy (Tang et al. 2024, arXiv 2402.16438), as their code has it, in float64.

    counts [languages, N, F]: tokens with silu(gate) > 0, of tokens [languages]. Returns the entropy [N, F] in nats of a
    neuron's activation probabilities scaled to one (0 if it is never active, which makes it look specific), and bool
    [languages, N, F], the language-specific neurons. These are the `share` of lowest entropy among neurons whose
    probability exceeds the `percentile` of all probabilities in some language; they belong to each such language.
    """
    p = counts.double() / tokens.double().view(-1, 1, 1)  # [languages, N, F]
    scaled = (p / p.sum(0)).nan_to_num(0.0)
    entropy = torch.special.entr(scaled).sum(0)  # entr(p) = -p log p
    bar = p.flatten().kthvalue(round(percentile * p.numel())).values
    often = p > bar
    # A neuron that is often active in no language goes to the end of the order.
    order = entropy.masked_fill(~often.any(0), math.inf).flatten().argsort(stable=True)
    specific = torch.zeros(entropy.numel(), dtype=torch.bool)
    specific[order[: round(share * len(order))]] = True
    return entropy, often & specific.view_as(entropy)


def closed_by_entropy(entropy, mask, share=0.15):
    """{"gate", "up", "either": {"specific", "general", "all": P(closed)}} for the neurons of the gated blocks.

    entropy [N, F]; mask {name: bool [N, F]}, True where open; a gate on a neuron is both its gate's and its up's.
    "specific" are the `share` of lowest entropy, "general" of highest, "all" the local sparsity. Entropy alone decides,
    without the filter of `lape`, so that a neuron that is never active (0) is specific; of equals the earlier block and
    neuron counts as lower, so that the two groups never overlap.
    """
    gate = mask["gate" if "gate" in mask else "neuron"]
    up = mask["up" if "up" in mask else "neuron"]
    order = entropy.flatten().argsort(stable=True)
    count = round(share * len(order))
    found = {}
    for name, open in {"gate": gate, "up": up, "either": gate & up}.items():
        closed = (~open).flatten()[order].double()  # from the most specific neuron to the most general
        found[name] = {
            "specific": closed[:count].mean().item(),
            "general": closed[len(order) - count :].mean().item(),
            "all": closed.mean().item(),
        }
    return found


def add_active(counts, projection, inputs, gate):
    """A hook on gate_proj: counts [F] += tokens of gate [B, T, F] that are positive; silu keeps the sign."""
    counts.add_((gate > 0).sum((0, 1)))


@torch.no_grad()
def activations(model, tokens, name, size=8):
    """tokens [n, T] -> int64 [N, F]: at how many of them silu(gate) > 0, in block and neuron; `size` rows at a time."""
    counts = torch.zeros(len(model.layers), model.config.intermediate_size, dtype=torch.int64, device=tokens.device)
    with contextlib.ExitStack() as hooks:  # removes them at the end
        for row, block in zip(counts, model.layers, strict=True):
            hooks.enter_context(block.mlp.gate_proj.register_forward_hook(partial(add_active, row)))
        for part in tqdm(tokens.split(size), desc=name):
            model.hidden(part)
    return counts


def lape_report(args):
    """Does the mask close the neurons that few domains use? Counted on --tokens of each domain's training text."""
    run, base, domains = open_finished(args.run, args.device)
    length = run.settings.seq_len
    gates, mask = run.gates(base)
    if args.tokens < length or len(domains) < 2 or not ("neuron" in mask or "gate" in mask):
        raise BadInput(f"{args.run}: lape needs gates on the MLP, two domains and --tokens of at least {length}.")
    counted = []
    read = []
    for name, split in domains.items():
        x = torch.from_numpy(windows(split.train, length, args.tokens // length))
        counted.append(activations(base, x.to(run.device), name).cpu())
        read.append(x.numel())
    counts = torch.stack(counted)  # [domains, N, F]
    tokens = torch.tensor(read)  # [domains]
    with atomic(run.folder / "lape.safetensors") as path:
        save_file({"counts": counts, "tokens": tokens}, path, {"domains": json.dumps(list(domains))})

    entropy, specific = lape(counts, tokens)
    first = gates.first_block
    results = {
        "domains": {},
        "specific": specific.any(0).sum().item(),
        "never_active": (counts[:, first:].sum(0) == 0).sum().item(),
        "closed": closed_by_entropy(entropy[first:], mask),
    }
    neurons = specific.sum((1, 2))  # [domains]
    for i, name in enumerate(domains):
        results["domains"][name] = {"tokens": read[i], "specific": neurons[i].item()}
    save(run.folder, {"lape.md": lape_text(results, first), "lape.json": results})


def lape_text(results, first):
    """lape.json as text; `first` is the first block with gates."""
    text = [
        "## LAPE: language-specific neurons of the unpruned model",
        number_table(results["domains"], "{:,}"),
        f"Each counted once: {results['specific']:,} neurons.",
        f"## P(closed) from block {first} on: the 15% most specific neurons, the 15% most general, all",
        number_table(results["closed"], "{:.1%}"),
        f"{results['never_active']:,} neurons there are never active, which counts as specific.",
    ]
    return "\n\n".join(text) + "\n"


def number_table(rows, form):
    """{label: {column: number}} as a Markdown table; `form` says how a number is written."""
    texts = {}
    for label, row in rows.items():
        texts[label] = [form.format(number) for number in row.values()]
    return table("", list(row), texts)


# Probes --------------------------------------------------------------------------------------------------------------


def centred(x):
    """x [n, D] in float64, less the mean of its n points."""
    x = x.double()
    return x - x.mean(0)


def cka(x, y):
    """Linear CKA of x [n, D] and y [n, E] (Kornblith et al. 2019, arXiv 1905.00414), 0 to 1: 1 if they are the same but
    for rotation, scale and shift. With fewer texts than dimensions it is near 1 by itself."""
    x = centred(x)
    y = centred(y)
    shared = (x.T @ y).square().sum()
    own = (x.T @ x).norm() * (y.T @ y).norm()
    return (shared / own).item()


def knn_overlap(x, y, k):
    """Share of the k < n nearest neighbours by cosine that x [n, D] and y [n, E] have in common, mean over the n points
    (mutual kNN of Huh et al. 2024, arXiv 2405.07987). By chance it is k / (n - 1)."""
    x = F.normalize(x.double(), dim=1)
    y = F.normalize(y.double(), dim=1)
    common = 0
    for rows in torch.arange(len(x)).split(1024):  # n x n cosines of many texts would fill the memory
        near_x = neighbours(x, rows, k).unsqueeze(2)  # [rows, k, 1]
        near_y = neighbours(y, rows, k).unsqueeze(1)  # [rows, 1, k]
        common += (near_x == near_y).sum().item()
    return common / (k * len(x))


def neighbours(x, rows, k):
    """[rows, k]: the points of x [n, D], of length 1, that are nearest to those of the rows."""
    cosine = x[rows] @ x.T
    cosine[torch.arange(len(rows)), rows] = -math.inf  # nobody is his own neighbour
    return cosine.topk(k).indices


def centroid_cosine(x, y, labels):
    """[classes]: cosine between a class's mean in x [n, D] and in y [n, D], both less the mean of all n points.

    Without that centring the direction that all hidden states of a model share brings every cosine close to 1.
    """
    x = centred(x)
    y = centred(y)
    cosines = []
    for label in labels.unique():
        mean_x = x[labels == label].mean(0)
        mean_y = y[labels == label].mean(0)
        cosines.append(F.cosine_similarity(mean_x, mean_y, dim=0))
    return torch.stack(cosines)


@torch.no_grad()
def embeddings(model, ids, name, size=64):
    """ids [n, T] -> float32 [n, D]: mean over a text's tokens of the hidden states after the last norm."""
    means = []
    for part in tqdm(ids.split(size), desc=name):
        states = model.norm(model.hidden(part))  # [size, T, D]
        means.append(states.float().mean(1))
    return torch.cat(means).cpu()


def probes(args, k=10):
    """Is the backbone without a module still the model that it was? At most --texts held-out windows of each domain."""
    run, base, domains = open_finished(args.run, args.device)
    texts = [windows(split.heldout, Router.WINDOW, max(0, args.texts)) for split in domains.values()]
    lengths = list(map(len, texts))
    if len(texts) < 2 or min(lengths) <= k:
        raise BadInput(f"{args.run}: probes needs two domains and over {k} texts of each; raise --texts or add text.")
    ids = torch.from_numpy(np.concatenate(texts)).to(run.device)
    labels = torch.arange(len(texts)).repeat_interleave(torch.tensor(lengths))
    x = embeddings(base, ids, "unpruned")
    y = embeddings(run.backbone, ids, "backbone")
    centroids = centroid_cosine(x, y, labels)

    results = {}
    for i, name in enumerate(domains):
        own = labels == i
        results[name] = compare(x[own], y[own], k, centroids[i])
    results["all texts"] = compare(x, y, k, centroids.mean())
    title = f"## The backbone without a module against the unpruned model: CKA, {k} nearest neighbours, centroids"
    text = title + "\n\n" + number_table(results, "{:.6g}") + "\n"
    save(run.folder, {"probes.md": text, "probes.json": results})


def compare(x, y, k, centroid):
    """The row of some texts in the table: x [n, D] of the unpruned model, y [n, D] of the backbone."""
    return {
        "texts": len(x),
        "cka": cka(x, y),
        "knn": knn_overlap(x, y, k),
        "centroid": centroid.item(),
    }
