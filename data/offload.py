"""--offload: the module at work and its optimizer are on the GPU; all others wait in the CPU's memory."""


class Offload:
    def __init__(self, modules, optimizers, device):
        self.modules = modules  # {domain: module}
        self.optimizers = optimizers
        self.device = device
        self.at_work = None  # the domain whose module is on the device

    def fetch(self, domain):
        """Bring a domain's module and optimizer to the device, in place of the last one's."""
        if domain == self.at_work:
            return
        if self.at_work is not None:
            self.move(self.at_work, "cpu")
        self.move(domain, self.device)
        self.at_work = domain

    def move(self, domain, device):
        for p in self.modules[domain].parameters():
            p.data = p.data.to(device)
            state = self.optimizers[domain].state[p]
            for name in state:
                state[name] = state[name].to(device)
