"""Each idea of knowledge offloading on numbers that fit on a screen: `python data/tour.py`, in the order of koff.py.

It needs no weights and no text, and takes a few seconds. The inputs are made up; the project's own functions compute
the results.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import koff
from data.objectives import kl_drop, kl_renormalise
from data.solve import Regression, reduced_rank_regression
from data.starts import text_context
from model import Config, Model, Projection

BETA = 2 / 3  # temperature of the gates

# One block of width 6 with 4 MLP neurons and one attention head of 2 channels. Only the sizes matter here.
CONFIG = Config(
    model_type="llama", vocab_size=10, hidden_size=6, intermediate_size=4, num_hidden_layers=1,
    num_attention_heads=1, num_key_value_heads=1, head_dim=2, rms_norm_eps=1e-6, rope_theta=10_000.0,
    rope_scaling=None, max_position_embeddings=64, tie_word_embeddings=True, qkv_bias=False, o_bias=False,
    mlp_bias=False, qk_norm=None, post_norm=False, eos_token_ids=(),
)  # fmt: skip


def say(text):
    print("  " + text)


def show(label, numbers):
    """Print a label and its numbers."""
    cells = "".join(f"{number:8d}" if isinstance(number, int) else f"{number:8.3f}" for number in numbers)
    say(f"{label:<40}{cells}")


def tiny_model():
    model = Model(CONFIG)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.5)  # weights of norms are near 1
    return model.requires_grad_(False)


def hard_concrete_gate():
    """A gate is a number z in [0, 1] that multiplies one output channel of a matrix."""
    noise = torch.tensor([0.02, 0.1, 0.3, 0.6, 0.9])
    show("noise u, uniform on (0, 1)", noise)
    for log_alpha in (3.0, 0.0, -3.0):
        z = koff.hard_concrete(torch.tensor(log_alpha), BETA, noise)
        p = koff.probability_open(torch.tensor(log_alpha), BETA)
        show(f"z for log alpha {log_alpha:4.1f}; P(z > 0) is {p:.2f}", z)
    say("log alpha is trained: one number for each output channel of k, v, gate, up and down.")
    say("Each step draws new noise. Many draws are exactly 0 or 1; those between have a gradient.")


def cut_rows():
    """If z = 0 for good, the matrix row of that channel can be cut."""
    projection = Projection(fan_in=3, channels=6, bias=False, rows=6)
    projection.weight.data = torch.arange(18.0).view(6, 3) / 10
    x = torch.tensor([[[1.0, -1.0, 2.0]]])  # [B, T, fan-in]
    z = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 0.0])
    lora_a = torch.ones(1, 3)
    lora_b = torch.full((6, 1), 0.5)
    show("z of 6 channels", z)
    show("z (W x), W has 6 rows", projection(x, z)[0, 0])
    show("z (W x + B A x): LoRA adds 1 if open", projection(x, z, (lora_a, lora_b))[0, 0])
    small = Projection(fan_in=3, channels=6, bias=False, rows=4)  # 4 of the 6 rows are left
    small.kept = z.nonzero()[:, 0]
    small.weight.data = projection.weight.data[small.kept]
    show("W x, W has 4 rows, zeros put back", small(x)[0, 0])
    say("The gate multiplies the sum, so LoRA cannot reopen a closed channel.")


def two_counts():
    """Two counts of what is removed: closed channels, and parameters that are really gone."""
    model = tiny_model()
    mask = {"gate": torch.ones(1, 4), "up": torch.ones(1, 4), "down": torch.ones(1, 6)}  # [blocks, channels], 1 is open
    mask["gate"][0, 0] = 0
    mask["up"][0, 1] = 0
    say("A neuron is silu(gate) * up: a row of gate_proj, a row of up_proj and a column of down_proj, 6 numbers each.")
    say("Closed: the gate_proj row of neuron 0 and the up_proj row of neuron 1.")
    say(f"The paper's count, closed channels x fan-in: {koff.removed_paper(CONFIG, mask):.0f} parameters.")
    physical = koff.removed_physical(CONFIG, mask)
    say(f"Really gone: {physical:.0f}. One closed row makes its neuron's output zero, so its two other parts go too.")
    kept = koff.kept_channels({name: rows.bool() for name, rows in mask.items()}, CONFIG, first_block=0, device="cpu")
    small = koff.materialise(model, kept)
    before = koff.count_parameters(model)
    after = koff.count_parameters(small)
    say(
        f"The materialised model has {after} of {before} parameters: its physical sparsity is {1 - after / before:.1%}."
    )
    say('In this repository "12% removed" means this share. The paper probably means its own count.')
    tokens = torch.tensor([[1, 2, 3]])
    z = {0: {name: rows[0] for name, rows in mask.items()}}  # {block: {name: [channels]}}
    difference = (model(tokens, z) - small(tokens)).abs().max()
    say(f"The masked and the smaller model have the same logits, up to {difference:.0e}.")


def penalty_and_final_mask():
    """The penalty raises the expected sparsity to its target; then the final mask closes that much."""
    gates = koff.Gates(CONFIG, first_block=0, granularity="neuron", start=1.0)
    with torch.no_grad():
        for log_alpha in gates.log_alpha.values():
            log_alpha += torch.rand_like(log_alpha)
    hinge = koff.Hinge(20.0)  # lambda
    optimizer = torch.optim.SGD(gates.parameters(), lr=1.0)
    target = 0.25
    reached = []
    for _ in range(61):
        expected = gates.sparsity()  # over the noise
        reached.append(expected.item())
        loss = hinge(expected, target)  # lambda * max(0, target - expected); training adds the KL
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    say("loss = lambda * max(0, target - expected sparsity). One gate covers a whole neuron here, as by default.")
    show("step", range(0, 61, 15))
    show("expected sparsity, target 0.25", reached[::15])
    mask = gates.final_mask(target)
    show("neuron", range(4))
    show("its log alpha at the end", gates.log_alpha["neuron"][0].tolist())
    show("its place in the final mask", mask["neuron"][0].int().tolist())
    say("The gates with the lowest log alpha close until the target is reached. A neuron is 18 of 198 parameters:")
    say("two are 18.2%, three 27.3%, so three close. In a real model a gate is a tiny step.")
    show("sparsity of the final mask", [gates.sparsity(mask).item()])
    say("From then on there is no noise: a gate is 0 or 1.")


def memory_module():
    """A module is LoRA (in the paper on five projections) and M trainable keys and values, in each block."""
    module = koff.MemoryModule(CONFIG, first_block=0, rank=2, alpha=2.0, kv_tokens=3)
    memory = module.by_block(torch.float32)[0]
    for name, (a, b) in memory.lora.items():
        say(f"LoRA on {name:<5} A {list(a.shape)}, B {list(b.shape)}")
    say(f"keys and values [heads, M, head dim]: {list(memory.keys.shape)} each")
    say("Training attaches the module of the text's domain (to general text a random one). At use a router picks one.")

    model = tiny_model()
    prefix = torch.tensor([4, 7, 2])
    text = torch.tensor([[1, 5, 3, 8]])
    whole = model(torch.cat([prefix[None], text], dim=1))[:, len(prefix) :]
    with_memory = model(text, memories=text_context(model, prefix, first_block=0))
    difference = (whole - with_memory).abs().max()
    say(f"A memory can also be made of text: keys and values of a prefix act like the prefix, up to {difference:.0e}.")
    say("Ours: training starts from such keys and values of real text; the paper starts from noise.")


def distillation():
    """The loss is KL(teacher || student) on the teacher's most likely tokens: here 3 of 5, in training 100."""
    teacher = torch.tensor([[0.50, 0.30, 0.10, 0.06, 0.04]]).log()
    student = torch.tensor([[0.45, 0.25, 0.05, 0.20, 0.05]]).log()
    index = torch.tensor([[0, 1, 2]])
    log_p, log_p_rest = koff.top_and_rest(teacher, index)
    top = (index, log_p, log_p_rest)
    show("teacher: the frozen model, gates open", teacher[0].exp())
    show("student: gates and a module", student[0].exp())
    show("KL on all 5 tokens", (teacher.exp() * (teacher - student)).sum(-1))
    show("top 3, and the rest as one outcome", koff.kl_topk(student, *top))
    show("top 3, each side renormalised", kl_renormalise(student, *top))
    show("top 3, no term for the rest", kl_drop(student, *top))
    say("The fourth token is three times too likely for the student. Renormalising hides most of that.")
    say("The paper does not say which of these it uses. Ours is the rest as one outcome.")


def least_squares():
    """Ours, not the paper's: once the mask is final, least squares mends the backbone and finds LoRA on `down`."""
    say("Three tokens activate one neuron each. The student lacks the following behind `down`.")
    missing = torch.tensor([[2.0, 4.0, 2.0], [1.0, 2.0, 1.0], [0.0, 0.0, 1.0]], dtype=torch.float64)  # R [tokens, D]
    fit = Regression()
    fit.gram = torch.eye(3, dtype=torch.float64)  # H^T H, where H [tokens, neurons] are the activations
    fit.cross = missing  # H^T R
    fit.square = missing.square().sum()
    for token in range(3):
        show(f"token {token}: what the cut removed", missing[token].tolist())
    say("With the text of all domains the whole solution is added to the backbone's `down`: the repair.")
    show("share of the squares that it explains", [fit.explained_by(fit.solution(ridge=1e-9)) / fit.square])
    say("With the text of one domain the best low-rank solution is that domain's LoRA.")
    a, b, gains = reduced_rank_regression(fit, ridge=1e-9)
    show("share that each further rank explains", gains / fit.square)
    for token in range(3):
        show(f"token {token}: what rank 1 restores", (b[:, :1] @ a[:1])[:, token].tolist())
    say("Training goes on from there.")


PARTS = (
    hard_concrete_gate, cut_rows, two_counts, penalty_and_final_mask, memory_module, distillation, least_squares,
)  # fmt: skip


def main():
    torch.manual_seed(0)
    for number, part in enumerate(PARTS, 1):
        print(f"\n{number}. {part.__doc__}\n")
        part()
    print("\nNext: model.py, where gates and memories enter; koff.py, the method; train.py, the loop.")


if __name__ == "__main__":
    main()
