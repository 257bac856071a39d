"""Which domain learns next: round robin, or with --focus more often the one furthest from the teacher."""

import numpy as np
import torch

NEW = 0.2  # weight of a new loss in the running mean


class Turns:
    """A round visits each domain once, in a new order, and then `focus` times the one with the highest recent loss.

    The first round has no extra visits: no loss is known yet.
    """

    def __init__(self, domains, seed, focus, device):
        self.domains = domains
        self.seed = seed
        self.focus = focus
        self.visits = [0] * len(domains)
        self.recent = torch.zeros(len(domains), device=device)  # running mean of each domain's loss
        self.worst = 0  # the domain with the highest mean when this round began

    def next(self, index):
        """(domain, number of its batch) for step `index`. To be called once for each step, in order."""
        if index >= len(self.domains):
            index += self.focus
        round_number, place = divmod(index, len(self.domains) + self.focus)
        if self.focus and round_number and place == 0:
            # Bias correction, as in Adam.
            visits = torch.tensor(self.visits, device=self.recent.device)
            self.worst = (self.recent / (1 - (1 - NEW) ** visits)).argmax().item()  # a GPU waits here, once a round
        # The order follows from the number of the round, so resuming needs no saved state.
        order = np.random.default_rng([self.seed, round_number]).permutation(len(self.domains))
        d = order[place] if place < len(order) else self.worst
        self.visits[d] += 1
        return self.domains[d], self.visits[d] - 1

    def saw(self, domain, loss):
        """Note the loss of a step on the domain."""
        self.recent[self.domains.index(domain)].lerp_(loss, NEW)

    def state_dict(self):
        return {"visits": torch.tensor(self.visits), "recent": self.recent, "worst": torch.tensor(self.worst)}

    def load_state_dict(self, state):
        """ValueError for a state of other domains."""
        if state["recent"].shape != self.recent.shape or state["visits"].shape != self.recent.shape:
            raise ValueError(f"it is not of {len(self.domains)} domains")
        self.visits = state["visits"].tolist()
        self.recent = state["recent"].to(self.recent.device)
        self.worst = range(len(self.domains))[state["worst"].item()]
