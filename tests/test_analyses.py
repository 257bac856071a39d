"""Analyses against closed forms, brute force, transformers and what must not change them; pictures of small files."""

import json
import os
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import eval as evaluation
import train
from data import analyses, pictures
from data.checkpoint import save_backbone
from test_train import flags, world  # noqa: F401 (a fixture)

# LAPE ---------------------------------------------------------------------------------------------------------------


def entropies(counts, tokens):
    """As `analyses.lape` defines them, neuron by neuron in numpy's float64."""
    out = np.zeros(counts.shape[1:])
    for place in np.ndindex(*out.shape):
        p = counts[(slice(None), *place)].astype(np.float64) / tokens
        if p.sum() > 0:
            p = p[p > 0] / p.sum()
            out[place] = -(p * np.log(p)).sum()
    return out


def random_counts():
    tokens = torch.tensor([900, 1000, 1100])
    counts = (torch.rand(3, 4, 50, generator=torch.Generator().manual_seed(0)) ** 4 * 900).long()
    counts[:, 1, 7] = 0  # never active
    counts[:2, 2, 3] = 0  # of one language alone
    counts[:, 3, 9] = tokens // 2  # of all alike
    return counts, tokens


def test_entropies_of_lape():
    counts, tokens = random_counts()
    entropy, _ = analyses.lape(counts, tokens)
    assert entropy.dtype == torch.float64
    assert np.allclose(entropy.numpy(), entropies(counts.numpy(), tokens.numpy()), rtol=1e-12, atol=1e-12)
    assert entropy[1, 7] == 0 and entropy[2, 3] == 0 and entropy[3, 9] == pytest.approx(np.log(3))


def test_language_specific_neurons_are_the_lowest_of_those_above_the_percentile():
    counts, tokens = random_counts()
    entropy, specific = analyses.lape(counts, tokens, share=0.05)
    p = counts.double() / tokens[:, None, None]
    bar = sorted(p.flatten().tolist())[round(0.95 * p.numel()) - 1]
    often = [place for place in np.ndindex(4, 50) if any(p[(d, *place)] > bar for d in range(3))]
    lowest = sorted(often, key=lambda place: entropy[place].item())[: round(0.05 * 200)]
    assert 10 == len(lowest) < len(often) and (1, 7) not in often
    assert {(d, *place) for place in lowest for d in range(3) if p[(d, *place)] > bar} == {
        tuple(place) for place in specific.nonzero().tolist()
    }
    _, specific = analyses.lape(counts, tokens, share=1.0)
    assert torch.equal(specific, p > bar) and specific.sum() == 30  # 5% of 600 probabilities


@pytest.mark.parametrize("kind", [{}, dict(mlp_bias=True, tie_word_embeddings=False)])
def test_activations_are_those_that_transformers_has(tiny, tmp_path, kind):
    from transformers import AutoModelForCausalLM

    model = tiny(**kind)
    (tmp_path / "tokenizer.json").write_text("{}")
    save_backbone(tmp_path, model, tmp_path / "tokenizer.json")
    theirs, tokens, expected = AutoModelForCausalLM.from_pretrained(tmp_path), torch.randint(0, 131, (5, 12)), []
    assert type(theirs).__name__ == "LlamaForCausalLM"
    for layer in theirs.model.layers:
        layer.mlp.act_fn = type(layer.mlp.act_fn)()  # one module each, or the hooks of all meet in a shared one
        layer.mlp.act_fn.register_forward_hook(lambda module, x, y: expected.append((y > 0).sum((0, 1))))
    theirs(tokens)
    counts = analyses.activations(model, tokens, "", size=2)
    assert torch.equal(counts, torch.stack(expected)) and counts.float().std() > 0
    assert not any(block.mlp.gate_proj._forward_hooks for block in model.layers)


def test_closed_by_entropy_on_a_mask_made_by_hand():
    entropy = torch.arange(20, dtype=torch.float64).flip(0).view(2, 10)  # the last neurons are the most specific
    gate, up = torch.ones(2, 10, dtype=torch.bool), torch.ones(2, 10, dtype=torch.bool)
    gate[1, 8:] = False  # two of the three most specific
    up[1, 7] = up[0, 0] = False  # the third, and one of the three most general
    found = analyses.closed_by_entropy(entropy, {"gate": gate, "up": up, "down": gate[:, :3]})
    assert found["gate"] == pytest.approx({"specific": 2 / 3, "general": 0, "all": 2 / 20})
    assert found["up"] == pytest.approx({"specific": 1 / 3, "general": 1 / 3, "all": 2 / 20})
    assert found["either"] == pytest.approx({"specific": 1, "general": 1 / 3, "all": 4 / 20})
    found = analyses.closed_by_entropy(entropy, {"neuron": gate})
    assert (
        found["gate"] == found["up"] == found["either"] == pytest.approx({"specific": 2 / 3, "general": 0, "all": 0.1})
    )


def test_of_equal_entropies_the_earlier_is_more_specific_and_groups_do_not_overlap():
    closed = torch.zeros(2, 10, dtype=torch.bool)
    closed[0, :3] = True
    found = analyses.closed_by_entropy(torch.zeros(2, 10, dtype=torch.float64), {"neuron": ~closed})
    assert found["gate"] == pytest.approx({"specific": 1, "general": 0, "all": 0.15})


# Probes -------------------------------------------------------------------------------------------------------------


def cloud(n=40, D=6, seed=0):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(D=6):
    return torch.linalg.qr(cloud(D, D, 3))[0]


def test_cka_is_the_hsic_of_gram_matrices_and_knows_no_rotation_scale_or_shift():
    x, y = cloud(), cloud(D=9, seed=1) + cloud() @ cloud(6, 9, 2)
    centre = torch.eye(40, dtype=torch.float64) - 1 / 40

    def hsic(a, b):
        return torch.trace(centre @ a @ a.T @ centre @ b @ b.T)

    expected = (hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()).item()
    assert analyses.cka(x, y) == pytest.approx(expected, rel=1e-10) and 0.1 < expected < 0.9
    assert analyses.cka(x, x) == pytest.approx(1)
    assert analyses.cka(x, 3 * x @ rotation() + 5) == pytest.approx(1)
    assert analyses.cka(x @ rotation() / 7 - 2, y) == pytest.approx(expected)
    corners = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])  # of a square; against one of its sides: 1 / sqrt 2
    assert analyses.cka(corners, corners[:, :1]) == pytest.approx(0.5**0.5)


def test_knn_overlap_by_hand_and_by_chance():
    angle = torch.tensor([0.0, 0.1, 0.3, 2.0, 2.1, 2.3])
    x = torch.stack([angle.cos(), angle.sin()], dim=1)
    swapped = x[[0, 1, 3, 2, 4, 5]]  # points 2 and 3 change places: neighbours of each by hand, k = 2
    near = {0: {1, 2}, 1: {0, 2}, 2: {0, 1}, 3: {4, 5}, 4: {3, 5}, 5: {3, 4}}
    then = {0: {1, 3}, 1: {0, 3}, 2: {4, 5}, 3: {0, 1}, 4: {2, 5}, 5: {2, 4}}
    expected = sum(len(near[i] & then[i]) for i in near) / 12
    assert analyses.knn_overlap(x, swapped, 2) == pytest.approx(expected) and analyses.knn_overlap(x, x, 2) == 1
    x, y = cloud(), cloud() + cloud(seed=1)
    overlap = analyses.knn_overlap(x, y, 5)
    assert 0.2 < overlap < 0.9 and overlap == analyses.knn_overlap(3 * x @ rotation(), y / 2, 5)
    assert overlap == analyses.knn_overlap(x * torch.rand(40, 1), y, 5)  # by cosine: lengths do not count
    x, y = cloud(1500), cloud(1500) + cloud(1500, seed=1)  # more than are compared at once
    near = [t / t.norm(dim=1, keepdim=True) for t in (x, y)]
    near = [(t @ t.T - 9 * torch.eye(1500)).argsort(1)[:, -5:].tolist() for t in near]
    expected = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(*near, strict=True)])
    assert analyses.knn_overlap(x, y, 5) == pytest.approx(expected)
    by_chance = np.mean([analyses.knn_overlap(cloud(60, seed=i), cloud(60, seed=i + 100), 10) for i in range(40)])
    assert by_chance == pytest.approx(10 / 59, abs=0.01)


def test_centroid_cosine_by_hand_and_what_does_not_change_it():
    label = torch.arange(4).repeat_interleave(10)
    x, y = cloud() + cloud(4, seed=5)[label], cloud(seed=1) + cloud(4, seed=5)[label]
    cosine = analyses.centroid_cosine(x, y, label)
    a, b = x[label == 2].mean(0) - x.mean(0), y[label == 2].mean(0) - y.mean(0)
    assert cosine.shape == (4,) and cosine[2].item() == pytest.approx((a @ b / a.norm() / b.norm()).item())
    assert (cosine < 0.99).any()
    assert torch.allclose(analyses.centroid_cosine(x, x, label), torch.ones(4, dtype=torch.float64))
    assert torch.allclose(analyses.centroid_cosine(2 * x @ rotation() + 3, 5 * y @ rotation() - 1, label), cosine)
    within = torch.cat([torch.randperm(10) + 10 * c for c in range(4)])
    assert torch.allclose(analyses.centroid_cosine(x, y[within], label), cosine)


# Commands -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["neuron", "projection"])
def test_commands_on_a_finished_run(world, granularity, capsys):  # noqa: F811
    out = world / "runs/one"
    assert train.main(flags(world, granularity=granularity)) == 0
    capsys.readouterr()
    assert evaluation.main(["lape", str(out), "--tokens", "320"]) == 0
    saved, found = load_file(out / "lape.safetensors"), json.loads((out / "lape.json").read_text())
    entropy, specific = analyses.lape(saved["counts"], saved["tokens"])
    assert np.allclose(entropy.numpy(), entropies(saved["counts"].numpy(), saved["tokens"].numpy()), atol=1e-12)
    assert found["domains"]["german"] == {"tokens": 320, "specific": int(specific[1].sum())}
    masks = {n[5:]: m.bool() for n, m in load_file(out / "gates.safetensors").items() if n.startswith("mask.")}
    assert found["closed"] == analyses.closed_by_entropy(entropy[1:], masks)
    assert (out / "lape.md").read_text() in capsys.readouterr().out

    assert evaluation.main(["probes", str(out), "--texts", "12"]) == 0
    found = json.loads((out / "probes.json").read_text())
    assert [row["texts"] for row in found.values()] == [12, 12, 24] and list(found)[-1] == "all texts"
    assert all(0 < row["cka"] <= 1 and 0 <= row["knn"] <= 1 and row["centroid"] <= 1 for row in found.values())
    assert (out / "probes.md").read_text() in capsys.readouterr().out

    for wrong in ("--tokens", "-5"), ("--tokens", "15"):
        assert evaluation.main(["lape", str(out), *wrong]) == 2
        assert "--tokens of at least 16" in (err := capsys.readouterr().err) and err.count("\n") == 1
    for wrong in "-5", "10":
        assert evaluation.main(["probes", str(out), "--texts", wrong]) == 2
        assert "over 10 texts of each" in (err := capsys.readouterr().err) and err.count("\n") == 1


def test_the_backbone_that_lost_nothing_is_the_unpruned_model(world, capsys):  # noqa: F811
    assert train.main(flags(world, sparsity=0.0, steps=0)) == 0
    assert evaluation.main(["probes", str(world / "runs/one")]) == 0
    for row in json.loads((world / "runs/one/probes.json").read_text()).values():
        assert [row["cka"], row["knn"], row["centroid"]] == pytest.approx([1, 1, 1])


def test_gates_on_attention_alone_have_no_neurons_to_look_at(world, capsys):  # noqa: F811
    assert train.main(flags(world, gated="kv", sparsity=0.001, steps=0)) == 0
    capsys.readouterr()
    assert evaluation.main(["lape", str(world / "runs/one")]) == 2
    assert "lape needs gates on the MLP" in capsys.readouterr().err
    assert not (world / "runs/one/lape.safetensors").exists()


@pytest.mark.skipif("KOFF_SMOLLM2" not in os.environ, reason="set KOFF_SMOLLM2 to the folder of SmolLM2-135M")
def test_lape_of_smollm2_on_the_handbook(tmp_path, capsys):
    small = dict(steps=0, blocks=3, sparsity=0.02, rank=1, kv_tokens=0, fisher_sequences=6, seq_len=64, eval_len=64)
    small |= dict(model=os.environ["KOFF_SMOLLM2"], eval_windows=1, out=tmp_path / "run")
    assert train.main([x for name, value in small.items() for x in (f"--{name.replace('_', '-')}", str(value))]) == 0
    assert evaluation.main(["lape", str(tmp_path / "run"), "--tokens", "256"]) == 0
    saved = load_file(tmp_path / "run/lape.safetensors")
    assert saved["counts"].shape == (6, 30, 1536) and (saved["tokens"] == 256).all() and saved["counts"].max() <= 256
    entropy, specific = analyses.lape(saved["counts"], saved["tokens"])
    assert np.allclose(entropy.numpy(), entropies(saved["counts"].numpy(), saved["tokens"].numpy()), atol=1e-12)
    assert specific.any(0).sum() == round(0.01 * 30 * 1536)


# Pictures -----------------------------------------------------------------------------------------------------------

RESULTS = {
    "perplexity": {
        "unpruned": {"a": 10.0, "b": 20.0}, "backbone": {"a": 15.0, "b": 22.0},
        "koff": {"a": 10.5, "b": 19.0}, "routed": {"a": 10.5, "b": 19.0},
    },
    "swap": {"a": {"a": 10.5, "b": 13.0}, "b": {"a": 21.0, "b": 19.0}},
    "layers": {str(i): {"k": 0.1 * i, "gate": 0.2, "up": 0.3, "down": 0.0, "v": 0.05} for i in range(4)},
}  # fmt: skip
LOG = []
for i in range(9):
    sparsity = {"physical": 0.01 * i, "paper": 0.008 * i}
    LOG.append({"step": 10 * i, "domain": "ab"[i % 2], "loss": 2 / (i + 1), **sparsity, "lambda": 60.0})
SHARES = {"specific": 0.7, "general": 0.05, "all": 0.5}
LAPE = {"closed": {"gate": SHARES, "up": {**SHARES, "all": 0.4}, "either": SHARES}}
ROWS = {
    f"sparsity {x}": {"physical": [x], "backbone": [1 + 3 * x], "koff": None if x == 0.3 else [1 + x]}
    for x in (0.1, 0.2, 0.3)
} | {"pruning + LoRA": {"physical": [0.1] * 3, "backbone": [1.2, 1.3, 1.25], "koff": [1.1, 1.08, 0.99]}}
FILES = {
    "results.json": RESULTS, "log.jsonl": LOG, "lape.json": LAPE, "sweep.json": {"sweep": "one", "rows": ROWS},
}  # fmt: skip
MADE = {
    "results.json": ["layers.png", "swap.png"], "log.jsonl": ["curves.png"], "lape.json": ["lape.png"],
    "sweep.json": ["sweep.png"],
}  # fmt: skip


def put(folder, name, content):
    text = "".join(json.dumps(x) + "\n" for x in content) if name == "log.jsonl" else json.dumps(content)
    (folder / name).write_text(text)


@pytest.mark.parametrize("name", FILES)
def test_every_file_that_is_there_is_drawn(name, tmp_path, capsys):
    reader = pytest.importorskip("matplotlib.image", reason="pictures need matplotlib")
    put(tmp_path, name, FILES[name])
    assert evaluation.main(["plot", str(tmp_path)]) == 0
    made = sorted(path.name for path in tmp_path.glob("*.png"))
    assert made == MADE[name] and capsys.readouterr().out.split() == [str(tmp_path / picture) for picture in made]
    for picture in made:  # on white ground, which is not transparent: black ink is legible on a dark page too
        image = reader.imread(tmp_path / picture, format="png")
        assert (image[0] == 1).all() and (image[:, 0] == 1).all() and image.min() < 0.2


@pytest.mark.parametrize(
    "name,content",
    [
        ("results.json", {**RESULTS, "swap": {}, "perplexity": {n: RESULTS["perplexity"][n] for n in ("unpruned", "backbone")}}),
        ("lape.json", {"closed": dict.fromkeys(("gate", "up", "either"), SHARES)}),
        ("sweep.json", {"rows": {"pruning + LoRA": ROWS["pruning + LoRA"]}}),
        ("sweep.json", {"rows": {"sparsity 0.3": ROWS["sparsity 0.3"]}}),
        ("log.jsonl", LOG[:1]),
        ("log.jsonl", [{name: entry[name] for name in entry if name != "domain"} for entry in LOG]),  # of before
    ],
)  # fmt: skip
def test_pictures_of_runs_that_have_less(name, content, tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    put(tmp_path, name, content)
    assert evaluation.main(["plot", str(tmp_path)]) == 0 and list(tmp_path.glob("*.png"))


def test_the_loss_of_each_domain_is_a_curve_of_its_own():
    figure = pytest.importorskip("matplotlib.figure", reason="pictures need matplotlib").Figure()
    solved = {"step": 40, "solved": "a", "explained": {"1": 0.5}}  # a line that has no loss
    pictures.draw_curves(figure, [*LOG[:4], solved, *LOG[4:]])
    loss, physical, paper, multiplier = (
        {line.get_label(): line.get_xydata().tolist() for line in axes.lines} for axes in figure.axes
    )
    assert loss == {
        "a": [[10 * i, 2 / (i + 1)] for i in (0, 2, 4, 6, 8)],
        "b": [[10 * i, 2 / (i + 1)] for i in (1, 3, 5, 7)],
    }
    assert physical == {"sparsity, physical": [[10 * i, 0.01 * i] for i in range(9)]}
    assert paper == {"sparsity, paper": [[10 * i, 0.008 * i] for i in range(9)]}
    assert multiplier == {"lambda": [[10 * i, 60.0] for i in range(9)]}


def test_nothing_to_draw_damage_and_no_matplotlib_are_one_sentence(tmp_path, capsys, monkeypatch):
    def refused(message):
        assert evaluation.main(["plot", str(tmp_path)]) == 2
        out, err = capsys.readouterr()
        assert message in err and err.count("\n") == 1 and not out and not list(tmp_path.glob("*.png"))

    if find_spec("matplotlib"):
        refused("has no results.json, log.jsonl, lape.json, sweep.json")
        for damaged in ("{", '{"rows": {"a": {}}}'):
            (tmp_path / "sweep.json").write_text(damaged)
            refused("sweep.json is not what this version saves")
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # import fails from here on
    refused("pip install matplotlib")
