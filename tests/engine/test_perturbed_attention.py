"""Perturbed-attention guidance and embedded guidance: a branch with the identity for attention maps, a scale fed."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import vivace
from tests.engine.plans import edit, euler
from tests.engine.test_adaptive_guidance import SCHEDULES, Counted, ddim, guided, noise
from tests.engine.toy import Toy, session
from vivace.engine.passes import (
    apply_adaptive_guidance,
    apply_block_cache,
    apply_guards,
    apply_guidance,
    apply_linear_ag,
    apply_perturbed_attention,
    freeze,
)
from vivace.engine.perturbed import identity_blocks, parted
from vivace.engine.plan import Action, InputRef, Plan, Rule, Variant
from vivace.errors import ArgumentError, PlanError, UnsupportedError

FLOW = SCHEDULES["flow"]
perturbed = partial(apply_perturbed_attention, blocks=(1, 3))


# ---------------------------------------------------------------- the plan
class Three(Counted):
    """A third branch: the class as if its modes were wider."""

    def __call__(self, x, t, branch="cond"):
        self.seen.setdefault("perturbed", 0)
        if branch != "perturbed":
            return super().__call__(x, t, branch)
        self.seen["perturbed"] += len(x)
        return self.of["cond"](0.9 * x, t)


def published(start, scale, away, steps=8):
    """Ahn et al. 2024, eq. 15 with classifier-free guidance beside it, over flow Euler in a plain loop."""
    net, x = Three("flow"), start.clone()
    rows = ddim(steps=steps).steps
    for step, after in zip(rows, [*(row.sigma for row in rows[1:]), 0.0], strict=True):
        t = torch.full((len(x),), step.timestep, dtype=torch.float64)
        cond, uncond, worse = (net(x, t, branch) for branch in ("cond", "uncond", "perturbed"))
        made = uncond + scale * (cond - uncond) + away * (cond - worse)
        x = x + (after - step.sigma) * made
    return x


def sample(plan, start, **inputs):
    """The plan with a function for a model: it has no blocks, its branches are its own."""
    steps = tuple(replace(step, variant=replace(step.variant, rules=())) for step in plan.steps)
    return vivace.sample(Three("flow"), replace(plan, steps=steps), start, inputs=inputs)


def test_it_is_the_published_combination():
    start = noise()
    got = sample(perturbed(guided(steps=8), 1.5), start)
    assert torch.allclose(got, published(start, 3.0, 1.5), rtol=1e-10, atol=1e-10)
    got = sample(perturbed(ddim(steps=8), 1.5), start)  # without guidance: scale 1
    assert torch.allclose(got, published(start, 1.0, 1.5), rtol=1e-10, atol=1e-10)
    assert torch.equal(sample(perturbed(ddim(steps=8)), start, perturbed_scale=1.5), got)


def test_scale_zero_is_the_plan_without():
    start = noise()
    for plan in (ddim(steps=8), guided(steps=8)):
        assert torch.equal(sample(perturbed(plan, 0.0), start), sample(plan, start))


def test_rows_have_a_branch_and_its_rule():
    plan = apply_perturbed_attention(guided("v", 4), 2.0, blocks=(1, -1), interval=(0.0, 0.5))
    assert [step.branches for step in plan.steps] == [("cond", "uncond", "perturbed")] * 2 + [("cond", "uncond")] * 2
    assert plan.steps[0].variant.rules == (Rule((1, -1), "attn", ("perturbed",), Action.IDENTITY),)
    assert InputRef("perturbed_scale", 2.0) in plan.inputs and plan.branch_evals == 10
    bound = plan.bind(Toy().spec)
    assert identity_blocks(bound.steps[0].variant, "perturbed") == {1, 2}
    assert identity_blocks(bound.steps[0].variant, "cond") == frozenset()
    assert parted(bound.steps[0].variant) == (
        (Variant(branches=("cond", "uncond"), keep=4.0), frozenset()),
        (Variant(branches=("perturbed",), keep=4.0), frozenset({1, 2})),
    )


def test_recipe_tail_again_and_files(tmp_path):
    plan = apply_perturbed_attention(guided(steps=8), 2.0, blocks=(1, 3), interval=(0.0, 0.75))
    assert plan.again().steps == plan.steps
    assert [len(step.branches) for step in plan.tail(0.5).steps] == [3, 3, 2, 2]
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_other_guidance_goes_with_it():
    made = perturbed(apply_linear_ag(guided(steps=6), rows=[3]), 1.0)
    assert [len(step.branches) for step in made.steps] == [3, 3, 3, 2, 3, 3]
    adaptive = apply_adaptive_guidance(perturbed(guided(steps=6), 1.0), 0.9)
    assert adaptive.steps[2].guard.otherwise.branches == ("cond", "perturbed")
    static = freeze(adaptive, {row: True for row in range(1, 6)})
    assert static.steps[2].outs == ("cond", "perturbed") and static.branch_evals == 13
    start = noise()
    want = perturbed(apply_guidance(ddim(steps=6), 3.0, interval=(0.0, 1.1 / 6)), 1.0)
    assert torch.allclose(sample(static, start), sample(want, start), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"scale": float("nan")}, "scale"),
        ({"scale": "3"}, "scale"),
        ({"blocks": (1,)}, "blocks"),
        ({"blocks": (1.0, 2.0)}, "blocks"),
        ({"blocks": "12"}, "blocks"),
        ({"interval": (0.5, 0.5)}, "interval"),
    ],
)
def test_bad_arguments_are_named(options, match):
    with pytest.raises(ArgumentError, match=match):
        apply_perturbed_attention(guided(), **{"blocks": (1, 3), **options})


def test_plans_that_cannot_have_it_are_refused():
    with pytest.raises(PlanError, match="perturbed branch already"):
        perturbed(perturbed(guided()))
    for plan in (apply_block_cache(guided(), "fora", interval=2), apply_guards(guided(), "first_block_cache")):
        with pytest.raises(PlanError, match="comes before both"):
            perturbed(plan)
    with pytest.raises(PlanError, match="guided already"):
        apply_guidance(perturbed(ddim()), 2.0)
    with pytest.raises(ArgumentError, match="none of the model's 4"):
        apply_perturbed_attention(guided("v").bind(Toy().spec), blocks=(2, 7))


def test_models_that_cannot_replace_attention_refuse_it():
    with pytest.raises(UnsupportedError, match="step 0: the eager executor does not run IDENTITY of site 'attn'"):
        session(perturbed(guided("v")))
    with pytest.raises(UnsupportedError, match="IDENTITY"):
        vivace.sample(Three("flow"), perturbed(guided()), noise())


# ---------------------------------------------------------------- the native DiT
@pytest.fixture(scope="module")
def pipe():
    return vivace.load("emoji")


def attention_of_values(model, x, t, label, blocks):
    """The DiT block by block with F.scaled_dot_product_attention written out: softmax, or the identity matrix."""
    rows = torch.tensor([[label]])
    modulation = model.condition(t, rows)
    hidden = model.embed(x)
    for i, block in enumerate(model.layers()):
        shift, scale, gate, shift2, scale2, gate2 = modulation.of_block(i)
        h = F.layer_norm(hidden, hidden.shape[-1:], eps=1e-6) * scale + shift
        n, tokens, width = h.shape
        q, k, v = block.qkv(h).view(n, tokens, 3, block.heads, -1).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1)
        weights = torch.eye(tokens).expand_as(weights) if i in blocks else weights
        hidden = hidden + gate * block.out((weights @ v).transpose(1, 2).reshape(n, tokens, width))
        h = F.layer_norm(hidden, hidden.shape[-1:], eps=block.mlp_eps) * scale2 + shift2
        hidden = hidden + gate2 * block.down(F.gelu(block.up(h), approximate=block.approximate))
    return model.head(hidden, modulation)[0]


@pytest.mark.parametrize("blocks", [(0, 1), (2, 4), (0, 6)])
def test_the_branch_is_the_network_with_identity_maps(pipe, blocks):
    from vivace.models.class_denoiser import ClassDenoiser

    denoiser = ClassDenoiser(pipe.model)
    plan = apply_perturbed_attention(
        apply_guidance(vivace.make_plan(pipe.spec.schedule, "ddim", 2, prediction="v"), 2.0), blocks=blocks
    ).bind(pipe.spec)
    x, condition = torch.randn(1, *pipe.spec.latent_shape), denoiser.encode("red heart")
    cond, uncond, worse = denoiser.evaluate(x, [500.0], [condition], plan.steps[0].variant)
    plain = denoiser.evaluate(x, [500.0], [condition], Variant(branches=("cond", "uncond")))
    assert torch.equal(cond, plain[0]) and torch.equal(uncond, plain[1])
    want = attention_of_values(pipe.model.module, x, torch.tensor([500.0]), condition.id, range(*blocks))
    assert torch.allclose(worse, want, rtol=1e-4, atol=1e-5) and not torch.allclose(worse, cond, atol=1e-2)


def test_executors_agree_and_pictures_keep_their_bits(pipe):
    plan = vivace.make_plan(pipe.spec.schedule, "unipc", 4, prediction="v")
    plan = apply_perturbed_attention(apply_guidance(plan, 2.0), 1.0, blocks=(2, 4), interval=(0.0, 0.5))
    made = {}
    for backend in ("eager", "cpu"):
        compiled = pipe.compile(plan, backend=backend)
        both = compiled("pizza", n=2, seed=3)
        assert both.receipt.branch_evals == 10
        assert torch.equal(compiled("pizza", index=1, seed=3).latents[0], both.latents[1])
        made[backend] = both
    assert torch.allclose(made["cpu"].latents, made["eager"].latents, atol=2e-4)
    assert any("identity" in use.reason for use in made["cpu"].receipt.kernels)


def test_caches_beside_it_are_refused(pipe):
    plan = perturbed(vivace.make_plan(pipe.spec.schedule, "ddim", 8, prediction="v"))
    with pytest.raises(PlanError, match="two values"):
        pipe.compile(apply_block_cache(plan, "fora", interval=2))
    kept = Rule((0, 2), "mlp", action=Action.COMPUTE)
    both = edit(plan, 2, variant=replace(plan.steps[2].variant, rules=(*plan.steps[2].variant.rules, kept)))
    with pytest.raises(UnsupportedError, match="step 2.*beside caches"):
        pipe.compile(both)


# ---------------------------------------------------------------- embedded
def embedded(steps=5, scale=3.5):
    return apply_guidance(ddim(steps=steps), scale, kind="embedded")


def test_an_embedded_scale_is_fed_and_costs_no_branch():
    seen = []

    def net(x, t, guidance):
        seen.append(guidance.tolist())
        return x * guidance[:, None]

    start = noise(3)
    got = vivace.sample(net, embedded(), start)
    assert seen == [[3.5] * 3] * 5 and embedded().branch_evals == 5
    want = vivace.sample(lambda x, t: 3.5 * x, ddim(steps=5), start)
    assert torch.allclose(got, want, rtol=1e-14)
    seen.clear()
    vivace.sample(net, embedded(), start, seed=[1, 2, 3], inputs={"guidance_scale": 2.0})
    assert seen[0] == [2.0] * 3


def test_embedded_rows_are_the_plans_but_for_the_input():
    plan = embedded()
    assert plan.steps[0].net_inputs == (("guidance", InputRef("guidance_scale", 3.5)),)
    assert [step.ops for step in plan.steps] == [step.ops for step in ddim(steps=5).steps]
    assert plan.again().steps == plan.steps and plan.tail(0.5).steps[0].net_inputs == plan.steps[0].net_inputs


def test_embedded_guidance_that_cannot_be_is_refused():
    for options in ({"interval": (0.0, 0.5)}, {"rescale": 0.7}):
        with pytest.raises(ArgumentError, match="takes neither"):
            apply_guidance(euler(4), kind="embedded", **options)
    with pytest.raises(PlanError, match="guided already"):
        apply_guidance(embedded(), 2.0)
    with pytest.raises(UnsupportedError, match="network input 'guidance' \\(this model's further inputs: none\\)"):
        session(apply_guidance(ddim("v"), kind="embedded"))
    with pytest.raises(ArgumentError, match="guidance_scale is a tensor"):
        tensor = torch.ones(3, 2, dtype=torch.float64)
        vivace.sample(lambda x, t, guidance: x, embedded(), noise(3), inputs={"guidance_scale": tensor})
