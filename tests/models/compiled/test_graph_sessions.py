"""Sessions through the executor of graphs: the native DiT and networks of diffusers, with the bits of eager."""

import numpy as np
import pytest
import torch
from tests.engine.recording import Recording
from tests.models.conftest import TINY
from tests.models.pipelines.test_denoiser import embeddings, load, plan_of, prompt_of
from tests.models.pipelines.tiny import FAMILIES

import vivace
from vivace.engine.compiled import Evaluation
from vivace.engine.denoiser import predictions
from vivace.engine.executors.cuda_graph import CudaGraphExecutor, bucket
from vivace.engine.executors.eager import EagerExecutor
from vivace.engine.session import Session
from vivace.models.class_denoiser import ClassDenoiser
from vivace.models.compiled.replay import DitReplay
from vivace.models.load import load as load_model
from vivace.models.pipelines.network import NetworkDenoiser

SCHEDULER = {"_class_name": "DDIMScheduler", "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


class Sequenced(ClassDenoiser):
    """The native DiT whose `evaluate` is the forward of its pieces."""

    def __init__(self, model):
        super().__init__(model)
        self.replay = DitReplay(model.module, lambda match, b: match.id if b == "cond" else model.classes)

    def evaluate(self, x, timesteps, conditions, variant):
        lanes = tuple(range(len(x)))
        call = Evaluation(x, lanes, lanes, tuple(timesteps), tuple(conditions), (None,) * len(x))
        pieces = self.replay.stage(call, variant)
        joined = [{name: torch.cat(parts) for name, parts in piece.inputs.items()} for piece in pieces]
        results = [piece.forward(inputs).clone() for piece, inputs in zip(pieces, joined, strict=True)]
        return predictions(pieces, results, len(variant.branches), len(x))


def session(denoiser, network, *plans, graphs=True, hoist=True):
    """A session of these plans; without graphs: the eager one."""
    recording = Recording(network)
    executor = CudaGraphExecutor(denoiser, recording, hoist=hoist, graphs=recording)
    return Session(
        denoiser,
        plans,
        executor if graphs else EagerExecutor(denoiser),
        shape=denoiser.spec.latent_shape,
        expand=lambda plan: plan.bind(denoiser.spec),
        threads=1,
    )


def run(session, requests):
    """All requests together, row by row."""
    states = [session.begin(request) for request in requests]
    while active := [state for state in states if not state.done]:
        session.step(active)
    return [session.finish(state) for state in states]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def native(request, tiny_folder):
    return Sequenced(load_model(tiny_folder, dtype=request.param, scheduler=SCHEDULER))


def plans(steps=3, scale=2.0):
    schedule = vivace.NoiseSchedule.from_diffusers(SCHEDULER)
    plain = vivace.make_plan(schedule, steps=steps, prediction="eps")
    half = vivace.make_plan(schedule, solver="ddim", steps=steps + 1, prediction="eps", eta=0.5)
    guided, part = (vivace.passes.apply_guidance(p, scale, interval=(0, e)) for p, e in ((plain, 1.0), (half, 0.5)))
    return plain, guided, part


def requests(made):
    numbers = ((0, 1, None), (1, 2, 3), (2, 1, 7), (1, 3, 0))
    return [vivace.Request(p, plan=made[i], n=n, seed=10 + k) for k, (i, n, p) in enumerate(numbers)]


def captured(session):
    """Every artefact is a graph."""
    report = session.executor.report()
    assert "not_captured" not in report and report["graphs"] > 0
    return session.executor.compiles


def test_a_graph_holds_the_weights_that_a_model_moves_on_from(tiny_folder):
    native = Sequenced(load_model(tiny_folder, dtype=torch.float32, scheduler=SCHEDULER))
    made = session(native, native.replay, plans()[0])
    parameter = native.model.module.layers()[0].qkv.weight
    place = parameter.data_ptr()
    parameter.data = parameter.data.clone()  # as .to() does it
    held = [tensor.data_ptr() for artefact in made.executor._artefacts.values() for tensor in artefact.weights]
    assert place in held and parameter.data_ptr() not in held


@pytest.mark.parametrize("hoist", [True, False])
def test_the_native_dit_through_graphs_has_the_bits_of_eager(native, hoist):
    made = plans()
    graphs = session(native, native.replay, *made, hoist=hoist)
    eager = session(native, native.replay, *made, graphs=False)
    together, wanted = run(graphs, requests(made)), run(eager, requests(made))
    for mine, theirs, request in zip(together, wanted, requests(made), strict=True):
        assert torch.equal(mine.latents, theirs.latents)
        assert torch.equal(run(graphs, [request])[0].latents, theirs.latents)
    assert graphs.executor.one_by_one is None
    size = max(len(plan.steps) for plan in made) * 2 * (6 * TINY["num_layers"] + 2) * 32 * 4
    assert together[-1].receipt.hoisted == ({} if not hoist else {"modulation": size * 3 // 4})
    captured(graphs)


def test_its_latents_are_those_of_the_network_within_rounding(native):
    if native.dtype != torch.float32:
        return
    plan = plans()[1]
    plain = ClassDenoiser(native.model)
    mine = session(native, native.replay, plan)(3, n=2, seed=5).latents
    wanted = session(plain, native.replay, plan, graphs=False)(3, n=2, seed=5).latents
    assert float((mine - wanted).norm() / wanted.norm()) < 1e-5


def test_another_sign_is_that_of_the_prediction(native):
    call = Evaluation(torch.ones(1, 4, 8, 8, dtype=native.dtype), (0,), (0,), (5.0,), (native.encode(3),), (None,))
    turned = DitReplay(native.model.module, native.replay.label, fed=lambda t: [1.0 - v for v in t], sign=-1.0)
    other = Evaluation(call.x, (0,), (0,), (-4.0,), call.conditions, (None,))
    variant = vivace.Variant()
    outs = [
        piece.forward({name: torch.cat(parts) for name, parts in piece.inputs.items()}).clone()
        for piece in (*native.replay.stage(call, variant), *turned.stage(other, variant))
    ]
    assert torch.equal(outs[0], -outs[1])


def test_the_native_dit_compiles_once_for_each_size_and_number_of_branches(native):
    plain, guided, part = plans()
    graphs = session(native, native.replay, plain, guided)
    for n in (1, 2, 3, 4, 5, 3):
        graphs(n % 3, n=n, plan=guided)
        graphs(None, n=n, plan=plain)
    before = captured(graphs)
    assert before == 2 * len({bucket(n) for n in range(1, 6)})
    for prompt, seed, scale, plan in ((1, 8, 3.0, guided), (7, 9, 1.5, part), (2, 1, 9.0, plans(9)[1])):
        graphs(prompt, n=2, seed=seed, guidance_scale=scale, plan=plan)
    assert captured(graphs) == before


def test_the_self_test_runs_graphs(native):
    graphs = session(native, native.replay, *plans())
    assert captured(graphs) in (2, 4)  # one sample; three too where its outcome is not on disk yet
    assert {variant.branches for variant in graphs.probe.ms} == {("cond",), ("cond", "uncond")}
    assert graphs.probe.executor is graphs.executor


# --- networks of diffusers --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["dit", "sd15", "sdxl", "sd3", "flux", "pixart"])
def test_a_network_of_diffusers_through_graphs_has_the_bits_of_eager(name):
    pipe = load(name)
    denoiser = pipe._denoiser(dict(pipe.networks))
    plan = plan_of(name, pipe, 2)
    graphs, eager = (session(denoiser, denoiser, plan, graphs=way) for way in (True, False))
    prompts = [prompt_of(name), prompt_of(name)]
    if name == "dit":
        prompts[1] = 5
    asked = [vivace.Request(prompt, seed=k, n=k + 1) for k, prompt in enumerate(prompts)]
    together, wanted = run(graphs, asked), run(eager, asked)
    for mine, theirs, request in zip(together, wanted, asked, strict=True):
        assert torch.equal(mine.latents, theirs.latents)
        assert np.array_equal(np.array(mine.images), np.array(theirs.images))
        assert torch.equal(run(graphs, [request])[0].latents, theirs.latents)
    assert mine.receipt.compiled["networks"] == [type(pipe.networks[FAMILIES[name].denoisers[0]]).__name__]
    captured(graphs)


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_numbers_and_prompts_compile_nothing(name):
    pipe = load(name)
    denoiser = pipe._denoiser(dict(pipe.networks))
    graphs = session(denoiser, denoiser, plan_of(name, pipe, 2))
    graphs(prompt_of(name))
    before = captured(graphs)
    other = prompt_of(name)
    for key, value in other.items():
        if torch.is_tensor(value) and value.is_floating_point():
            other[key] = torch.roll(value, 1, -1)
    graphs(other, seed=5, plan=plan_of(name, pipe, 4))
    if FAMILIES[name].guided:
        graphs(other, guidance_scale=3.5)
    assert captured(graphs) == before


def test_rows_of_unequal_arguments_are_pieces_of_their_own():
    pipe = load("sd3")
    denoiser = pipe._denoiser(dict(pipe.networks))
    graphs, eager = (session(denoiser, denoiser, plan_of("sd3", pipe, 2), graphs=way) for way in (True, False))
    short, long = prompt_of("sd3"), prompt_of("sd3")
    for sign in ("", "negative_"):
        long[f"{sign}prompt_embeds"] = embeddings(1, 9, 16, seed=8)
    asked = [vivace.Request(prompt, seed=i) for i, prompt in enumerate((short, long, short))]
    for executor in (graphs.executor, eager.executor):
        executor.one_by_one = None  # tiny networks run one by one by themselves
    conditions = [denoiser.encode(request.prompt) for request in asked]
    lanes = (0, 1, 2)
    x = torch.randn(3, *denoiser.spec.latent_shape)
    variant = vivace.Variant(branches=("cond", "uncond"))
    call = Evaluation(x, lanes, lanes, (3.0, 2.0, 1.0), tuple(conditions), (None,) * 3)
    pieces = denoiser.stage(call, variant, bucket)
    assert [piece.places for piece in pieces] == [(0, 2, 3, 5), (1, 4)]
    assert len({piece.key for piece in pieces}) == 2
    wanted = denoiser.evaluate(x, (3.0, 2.0, 1.0), conditions, variant)
    got = graphs.executor.evaluate(x, (3.0, 2.0, 1.0), conditions, variant)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert graphs.executor.report()["graphs"] == graphs.executor.compiles


def test_a_piece_is_filled_up_by_its_last_row():
    pipe = load("sd15")
    denoiser = pipe._denoiser(dict(pipe.networks))
    condition, x = denoiser.encode(prompt_of("sd15")), torch.randn(5, 4, 8, 8)
    call = Evaluation(x, (4, 0, 2), (0, 0, 0), (3.0, 2.0, 1.0), (condition,) * 3, (None,) * 3)
    (piece,) = denoiser.stage(call, vivace.Variant(branches=("cond", "uncond")), bucket)
    assert piece.places == (0, 1, 2, 3, 4, 5, -1, -1)
    latent, times = (piece.inputs[name] for name in (denoiser.manner.latent, denoiser.manner.time))
    assert torch.equal(torch.cat(latent), x[[4, 0, 2, 4, 0, 2, 2, 2]])
    assert times[0].tolist() == [3.0, 2.0, 1.0, 3.0, 2.0, 1.0, 1.0, 1.0]
    alone = denoiser.stage(call, vivace.Variant(branches=("cond",)))[0]
    assert alone.places == (0, 1, 2) and alone.key != piece.key


def test_a_forward_holds_nothing_of_the_request_it_was_made_for():
    from tests.engine.recording import address, reachable

    pipe = load("sdxl")
    denoiser = pipe._denoiser(dict(pipe.networks))
    condition = denoiser.encode(prompt_of("sdxl"))
    call = Evaluation(torch.zeros(1, 4, 8, 8), (0,), (0,), (1.0,), (condition,), (None,))
    (piece,) = denoiser.stage(call, vivace.Variant())
    held = {address(tensor) for tensor in reachable(piece.forward)}
    assert "/added_cond_kwargs/text_embeds" in piece.inputs
    assert not held & {address(part) for parts in piece.inputs.values() for part in parts}


def test_on_cuda_a_network_of_diffusers_replays_itself_and_a_dit_as_the_native_one():
    for name, kind in (("sd3", NetworkDenoiser), ("dit", DitReplay)):
        pipe = load(name)
        denoiser = pipe._denoiser(dict(pipe.networks))
        denoiser.device = torch.device("cuda")
        assert isinstance(denoiser.compiler(), kind)
    assert denoiser.hoist((1.0,), ("cond",), None) is None
    assert denoiser.why_not(vivace.Variant(model="other")) == "there is no network 'other'"


def test_a_dit_of_diffusers_through_the_native_pieces_agrees_with_its_own_forward():
    pipe = load("dit")
    denoiser = pipe._denoiser(dict(pipe.networks))
    denoiser.device = torch.device("cuda")
    replay, denoiser.device = denoiser.compiler(), torch.device("cpu")
    plan = plan_of("dit", pipe, 2)
    mine, wanted = (session(denoiser, replay, plan, graphs=way)(5, n=2, seed=3).latents for way in (True, False))
    assert float((mine - wanted).norm() / wanted.norm()) < 1e-5
