"""Each idea of knowledge offloading on numbers that fit on a screen: `python data/tour.py`, in the order of koff.py.

It needs no weights and no text, and takes a few seconds. Every number comes from the functions that training uses.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import koff
from data.objectives import kl_drop, kl_renormalise
from data.solve import reduced_rank_regression
from data.starts import text_context
from model import Config, Model, Projection

CONFIG = Config(
    model_type="llama", vocab_size=10, hidden_size=6, intermediate_size=4, num_hidden_layers=1,
    num_attention_heads=1, num_key_value_heads=1, head_dim=2, rms_norm_eps=1e-6, rope_theta=10_000.0,
    rope_scaling=None, max_position_embeddings=64, tie_word_embeddings=True, qkv_bias=False, o_bias=False,
    mlp_bias=False, qk_norm=None, post_norm=False, eos_token_ids=(),
)  # fmt: skip


def say(text):
    print("  " + text)


def row(label, numbers):
    """A line of numbers."""
    cells = "".join(f"{number:8d}" if isinstance(number, int) else f"{number:8.2f}" for number in numbers)
    say(f"{label:<34}{cells}")


def tiny_model():
    """A random model with 1 block, width 6 and 4 MLP neurons."""
    model = Model(CONFIG)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.5)
    return model.requires_grad_(False)


def hard_concrete_gate():
    """A gate is a number z in [0, 1] that multiplies one output channel."""
    noise = torch.tensor([0.02, 0.1, 0.3, 0.6, 0.9])
    row("noise u", noise)
    for log_alpha in (3.0, 0.0, -3.0):
        z = koff.hard_concrete(torch.tensor(log_alpha), 2 / 3, noise)
        p = koff.probability_open(torch.tensor(log_alpha), 2 / 3)
        row(f"z for log alpha {log_alpha:4.1f}, P(z > 0) {p:.2f}", z)
    say("Training moves log alpha. Draws are often exactly 0 or 1; in between they have a gradient.")


def cut_rows():
    """A closed channel is a row of its matrix that can be cut."""
    projection = Projection(fan_in=3, channels=6, bias=False, rows=6)
    projection.weight.data = torch.arange(18.0).view(6, 3) / 10
    x = torch.tensor([[[1.0, -1.0, 2.0]]])  # [B, T, fan-in]
    z = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 0.0])
    lora = torch.ones(1, 3), torch.full((6, 1), 0.5)  # A [r, fan-in], B [channels, r]
    row("z", z)
    row("z (W x), 6 rows", projection(x, z)[0, 0])
    row("z (W x + B A x)", projection(x, z, lora)[0, 0])
    small = Projection(fan_in=3, channels=6, bias=False, rows=4)
    small.kept = z.nonzero()[:, 0]
    small.weight.data = projection.weight.data[small.kept]
    row("W x with 4 rows, zeros put back", small(x)[0, 0])
    say("LoRA cannot reopen a closed channel: the gate multiplies the sum.")


def two_counts():
    """What does "12% removed" count? The block has 4 neurons: rows of gate and up, columns of down, all 6 long."""
    model = tiny_model()
    mask = {"gate": torch.ones(1, 4), "up": torch.ones(1, 4), "down": torch.ones(1, 6)}
    mask["gate"][0, 0] = 0
    mask["up"][0, 1] = 0
    paper = koff.removed_paper(CONFIG, mask)
    physical = koff.removed_physical(CONFIG, mask)
    say("Closed: the gate row of neuron 0 and the up row of neuron 1.")
    say(f"By the paper's count, closed channels x fan-in: {paper:.0f} parameters.")
    say(f"Really gone: {physical:.0f}. Both neurons are dead, so each loses two rows and a column of down.")
    kept = koff.kept_channels({name: rows.bool() for name, rows in mask.items()}, CONFIG, 0, "cpu")
    small = koff.materialise(model, kept)
    before = koff.count_parameters(model)
    after = koff.count_parameters(small)
    say(f"The materialised model has {after} of {before} parameters: {1 - after / before:.0%} removed.")
    tokens = torch.tensor([[1, 2, 3]])
    z = {0: {name: rows[0] for name, rows in mask.items()}}
    difference = (model(tokens, z) - small(tokens)).abs().max()
    say(f"Largest difference between its logits and the masked model's: {difference:.0e}.")


def penalty():
    """The penalty closes gates until the expected sparsity reaches its target."""
    gates = koff.Gates(CONFIG, first_block=0)
    hinge = koff.Hinge(20.0)
    optimizer = torch.optim.AdamW(gates.parameters(), lr=0.05)
    target = 0.3
    reached = []
    for _ in range(121):
        expected = gates.sparsity()
        reached.append(expected.item())
        hinge(expected, target).backward()  # lambda * max(0, target - expected); training adds the KL to it
        optimizer.step()
        optimizer.zero_grad()
    row("step", range(0, 121, 20))
    row("expected sparsity, target 0.30", reached[::20])


def memory_module():
    """A module is LoRA on five projections and M trainable keys and values, for each block."""
    module = koff.MemoryModule(CONFIG, first_block=0, rank=2, alpha=2.0, kv_tokens=3)
    for name in module.lora_a:
        a, b = module.lora_a[name], module.lora_b[name]
        say(f"LoRA on {name:<5} A {list(a.shape[1:])}, B {list(b.shape[1:])}")
    say(f"keys and values [heads, M, head dim]: {list(module.keys.shape[1:])} each")

    model = tiny_model()
    prefix = torch.tensor([4, 7, 2])
    text = torch.tensor([[1, 5, 3, 8]])
    whole = model(torch.cat([prefix[None], text], dim=1))[:, len(prefix) :]
    with_memory = model(text, memories=text_context(model, prefix, first_block=0))
    difference = (whole - with_memory).abs().max()
    say(f"Keys and values of a prefix act like the prefix itself: logits differ by {difference:.0e}.")
    say("Training starts there and then moves them as free parameters.")


def distillation():
    """The loss is KL(teacher || student) on the teacher's top outcomes: here 3 of 5."""
    teacher = torch.tensor([[0.50, 0.30, 0.10, 0.06, 0.04]]).log()
    student = torch.tensor([[0.45, 0.25, 0.05, 0.20, 0.05]]).log()
    index = torch.tensor([[0, 1, 2]])
    top = (index, *koff.top_and_rest(teacher, index))  # as `koff.teacher_topk` has it
    row("teacher", teacher[0].exp())
    row("student", student[0].exp())
    row("KL on all 5 outcomes", (teacher.exp() * (teacher - student)).sum(-1))
    row("top 3, rest as one outcome (kl)", koff.kl_topk(student, top))
    row("top 3, both renormalised", kl_renormalise(student, top))
    row("top 3 alone", kl_drop(student, top))
    say("The student's outcome 4 is three times too likely. Renormalising hides most of that.")


def least_squares():
    """Ours: once the mask is final, LoRA on `down` has a closed form. Rank 1 of a 3 x 3 residual:"""
    activations = torch.eye(3, dtype=torch.float64)  # H: three tokens, three neurons
    missing = torch.tensor([[2.0, 4.0, 2.0], [1.0, 2.0, 1.0], [0.0, 0.0, 1.0]], dtype=torch.float64)  # R
    a, b, explained = reduced_rank_regression(activations.T @ activations, activations.T @ missing, 1, 1e-9)
    solved = activations @ a.T @ b.T  # H A^T B^T
    for i in range(3):
        row("missing | restored by rank 1", [*missing[i], *solved[i]])
    say(f"One direction explains {explained / missing.square().sum():.0%} of the squares.")


PARTS = (
    hard_concrete_gate, cut_rows, two_counts, penalty, memory_module, distillation, least_squares,
)  # fmt: skip


def main():
    torch.manual_seed(0)
    for number, part in enumerate(PARTS, 1):
        print(f"\n{number}. {part.__doc__.strip()}\n")
        part()
    print("\nNext: model.py, where gates and memories enter; koff.py, the method; train.py, the loop.")


if __name__ == "__main__":
    main()
