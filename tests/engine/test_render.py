from dataclasses import replace

from tests.engine.plans import edit, euler, guided_row, plan_of
from vivace.engine.bind import ModelSpec
from vivace.engine.plan import Action, Affine, Args, Guard, Recipe, Rule, TensorRef, Transform, Variant
from vivace.engine.render import number, render_diff

GOLDEN = """\
# t   lam   net   branches blocks keep ops
0 500 -0.549 model cond+unc all 1 d=cond-unc; g=unc+{guidance_scale=4}*d; m0=x0(g); x=.5x+.75m0
1 .75 -1.099 bf16+int8 cond all 1 x=x-.25out
2 .5 0.000 second:model cond 0:2.attn=F1,-2:=R .5 drift x=x-.25out guard cosine below .1: all
3 0 inf - - - - x=clamp(x;low=-1,high=1); x=[mean]*x+.2noise:2 restart"""


def squeeze(text):
    return "\n".join(" ".join(line.split()) for line in text.splitlines())


def test_printout_is_the_golden_text():
    bf16, int8 = Rule((0, 2), precision="bf16"), Rule((2, 4), precision="int8")
    cached = Rule((0, 2), "attn", None, Action.FORECAST, 1), Rule((-2, 0), action=Action.REUSE)
    euler_row = Affine("x", (("x", 1.0), ("out", -0.25)))
    row = edit(euler(1), 0, timestep=0.75, alpha=0.25, sigma=0.75, ops=(euler_row,)).steps[0]
    clamp = Transform("clamp", "x", (), (("low", -1.0), ("high", 1.0)))
    plan = plan_of(
        guided_row(alpha=0.5, sigma=0.8660254037844386),
        replace(row, variant=Variant(rules=(bf16, int8))),
        replace(
            row,
            timestep=0.5,
            alpha=0.5,
            sigma=0.5,
            variant=Variant("second", rules=cached, keep=0.5, selector="drift"),
            guard=Guard("cosine", "below", 0.1, Variant()),
        ),
        replace(
            row,
            timestep=0.0,
            alpha=1.0,
            sigma=0.0,
            variant=None,
            ops=(clamp, Affine("x", (("x", TensorRef("mean")), ("noise:2", 0.2)))),
            restart=True,
        ),
        prediction="eps",
    )
    head, start, *table = squeeze(str(plan)).splitlines()
    assert (
        head == f"plan {plan.hash[:12]} | made by hand | prediction eps | nfe 3 | branch_evals 4 | variants 4 | unbound"
    )
    assert start == "start x=noise:0"
    assert "\n".join(table) == squeeze(GOLDEN)


def test_bound_printout_has_a_letter_per_block_and_token_counts():
    blocks, keys = (0, 4), (0, 0)
    kept = Rule(blocks, action=Action.COMPUTE), Rule(keys, "kv", action=Action.COMPUTE)
    read = Rule(blocks, action=Action.REUSE), Rule(keys, "kv", action=Action.REUSE)
    plan = edit(euler(2), 0, variant=Variant(rules=kept))
    plan = edit(plan, 1, variant=Variant(rules=read, keep=0.25, selector="norm", selector_params=(("bound", 7.0),)))
    lines = str(plan.bind(ModelSpec("toy", "ab" * 32, "flow", (3, 32, 32), 6, (4, 4)))).splitlines()
    assert "bound abababababab 3x32x32 6 blocks" in lines[0]
    assert lines[3].split()[5:7] == ["CCCCCC,0:6.kv=C", "64/64"]
    assert lines[4].split()[5:8] == ["RRRRCC,0:6.kv=R", "16/64", "norm<=7"]


def test_head_names_solver_passes_and_tail():
    recipe = Recipe("make_plan", Args.of({"solver": "unipc"}), 0.5, (("apply_guidance", Args()),))
    assert "| unipc tail .5 + guidance |" in str(replace(euler(), recipe=recipe)).splitlines()[0]


def test_numbers_are_short():
    assert [number(v) for v in (0.98, -0.05, 4.0, 1.25e-5, 0.0, 123456.0)] == [
        ".98",
        "-.05",
        "4",
        "1.25e-05",
        "0",
        "1.235e+05",
    ]


def test_diff_shows_changed_rows_only_and_nothing_for_equal_plans():
    one, two = euler(5), edit(euler(5), 3, timestep=0.41)
    assert render_diff(one, euler(5)) == ""
    rows = [line for line in render_diff(one, two).splitlines() if line[1:2].isdigit()]
    assert [row.split()[:2] for row in rows] == [["-3", ".4"], ["+3", ".41"]]
