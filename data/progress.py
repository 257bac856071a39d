"""The progress of a training: its curves on disk, and signals between two steps."""

import contextlib
import json
import math

from data import BadInput, atomic, on_signals


@contextlib.contextmanager
def stop_signals():
    """Yield a list of the signals that came, see `on_signals`: the loop ends after its step, never in the middle."""
    # A signal handler may run between any two lines: it only leaves a mark, and the loop looks for it.
    came = []
    with on_signals(lambda number, _: came.append(number)):
        yield came


def read_log(path):
    """The entries of a log.jsonl. A crash may leave lines that are cut, blank or NUL: these are left out."""
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                entries.append(entry)
    return entries


class Log:
    """The curves of a run: a line of JSON every ten steps in log.jsonl."""

    def __init__(self, out, start, solved=()):
        """Go on before step `start`, with the modules of the domains `solved`."""
        self.path = out / "log.jsonl"
        entries = read_log(self.path) if self.path.exists() else []
        with atomic(self.path) as partial, open(partial, "w") as file:
            for entry in entries:
                # What was written after the checkpoint comes again.
                if entry["step"] < start or entry.get("solved") in solved:
                    file.write(json.dumps(entry) + "\n")

    def check(self, step, domain, trainer, loss):
        """BadInput if the loss of a step is no number any more: from there nothing can be learnt."""
        value = loss.item()
        if not math.isfinite(value):
            s = trainer.s
            rates = f"--lora-rate {s.lora_rate:g}, --gate-rate {s.gate_rate:g} or --kv-rate {s.kv_rate:g}"
            where = f"the loss is {value} at step {step}, on {domain}"
            raise BadInput(f"{where}; lower {rates}, and say --fresh. The checkpoint is from before.")

    def write(self, step, domain, trainer, loss):
        """Add the numbers of a step; returns them as the progress line shows them.

        Each `.item()` waits until a GPU has got that far.
        """
        self.check(step, domain, trainer, loss)
        line = {
            "step": step,
            "loss": loss.item(),
            "physical": trainer.gates.sparsity(trainer.mask, "physical").item(),
            "paper": trainer.gates.sparsity(trainer.mask, "paper").item(),
            "lambda": trainer.penalty.multipliers[0].item(),
        }
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        return f"loss {line['loss']:.3f}, sparsity {line['physical']:.3f} physical, {line['paper']:.3f} paper"

    def write_solved(self, step, domain, explained):
        """Add a line for a memory that was solved; returns it as the screen shows it. See `koff.solve_memories`."""
        shares = {block: share.item() for block, share in explained.items()}
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, "solved": domain, "explained": shares}) + "\n")
        percent = ", ".join(f"{share:.0%}" for share in shares.values())
        where = f"after blocks {min(shares)} to {max(shares)}, on the text that it was solved on"
        return f"solved {domain}: explains {percent} of what is missing {where}"
