"""Any combination of settings trains, or is refused with the names of those in conflict; none does nothing in silence.

python -m pytest tests/test_any_settings.py            a hundred combinations
python -m pytest tests/test_any_settings.py -m slow    two thousand
"""

import re
import shutil
from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from data import BadInput, starts
from data.progress import Progress
from data.settings import Settings
from test_train import changed, flags, make_world, open_run, tensors

NOT_DRAWN = ("model", "data", "domains", "device", "seed", "steps", "eval_windows", "eval_len")
# Beyond these a tiny model is slow or has not the memory; what is too large is refused, which other tests show.
LARGEST = dict(rank=48, kv_tokens=40, batch=3, seq_len=40, fisher_sequences=8, solve_tokens=400, kv_passages=20)


def values(f):
    """What a setting is drawn from: its choices; else its bounds, what lies between, and its default."""
    if f.metadata["choices"]:
        return st.sampled_from(list(f.metadata["choices"]))
    if isinstance(f.default, bool):
        return st.booleans()
    low, high = f.metadata["low"], min(f.metadata["high"] or 1, LARGEST.get(f.name, 10**9))
    if isinstance(f.default, float):
        # A rate of 1e-300 is none.
        return st.sampled_from([low, f.default]) | st.floats(max(low, 1e-6), min(high, 100.0))
    return st.sampled_from([low]) | st.integers(low, min(high, 60))


DRAWN = {f.name: values(f) for f in fields(Settings) if f.name not in (*NOT_DRAWN, "retention", "repair", "dtype")}
DRAWN["retention"] = st.sampled_from(["", "domains"])
DRAWN["repair"] = st.sampled_from(["domains", "none"])
DRAWN["dtype"] = st.sampled_from(["float32", "bfloat16"])
# Most of them as they are: else nearly all would be refused.
SOME = st.sets(st.sampled_from(sorted(DRAWN)), max_size=6).flatmap(
    lambda names: st.fixed_dictionaries({name: DRAWN[name] for name in sorted(names)})
)
SMALL = dict(blocks=2, sparsity=0.05, steps=4, batch=2, seq_len=16, eval_len=16, rank=2, alpha=2.0, kv_tokens=3, top=20,
             fisher_sequences=4, solve_tokens=64, dtype="float32", gate_share=0.5)  # fmt: skip


def as_flags(world, chosen):
    argv = flags(world, **{name: value for name, value in {**SMALL, **chosen}.items() if not isinstance(value, bool)})
    for name, value in chosen.items():
        if isinstance(value, bool):
            argv.append(f"--{'' if value else 'no-'}{name.replace('_', '-')}")
    return argv


def trains(world, chosen):
    """Four steps under these settings, and what has to hold after them; or a refusal that names settings."""
    try:
        trainer, text = open_run(as_flags(world, chosen))
    except BadInput as error:
        named = set(re.findall(r"--[a-z-]+|sparsity", str(error)))
        assert named and str(error).endswith("."), error
        return False
    starts.start(trainer, text.train)  # the loop does it again, with the same result
    before = tensors(trainer)
    s = trainer.s
    shutil.rmtree(world / "runs", ignore_errors=True)
    with Progress(trainer, text, world / "runs/one", 0.0) as progress:
        train.loop(trainer, text, progress)
    after = tensors(trainer)
    moved = {who for who, _ in changed(before, after)}
    if s.memory:
        assert moved >= set(trainer.domains), "nothing of a module moved"
    elif s.gate_rate and s.gate_steps:
        assert moved == {"gates"}
    assert all(p.isfinite().all() for p in after.values())
    removed = trainer.gates.sparsity(trainer.mask, s.count).item()
    one_multiple = s.multiple * 3 * trainer.gates.config.hidden_size / trainer.gates.total
    assert s.sparsity <= removed <= s.sparsity + one_multiple + 1e-3
    return True


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("settings")
    make_world(folder)
    return folder


def draw(world, examples):
    """So many combinations, the same each time; most of them train."""
    trained = []

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(chosen=SOME)
    def combination(chosen):
        trained.append(trains(world, chosen))

    combination()
    assert len(trained) / 2 < sum(trained) < len(trained), sum(trained)


def test_a_hundred_combinations(small_world):
    draw(small_world, 100)


@pytest.mark.slow
def test_2000_combinations(small_world):
    draw(small_world, 2000)
