"""A training on its way: its curves and checkpoints on the disk, its line on the screen, signals between two steps."""

import contextlib
import json
import math
import sys
import time
import zipfile

import torch
from tqdm import tqdm

from data import BadInput, atomic, on_signals, out_of_memory
from data.life import check_same
from data.starts import read_contexts, start

# The curves: log.jsonl -----------------------------------------------------------------------------------------------


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
    """A line of JSON every ten steps, and one for each solved module."""

    def __init__(self, out, start, solved):
        """Go on before step `start`, with the modules of the domains `solved`."""
        self.path = out / "log.jsonl"
        entries = read_log(self.path) if self.path.exists() else []
        with atomic(self.path) as partial, open(partial, "w") as file:
            for entry in entries:
                # What was written after the checkpoint comes again.
                if entry["step"] < start or entry.get("solved") in solved or (solved and "repaired" in entry):
                    file.write(json.dumps(entry) + "\n")

    def write(self, **entry):
        with open(self.path, "a") as file:
            file.write(json.dumps(entry) + "\n")


# Checkpoints ---------------------------------------------------------------------------------------------------------


def parts_of(trainer):
    """{name: part}: everything in a trainer whose state belongs in a checkpoint."""
    parts = {"gates": trainer.gates, "gate optimizer": trainer.gate_optimizer}
    parts |= {"penalty": trainer.penalty, "turns": trainer.turns}
    for domain, module in trainer.modules.items():
        parts[f"module {domain}"] = module
        parts[f"optimizer {domain}"] = trainer.optimizers[domain]
    return parts


def state_of(part):
    """The state of a module, an optimizer or another part of a run. An optimizer's groups follow from the settings."""
    state = part.state_dict()
    return state["state"] if isinstance(part, torch.optim.Optimizer) else state


def restore(part, state):
    """Undo `state_of`. Raises an exception, of any kind, for the state of another kind of run."""
    if not isinstance(part, torch.optim.Optimizer):
        part.load_state_dict(state)
        return
    if not all(isinstance(means, dict) for means in state.values()):  # torch would warn, and then fail
        raise ValueError("the state of an optimizer is of another kind")
    part.load_state_dict({**part.state_dict(), "state": state})
    for p, means in part.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            if means and means[name].shape != p.shape:
                raise ValueError(f"a tensor of shape {list(means[name].shape)} is not {list(p.shape)}")


def load_checkpoint(path, trainer, inputs, folder):
    """Restore the trainer from a checkpoint. Returns (first step to do, solved domains, seconds so far)."""
    try:
        with zipfile.ZipFile(path) as file:
            if torn := file.testzip():  # torch writes checksums, and does not read them
                raise ValueError(f"{torn} has another checksum")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        before = saved["inputs"]
        for name in {**before, **inputs}:
            check_same(folder, name, before.get(name), inputs.get(name))
        parts = parts_of(trainer)
        if saved["parts"].keys() != parts.keys():
            raise ValueError("it has other parts")
        for name, part in parts.items():
            restore(part, saved["parts"][name])
        if type(saved["step"]) is not int or not 0 <= saved["step"] <= trainer.s.steps:
            raise ValueError(f"{saved['step']!r} is not one of {trainer.s.steps} steps")
        return saved["step"], [str(domain) for domain in saved["solved"]], float(saved["seconds"])
    except Exception as error:  # a torn file fails in many ways
        if isinstance(error, BadInput) or out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0] or repr(error)
        said = f"{path} is damaged, or of another version ({reason})"
        raise BadInput(f"{said}; remove it, and the training begins again.") from None


# Between two steps ---------------------------------------------------------------------------------------------------


def in_words(shares):
    """What least squares explains, {block: share}, as text."""
    percent = ", ".join(f"{share:.0%}" for share in shares.values())
    return f"explains {percent} of what is missing after blocks {min(shares)} to {max(shares)}"


@contextlib.contextmanager
def stop_signals():
    """Yield a list of the signals that came, see `on_signals`. The loop looks at it between two steps."""
    # A signal handler may run between any two lines, so it only leaves a mark.
    came = []
    with on_signals(lambda number, _: came.append(number)):
        yield came


class Progress:
    """with Progress(trainer, text, out, begun) as progress: the run in the folder `out` starts, or goes on.

    `begun` is when it began, by `time.perf_counter`; pauses are taken out. After Ctrl-C, SIGTERM or SIGHUP a checkpoint
    is saved, and KeyboardInterrupt raised.
    """

    def __init__(self, trainer, text, out, begun):
        self.trainer = trainer
        self.text = text
        self.out = out
        self.begun = begun
        self.start = 0  # the first step to do
        self.solved = []  # domains whose module has its closed form
        s = trainer.s
        self.last = s.steps if s.memory else s.gate_steps  # without modules nothing learns under the final mask
        self.retention = None  # the last loss on general text that is not logged yet

    def __enter__(self):
        path = self.out / "checkpoint.pt"
        self.trainer.s.to_file(self.out / "settings.json")
        if path.exists():
            found = load_checkpoint(path, self.trainer, self.text.inputs, self.out)
            self.start, self.solved, seconds = found
            self.begun -= seconds
            read_contexts(self.trainer, self.text.train)
            print(f"continuing {self.out} at step {self.start}")
        else:
            start(self.trainer, self.text.train)
        self.log = Log(self.out, self.start, self.solved)
        self.resumed = time.perf_counter()
        self.open = contextlib.ExitStack()
        self.signals = self.open.enter_context(stop_signals())
        self.bar = self.open.enter_context(tqdm(total=self.last, initial=self.start, desc=self.out.name))
        return self

    def __exit__(self, kind, error, trace):
        self.open.close()
        if kind is None and self.signals:  # one came while the last checkpoint was saved
            raise KeyboardInterrupt(self.signals[0])

    def steps(self, start, stop):
        """The steps from `start` to `stop` - 1 that are still to be done."""
        return range(max(start, self.start), min(stop, self.last))

    def unsolved(self):
        """The domains whose module has no closed form yet, though the settings ask for one."""
        return [domain for domain in self.trainer.domains if self.trainer.s.solves and domain not in self.solved]

    def after_step(self, index, domain, loss, retention=None):
        """Log step `index` and its losses, scalars on the device; save a checkpoint when it is time."""
        s = self.trainer.s
        done = index + 1
        self.trainer.turns.saw(domain, loss)
        self.bar.update()
        if retention is not None:
            self.retention = retention
        if index % 10 == 0:  # reading numbers makes a GPU wait, so not at every step
            line = self.write_losses(index, domain, loss)
            speed = s.batch * s.seq_len * (done - self.start) / (time.perf_counter() - self.resumed)
            self.bar.set_postfix_str(f"{line}, {speed:,.0f} tokens/s", refresh=False)
        stop = list(self.signals)  # asked once: a signal can come at any moment
        if stop or done % s.save_every == 0 or done == self.last:
            self.check(index, domain, loss)  # a checkpoint is worth keeping only if the loss is a number
            self.save(done)
        if stop:
            self.interrupt(f"step {done}")

    def after_repair(self, explained):
        """Log the repair of the backbone. explained: see `solve.repair`. (A run that goes on repairs it again.)"""
        shares = {block: share.item() for block, share in explained.items()}
        if self.start <= self.trainer.s.gate_steps and not self.solved:
            self.log.write(step=self.trainer.s.gate_steps, repaired=shares)
        tqdm.write(f"repaired the backbone: {in_words(shares)}, on the text of the repair")
        if self.signals:
            self.save(max(self.start, self.trainer.s.gate_steps))  # a run that goes on may be far behind its gates
            self.interrupt("the backbone was repaired")

    def after_solving(self, domain, explained):
        """Log a solved module; save a checkpoint after the last one. explained: see `solve_memories`."""
        self.solved.append(domain)
        shares = {block: share.item() for block, share in explained.items()}
        self.log.write(step=self.trainer.s.gate_steps, solved=domain, explained=shares)
        tqdm.write(f"solved {domain}: {in_words(shares)}, on the text that it was solved on")
        if self.signals or not self.unsolved():  # with a real model it took minutes
            self.save(self.trainer.s.gate_steps)
        if self.signals:
            self.interrupt(f"{domain} was solved")

    def interrupt(self, moment):
        self.bar.close()
        print(f"stopped after {moment}", file=sys.stderr)
        raise KeyboardInterrupt(self.signals[0])

    def check(self, index, domain, loss):
        """BadInput if the loss of a step is no finite number: from there nothing can be learnt."""
        value = loss.item()
        if not math.isfinite(value):
            s = self.trainer.s
            rates = f"--lora-rate {s.lora_rate:g}, --gate-rate {s.gate_rate:g} or --kv-rate {s.kv_rate:g}"
            where = f"the loss is {value} at step {index}, on {domain}"
            raise BadInput(f"{where}; lower {rates}, and say --fresh. The checkpoint is from before.")

    def write_losses(self, index, domain, loss):
        """Log the numbers of a step; return them as the progress line shows them. Each `.item()` waits for the GPU."""
        self.check(index, domain, loss)
        trainer = self.trainer
        entry = {
            "step": index,
            "domain": domain,
            "loss": loss.item(),
            "retention": None if self.retention is None else self.retention.item(),
            "physical": trainer.gates.sparsity(trainer.mask, "physical").item(),
            "paper": trainer.gates.sparsity(trainer.mask, "paper").item(),
            "lambda": trainer.penalty.multiplier.item(),
            "rates": self.rates(domain),
        }
        self.retention = None
        self.log.write(**entry)
        return f"loss {entry['loss']:.3f}, sparsity {entry['physical']:.3f} physical, {entry['paper']:.3f} paper"

    def rates(self, domain):
        """{parameter group: learning rate} of the last step."""
        optimizers = [self.trainer.gate_optimizer]
        if self.trainer.attached:
            optimizers.append(self.trainer.optimizers[domain])
        return {group["name"]: group["lr"] for optimizer in optimizers for group in optimizer.param_groups}

    def save(self, step):
        """Save all that the run needs to go on with step number `step`, bit for bit."""
        saved = {
            "parts": {name: state_of(part) for name, part in parts_of(self.trainer).items()},
            "step": step,
            "solved": self.solved,
            "seconds": time.perf_counter() - self.begun,
            "inputs": self.text.inputs,
        }
        with atomic(self.out / "checkpoint.pt") as partial:
            torch.save(saved, partial)
