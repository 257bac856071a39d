"""Train the tiny multilingual base model that the repository ships in data/base/.

    pip install tokenizers && python tests/make_base.py [--minutes 15]

A 4,096-entry byte-level BPE and a 5.8M-parameter Llama, both on the training part of data/handbook/ only: the held-out
text is never seen. Needs `tokenizers` for the BPE; weights are saved as bfloat16 (11.5 MB).
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
from data import BadInput, atomic
from data.checkpoint import checkpoint_name
from data.corpus import batch, find_domains, load_text, read_documents, split_text, windows
from data.families import parse_config
from data.tokenizer import Tokenizer
from model import Model

CONFIG = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=4096, hidden_size=256, intermediate_size=768,
    num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4, head_dim=32, rms_norm_eps=1e-5,
    rope_theta=10000.0, max_position_embeddings=2048, tie_word_embeddings=True, hidden_act="silu", attention_bias=False,
    mlp_bias=False, bos_token_id=None, eos_token_id=0, torch_dtype="bfloat16",
)  # fmt: skip

# Without it transformers 4 makes this a Llama 2 tokenizer: other ids, and some beyond the embedding; and no version knows
# which token ends a text. The clean-up, which older ones do, takes spaces out of a decoded text.
TOKENIZER_CONFIG = dict(
    tokenizer_class="PreTrainedTokenizerFast", eos_token="<|endoftext|>", clean_up_tokenization_spaces=False
)


def write_json(path, content):
    with atomic(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")


def train_tokenizer(texts, path):
    try:
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise BadInput("training a tokenizer needs the package tokenizers; pip install tokenizers.") from None
    tokenizer = Tokenizer(models.BPE())
    regex = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [TOKENIZER_CONFIG["eos_token"]]
    trainer = trainers.BpeTrainer(vocab_size=CONFIG["vocab_size"], special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    with atomic(path) as partial:
        tokenizer.save(str(partial))


def main(minutes, size=16, length=256, peak=3e-3):
    base, corpus = HERE / "data/base", HERE / "data/handbook"
    paths = sorted(corpus.glob("*.txt"))
    training_text = []
    for path in paths:
        documents, stream = read_documents(path)
        training_text += split_text(documents, stream)[0]
    train_tokenizer(training_text, base / "tokenizer.json")
    tokenizer = Tokenizer.from_folder(base)
    paths = find_domains(corpus)
    domains = {name: load_text(path, tokenizer=tokenizer, cache="out/tokens") for name, path in paths.items()}
    ids = np.concatenate([split.train for split in domains.values()])
    torch.manual_seed(0)
    model = Model(parse_config(CONFIG))
    for name, p in model.named_parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(
                p, std=0.02 / (12**0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1)
            )
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [dict(params=matrices, weight_decay=0.1), dict(params=vectors, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)
    start, step, bar = time.time(), 0, tqdm(total=round(minutes * 60), unit="s")
    while (done := (time.time() - start) / (60 * minutes)) < 1:  # the schedule follows the clock: linear decay to zero
        for group in optimizer.param_groups:
            group["lr"] = peak * min((step + 1) / 50, 1 - done)
        x = torch.from_numpy(batch(ids, step, size, length, seed=0))
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.norm(model.run(model.embed_tokens(x), 0, len(model.layers)))
            logits = F.linear(hidden[:, :-1], model.head)
        loss = F.cross_entropy(logits.float().flatten(0, 1), x[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        bar.n = round(done * 60 * minutes)
        bar.set_postfix(step=step, loss=f"{loss.item():.3f}")
    state = {checkpoint_name(n): p.detach().bfloat16() for n, p in model.named_parameters()}
    with atomic(base / "model.safetensors") as partial:
        save_file(state, partial, metadata={"format": "pt"})
    write_json(base / "config.json", CONFIG)
    write_json(base / "tokenizer_config.json", TOKENIZER_CONFIG)
    model.to(torch.bfloat16).float()
    for name, split in domains.items():
        x = torch.from_numpy(windows(split.heldout, length))
        with torch.no_grad():
            loss = F.cross_entropy(model(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten())
        print(f"{name:12s} held-out perplexity {loss.exp().item():.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15.0, help="length of the training")
    try:
        main(parser.parse_args().minutes)
    except BadInput as error:
        sys.exit(f"make_base.py: {error}")
