"""SIM's pull is its loss's gradient, and leads a student to the teacher."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from parts import relative_error
from parts_float64 import ROUNDING, in_float64
from parts_scores import Gaussian, distance_descent, make_case, mean_move
from torch import Tensor

from rdm_diffusers.distillation import ScoreIdentity, ScoreImplicit

both_schedules = pytest.mark.parametrize("prediction_type", ["v_prediction", "flow_prediction"])
every_c = pytest.mark.parametrize("c", [0.01, 0.3, 3.0])


@pytest.fixture(autouse=True)
def numbers_in_float64() -> Iterator[None]:
    with in_float64():
        yield


@both_schedules
@every_c
def test_the_move_is_minus_the_gradient_of_the_papers_loss_of_scores(c: float, prediction_type: str) -> None:
    def loss(s_teacher: Tensor, s_fake: Tensor, conditional: Tensor, a: Tensor, s: Tensor) -> Tensor:
        y, a, s = (s_fake - s_teacher).flatten(1), a.flatten(), s.flatten()
        root = y.shape[1] ** 0.5
        weight, c_t = root * s**2 / a, root * c * a / s**2
        slope = y / (y.square().sum(1) + c_t**2).sqrt()[:, None]
        return -weight * (slope * (s_fake - conditional).flatten(1)).sum(1)

    case = make_case(prediction_type)
    assert relative_error(case.road(ScoreImplicit(sim_c=c)), -case.gradient(loss)) < ROUNDING


@both_schedules
def test_a_student_whose_fake_score_is_the_teacher_stays(prediction_type: str) -> None:
    apart, equal = make_case(prediction_type), make_case(prediction_type, same=True)
    assert equal.road(ScoreImplicit()).abs().max() < ROUNDING < apart.road(ScoreImplicit()).abs().max()


def test_with_a_large_c_it_is_sid_at_alpha_1() -> None:
    case, c = make_case("flow_prediction"), 1e6
    assert relative_error(c * case.road(ScoreImplicit(sim_c=c)), case.road(ScoreIdentity())) < 1e-9


@pytest.mark.parametrize("c", [0.3, 3.0])
def test_the_average_move_is_the_descent_of_the_pseudo_huber_distance_of_the_scores(c: float) -> None:
    student, teacher = (Gaussian(torch.tensor(m), torch.tensor(s)) for m, s in ((0.4, 0.7), (-0.9, 0.8)))
    found = torch.stack(mean_move(ScoreImplicit(sim_c=c), student, teacher, 0.8, 0.6))
    expected = torch.stack(distance_descent(lambda gap: (gap**2 + c**2).sqrt() - c, student, teacher, 0.8, 0.6))
    assert relative_error(found, expected) < 1e-6


def test_it_leads_a_gaussian_to_the_teachers() -> None:
    mean, std, teacher = torch.tensor(1.0), torch.tensor(0.4), Gaussian(torch.tensor(-0.5), torch.tensor(0.9))
    for update in range(600):
        a, s = ((0.95, 0.3), (0.8, 0.6), (0.4, 0.9))[update % 3]
        move, wider = mean_move(ScoreImplicit(sim_c=0.3), Gaussian(mean, std), teacher, a, s, nodes=12)
        mean, std = mean + 0.1 * move, std + 0.1 * wider
    assert (mean - teacher.mean).abs() < 1e-2 and (std - teacher.std).abs() < 1e-2
