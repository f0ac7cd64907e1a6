"""Makes an emoji checkpoint from the font Noto Color Emoji: renders, thins the classes, augments, trains a DiT.

    python examples/train_emoji.py --out emoji-64                     # 64x64, 256 tokens, 9.6 M parameters
    python examples/train_emoji.py --out emoji-64 --resume            # go on after an interruption
    vivace generate "red heart" --model emoji-64/model

In the folder --out: model/ (what `vivace.load` and diffusers read, EMA weights in float16), state.safetensors (all
that going on needs) and samples/ (a picture every --every updates). Needs the Debian package fonts-noto-color-emoji.
An update depends on the seed and its number only, so that a resumed run repeats the uninterrupted one bit for bit on
the CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import vivace
from vivace.errors import ArgumentError, ModelError, OutputError, VivaceError
from vivace.metrics.renders import augment, glyphs, most_distinct, render
from vivace.models.checkpoint import replacing
from vivace.models.dit import DiT
from vivace.models.dit_config import TIME_FEATURES, DiTConfig
from vivace.models.pictures import grid, write_png
from vivace.models.pipe import default_plan

STEPS, BETAS = 1000, (1e-4, 2e-2)  # of the training process, linear
DROPOUT = 0.1  # share of labels replaced by the null label
EMA = 0.999
WARM_UP = 500  # updates until the full learning rate
DECAY, CLIP = 0.01, 1.0  # weight decay; largest gradient norm
OVERSAMPLING = 2  # renders are this much larger than pictures
FREE = ("updates", "every")  # options that may change when a run goes on
LICENCE = "Noto Color Emoji: (c) Google Inc., SIL Open Font License 1.1 (font), Apache-2.0 (artwork sources)"


@dataclass(frozen=True)
class Options:
    """What a run is: sizes of the network and of the data, and how long."""

    size: int = 64  # pixels
    patch: int = 4
    width: int = 256
    layers: int = 6
    heads: int = 8
    batch: int = 128
    updates: int = 100_000
    classes: int = 1000
    rate: float = 5e-4  # of learning
    seed: int = 0
    every: int = 2000  # updates between states, exports and sample grids

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < (0 if name == "seed" else 1) and name != "rate":
                raise ArgumentError(f"--{name} {value}: need a positive whole number")
        if not 0 < self.rate < 1:
            raise ArgumentError(f"--rate {self.rate}: need a number between 0 and 1")
        if self.size % self.patch or self.size % 8 or self.width % (4 * self.heads):
            raise ArgumentError(
                f"--size {self.size} --patch {self.patch} --width {self.width} --heads {self.heads}: need a size that "
                "is a multiple of the patch and of 8, and a width that is a multiple of 4 times the heads"
            )

    @property
    def config(self) -> DiTConfig:
        """The network."""
        return DiTConfig(
            heads=self.heads, head_dim=self.width // self.heads, channels=3, out_channels=3, layers=self.layers,
            size=self.size, patch=self.patch, classes=self.classes,
        )  # fmt: skip


@dataclass(frozen=True)
class Data:
    """Renders uint8 [classes, 4, S, S] with S = 2 size, and one {id, name, codepoint} for each."""

    renders: Tensor
    names: list[dict[str, Any]]

    @classmethod
    def from_font(cls, options: Options, font: Path | None) -> Data:
        """The most distinct glyphs of the font. Raises ModelError without it."""
        found = glyphs(font)
        codes = list(found)
        pixels = render(codes, OVERSAMPLING * options.size, font)
        kept = most_distinct(pixels, options.classes)
        names = [{"id": i, "name": found[codes[k]], "codepoint": f"U+{codes[k]:04X}"} for i, k in enumerate(kept)]
        return cls(torch.from_numpy(pixels[kept]), names)


class Training:
    """Weights, their average, the optimizer and the number of updates done."""

    def __init__(self, options: Options, data: Data, device: torch.device) -> None:
        if len(data.renders) != options.classes:
            raise ArgumentError(f"train: {len(data.renders)} renders for {options.classes} classes; need one each")
        self.options, self.device, self.update = options, device, 0
        self.data, self.names = data.renders.to(device), data.names
        self.about = {"data": sha256(data.renders.numpy().tobytes()).hexdigest()}
        self.model = DiT(options.config)
        initialise(self.model, torch.Generator().manual_seed(options.seed))
        self.model.to(device).requires_grad_(True)
        self.average = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=options.rate, weight_decay=DECAY)
        betas = torch.linspace(*BETAS, STEPS, dtype=torch.float64)
        self.alpha_bar = torch.cumprod(1 - betas, 0).float().to(device)

    def step(self) -> Tensor:
        """One update: AdamW on the mean square error of v at uniform timesteps. Returns the loss."""
        x0, t, labels, noise = self.draw()
        alpha, sigma = (level[t].sqrt()[:, None, None, None] for level in (self.alpha_bar, 1 - self.alpha_bar))
        with torch.autocast(self.device.type, torch.bfloat16):
            predicted = predict(self.model, alpha * x0 + sigma * noise, t, labels)
        loss = F.mse_loss(predicted.float(), alpha * noise - sigma * x0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.rate * min(1.0, (self.update + 1) / WARM_UP)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.update += 1
        keep = min(EMA, (1 + self.update) / (10 + self.update))
        torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.model.parameters()], 1 - keep)
        return loss.detach()

    def draw(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pictures, timesteps, labels and noise of an update; they depend on the seed and its number only."""
        options, key = self.options, 2 * (self.options.seed * 2**32 + self.update)
        host, own = torch.Generator().manual_seed(key), torch.Generator(self.device).manual_seed(key + 1)
        labels = torch.randint(options.classes, (options.batch,), generator=host)
        t = torch.randint(STEPS, (options.batch,), generator=host).to(self.device)
        dropped = torch.rand(options.batch, generator=host) < DROPOUT
        x0 = augment(self.data[labels.to(self.device)], options.size, host)
        noise = torch.randn(x0.shape, generator=own, device=self.device)
        return x0, t, labels.masked_fill(dropped, options.classes).to(self.device), noise

    def save(self, path: Path) -> None:
        """All that going on needs, in one file that appears whole. Raises OutputError."""
        tensors = {}
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state[parameter]
            tensors |= {f"model.{name}": parameter.detach(), f"average.{name}": self.average[name]}
            tensors |= {f"{key}.{name}": state[key] for key in ("step", "exp_avg", "exp_avg_sq") if key in state}
        about = {"options": asdict(self.options), "update": self.update, **self.about}
        temporary = path.with_name(f".{path.name}-{os.getpid()}")
        try:
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, {"about": json.dumps(about)})
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise OutputError(f"{path}: cannot be written ({error}); the earlier state is still there") from error

    def load(self, path: Path) -> None:
        """Go on from a state file of the same options and data. Raises ModelError, ArgumentError."""
        try:
            with safe_open(path, "pt", device=str(self.device)) as file:
                about = json.loads(file.metadata()["about"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ModelError(f"{path}: cannot go on from it ({error}); start anew in another folder") from None
        for name, value in asdict(self.options).items():
            if name not in FREE and about["options"].get(name) != value:
                raise ArgumentError(f"{path}: made with --{name} {about['options'].get(name)}, now {value}; use that")
        if about["data"] != self.about["data"]:
            raise ArgumentError(f"{path}: made from other renders; use the same font, or start anew in another folder")
        for name, parameter in self.model.named_parameters():
            parameter.data.copy_(tensors[f"model.{name}"])
            self.average[name].copy_(tensors[f"average.{name}"])
            if f"step.{name}" in tensors:  # not before the first update
                kept = {key: tensors[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = kept | {"step": kept["step"].cpu()}
        self.update = about["update"]

    def export(self, folder: Path) -> None:
        """The averaged weights as a model folder, replacing an earlier one. Raises OutputError."""
        model = DiT(self.options.config)
        model.load_state_dict({name: tensor.cpu() for name, tensor in self.average.items()})
        with replacing(folder, ("transformer", "scheduler", "*.json", "README.md", "features.safetensors")) as work:
            model.save(work / "transformer", torch.float16)
            (work / "scheduler").mkdir()
            for name, content in describe(self.options, self.names, folder.resolve().parent.name).items():
                (work / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            (work / "README.md").write_text(card(self.options, self.update, model), encoding="utf-8")


def initialise(model: DiT, generator: torch.Generator) -> None:
    """Uniform Xavier matrices, zero biases; modulations and the last layer zero, so that every block starts as the
    identity (Peebles and Xie 2023, section 3.2)."""
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or "modulation" in name or name.startswith("final."):
            parameter.zero_()
        elif "label" in name or "time_" in name:
            parameter.normal_(0.0, 0.02, generator=generator)
        else:
            nn.init.xavier_uniform_(parameter, generator=generator)


def predict(model: DiT, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """`DiT.forward` of one branch in operations that differentiate; the residual stream stays float32 under autocast.

    x [n, C, H, W], t [n], labels [n] -> [n, C, H, W].
    """
    patch = model.config.patch
    hidden = model.patches(F.unfold(x, patch, stride=patch).transpose(1, 2)) + model.positions
    half = TIME_FEATURES // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=x.device) / (half - 1)
    angle = t[:, None].float() * exponent.exp()
    features = torch.cat([angle.cos(), angle.sin()], 1)
    first = None
    for block in model.blocks:
        part = block.condition
        condition = F.silu(part.label(labels) + part.time_out(F.silu(part.time_in(features))))
        first = condition if first is None else first
        vectors = part.modulation(condition).float()[:, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = vectors.chunk(6, 2)
        hidden = hidden + gate1 * attend(block, modulated(hidden, shift1, scale1, 1e-6))
        inner = block.up(modulated(hidden, shift2, scale2, block.mlp_eps))
        hidden = hidden + gate2 * block.down(F.gelu(inner, approximate=block.approximate))
    shift, scale = model.final_modulation(first).float()[:, None].chunk(2, 2)
    out = model.final(modulated(hidden, shift, scale, 1e-6))
    rows, columns = x.shape[2] // patch, x.shape[3] // patch
    out = out.view(len(x), rows, columns, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
    return out.reshape(x.shape)


def modulated(hidden: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """norm(hidden) * (1 + scale) + shift."""
    return F.layer_norm(hidden, (hidden.shape[-1],), eps=eps) * (1 + scale) + shift


def attend(block: Any, x: Tensor) -> Tensor:
    """Self-attention of a block."""
    n, tokens, width = x.shape
    query, key, value = block.qkv(x).view(n, tokens, 3, block.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return block.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(n, tokens, width))


def describe(options: Options, names: list[dict[str, Any]], title: str) -> dict[str, Any]:
    """The JSON files of a model folder but for the network's."""
    scheduler = {
        "_class_name": "DDPMScheduler", "beta_start": BETAS[0], "beta_end": BETAS[1], "beta_schedule": "linear",
        "num_train_timesteps": STEPS, "prediction_type": "v_prediction", "clip_sample": False,
        "timestep_spacing": "leading", "steps_offset": 0,
    }  # fmt: skip
    about = {
        "name": title, "summary": f"{options.classes} named emoji at {options.size}x{options.size} pixels",
        "guidance_scale": 2.0, "solver": "unipc", "steps": 20, "example": names[0]["name"], "licence": LICENCE,
    }  # fmt: skip
    return {"names.json": names, "card.json": about, "scheduler/scheduler_config.json": scheduler}


def card(options: Options, updates: int, model: DiT) -> str:
    """The model card."""
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    size, tokens = options.size, (options.size // options.patch) ** 2
    return f"""# Emoji at {size}x{size}

A class-conditional pixel-space DiT that draws {options.classes} glyphs of Noto Color Emoji, in the `diffusers` format.

| | |
|---|---|
| network | `DiTTransformer2DModel`: {size}x{size}x3 pixels in [-1, 1], patch {options.patch} ({tokens} tokens), width \
{options.width}, {options.layers} blocks, {options.heads} heads, {millions:.2f} M parameters; class {options.classes} \
is the null label |
| process | {STEPS} steps, linear betas {BETAS[0]:g} to {BETAS[1]:g}, v-prediction |
| data | bitmaps of the font at {OVERSAMPLING * size} pixels, each draw: scale 0.86-1.02, turn up to 7 degrees, small \
shift, two-colour linear gradient; averaged to {size}x{size}. The {options.classes} most distinct glyphs |
| training | {updates} updates of AdamW, batch {options.batch}, rate {options.rate:g}, bfloat16 autocast, EMA {EMA}, \
label dropout {DROPOUT} |
| licence | {LICENCE}. Keep this notice with the weights |
"""


def draw_samples(folder: Path, path: Path, device: torch.device, count: int = 16) -> None:
    """A grid of the first classes from the exported model, same noise every time."""
    pipe = vivace.load(folder)
    session = pipe.compile(default_plan(pipe.model), device=device, backend="eager")
    images = [session(i, seed=0).images[0] for i in range(min(count, pipe.model.classes))]
    path.parent.mkdir(exist_ok=True)
    write_png(grid(images), path)


class Progress:
    """A bar on stderr, redrawn twice a second on a terminal, else a line now and then."""

    def __init__(self, start: int, total: int) -> None:
        self.start, self.total, self.began, self.shown = start, total, time.monotonic(), 0.0
        self.is_terminal = sys.stderr.isatty()

    def show(self, update: int, loss: Tensor) -> None:
        """Draw when it is time; the loss is read only then."""
        now = time.monotonic()
        if now - self.shown < (0.5 if self.is_terminal else 30.0) and update < self.total:
            return
        self.shown = now
        rate = (update - self.start) / max(now - self.began, 1e-9)
        left = time.strftime("%H:%M:%S", time.gmtime((self.total - update) / max(rate, 1e-9)))
        bar = "#" * (30 * update // self.total)
        line = f"[{bar:30}] {update}/{self.total}  loss {float(loss):.4f}  {rate:.1f} updates/s  {left} left"
        end = "" if self.is_terminal and update < self.total else "\n"
        print(f"\r{line}" if self.is_terminal else line, end=end, file=sys.stderr, flush=True)


def train(
    options: Options, data: Data, out: Path, *, device: str = "cpu", resume: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Training:  # fmt: skip
    """Run (or go on) to `options.updates`, or until `stop()`; state and model are written every `options.every`."""
    state = out / "state.safetensors"
    if state.exists() and not resume:
        raise OutputError(f"{state}: a run is there already; go on with --resume, or name another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out}: cannot be made ({error}); name another --out") from None
    training = Training(options, data, torch.device(device))
    if resume and state.exists():
        training.load(state)
    progress, loss = Progress(training.update, options.updates), None
    while training.update < options.updates and not stop():
        value = training.step()
        loss = value if loss is None else torch.lerp(loss, value, 0.02)
        progress.show(training.update, loss)
        if training.update % options.every == 0 or training.update == options.updates:
            training.save(state)
            training.export(out / "model")
            draw_samples(out / "model", out / "samples" / f"{training.update:07d}.png", training.device)
    training.save(state)
    return training


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in asdict(Options()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"default {value}")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda; default auto")
    parser.add_argument("--font", type=Path, help="NotoColorEmoji.ttf; default: where distributions put it")
    chosen = vars(parser.parse_args(arguments))
    out, resume, device, font = (chosen.pop(name) for name in ("out", "resume", "device", "font"))
    stopped: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda caught, _: stopped.append(caught))
    try:
        options = Options(**chosen)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        train(options, Data.from_font(options, font), out, device=device, resume=resume, stop=lambda: bool(stopped))
    except VivaceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"stopped; go on with --resume: {out}" if stopped else f"model: {out / 'model'}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
