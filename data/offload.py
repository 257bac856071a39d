"""--offload: the module at work and its optimizer are on the GPU; all others wait in the CPU's memory."""


class Offload(dict):
    """{domain: module}. Asking for a module brings it and its optimizer to the device, in place of the last ones."""

    def __init__(self, modules, optimizers, device):
        super().__init__(modules)
        self.optimizers = optimizers
        self.device = device
        self.at_work = None  # the domain whose module is on the device

    def __getitem__(self, domain):
        module = super().__getitem__(domain)
        if domain != self.at_work:
            if self.at_work is not None:
                self.move(self.at_work, "cpu")
            self.move(domain, self.device)
            self.at_work = domain
        return module

    def move(self, domain, device):
        for p in super().__getitem__(domain).parameters():
            p.data = p.data.to(device)
            state = self.optimizers[domain].state[p]
            for name in state:
                state[name] = state[name].to(device)
