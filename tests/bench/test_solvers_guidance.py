"""The claim of guidance is computed from what was measured; nothing that judges was fitted on."""

import pytest
import torch

from vivace.bench import solvers, solvers_guidance
from vivace.engine.passes import apply_adaptive_guidance


def test_names_and_noise_of_the_fit_and_of_the_judgement_are_apart():
    one, two = (solvers_guidance.problem(part, 2.0) for part in ("tune", "judge"))
    assert not set(one.prompts) & set(two.prompts) and len(one.prompts) == len(two.prompts) == solvers_guidance.NAMES
    assert not (one.noise([0]) == two.noise([0])).any()


def test_what_is_removed_is_counted_by_what_ran():
    plan = apply_adaptive_guidance(solvers_guidance.base(2.0), -0.99)
    asked = solvers_guidance.problem("judge", 2.0)
    latents, receipts = solvers_guidance.run(asked, plan, range(2))
    assert latents.shape == (2, *asked.shape) and bool(torch.isfinite(latents).all())
    assert [receipt.branch_evals for receipt in receipts] == [21, 21]


@pytest.mark.parametrize(("psnr", "value"), [(35.1, 0.35), (34.9, 0.0)])
def test_a_share_below_the_bound_of_quality_counts_as_nothing(monkeypatch, psnr, value):
    monkeypatch.setattr(
        solvers_guidance, "chosen_of", lambda artefact: [0.6, 2] if "adaptive" in artefact.kind else None
    )
    monkeypatch.setattr(solvers_guidance, "measured", lambda *_: {"share": 0.35, "psnr": psnr})
    rows, claim = solvers.CLAIMS[solvers_guidance.CLAIM](True)
    assert claim.value == value and claim.holds is (value >= 0.25) and rows[0]["psnr"] == psnr
    assert [row["setting"] for row in rows] == ["0.6 x 2"]


def test_without_a_setting_there_is_nothing_to_claim(monkeypatch):
    monkeypatch.setattr(solvers_guidance, "chosen_of", lambda artefact: None)
    rows, claim = solvers_guidance.guidance_claim(True)
    assert rows == [] and claim.value == 0.0 and claim.holds is False
