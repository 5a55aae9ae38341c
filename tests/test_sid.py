"""SiD's pull is its loss's gradient, and leads a student to the teacher."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from parts import make_conditioning, make_shared, relative_error, run_arguments
from parts_float64 import ROUNDING, in_float64
from parts_scores import Gaussian, distance_descent, make_case, mean_move
from torch import Tensor

from rdm_diffusers.config.command_line import parse_args
from rdm_diffusers.distillation import ReverseKL, ScoreIdentity
from rdm_diffusers.networks import FAKE_SCORE, TEACHER

both_schedules = pytest.mark.parametrize("prediction_type", ["v_prediction", "flow_prediction"])
every_alpha = pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])


@pytest.fixture(autouse=True)
def numbers_in_float64() -> Iterator[None]:
    with in_float64():
        yield


@both_schedules
@every_alpha
def test_the_move_is_minus_the_gradient_of_the_papers_loss_of_scores(alpha: float, prediction_type: str) -> None:
    def loss(s_teacher: Tensor, s_fake: Tensor, conditional: Tensor, a: Tensor, s: Tensor) -> Tensor:
        gap = s_teacher - s_fake
        return (s**4 / a**2 * (gap * (s_teacher - conditional) - alpha * gap**2)).flatten(1).sum(1)

    case = make_case(prediction_type)
    assert relative_error(case.road(ScoreIdentity(sid_alpha=alpha)), -case.gradient(loss)) < ROUNDING

    def weight(x0: Tensor, teacher_x0: Tensor) -> Tensor:
        return (x0 - teacher_x0).abs().flatten(1).mean(1)

    found = case.road(ScoreIdentity(sid_alpha=alpha), "sample")
    assert relative_error(found, -case.gradient(loss, weight)) < ROUNDING


@both_schedules
@every_alpha
def test_a_student_whose_fake_score_is_the_teacher_stays(alpha: float, prediction_type: str) -> None:
    apart, equal = make_case(prediction_type), make_case(prediction_type, same=True)
    matching = ScoreIdentity(sid_alpha=alpha)
    assert equal.road(matching).abs().max() < ROUNDING < apart.road(matching).abs().max()


def test_without_what_flows_through_the_networks_it_is_dmd() -> None:
    case = make_case("v_prediction")
    gradient = case.road(ReverseKL())
    assert relative_error(case.road(ScoreIdentity()), gradient) > 0.1

    class Still(ScoreIdentity):
        def pull(self, estimate):
            whole = super().pull(estimate)
            return type(whole)(whole.x0)

    assert torch.equal(case.road(Still()), gradient)


@every_alpha
def test_the_average_move_is_the_descent_of_the_squared_distance_of_the_scores(alpha: float) -> None:
    student, teacher = (Gaussian(torch.tensor(m), torch.tensor(s)) for m, s in ((0.4, 0.7), (-0.3, 1.1)))
    found = torch.stack(mean_move(ScoreIdentity(sid_alpha=1.0), student, teacher, 0.8, 0.6))
    expected = torch.stack(distance_descent(lambda gap: gap**2 / 2, student, teacher, 0.8, 0.6))
    assert relative_error(found, expected) < 1e-8
    other = torch.stack(mean_move(ScoreIdentity(sid_alpha=alpha), student, teacher, 0.8, 0.6))
    assert (relative_error(other, expected) < 1e-8) == (alpha == 1)


@every_alpha
def test_it_leads_a_gaussian_to_the_teachers(alpha: float) -> None:
    mean, std, teacher = torch.tensor(1.0), torch.tensor(0.4), Gaussian(torch.tensor(-0.5), torch.tensor(0.9))
    for update in range(300):
        a, s = ((0.95, 0.3), (0.8, 0.6), (0.4, 0.9))[update % 3]
        move, wider = mean_move(ScoreIdentity(sid_alpha=alpha), Gaussian(mean, std), teacher, a, s, nodes=12)
        mean, std = mean + move, std + wider
    assert (mean - teacher.mean).abs() < 1e-2 and (std - teacher.std).abs() < 1e-2


def test_an_unconditional_fake_score_gets_the_empty_prompt_and_the_others_their_own() -> None:
    networks, t, prompts = make_shared(), torch.tensor([100, 900]), make_conditioning(2)
    x_t, empty = torch.randn(2, 4, 8, 8), networks.null_conditioning.expand(2)
    expected = networks.predict(FAKE_SCORE, x_t, t, empty), networks.predict(TEACHER, x_t, t, prompts)
    networks.fake_score_unconditional = True
    assert torch.equal(networks.predict(FAKE_SCORE, x_t, t, prompts), expected[0])
    assert torch.equal(networks.predict(TEACHER, x_t, t, prompts), expected[1])


def test_zero_cfg_is_two_flags(tmp_path: Path) -> None:
    changes = dict(algorithm="sid", guidance_scale=1, fake_score_unconditional=True)
    config = parse_args(run_arguments("tiny", tmp_path / "prompts.txt", tmp_path, **changes))
    assert config.method.gndm_lambda == 0 and config.method.advantage_normalization == "sample"
