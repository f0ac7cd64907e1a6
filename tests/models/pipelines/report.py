"""docs/models.md: which families are covered, made by running every check for every family.

    python -m tests.models.pipelines.report

A check that fails stops it: the file cannot say what does not hold.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.models.pipelines.checks import CHECKS, networks
from tests.models.pipelines.tiny import FAMILIES, VARIANTS, make

from vivace.engine.caching import FEATURES
from vivace.models.caching.foreign import Cached
from vivace.models.pipelines.blocks import ModuleParts
from vivace.models.pipelines.families import FAMILIES as RECORDS

PATH = Path(__file__).resolve().parents[3] / "docs" / "models.md"

HEAD = """# Models

`vivace.load` and `vivace.accelerate` take the pipelines below as they are. Each family is tested as a tiny pipeline
with random weights on the CPU, with the scheduler it usually has. This file is made from those tests:
`python -m tests.models.pipelines.report`.

## Families and checks
"""

CLAIMS = """
- **accelerated, restored**: `vivace.accelerate` with the scheduler's own plan gives the bits of the plain pipeline, and
  after `vivace.restore` the pipeline is what it was.
- **fused step**: with the plan's arithmetic in the fused step and own kernels in the blocks, the picture is the plain
  one up to rounding (2e-5 of its largest value).
- **memory back**: after `restore` no tensor lives that did not live before. Peaks of load and run:
  [results/memory_tiny.md](results/memory_tiny.md).
- **blocks observed**: an observer sees every block once, in order; the prediction and the network keep their bits.
- **replaced**: a replaced block gives the bits of a network whose block was edited, and every block matters.
- **left out**: a block that hands on what it reads gives the bits of a network without it; a UNet needs every block,
  because the feature map changes shape.
- **float64**: the network runs in float64 and agrees with float32 up to rounding; "but" names what `diffusers` computes
  in float32 within the blocks all the same.
- **two threads**: one replaces blocks of a network while another runs it plainly, both with the bits of a thread alone.
- **cached**: blocks, and attentions and MLPs inside them, that are given what they gave do not run, and the prediction
  keeps its bits.
- **token rows**: tokens of a row that computes some get what a dense run gives them where the others keep the keys and
  values of an earlier row; a row of all tokens by the same way keeps the plain bits. "no": see below.
- **spec**: the tokens of a latent by the spec are the image tokens that the blocks read.

`guidance` is the argument that asks for a second branch; "in the network" means that the scale is an input.

## Networks
"""

REFUSED = """
A site of a plan's cache rules is `attn`, `cross_attn` or `mlp` of single blocks, `residual` or `block` of a range; a
rule on a block that lacks the site is refused by name. "Together": one projection gives both, so rules say the same of
both.

Pipelines that share a network share its row. These were tested as well: {variants}.

## Refused, and why

Every refusal is an `UnsupportedError` before any work, except where a prompt decides.

- A network of no known family: the message shows the record to add (below).
- A network compiled as a whole (`torch.compile(module)`, `module.compile()`): its blocks are no longer separate.
  `module.compile_repeated_blocks()` is fine, and so is any plan without rules for blocks.
- A network whose forward was replaced on the object, by hand or by a `diffusers` hook with a `new_forward`
  (FasterCache): what replaced it keeps the network it was made for. Offloading by `accelerate` or `diffusers` (whole
  network, groups, single layers), layerwise casting and caches on the blocks go through.
{refused}

## A family of your own

A record of a few lines; run it before `vivace.load` or `vivace.accelerate`:

```python
from vivace.models.pipelines.families import Blocks, Family, Rows, Shape, Tokens, register_family

register_family(
    Family(
        denoiser="MyTransformer2DModel",  # the class of the network
        blocks=(  # its lists of blocks in the order they run
            Blocks(
                "joint_blocks",
                Shape("hidden", "context", returns=("context", "hidden")),
                # rows of some tokens: its self-attention, and what it is handed with a row for each token
                tokens=Tokens(("attn",), options=(Rows("image_rotary_emb", axis=0),)),
            ),
            # one sequence of text and image tokens: how many text tokens lead it
            Blocks("blocks", Shape("hidden", None), text=lambda given: given["prompt_embeds"].shape[1]),
        ),
        latent=lambda config: (config.in_channels, config.sample_size, config.sample_size),
        patch=lambda config: (config.patch_size, config.patch_size),
        prediction="flow",
    )
)
```

`Blocks("joint_blocks")` alone is enough for blocks that `diffusers` registers for its own caches; without `tokens` all
rows compute all tokens.
"""


def rows(cells: Iterable[Sequence[str]]) -> str:
    """Lines of a table; the first line is its head."""
    head, *body = (f"| {' | '.join(row)} |" for row in cells)
    return "\n".join((head, "|" + " --- |" * head.count(" | ") + " --- |", *body)) + "\n"


def checked() -> list[list[str]]:
    """Family x check: runs all of them."""
    table = [["pipeline", "guidance", *(check.title for check in CHECKS.values())]]
    for name, tiny in FAMILIES.items():
        for check in CHECKS.values():
            check.run(name)
        parts = networks(name)[0].parts
        notes = {"float64": f"yes, but {parts.family.float32}" if parts.family.float32 else "yes"}
        if all(info.kind != "transformer" for info in parts.blocks):
            notes["left out"] = "no: shapes change"
        if Cached(parts.module).whole is not None:
            notes["token rows"] = "no"
        guidance = f"`{tiny.scale}`" if tiny.guided else "in the network"
        pipeline = f"`{type(make(name)).__name__}`" + (", two experts" if len(tiny.denoisers) > 1 else "")
        table.append([pipeline, guidance, *(notes.get(check.title, "yes") for check in CHECKS.values())])
    return table


def described() -> list[list[str]]:
    """What the records say of each network."""
    table = [["network", "blocks", "streams", "prediction", "takes a latent as", "sites that caches keep"]]
    takes = {"channels": "[B, C, ...]", "tokens": "[B, N, C of a patch]", "frames": "[B, F, C, H, W]"}
    seen = {type(network.module).__name__: network.parts for name in FAMILIES for network in networks(name)}
    for name, parts in seen.items():
        family = parts.family
        streams = dict.fromkeys(
            "one sequence of text and image" if info.joint else "image and text" if info.text else "image"
            for info in parts.blocks
        )
        prediction = family.prediction + (", negated" if family.sign < 0 else "")
        paths = ", ".join(f"`{entry.path}`" for entry in family.blocks)
        table.append([f"`{name}`", paths, ", ".join(streams), prediction, takes[family.layout], sites(parts)])
    return table


def sites(parts: ModuleParts) -> str:
    """Sites of a network's blocks, and those that one projection gives together."""
    there = Cached(parts.module).sites
    listed = ", ".join(site for site in FEATURES if site in there)
    joined = [(half.sites, entry.path) for entry in parts.family.blocks for half in entry.inside if len(half.sites) > 1]
    return listed + "".join(f"; {' and '.join(names)} of `{path}` together" for names, path in joined)


def render() -> str:
    """The whole file."""
    refused = [f"- `{record.denoiser}`: {why}." for record in RECORDS.values() for why in record.refused]
    refused += [
        f"- `{record.denoiser}`, rows of some tokens: {record.whole}." for record in RECORDS.values() if record.whole
    ]
    variants = ", ".join(f"`{type(make(name)).__name__}`" for name in VARIANTS)
    tail = REFUSED.format(variants=variants, refused="\n".join(refused))
    return "\n".join((HEAD, rows(checked()) + CLAIMS, rows(described()) + tail))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    PATH.write_text(render())
