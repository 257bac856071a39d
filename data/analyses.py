"""Two analyses of a finished run: `eval.py lape` and `eval.py probes`.

LAPE separates neurons that few domains use from neurons that all domains use: which of them did the mask close? The
probes compare hidden states of the backbone alone with the unpruned model's, by CKA, nearest neighbours and centroids.
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
    """Language Activation Probability Entropy (Tang et al. 2024, arXiv 2402.16438), as in their code, in float64.

    counts [languages, N, F]: on how many of tokens [languages] silu(gate) > 0. Returns two tensors:

    entropy [N, F], in nats: that of a neuron's activation probabilities, scaled to a sum of one. A neuron that is never
    active has 0, and so looks specific.
    specific, bool [languages, N, F]: the language-specific neurons. A neuron is often active in a language if its
    probability there exceeds the `percentile` of all probabilities. Among the neurons that are often active anywhere,
    the `share` with the lowest entropy is specific to the languages in which they are often active.
    """
    p = counts.double() / tokens.double().view(-1, 1, 1)  # [languages, N, F]
    scaled = (p / p.sum(0)).nan_to_num(0.0)
    entropy = torch.special.entr(scaled).sum(0)  # entr(p) = -p log p
    bar = p.flatten().kthvalue(round(percentile * p.numel())).values
    often = p > bar
    # Neurons that are not often active in any language go to the end of the order.
    order = entropy.masked_fill(~often.any(0), math.inf).flatten().argsort(stable=True)
    specific = torch.zeros(entropy.numel(), dtype=torch.bool)
    specific[order[: round(share * len(order))]] = True
    return entropy, often & specific.view_as(entropy)


def closed_by_entropy(entropy, mask, share=0.15):
    """{"gate", "up", "either": {"specific", "general", "all": P(closed)}} for the neurons of the gated blocks.

    entropy [N, F]; mask {name: bool [N, F]}, True is open. The gate of a whole neuron counts as gate's and as up's.
    "specific" is the `share` of neurons with the lowest entropy, "general" the share with the highest, and "all" gives
    the local sparsity. There is no filter as in `lape`: a neuron that is never active is specific. Ties are broken by
    position.
    """
    gate = mask["gate" if "gate" in mask else "neuron"]
    up = mask["up" if "up" in mask else "neuron"]
    order = entropy.flatten().argsort(stable=True)
    count = round(share * len(order))
    result = {}
    for name, open in {"gate": gate, "up": up, "either": gate & up}.items():
        closed = (~open).flatten()[order].double()  # from the most specific neuron to the most general
        result[name] = {
            "specific": closed[:count].mean().item(),
            "general": closed[len(order) - count :].mean().item(),
            "all": closed.mean().item(),
        }
    return result


def add_active(counts, projection, inputs, gate):
    """A hook on gate_proj: add the number of tokens with gate [B, T, F] > 0 to counts [F]. (silu keeps the sign.)"""
    counts.add_((gate > 0).sum((0, 1)))


@torch.no_grad()
def activations(model, tokens, name, size=8):
    """int64 [N, F]: on how many of tokens [n, T] silu(gate) > 0 in each block and neuron. `size` rows at a time."""
    counts = torch.zeros(len(model.layers), model.config.intermediate_size, dtype=torch.int64, device=tokens.device)
    with contextlib.ExitStack() as hooks:  # they are removed at the end
        for row, block in zip(counts, model.layers, strict=True):
            hooks.enter_context(block.mlp.gate_proj.register_forward_hook(partial(add_active, row)))
        for part in tqdm(tokens.split(size), desc=name):
            model.hidden(part)
    return counts


def lape_report(args):
    """Does the mask close the neurons that few domains use? Counts on --tokens of each domain's training text."""
    run, base, domains = open_finished(args.run, args.device)
    length = run.settings.seq_len
    gates, mask = run.gates(base)
    if args.tokens < length or len(domains) < 2 or not ("neuron" in mask or "gate" in mask):
        raise BadInput(f"{args.run}: lape needs gates on the MLP, two domains and --tokens of at least {length}.")
    counts = []
    tokens = []
    for name, split in domains.items():
        x = torch.from_numpy(windows(split.train, length, args.tokens // length))
        counts.append(activations(base, x.to(run.device), name).cpu())
        tokens.append(x.numel())
    counts = torch.stack(counts)  # [domains, N, F]
    tokens = torch.tensor(tokens)  # [domains]
    with atomic(run.folder / "lape.safetensors") as path:
        save_file({"counts": counts, "tokens": tokens}, path, {"domains": json.dumps(list(domains))})

    entropy, specific = lape(counts, tokens)
    first_block = gates.first_block
    results = {
        "domains": {},
        "specific": specific.any(0).sum().item(),
        "never_active": (counts[:, first_block:].sum(0) == 0).sum().item(),
        "closed": closed_by_entropy(entropy[first_block:], mask),
    }
    for i, name in enumerate(domains):
        results["domains"][name] = {"tokens": tokens[i].item(), "specific": specific[i].sum().item()}
    save(run.folder, {"lape.md": lape_text(results, first_block), "lape.json": results})


def lape_text(results, first_block):
    """lape.json as text. first_block: the first block with gates."""
    text = [
        "## LAPE: language-specific neurons of the unpruned model",
        number_table(results["domains"], "{:,}"),
        f"Each counted once: {results['specific']:,} neurons.",
        f"## P(closed) from block {first_block} on: the 15% most specific neurons, the 15% most general, all",
        number_table(results["closed"], "{:.1%}"),
        f"{results['never_active']:,} neurons there are never active, which counts as specific.",
    ]
    return "\n\n".join(text) + "\n"


def number_table(rows, form):
    """{label: {column: number}} as a Markdown table. form: the format of its numbers."""
    texts = {}
    for label, row in rows.items():
        texts[label] = [form.format(number) for number in row.values()]
    return table("", list(row), texts)


# Probes --------------------------------------------------------------------------------------------------------------


def centred(x):
    """x [n, D] in float64, minus the mean of its n points."""
    x = x.double()
    return x - x.mean(0)


def cka(x, y):
    """Linear CKA of x [n, D] and y [n, E] (Kornblith et al. 2019, arXiv 1905.00414), from 0 to 1.

    1 means equal up to rotation, scale and shift. With fewer points than dimensions any two are near 1.
    """
    x = centred(x)
    y = centred(y)
    shared = (x.T @ y).square().sum()
    own = (x.T @ x).norm() * (y.T @ y).norm()
    return (shared / own).item()


def knn_overlap(x, y, k):
    """Mutual kNN (Huh et al. 2024, arXiv 2405.07987): which share of its k < n nearest neighbours, by cosine, does a
    point have in both x [n, D] and y [n, E]? Mean over the n points. Chance gives k / (n - 1)."""
    x = F.normalize(x.double(), dim=1)
    y = F.normalize(y.double(), dim=1)
    common = 0
    for rows in torch.arange(len(x)).split(1024):  # n x n cosines at once could fill the memory
        near_x = neighbours(x, rows, k).unsqueeze(2)  # [rows, k, 1]
        near_y = neighbours(y, rows, k).unsqueeze(1)  # [rows, 1, k]
        common += (near_x == near_y).sum().item()
    return common / (k * len(x))


def neighbours(x, rows, k):
    """[rows, k]: the k points of x [n, D], all of length 1, that are nearest to each point in `rows`."""
    cosine = x[rows] @ x.T
    cosine[torch.arange(len(rows)), rows] = -math.inf  # a point is not its own neighbour
    return cosine.topk(k).indices


def centroid_cosine(x, y, labels):
    """[classes]: cosine between the mean of a class in x [n, D] and in y [n, D], both minus the mean of all n points.

    Without this centring every cosine would be close to 1: all hidden states of a model share one large direction.
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
    """ids [n, T] -> float32 [n, D]: hidden states after the last norm, mean over the tokens of a text."""
    means = []
    for part in tqdm(ids.split(size), desc=name):
        states = model.norm(model.hidden(part))  # [size, T, D]
        means.append(states.float().mean(1))
    return torch.cat(means).cpu()


def probes(args, k=10):
    """How far is the backbone alone from the unpruned model? On at most --texts held-out windows of each domain."""
    run, base, domains = open_finished(args.run, args.device)
    texts = [windows(split.heldout, Router.WINDOW, max(0, args.texts)) for split in domains.values()]
    lengths = [len(x) for x in texts]
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
    """A row of the table: texts as x [n, D] in the unpruned model and as y [n, D] in the backbone."""
    return {
        "texts": len(x),
        "cka": cka(x, y),
        "knn": knn_overlap(x, y, k),
        "centroid": centroid.item(),
    }
