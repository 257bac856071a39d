"""Settings: what is refused by its name, and how those of an earlier version are read."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest

import train
from data import BadInput, sweeps
from data.settings import NOT_THERE, PRESETS, Settings
from data.sweeps import SWEEPS
from test_train import flags, world  # noqa: F401 (a fixture)

# Settings that are void together -------------------------------------------------------------------------------------

VOID = [
    dict(order="prune-first", gate_share=1.0, solve_tokens=0),
    dict(order="prune-first", steps=10, gate_share=0.95, solve_tokens=0),  # less than a step
    dict(order="prune-first", memory=False),
    dict(memory=False, gate_rate=0.0),
    dict(rank=0, kv_tokens=0),
    dict(alpha=0.0),
    dict(lora_rate=0.0, kv_rate=0.0),
    dict(lora_rate=0.0, kv_tokens=0),
    dict(kv_rate=0.0, rank=0),
    dict(top=1, objective="kl-renormalise"),
    dict(beta=0.5, beta_end=2.0),
    dict(retention="domains", gate_rate=0.0),
    dict(retention="domains", steps=40, gate_share=0.15, retention_every=20),  # the mask is final after 6 steps
    dict(retention="domains", retention_every=1),  # the gates do not learn
]
FINE = [
    dict(gate_share=1.0),
    dict(order="prune-first"),
    dict(order="prune-first", steps=0),
    dict(order="prune-first", gate_share=1.0),  # its modules are solved
    dict(memory=False),
    dict(memory_blocks=2),
    dict(gate_rate=0.0),
    dict(rank=0, alpha=0.0),
    dict(kv_tokens=0),
    dict(lora_rate=0.0),
    dict(kv_rate=0.0),
    dict(lora_rate=0.0, kv_rate=0.0, steps=0),
    dict(rise=1.0, gate_share=0.4),
    dict(retention="domains", steps=40, gate_share=0.15, retention_every=5),
]


@pytest.mark.parametrize("more", [dict(steps=1), dict(order="prune-first", gate_share=0.87), dict(multiple=41)])
def test_what_the_text_or_the_model_makes_void_is_refused(world, capsys, more):  # noqa: F811
    assert train.main(flags(world, **more)) == 2
    err = capsys.readouterr().err
    assert "2 memories cannot learn in 1 steps" in err or "a block has 40 neurons" in err


@pytest.mark.parametrize("given", [dict(rank=2**70), dict(lora_rate=math.inf), dict(beta=math.inf), dict(steps=1.5)])
def test_numbers_beyond_all_bounds_are_refused(given):
    with pytest.raises(BadInput, match=f"--{next(iter(given)).replace('_', '-')} is"):
        Settings(**given)


@pytest.mark.parametrize("given", VOID, ids=str)
def test_settings_that_are_void_together_are_refused_by_name(given):
    with pytest.raises(BadInput, match=r"--.*(contradict|leaves nothing)"):
        Settings(**given)


def test_their_neighbours_are_not():
    for given in FINE:
        Settings(**given)
    for name in SWEEPS:
        for preset in ("handbook", "quick", "paper", "best"):
            if (name, preset) != ("ablations", "paper"):  # which solves for nothing
                sweeps.runs_of(name, PRESETS[preset], Path("out"), seeds=1)


# Settings of an earlier version --------------------------------------------------------------------------------------

# As b144f8a saved them, in as far as their names or values are others today.
EARLIER = dict(
    model="base", text=0.5, fix_mask=0.75, constraint="progressive", scaled=True, ramp=0.1, objective="kl", tail="bucket",
    compile=False, memory_blocks=2,
)  # fmt: skip


@pytest.mark.parametrize("earlier,today", [
    ({}, {}),
    (dict(text=1.0), dict(text_share=1.0)),
    (dict(fix_mask=0.0), dict(gate_share=1.0, rise=0.1)),  # the ramp was a share of all steps
    (dict(fix_mask=0.85), dict(gate_share=0.15, rise=0.1 / (1 - 0.85))),  # not 0.15000000000000002
    (dict(fix_mask=1.0), dict(gate_share=0.0, rise=0.0)),
    (dict(ramp=0.5), dict(rise=1.0)),
    (dict(scaled=False), dict(constraint="hinge")),  # lambda stays, the target rises
    (dict(constraint="hinge"), dict(rise=0.0)),  # lambda adapts, the target is there at once
    (dict(constraint="hinge", scaled=False), dict(constraint="hinge", rise=0.0)),  # the paper's, as it is written
    (dict(constraint="lagrangian"), dict(constraint="lagrangian")),
    (dict(constraint="lagrangian", scaled=False), dict(constraint="lagrangian")),
    (dict(tail="drop"), dict(objective="kl-drop")),
    (dict(tail="renormalise"), dict(objective="kl-renormalise")),
    (dict(objective="blend"), dict(objective="blend")),
    (dict(objective="next-token"), dict(objective="next-token")),
    (dict(compile=True), {}),  # of the machine, it changed no number
    (dict(placement="gain"), {}),  # the modules on the disk have the ranks
], ids=str)  # fmt: skip
def test_settings_of_an_earlier_version_are_read_as_todays(earlier, today):
    usual = dict(
        model="base", text_share=0.5, gate_share=0.25, constraint="scaled", rise=0.4, objective="kl", memory_blocks=2
    )
    assert Settings.from_saved(EARLIER | earlier) == Settings(**NOT_THERE | usual | today)


def test_a_ramp_is_a_share_of_the_gates_steps_also_beside_todays_name_of_their_share():
    assert Settings.from_saved(dict(ramp=0.12, gate_share=0.15)).rise == pytest.approx(0.8)


def test_a_run_from_before_the_repair_was_not_repaired():
    before = Settings.from_saved({})
    assert before.repair == "none"
    assert (before.curvature_tokens, before.kv_passages, before.kv_places) == (0, 1, 0)


def test_missing_settings_are_as_before_and_todays_come_back_as_they_are(tmp_path):
    assert Settings.from_saved({}) == Settings(**NOT_THERE)
    saved = asdict(Settings(**PRESETS["paper"]))
    assert Settings.from_saved(saved) == Settings(**PRESETS["paper"])
    for name in saved:
        less = {other: value for other, value in saved.items() if other != name}
        assert getattr(Settings.from_saved(less), name) == NOT_THERE.get(name, getattr(Settings(), name))
    before = json.dumps(EARLIER)
    (tmp_path / "settings.json").write_text(before)
    Settings.from_file(tmp_path / "settings.json").to_file(tmp_path / "again.json")
    assert Settings.from_file(tmp_path / "again.json") == Settings.from_saved(EARLIER)
    assert json.dumps(EARLIER) == before  # reading changes nothing


@pytest.mark.parametrize("saved,words", [
    (dict(model="base", warmth=3), "it has the unknown setting warmth"),
    (EARLIER | dict(warmth=3), "it has the unknown setting warmth"),
    (EARLIER | dict(memory_blocks=-1), "--memory-blocks is -1"),  # there was such a value
    (EARLIER | dict(tail="average"), "--objective is 'kl-average'"),
    (EARLIER | dict(objective="next-token", tail="drop"), "--objective is 'next-token-drop'"),  # a tail of nothing
    (dict(model="base", steps="many"), "--steps is 'many'"),
    (dict(model="base", scaled=True), "'constraint'"),  # without which nobody knows what it meant
    ({}, "it names no model"),
    ([], "it names no model"),
    (dict(steps=8), "it names no model"),  # of another program
], ids=str)  # fmt: skip
def test_settings_that_cannot_be_read_are_refused_by_name(tmp_path, saved, words):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(saved))
    with pytest.raises(BadInput, match=f"{path} cannot be used by this version .*train in another folder") as refused:
        Settings.from_file(path)
    assert words in str(refused.value)
