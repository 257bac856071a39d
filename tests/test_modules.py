"""The modules of a finished run: one more on the frozen backbone, one less."""

import io
import json
import shutil
import sys
import weakref
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import eval as evaluation
import train
from data import fast, tables
from data.families import parse_config
from data.router import Router
from data.run import Run, open_finished
from data.settings import Settings
from data.tokenizer import Tokenizer
from model import Model, Projection
from test_train import CONFIG, ROOT, ctrl_c_in_step_5, flags, world  # noqa: F401 (a fixture)


@pytest.fixture
def run(world):  # noqa: F811
    """A finished run of two domains, and the text of a third, which it was not trained on."""
    assert train.main(flags(world)) == 0
    lines = (ROOT / "data/handbook/italian.txt").read_text(encoding="utf-8").splitlines()
    (world / "italian.txt").write_text("\n".join(lines[:120]) + "\n", encoding="utf-8")
    return world / "runs/one"


def files(out):
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def add(run, *more):
    return train.main(["--add", str(run.parent.parent / "italian.txt"), "--out", str(run), *more])


def test_a_later_module_leaves_all_others_and_the_backbone_as_they_are(run):
    before, router = files(run), Router.load(run / "router.safetensors")
    assert add(run) == 0
    after = files(run)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"modules/italian.safetensors", "router.safetensors", "results.json", "report.md"}
    assert before.keys() == after.keys() - {"modules/italian.safetensors"}
    results = json.loads((run / "results.json").read_text())
    assert list(results["swap"]) == ["french", "german", "italian"] == list(results["swap"]["italian"])
    later = Router.load(run / "router.safetensors")
    assert np.array_equal(later.weight[:2], router.weight) and np.array_equal(later.threshold[:2], router.threshold)
    assert later.route(np.array([Run(run).tokenizer.encode("Il nucleo della distribuzione è stato")])) != ["german"]


def test_a_later_module_recovers_what_pruning_cost_its_domain(tmp_path):
    (data := tmp_path / "data").mkdir()
    for name in "english", "french":
        shutil.copy(ROOT / f"data/handbook/{name}.txt", data)
    out, german = tmp_path / "run", ROOT / "data/handbook/german.txt"
    short = ["--steps", "10", "--batch", "2", "--seq-len", "64", "--fisher-sequences", "4", "--solve-tokens", "2048"]
    short += ["--eval-len", "64", "--eval-windows", "4"]
    assert train.main([*short, "--data", str(data), "--out", str(out)]) == 0
    assert train.main(["--add", str(german), "--out", str(out)]) == 0
    without, own = (ratios(out)[variant][-1] for variant in ("backbone", "koff"))
    assert 1 < own < 1 + 0.7 * (without - 1)


def test_the_perplexity_of_any_text(run, capsys):
    """Of the whole text, not of a held-out part; here with as many windows as it has."""
    settings = json.loads((run / "settings.json").read_text())
    (run / "settings.json").write_text(json.dumps({**settings, "eval_windows": 10_000}))
    opened, base, _ = open_finished(run)
    texts = {}  # {path: its windows}
    for name in "italian", "portuguese":
        path = run.parent.parent / f"{name}.txt"
        text = "\n".join((ROOT / f"data/handbook/{name}.txt").read_text(encoding="utf-8").split("\n")[:60])
        path.write_text(text, encoding="utf-8")
        ids = np.array(opened.tokenizer.encode(text, bos=True))
        texts[str(path)] = torch.from_numpy(ids[: len(ids) // 16 * 16]).view(-1, 16)
    rows = {"unpruned": (base, None), "backbone alone": (opened.backbone, None)}
    rows |= {f"module {name}": (opened.backbone, opened.memories(name)) for name in opened.names}
    capsys.readouterr()
    assert evaluation.main(["perplexity", str(run), *texts]) == 0
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines[2:]] == [*rows, "KOFF, routed module"]
    for line, (model, module) in zip(lines[2:], rows.values(), strict=False):
        for column, tokens in zip((1, 3), texts.values(), strict=True):
            logits = model(tokens, memories=module)[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), tokens[:, 1:].flatten())
            ratio = float(line[column]) / float(lines[2][column])
            assert float(line[column]) == pytest.approx(loss.exp().item(), rel=2e-3, abs=0.006)
            assert float(line[column + 1].removesuffix(" x")) == pytest.approx(ratio, abs=1e-3)
    (run / "short.txt").write_text("too short")
    assert evaluation.main(["perplexity", str(run), str(run / "short.txt")]) == 2
    assert "short.txt is shorter than a window of 16 tokens" in capsys.readouterr().err


def test_a_module_changes_and_the_copies_of_the_last_one_go(run):
    opened, tokens = Run(run), torch.arange(20)[None]
    backbone = opened.backbone(tokens)
    expected = {}
    for name in opened.names:
        model, memories = fast.merged(opened.backbone, opened.memories(name))
        expected[name] = model(tokens, memories=memories)
    assert not torch.equal(expected["french"], expected["german"])
    alive = weakref.WeakSet()
    for name in ("french", "german", None, "german", "french", None):
        model, memories = opened.attached(name)
        assert opened.attached(name)[0] is model
        assert torch.equal(model(tokens, memories=memories), expected[name] if name else backbone)
        if name:
            alive.add(model)
        del model, memories
        assert len(alive) == 1


def beside(monkeypatch):
    """A list of whether a projection had a LoRA beside its matrix, one entry per call from now on."""
    seen, forward = [], Projection.forward

    def spy(self, x, z=None, lora=None):
        seen.append(lora is not None)
        return forward(self, x, z, lora)

    monkeypatch.setattr(Projection, "forward", spy)
    return seen


def test_where_one_module_reads_a_text_its_lora_is_in_the_matrices(run, monkeypatch):
    seen = beside(monkeypatch)
    monkeypatch.setattr(sys, "stdin", io.StringIO("/domain german\nDer Kernel\n/domain french\nLe noyau\n"))
    text = str(run.parent.parent / "italian.txt")
    short = ["--tokens", "5"]
    generate = ["generate", "Der Kernel", "--module", "german", *short]
    for name, *more in generate, ["chat", *short], ["perplexity", text], ["report"]:
        seen.clear()
        assert evaluation.main([name, str(run), *more]) == 0
        assert seen and not any(seen)


def ratios(out):
    return tables.ratios(json.loads((out / "results.json").read_text()))


def test_a_later_module_that_was_stopped_goes_on_and_is_the_same(run, monkeypatch, capsys):
    steps = ("--steps", "12")
    assert add(run, *steps) == 0
    whole = files(run)
    assert evaluation.main(["remove", str(run), "italian"]) == 0
    with ctrl_c_in_step_5(monkeypatch):
        assert add(run, *steps) == 130 and not (run / "modules/italian.safetensors").exists()
    capsys.readouterr()
    assert add(run, "--steps", "9") == 2 and "with other settings" in capsys.readouterr().err
    assert add(run, *steps) == 0
    after = files(run)
    assert {name for name in whole if whole[name] != after[name]} <= {"results.json"}  # it says the seconds


def test_a_module_is_removed_and_the_others_stay_as_they_are(run, capsys):
    assert add(run) == 0
    before, router = files(run), Router.load(run / "router.safetensors")
    capsys.readouterr()
    assert evaluation.main(["remove", str(run), "french"]) == 0
    assert f"{run} holds german, italian; eval.py report {run} makes its tables again" in capsys.readouterr().out
    after = files(run)
    assert before.keys() - after.keys() == {"modules/french.safetensors"}
    assert {name for name in after if after[name] != before[name]} == {"router.safetensors"}
    left = Router.load(run / "router.safetensors")
    assert np.array_equal(left.weight, router.weight[1:]) and np.array_equal(left.threshold, router.threshold[1:])
    assert evaluation.main(["report", str(run)]) == 0
    assert list(json.loads((run / "results.json").read_text())["swap"]) == ["german", "italian"]
    assert evaluation.main(["remove", str(run), "italian"]) == 0  # which came later
    assert evaluation.main(["remove", str(run), "german"]) == 2 and "only module" in capsys.readouterr().err
    assert add(run) == 0  # and comes back


def test_a_wide_bfloat16_run_takes_another_module(tmp_path):
    """Positions of open channels beyond 256 are not exact in bfloat16: they are no weights."""
    config = CONFIG | dict(hidden_size=320, num_attention_heads=4, intermediate_size=64)
    (base := tmp_path / "base").mkdir()
    model = Model(parse_config(config))
    save_file(
        {f"model.{n}": torch.randn_like(p) * 0.1 for n, p in model.named_parameters()}, base / "model.safetensors"
    )
    (base / "config.json").write_text(json.dumps(config))
    shutil.copy(ROOT / "data/base/tokenizer.json", base)
    for name in "german", "french", "italian":
        text = (ROOT / f"data/handbook/{name}.txt").read_text(encoding="utf-8")[:20_000]
        path = tmp_path / "data" / f"{name}.txt" if name != "italian" else tmp_path / "italian.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    given = flags(tmp_path, dtype="bfloat16", gated="kv+mlp", steps=2)
    assert train.main(given) == 0
    state = load_file(tmp_path / "runs/one/backbone/model.safetensors")
    assert max(t.max() for n, t in state.items() if n.endswith("down_proj.kept")) > 256
    assert add(tmp_path / "runs/one") == 0


def test_what_cannot_be_is_one_sentence(run, capsys):
    before = files(run)
    for work, words in (
        (lambda: add(run, "--sparsity", "0.2"), "--sparsity cannot differ"),
        (
            lambda: train.main(["--add", str(run.parent.parent / "data/german.txt"), "--out", str(run)]),
            "domain german already",
        ),
        (lambda: train.main(["--add", "nowhere.txt", "--out", str(run)]), "nowhere.txt does not exist"),
        (lambda: train.main(["--add", "a,b.txt", "--out", str(run)]), "a domain's name becomes a file name"),
        (lambda: evaluation.main(["remove", str(run), "dutch"]), "has no module 'dutch'"),
        (lambda: evaluation.main(["remove", str(run), "../router"]), "has no module"),
    ):
        capsys.readouterr()
        assert work() == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1
        assert files(run) == before


def test_a_backbone_is_no_pretrained_model(run, capsys):
    out = run.parent.parent / "again"
    for more in ([], ["--dry-run"]):
        assert train.main([*flags(run.parent.parent, model=run / "backbone", out=out), *more]) == 2
        assert "is a backbone, from which channels are gone" in capsys.readouterr().err and not out.exists()


def test_a_language_that_came_later_is_no_other_language():
    router, ids = Router(), np.arange(2000) % 97
    tokenizer = Tokenizer.from_folder(ROOT / "data/base")
    router.add("german", ids, "key")
    run = SimpleNamespace(router=router, tokenizer=tokenizer, settings=Settings())
    text = {"german": SimpleNamespace(heldout=ids)}
    before = evaluation.router_quality(run, text)["other_windows"]
    router.add("dutch", ids, "key")
    languages = [json.loads(line) for line in (ROOT / "data/other_languages.jsonl").open(encoding="utf-8")]
    dutch = [row["text"] for row in languages if row["language"] == "dutch"]
    windows = sum(len(tokenizer.encode(text)) // router.WINDOW for text in dutch)
    assert before - evaluation.router_quality(run, text)["other_windows"] == windows > 10


def test_a_domain_of_little_text_keeps_its_windows_beside_one_of_much():
    tokenizer = Tokenizer.from_folder(ROOT / "data/base")
    ids = {}
    for name in "german", "french", "spanish":
        text = (ROOT / f"data/handbook/{name}.txt").read_text(encoding="utf-8")
        ids[name] = np.array(tokenizer.encode(text[:1_500_000]))
    for small, large in permutations(ids, 2):
        train = {small: ids[small][50_000:51_300], large: ids[large][: len(ids[large]) * 9 // 10]}
        router = Router(train.values())
        for name in train:
            router.add(name, train[name], name)
        held = {small: ids[small][51_300:80_000].reshape(-1, 50), large: ids[large][-20_000:].reshape(-1, 50)}
        right = {name: np.mean(router.scores(held[name]).argmax(1) == i) for i, name in enumerate(held)}
        assert min(right.values()) > 0.93, (small, large, right)
        assert router.route(held[small]).count(large) < 0.07 * len(held[small])


def test_the_report_says_what_was_held_out_and_what_of_it_was_trained_on(run):
    results = json.loads((run / "results.json").read_text())
    for share, windows, again in results["heldout"].values():
        assert 0.03 < share < 0.1 and windows > 0 and again == 0
    share, windows, _ = results["heldout"]["german"]
    assert f"german {share:.1%} (0 of {windows})" in (run / "report.md").read_text()
    ids = np.random.default_rng(0).integers(0, 4000, 9000)
    copied = SimpleNamespace(train=ids, heldout=ids[1000:2000])
    settings = SimpleNamespace(eval_len=64, eval_windows=None)
    found = evaluation.heldout_text(SimpleNamespace(settings=settings), {"copied": copied})
    assert found == {"copied": [0.1, 15, 15]}


def test_the_reported_accuracy_is_the_mean_over_domains():
    router, rng = Router(), np.random.default_rng(0)
    text = {"a": rng.integers(0, 100, 20_000), "b": rng.integers(100, 200, 20_000)}
    for name, ids in text.items():
        router.add(name, ids, name)
    run = SimpleNamespace(router=router, settings=Settings(data="text of one's own"))
    wrong = {
        "a": np.concatenate([text["a"][:900], text["b"][:100]]),
        "b": np.concatenate([text["b"][:50], text["a"][:50]]),
    }
    quality = evaluation.router_quality(run, {name: SimpleNamespace(heldout=ids) for name, ids in wrong.items()})
    assert quality["accuracies"] == {"a": 0.9, "b": 0.5} and quality["accuracy"] == pytest.approx(0.7)


def test_a_text_that_is_a_link_keeps_its_own_name(run):
    """In a cache of downloads the file behind a link is called after its hash."""
    world = run.parent.parent  # noqa: F811
    for path in (world / "italian.txt", world / "data/french.txt"):
        blob = path.rename(world / f"{path.stem}-0123")
        path.symlink_to(blob)
    assert add(run) == 0
    assert list(json.loads((run / "results.json").read_text())["swap"]) == ["french", "german", "italian"]
    assert evaluation.main(["report", str(run)]) == 0


def test_another_base_model_is_refused(run, capsys):
    path = run.parent.parent / "base/model.safetensors"
    state = load_file(path)
    save_file({n: t + 1 if n == "model.norm.weight" else t for n, t in state.items()}, path)
    assert add(run) == 2 and "began with another model" in capsys.readouterr().err
    assert torch.isfinite(state["model.norm.weight"]).all()


def test_a_report_is_made_where_evaluation_failed_and_where_a_text_or_a_module_came_or_went(run, capsys):
    shutil.copy(run.parent.parent / "italian.txt", run.parent.parent / "dutch.txt")
    assert train.main(["--add", str(run.parent.parent / "dutch.txt"), "--out", str(run)]) == 0
    results = json.loads((run / "results.json").read_text())
    assert (
        list(results["swap"]) == ["french", "german", "dutch"] == list(results["swap"]["dutch"])
    )  # the diagonal stays
    settings = json.loads((run / "settings.json").read_text()) | {"domains": "2"}
    (run / "settings.json").write_text(json.dumps(settings))
    shutil.copy(run.parent.parent / "italian.txt", run.parent.parent / "data/czech.txt")  # now among the first two
    (run / "modules/german.safetensors").unlink()
    before = files(run)
    capsys.readouterr()
    assert evaluation.main(["report", str(run)]) == 2  # tables of the others would take the place of these
    assert "german.safetensors does not exist; bring it back" in capsys.readouterr().err
    assert add(run) == 2 and files(run) == before  # before anything is trained
    assert evaluation.main(["remove", str(run), "german"]) == 0
    (run / "results.json").unlink()
    assert evaluation.main(["report", str(run)]) == 0
    again = json.loads((run / "results.json").read_text())
    assert again["perplexity"]["koff"] == {d: results["perplexity"]["koff"][d] for d in ("french", "dutch")}


def test_a_router_of_an_earlier_version_is_one_sentence(run, capsys):
    saved = load_file(run / "router.safetensors")
    save_file(saved, run / "router.safetensors", {"domains": json.dumps(["french", "german"])})
    assert evaluation.main(["generate", str(run), "Der Kernel"]) == 2
    assert "router.safetensors cannot be read (this version has not written it)" in capsys.readouterr().err
