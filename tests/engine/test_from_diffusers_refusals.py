"""What `Plan.from_diffusers` refuses, by the name of the class or field."""

import warnings

import pytest
from diffusers import schedulers

from vivace.engine.plan import Plan
from vivace.errors import ArgumentError, UnsupportedError


def make(name, **config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(schedulers, name)(**config)


REFUSED = [
    ("DDIMScheduler", {"prediction_type": "flow_prediction"}),
    ("DDIMScheduler", {"beta_schedule": "sigmoid"}),
    ("DDIMScheduler", {"timestep_spacing": "random"}),
    ("DDPMScheduler", {"variance_type": "learned_range"}),
    ("DDPMScheduler", {"variance_type": "fixed_large_log"}),
    ("EulerAncestralDiscreteScheduler", {"prediction_type": "sample"}),
    ("EulerDiscreteScheduler", {"interpolation_type": "cubic"}),
    ("HeunDiscreteScheduler", {"beta_schedule": "laplace"}),
    ("DPMSolverMultistepScheduler", {"solver_order": 4}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver+++"}),
    ("DPMSolverMultistepScheduler", {"variance_type": "fixed_small"}),
    ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction"}),
    ("DPMSolverMultistepScheduler", {"final_sigmas_type": "zero", "algorithm_type": "dpmsolver"}),
    ("DPMSolverMultistepScheduler", {"final_sigmas_type": "other"}),
    ("DPMSolverMultistepScheduler", {"use_exponential_sigmas": True, "use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "use_karras_sigmas": True}),
    (
        "DPMSolverMultistepScheduler",
        {"solver_order": 3, "algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
    ),
    (
        "DPMSolverSinglestepScheduler",
        {"thresholding": True, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    ),
    ("EDMDPMSolverMultistepScheduler", {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"}),
    ("EDMEulerScheduler", {"prediction_type": "sample"}),
    ("EDMEulerScheduler", {"sigma_schedule": "linear"}),
    ("PNDMScheduler", {"prediction_type": "sample"}),
    ("UniPCMultistepScheduler", {"solver_order": 4}),
    ("UniPCMultistepScheduler", {"solver_p": object()}),
    ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}),
    ("FlowMatchLCMScheduler", {"scale_factors": [0.5, 1.0]}),
]


@pytest.mark.parametrize(("name", "config"), REFUSED)
def test_what_is_not_covered_is_refused_by_the_name_of_the_field(name, config):
    with pytest.raises(UnsupportedError, match=next(iter(config))):
        Plan.from_diffusers({"_class_name": name, **config}, 5)


def test_unknown_classes_and_wrong_arguments():
    with pytest.raises(UnsupportedError, match="SASolverScheduler.*UniPCMultistepScheduler"):
        Plan.from_diffusers(make("SASolverScheduler"), 5)
    with pytest.raises(UnsupportedError, match="_class_name"):
        Plan.from_diffusers({"beta_start": 0.1}, 5)
    with pytest.raises(ArgumentError, match="scheduler config"):
        Plan.from_diffusers(7, 5)
    for steps in (0, -1, 2.5, True, "5", None):
        with pytest.raises(ArgumentError, match="steps"):
            Plan.from_diffusers({"_class_name": "DDIMScheduler"}, steps)
    with pytest.raises(ArgumentError, match="training timesteps"):
        Plan.from_diffusers({"_class_name": "DDIMScheduler"}, 1001)
    with pytest.raises(ArgumentError, match="timesteps"):
        Plan.from_diffusers({"_class_name": "DDIMScheduler"}, timesteps=[3, 2])
    with pytest.raises(ArgumentError, match="noise must fall"):
        Plan.from_diffusers({"_class_name": "UniPCMultistepScheduler"}, 1000)
    with pytest.raises(ArgumentError, match="solver_type.*heun"):
        Plan.from_diffusers({"_class_name": "DPMSolverMultistepScheduler", "solver_type": "heum"}, 5)
    with pytest.raises(ArgumentError, match="strength"):
        Plan.from_diffusers({"_class_name": "DDIMScheduler"}, 5, strength=0.1)
