"""A run from the gates' scores to an evaluation on a pretended GPU: an operation that mixes it with the CPU raises.

FakeTensorMode gives tensors shapes and devices but no numbers. The device is a backend that torch lets Python register,
because a CPU build of torch has no gradients on "cuda". The meta device, which other tests use, hides such mixtures
wherever an operation does not look at the device. Each case has a process of its own: the backend stays registered.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CASES = {
    "plain": {},
    "projections": dict(granularity="projection", lora="kv+mlp", constraint="lagrangian"),
    "qkv": dict(gated="qkv", gate_init="fisher", sparsity=0.02),
    "blend": dict(objective="blend", multiple=4),
    "pruned": dict(memory=False, repair="domains", gate_share=1.0),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_nothing_is_left_on_the_cpu(case, dtype):
    done = subprocess.run([sys.executable, __file__, case, dtype], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("this torch has no backends that Python registers")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["all", "on", "gpu:0"]


def walk(case, dtype):
    """Call everything that touches the device."""
    import numpy as np
    import torch
    from torch._subclasses import fake_tensor
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

        _setup_privateuseone_for_python_backend("gpu")
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(1.0, device="gpu") begins on the CPU
        FakeTensorMode.avoid_device_init = property(lambda mode: True)
        fake_tensor.CONSTANT_NUMEL_LIMIT = -1  # no tensor of constants either
    except (ImportError, AttributeError):
        sys.exit(77)
    import koff
    import train
    from conftest import SHAPE
    from data import fast, starts
    from data.families import parse_config
    from data.objectives import token_losses
    from data.settings import Settings
    from data.solve import repair_student, solve_module
    from model import Model, generate

    small = dict(
        steps=40, gate_share=0.5, blocks=2, batch=2, seq_len=16, rank=4, alpha=4.0, kv_tokens=3, solve_tokens=64
    )
    more = dict(kv_passages=2, kv_places=4, repair_tokens=64, curvature_tokens=32, fisher_sequences=4)
    s = Settings(**{**small, **more, **CASES[case]})
    config = parse_config(SHAPE)
    with torch.device("meta"):
        model = Model(config).to(getattr(torch, dtype)).requires_grad_(False)
    shapes = {name: (t.shape, t.dtype) for name, t in model.state_dict().items()}
    gates = s.new_gates(config)
    mask = {name: torch.rand(a.shape) > 0.3 for name, a in gates.log_alpha.items()}
    kept = koff.kept_channels(mask, config, gates.first_block, "cpu")
    text = {name: np.arange(3000) % 100 for name in ("a", "b")}
    fast.enable()
    with FakeTensorMode() as mode:

        def on_gpu(tensor):
            return mode.from_tensor(tensor).to("gpu")

        # Numbers that a program asks for do not exist: the first of several is taken, and the mask is given.
        torch.Tensor.item = lambda tensor: 0
        torch.Tensor.__bool__ = lambda tensor: False
        koff.kept_channels = lambda *_: {i: {n: on_gpu(x) for n, x in index.items()} for i, index in kept.items()}
        state = {name: torch.empty(shape, dtype=kind, device="gpu") for name, (shape, kind) in shapes.items()}
        model.load_state_dict(state, assign=True)
        trainer = train.Trainer(model, s, text)
        starts.start(trainer, text)
        tokens = torch.zeros(2, 16, dtype=torch.int64, device="gpu")
        losses = [trainer.learn(tokens, "a", 0), trainer.retain(tokens, "b", 1)]
        trainer.freeze_mask({name: on_gpu(is_open) for name, is_open in mask.items()})
        repair_student(trainer, text)
        memories = None
        if s.memory:
            solve_module(trainer, "a", text["a"])
            losses.append(trainer.recover(tokens, "a", 30))
            memories = koff.materialise_memories(trainer.memories("a"), trainer.kept)
        trainer.turns.saw("a", losses[-1])
        shared = model.run(model.embed_tokens(tokens), 0, trainer.split)
        merged = fast.merged(trainer.student, memories) if memories else (trainer.student, None)
        for student, attached in (trainer.student, memories), merged, (model, None):
            losses.append(token_losses(student, attached, shared, trainer.split, tokens))
        losses += generate(*merged[:1], tokens[:1], 2, 100, (), memories=merged[1])
        losses += generate(*merged[:1], tokens[:1], 2, 100, (), 0.8, 0.9, memories=merged[1])
        devices = {t.device for t in (*losses, *trainer.student.parameters(), *trainer.gates.parameters())}
        try:
            trainer.learn(tokens.cpu(), "a", 2)
        except Exception as error:  # the control
            if "device" in str(error):
                print("all on", *devices)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    walk(*sys.argv[1:])
