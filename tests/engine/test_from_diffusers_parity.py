"""Random configs of every covered scheduler, run by `diffusers` and by the plan made of them."""

import inspect

import numpy as np
import pytest
from diffusers import schedulers

from vivace.bench.diffusers_configs import CLASSES, Case, Chooser, random_case
from vivace.bench.diffusers_parity import parity_report, run_case, summary
from vivace.engine.diffusers_classes import EXPLICIT, MAKERS
from vivace.engine.diffusers_config import FIELDS
from vivace.engine.plan import Plan
from vivace.engine.planning import replan

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
CASES = 6  # of every class
SDE = {"algorithm_type": "sde-dpmsolver++", "solver_order": 3, "final_sigmas_type": "sigma_min"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def cases_of(name, count, seed):
    rng = np.random.default_rng(seed)
    return [random_case(rng, name) for _ in range(count)]


@pytest.mark.parametrize("name", CLASSES)
def test_no_random_config_deviates(name):
    report = summary([run_case(case) for case in cases_of(name, CASES, seed=11)])
    assert report["deviations"] == []
    assert report["agree"] >= report["runnable"] - 1


def test_the_report_counts_every_case():
    report = parity_report(6, seed=5)
    assert report["count"] == 6 == sum(report[kind] for kind in ("agree", "deviate", "refused", "cannot"))
    assert sum(sum(kinds.values()) for kinds in report["by_scheduler"].values()) == 6


def test_every_covered_class_has_fields_a_maker_and_random_configs():
    assert set(FIELDS) == set(MAKERS) == set(CLASSES)
    assert {name for names in EXPLICIT.values() for name in names} <= set(FIELDS)


def test_every_field_of_the_covered_classes_is_known():
    for name, fields in FIELDS.items():
        theirs = inspect.signature(getattr(schedulers, name).__init__).parameters
        assert {key: value.default for key, value in theirs.items() if key != "self"} == dict(fields), name


@pytest.mark.parametrize("name", FIELDS)
def test_a_config_dict_gives_the_plan_of_the_object(name):
    scheduler = getattr(schedulers, name)()
    one = Plan.from_diffusers(scheduler, 8)
    two = Plan.from_diffusers({**scheduler.config, "_class_name": name}, 8)
    assert replan(one.recipe) == one and replan(two.recipe) == two
    assert one.tail(0.5) == Plan.from_diffusers(scheduler, 8, strength=0.5) if name != "PNDMScheduler" else True
    assert len(one.steps) == len(two.steps)
    for a, b in zip(one.steps, two.steps, strict=True):
        assert a.timestep == pytest.approx(b.timestep, abs=0.01)
        assert (a.alpha, a.sigma) == (pytest.approx(b.alpha, rel=1e-4), pytest.approx(b.sigma, rel=1e-4))


FIXED = [
    ("IPNDMScheduler", {"trained_betas": np.linspace(0.99, 0.01, 12).tolist()}, {"steps": 5}),
    ("EDMEulerScheduler", {"sigma_data": 1.0}, {"sigmas": [0.0, 0.3, 0.8, 1.0]}),
    ("EulerDiscreteScheduler", {}, {"sigmas": [14.0, 3.0, 0.5, 0.1]}),
    ("DPMSolverMultistepScheduler", SDE, {"steps": 12}),
    ("DPMSolverMultistepScheduler", {**SDE, "algorithm_type": "sde-dpmsolver", "solver_order": 2}, {"steps": 12}),
    ("DPMSolverMultistepScheduler", {**FLOW, "prediction_type": "v_prediction"}, {"steps": 7}),
    ("DPMSolverSinglestepScheduler", {**SDE, "solver_type": "heun"}, {"steps": 12}),
    ("DPMSolverSinglestepScheduler", {"solver_order": 3}, {"steps": 11, "strength": 0.5}),
    ("UniPCMultistepScheduler", {"predict_x0": False, "final_sigmas_type": "sigma_min"}, {"steps": 9}),
    ("UniPCMultistepScheduler", {**FLOW, "shift_terminal": 0.1}, {"steps": 9}),
    ("LMSDiscreteScheduler", {}, {"steps": 10, "strength": 0.5}),
    ("PNDMScheduler", {"skip_prk_steps": True, "prediction_type": "v_prediction"}, {"steps": 10, "strength": 0.5}),
    ("PNDMScheduler", {"prediction_type": "v_prediction"}, {"steps": 10}),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, {"steps": 6, "strength": 0.5}),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, {"steps": 6, "strength": 0.5}),
]


@pytest.mark.parametrize(("name", "config", "request_"), FIXED)
def test_what_a_class_has_of_its_own(name, config, request_):
    outcome = run_case(Case(name, config, request_, seed=1))
    assert outcome.kind == "agree", outcome


def test_choices_are_seeded():
    one, two = (Chooser(np.random.default_rng(3)) for _ in range(2))
    assert [one.of(1, 2, 3), one.within(0, 1)] == [two.of(1, 2, 3), two.within(0, 1)]
