"""A pack's session does what the engine's does: latents, guards' decisions, tokens, pictures, errors."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import vivace
from tests.runtime.tiny_pipe import plan_of, tiny_pipe
from vivace.engine.noise import normals
from vivace.engine.plan import Guard
from vivace.errors import ArgumentError, BackendError, DtypeError, PackError, PromptError, ShapeError, StateError
from vivace.export import export_onnx
from vivace.runtime import open_pack, verify_pack
from vivace.runtime.session import backend_of

passes = vivace.passes
TOLERANCE = 1e-4  # what float32 packs are held to


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return tiny_pipe(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def plain(pipe, tmp_path_factory):
    pack = export_onnx(pipe, plan_of(pipe, steps=4), tmp_path_factory.mktemp("plain") / "pack")
    return pack.session(threads=1)


def modulated(plan, threshold):
    """Guards on the input of the first block in place of those on what it adds: the rule of a sum since the last row
    that was computed."""

    def changed(step):
        if step.guard is None:
            return step
        given = Guard("modulated_input", "accumulated_below", threshold, step.guard.otherwise, (0.5, 1.0, 0.0))
        return replace(step, guard=given)

    return replace(plan, steps=tuple(map(changed, plan.steps)))


def guarded(plan, threshold=0.9, **options):
    return passes.apply_guards(plan, "first_block_cache", threshold=threshold, **options)


def cached(plan, **options):
    return passes.apply_block_cache(plan, "fora", **{"interval": 2, **options})


def tokens(selector, **options):
    return lambda pipe: passes.apply_tokens(plan_of(pipe), **{"keep": 0.5, "selector": selector, **options})


PLANS = {
    "guided": plan_of,
    "interval": lambda pipe: passes.apply_guidance(plan_of(pipe, guidance=None), 2.0, interval=(0.2, 0.7)),
    "noise in rows": lambda pipe: plan_of(pipe, "dpmpp_2m_sde"),
    "two evaluations": lambda pipe: plan_of(pipe, "heun", 4),
    "reuse": lambda pipe: cached(plan_of(pipe)),
    "reuse in halves": lambda pipe: cached(plan_of(pipe), sites=("attn", "mlp"), store="bf16"),
    "forecast": lambda pipe: passes.apply_block_cache(plan_of(pipe), "taylorseer", interval=3, order=2),
    "forecast in 8 bits": lambda pipe: passes.apply_block_cache(
        plan_of(pipe), "taylorseer", interval=3, order=1, store="int8"
    ),
    "first block": lambda pipe: guarded(plan_of(pipe)),
    "modulated input": lambda pipe: modulated(guarded(plan_of(pipe)), 1.4),
    "guidance left out": lambda pipe: passes.apply_adaptive_guidance(plan_of(pipe), 0.9775),
    "guidance estimated": lambda pipe: passes.apply_adaptive_guidance(plan_of(pipe), 0.9785, estimate=2),
    "perturbed": lambda pipe: passes.apply_perturbed_attention(plan_of(pipe), 1.0, blocks=(1, 2)),
    "tokens by deviation": tokens("deviation"),
    "tokens by norm": tokens("norm", drop_high=0.5, starvation=0.0),
    "tokens by change": tokens("change"),
    "tokens by guidance": tokens("guidance"),
    "tokens by attention": tokens("attention"),
    "tokens at random": tokens("random"),
    "tokens of two evaluations": lambda pipe: passes.apply_tokens(plan_of(pipe, "heun", 5), keep=0.5, first=2),
    "tokens and reuse": lambda pipe: passes.apply_tokens(cached(plan_of(pipe), sites=("mlp",)), keep=0.5),
}

GUARDED = ("first block", "modulated input", "guidance left out", "guidance estimated")


@pytest.mark.parametrize("name", PLANS)
def test_a_pack_gives_what_the_eager_session_gives(name, pipe, tmp_path):
    plan = PLANS[name](pipe)
    theirs = pipe.compile(plan, backend="eager")(4, n=3, index=5, seed=99)
    session = export_onnx(pipe, plan, tmp_path / "pack").session(threads=1)
    ours = session(4, n=3, index=5, seed=99)
    wanted = theirs.latents.numpy()
    assert np.abs(ours.latents - wanted).max() <= TOLERANCE * np.abs(wanted).max()
    decisions = [(each.row, list(each.fired)) for each in theirs.receipt.decisions]
    assert [(each["row"], each["fired"]) for each in ours.receipt["decisions"]] == decisions
    assert name not in GUARDED or any(any(fired) for _, fired in decisions)
    if theirs.computed is not None:
        assert np.array_equal(ours.computed, theirs.computed.numpy())
    levels = [np.abs(np.asarray(a, int) - np.asarray(b, int)) for a, b in zip(ours.images, theirs.images, strict=True)]
    assert np.max(levels) <= 1


def test_guards_send_the_pictures_of_a_request_different_ways(pipe, tmp_path):
    session = export_onnx(pipe, guarded(plan_of(pipe)), tmp_path / "pack").session(threads=1)
    result = session(4, n=8, seed=99)
    fired = [each["fired"] for each in result.receipt["decisions"]]
    assert any(any(row) and not all(row) for row in fired)
    alone = [session(4, index=j, seed=99).latents[0] for j in range(8)]
    assert np.abs(result.latents - np.stack(alone)).max() <= 1e-5 * np.abs(result.latents).max()


def test_a_sticky_guard_looks_no_more_where_no_row_goes_on_from_a_look(pipe, tmp_path):
    plan = modulated(guarded(plan_of(pipe)), 1e9)
    sticky = replace(plan, steps=tuple(
        replace(s, guard=replace(s.guard, sticky=True, rule="below")) if s.guard else s for s in plan.steps
    ))  # fmt: skip
    theirs = pipe.compile(sticky, backend="eager")(4, n=2, seed=1)
    ours = export_onnx(pipe, sticky, tmp_path / "pack").session(threads=1)(4, n=2, seed=1)
    wanted = theirs.latents.numpy()
    assert np.abs(ours.latents - wanted).max() <= TOLERANCE * np.abs(wanted).max()
    fired = [all(each["fired"]) for each in ours.receipt["decisions"]]
    assert fired == [all(each.fired) for each in theirs.receipt.decisions] and fired[-1]
    looks = [sum("modulated" in call["graph"] for call in row["calls"]) for row in ours.receipt["rows"]]
    assert looks[-1] == 0 and max(looks) == 1


def test_a_tail_with_a_mask_starts_at_a_picture_and_leaves_its_bits_outside(pipe, tmp_path):
    plan = passes.apply_mask(plan_of(pipe)).tail(0.5)
    start = np.stack([normals((3, 8, 8), 5, picture=j) for j in range(2)])
    mask = np.zeros((3, 8, 8), np.float32)
    mask[:, 2:6, 2:6] = 1.0
    session = pipe.compile(plan, backend="eager")
    theirs = session(4, n=2, image=torch.from_numpy(start), mask=torch.from_numpy(mask))
    ours = export_onnx(pipe, plan, tmp_path / "pack").session(threads=1)(4, n=2, image=start, mask=mask)
    wanted = theirs.latents.numpy()
    assert np.abs(ours.latents - wanted).max() <= TOLERANCE * np.abs(wanted).max()
    outside = np.broadcast_to(mask == 0, start.shape)
    assert np.array_equal(ours.latents[outside], start[outside])


def test_tokens_in_a_mask_are_those_of_the_engine(pipe, tmp_path):
    plan = passes.apply_mask(passes.apply_tokens(plan_of(pipe), keep=0.5, selector="mask"))
    start = np.zeros((3, 8, 8), np.float32)
    mask = np.zeros((3, 8, 8), np.float32)
    mask[:, :3, :5] = 1.0
    given = {"image": torch.from_numpy(start), "mask": torch.from_numpy(mask)}
    theirs = pipe.compile(plan, backend="eager")(4, **given)
    session = export_onnx(pipe, plan, tmp_path / "pack").session(threads=1)
    ours = session(4, image=start, mask=mask)
    assert np.array_equal(ours.computed, theirs.computed.numpy())
    with pytest.raises(ArgumentError, match="touches 16 of 16 tokens"):
        session(4, image=start, mask=np.ones((3, 8, 8), np.float32))


def test_a_request_may_override_the_scale_and_the_noise(pipe, plain):
    noise = np.stack([normals((3, 8, 8), 3, picture=j) for j in range(2)])
    theirs = pipe.compile(plan_of(pipe, steps=4), backend="eager")
    wanted = theirs(1, n=2, guidance_scale=5.0, latents=torch.from_numpy(noise)).latents.numpy()
    ours = plain(1, n=2, guidance_scale=5.0, latents=noise)
    assert np.abs(ours.latents - wanted).max() <= TOLERANCE * np.abs(wanted).max()


def test_inputs_by_name_do_what_the_arguments_of_that_name_do(plain):
    wanted = plain(1, guidance_scale=5.0).latents
    assert np.array_equal(plain(1, inputs={"guidance_scale": 5.0}).latents, wanted)
    assert np.array_equal(plain(1, guidance_scale=np.float32(5.0)).latents, wanted)
    assert not np.array_equal(plain(1).latents, wanted)


def test_pictures_of_a_batch_are_those_made_alone(plain):
    together = plain(1, n=3, index=2, seed=8).latents
    for j in range(3):
        alone = plain(1, index=2 + j, seed=8).latents[0]
        assert np.abs(alone - together[j]).max() <= 1e-5 * np.abs(alone).max()


def test_a_start_may_be_a_picture_where_latents_are_pixels(pipe, tmp_path):
    from PIL import Image

    session = export_onnx(pipe, plan_of(pipe).tail(0.5), tmp_path / "pack").session(threads=1)
    picture = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    latent = np.asarray(picture, np.float32).transpose(2, 0, 1) / np.float32(127.5) - np.float32(1.0)
    assert np.array_equal(session(1, image=picture).latents, session(1, image=latent).latents)


def test_the_callback_sees_every_row_and_may_stop(plain):
    rows = []
    result = plain(1, callback=lambda row, x: rows.append((row, x)))
    assert [row for row, _ in rows] == [0, 1, 2, 3] and np.array_equal(rows[-1][1], result.latents)
    with pytest.raises(StateError, match="stopped the run after row 1"):
        plain(1, callback=lambda row, x: row < 1)


def test_the_receipt_says_what_ran(plain):
    receipt = plain(3, n=2, seed=5).receipt
    assert receipt["nfe"] == receipt["calls"] == 4 and receipt["n"] == 2 and receipt["seed"] == 5
    assert receipt["prompt"]["id"] == 3 and receipt["plan_hash"] == plain.plan.hash
    assert [row["calls"] for row in receipt["rows"]] == [[{"graph": "row0-full", "rows": 4}]] * 4
    assert all(row["network_ms"] > 0 for row in receipt["rows"])


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"n": 0}, ArgumentError, "n is 0; an integer from 1"),
        ({"seed": -1}, ArgumentError, "seed is -1"),
        ({"seed": True}, ArgumentError, "seed is True"),
        ({"index": 1 << 32}, ArgumentError, "index is"),
        ({"latents": np.zeros((3, 8, 8), np.float32)}, ShapeError, r"shape \(3, 8, 8\); needs \(1, 3, 8, 8\)"),
        ({"latents": np.zeros((1, 3, 8, 8), int)}, DtypeError, "latents is int64"),
        ({"latents": np.full((1, 3, 8, 8), np.nan)}, ArgumentError, "latents holds NaN"),
        ({"guidance_scale": float("inf")}, ArgumentError, "guidance_scale is inf"),
        ({"inputs": {"strength": 1.0}}, ArgumentError, "reads no input 'strength'; it reads"),
        ({"mask": 1.0}, ArgumentError, "reads no input 'mask'"),
        ({"prompt": "no such thing"}, PromptError, "no class names"),
        ({"prompt": 11}, PromptError, "class id 11"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_clear_error_before_any_work(plain, given, error, message):
    with pytest.raises(error, match=message):
        plain(**{"prompt": 1, **given})


def test_a_scale_without_guidance_is_a_warning(pipe, tmp_path):
    session = export_onnx(pipe, plan_of(pipe, steps=2, guidance=None), tmp_path / "pack").session(threads=1)
    assert session(1, guidance_scale=2.0).receipt["warnings"] == [
        "guidance_scale had no effect: the plan has no guidance"
    ]


def test_an_unknown_backend_is_refused(plain):
    with pytest.raises(BackendError, match="'cuda' is not here; use one of onnxruntime, openvino, tensorrt"):
        backend_of("cuda")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_openvino_gives_what_the_eager_session_gives(pipe, tmp_path, dtype):
    pytest.importorskip("openvino")
    plan = passes.apply_tokens(cached(plan_of(pipe), sites=("attn",)), keep=0.5)
    pack = export_onnx(pipe, plan, tmp_path / "pack", dtype=dtype)
    found = verify_pack(pack, backend="openvino", threads=1)
    assert found.backend == "openvino" and found.noise and found.first is None


def test_a_dtype_that_the_runtime_lacks_is_said_to_be_so(pipe, tmp_path):
    pack = export_onnx(pipe, plan_of(pipe, steps=2), tmp_path / "pack", dtype="bfloat16")
    try:
        session = pack.session(threads=1)
    except BackendError as error:
        assert "has no bfloat16 kernel for row0-full.onnx on this CPU" in str(error)
    else:  # a later release that has them
        assert verify_pack(pack, session=session).first is None


def test_a_graph_that_cannot_be_loaded_is_a_pack_error_that_names_it(plain, tmp_path):
    import shutil

    folder = tmp_path / "pack"
    shutil.copytree(plain.pack.path, folder)
    pack = open_pack(folder)
    (folder / "row0-full.onnx").write_bytes(b"nonsense")
    with pytest.raises(PackError, match=r"cannot load row0-full\.onnx"):
        pack.session()


def test_weights_are_laid_out_anew_unless_memory_is_short(plain, monkeypatch):
    from vivace.runtime import ort

    assert ort._fits(plain.pack)
    monkeypatch.setattr(ort.os, "sysconf", lambda name: 64)
    assert not ort._fits(plain.pack)
    wanted = plain(1).latents
    for packed in (False, True):
        session = plain.pack.session(backend=ort.OnnxRuntime(1, packed))
        assert np.abs(session(1).latents - wanted).max() <= 1e-5 * np.abs(wanted).max()
