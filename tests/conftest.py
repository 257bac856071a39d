"""Tiny random models, the same for every test."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for so little work threads cost more than they give, a hundredfold

import pytest
import torch

from data.families import parse_config
from model import Attention, Model, attend

SHAPE = dict(
    model_type="llama", vocab_size=131, hidden_size=24, intermediate_size=40, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256, eos_token_id=3,
    tie_word_embeddings=True,
)  # fmt: skip


def random_model(**more):
    torch.manual_seed(1)
    model = Model(parse_config({**SHAPE, **more}))
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.2)
    return model.requires_grad_(False)


@pytest.fixture
def tiny():
    return random_model


@pytest.fixture(autouse=True)
def plain_attention(monkeypatch):
    """Every test begins with the attention of model.py. (train.py and eval.py, called in a test, replace it.)"""
    monkeypatch.setattr(Attention, "attend", staticmethod(attend))
