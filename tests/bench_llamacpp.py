"""Size and speed in llama.cpp: `python tests/bench_llamacpp.py RUN [RUN ...]` prints a Markdown table.

Each run is exported twice, at its own size and dense, with zeros in the closed channels. Prefill reads 512 tokens, and
decoding writes 128, one sequence on --threads threads, in turns; the fastest round counts. Memory is the peak of the
resident set of a process that does this, above that of one that loads nothing. Needs: pip install gguf xllamacpp.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import xllamacpp as xl

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import koff
from data import llamacpp
from data.export import expand
from data.run import Run
from data.tables import table

PREFILL, DECODE = 512, 128


def write(run, folder):
    """Write pruned and dense files of a run: {(size, dtype): path}, and the number of parameters left."""
    gates, mask = run.gates(run.backbone)
    kept = koff.kept_channels(mask, run.backbone.config, gates.first_block, "cpu")
    dense = expand(run.backbone, kept)
    files = {}
    for dtype in "f32", "bf16", "q8_0":
        narrow = koff.materialise(dense, llamacpp.neurons_left(kept, dense.config, dtype))
        for size, model in ("pruned", narrow), ("dense", dense):
            files[size, dtype] = folder / f"{size}-{dtype}.gguf"
            llamacpp.write_backbone(files[size, dtype], run, model, dtype)
    left = sum(tensor.numel() for name, tensor in run.backbone.state_dict().items() if not name.endswith(".kept"))
    return files, left


def served(path, threads):
    given = xl.CommonParams()
    given.model.path = str(path)
    given.n_ctx, given.n_parallel, given.fit_params, given.verbosity = 1024, 1, False, 0
    given.cpuparams.n_threads = given.cpuparams_batch.n_threads = threads
    return xl.Server(given)


def speeds(server, seed):
    """(tokens read in a second, tokens written in a second). The seed changes the prompt: nothing is cached."""
    prompt = torch.randint(1000, 4000, (PREFILL,), generator=torch.Generator().manual_seed(seed)).tolist()
    asked = {"prompt": prompt, "n_predict": DECODE, "ignore_eos": True, "temperature": 0.0, "cache_prompt": False}
    timings = server.handle_completions(asked)["timings"]
    assert (timings["prompt_n"], timings["predicted_n"]) == (PREFILL, DECODE)
    return timings["prompt_per_second"], timings["predicted_per_second"]


def peak(path, threads):
    """Megabytes of a process that serves the file, above one that serves none."""
    sizes = []
    for given in str(path), "":
        command = [sys.executable, __file__, "--peak", given, "--threads", str(threads)]
        sizes.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]))
    return (sizes[0] - sizes[1]) / 1e3


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak is not None:
        if args.peak:
            speeds(served(args.peak, args.threads), 0)
        status = Path("/proc/self/status").read_text()  # (getrusage would count the parent's memory)
        print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
        return
    rows = {}
    for folder in args.runs:
        run = Run(folder, "cpu", torch.float32)
        tokenizer = (run.folder / "backbone/tokenizer.json").stat().st_size
        with tempfile.TemporaryDirectory() as place:
            files, left = write(run, Path(place))
            for dtype, each in ("f32", 4), ("bf16", 2), ("q8_0", 34 / 32):
                pair = [served(files[size, dtype], args.threads) for size in ("pruned", "dense")]
                best = [(0, 0), (0, 0)]
                for number in range(args.rounds):
                    for i, server in enumerate(pair):
                        best[i] = tuple(map(max, best[i], speeds(server, number)))
                del pair
                pruned, dense = (files[size, dtype].stat().st_size for size in ("pruned", "dense"))
                memory = [peak(files[size, dtype], args.threads) for size in ("pruned", "dense")]
                label = f"{folder.name}, {dtype}"
                rows[label] = [
                    f"{pruned / 1e6:.1f}",
                    f"{pruned / (left * each + tokenizer):.3f} x",
                    f"{pruned / dense:.3f} x",
                    f"{memory[0]:.0f}",
                    f"{memory[0] / memory[1]:.2f} x",
                    f"{best[0][0]:.0f}",
                    f"{best[0][0] / best[1][0]:.2f} x",
                    f"{best[0][1]:.1f}",
                    f"{best[0][1] / best[1][1]:.2f} x",
                ]
                print(label, *rows[label], file=sys.stderr)
    columns = ["file, MB", "of what is left", "of dense", "memory, MB", "of dense"]
    columns += ["prefill, tokens/s", "of dense", "decoding, tokens/s", "of dense"]
    print(table("", columns, rows))


if __name__ == "__main__":
    main()
