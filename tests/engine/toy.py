"""A tiny denoiser whose samples do not touch each other: enough to test sessions without weights."""

import torch

from vivace.engine.bind import ModelSpec
from vivace.engine.executors.eager import EagerExecutor
from vivace.engine.session import Session
from vivace.errors import PromptError

SHAPE = (3, 8, 8)


class Toy:
    """Elementwise network in float32; counts its calls and the samples of each."""

    models = ("main",)
    precisions = frozenset()
    digest = ""
    sites = frozenset()
    metrics = frozenset()

    def __init__(self, prediction="v", coupled=False):
        self.spec = ModelSpec("toy", "0" * 64, prediction, SHAPE, 4, (4, 4))
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.coupled, self.calls = coupled, []

    def encode(self, prompt):
        if prompt == "nonsense":
            raise PromptError("prompt 'nonsense' names nothing")
        return 0.0 if prompt is None else float(len(prompt))

    def evaluate(self, x, timesteps, conditions, variant):
        self.calls.append((len(x), variant.branches))
        t = torch.tensor(timesteps).view(-1, 1, 1, 1)
        c = torch.tensor(conditions).view(-1, 1, 1, 1)
        base = torch.tanh(x * 0.7 + 0.001 * t)
        if self.coupled:
            base = base + 1e-3 * x.mean()
        return tuple(base + (0.1 * c if branch == "cond" else 0.0) for branch in variant.branches)

    def to_latent(self, image):
        return torch.as_tensor(image)

    def reports(self):
        return {}

    def to_images(self, latents):
        return [f"image {i}" for i in range(len(latents))]


def session(*plans, toy=None, **options):
    toy = toy or Toy()
    shape = options.pop("shape", SHAPE)

    def expand(plan):
        return plan.bind(toy.spec, shape)

    return Session(toy, plans, EagerExecutor(toy), shape=shape, expand=expand, **options)
