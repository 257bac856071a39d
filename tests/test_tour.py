"""The tour runs in seconds, and the numbers on its screen are right."""

import re
import time

import pytest
import torch

from data import tour


@pytest.fixture(scope="module")
def printed():
    """What the tour prints, and the seconds that it takes."""
    lines = []
    patch = pytest.MonkeyPatch()
    patch.setattr("builtins.print", lambda text="": lines.append(text))
    begun = time.perf_counter()
    tour.main()
    patch.undo()
    return "\n".join(lines), time.perf_counter() - begun


def numbers(text, label):
    """The numbers of the line that begins with a label."""
    line = next(line.strip() for line in text.splitlines() if line.strip().startswith(label))
    return [float(word) for word in line.removeprefix(label).split()]


def test_it_has_seven_parts_and_takes_less_than_ten_seconds(printed):
    text, seconds = printed
    assert re.findall(r"^\n?(\d)\. ", text, re.M) == list("1234567")
    assert seconds < 10
    assert all(len(line) <= 120 for line in text.splitlines())


def test_a_gate_is_the_formula_of_louizos(printed):
    u = torch.tensor([0.02, 0.1, 0.3, 0.6, 0.9], dtype=torch.float64)
    expected = (torch.sigmoid((u / (1 - u)).log() / (2 / 3)) * 1.2 - 0.1).clamp(0, 1)
    assert numbers(printed[0], "z for log alpha  0.0; P(z > 0) is 0.83") == pytest.approx(expected.tolist(), abs=5e-4)


def test_both_counts_and_the_smaller_model(printed):
    text, _ = printed
    assert "closed channels x fan-in: 12 parameters" in text  # two rows of 6
    assert "Really gone: 36." in text  # two neurons of three vectors of 6
    assert "has 162 of 198 parameters: its physical sparsity is 18.2%" in text
    differences = [float(x) for x in re.findall(r"up to (\d\S*e-?\d+)", text)]
    assert len(differences) == 2 and max(differences) < 1e-5


def test_the_expected_sparsity_comes_to_its_target_and_three_neurons_close(printed):
    text, _ = printed
    assert numbers(text, "expected sparsity, target 0.25")[-1] == pytest.approx(0.25, abs=0.03)
    alpha, mask = numbers(text, "its log alpha at the end"), numbers(text, "its place in the final mask")
    assert sorted(mask) == [0, 0, 0, 1] and mask.index(1) == alpha.index(max(alpha))
    assert numbers(text, "sparsity of the final mask") == [pytest.approx(54 / 198, abs=5e-4)]


def test_the_kl_with_each_treatment_of_the_rest(printed):
    p, q = torch.tensor([0.5, 0.3, 0.1, 0.06, 0.04]), torch.tensor([0.45, 0.25, 0.05, 0.2, 0.05])
    terms = p * (p / q).log()
    renormalised = (p[:3] / p[:3].sum() * ((p[:3] / p[:3].sum()) / (q[:3] / q[:3].sum())).log()).sum()
    expected = {
        "KL on all 5 tokens": terms.sum(),
        "top 3, and the rest as one outcome": terms[:3].sum() + p[3:].sum() * (p[3:].sum() / q[3:].sum()).log(),
        "top 3, each side renormalised": renormalised,
        "top 3, no term for the rest": terms[:3].sum(),
    }
    for label, value in expected.items():
        assert numbers(printed[0], label) == [pytest.approx(value.item(), abs=6e-4)], label


def test_rank_one_is_the_best_approximation(printed):
    R = torch.tensor([[2.0, 4.0, 2.0], [1.0, 2.0, 1.0], [0.0, 0.0, 1.0]])
    U, S, V = torch.linalg.svd(R)
    best = S[0] * torch.outer(U[:, 0], V[0])
    for token, row in enumerate(best.tolist()):
        assert numbers(printed[0], f"token {token}: what rank 1 restores") == pytest.approx(row, abs=6e-4)
    shares = (S**2 / (S**2).sum()).tolist()
    assert numbers(printed[0], "share that each further rank explains") == pytest.approx(shares, abs=6e-4)
    assert numbers(printed[0], "share of the squares that it explains") == [1.0]
