"""Which prompt a given picture belongs to is read off its name, and said, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from rdm_diffusers.evaluation.pictures import describe_pairs, natural_key, pair


def paths(*names: str) -> list[Path]:
    return [Path("pictures") / name for name in names]


def test_pictures_are_in_the_order_of_their_numbers_and_it_is_said_how_they_are_paired() -> None:
    names = paths(*(f"{i}.png" for i in range(12)))
    prompts = [f"prompt {i}" for i in range(20)]
    assert pair(sorted(names), prompts) == names
    assert pair(sorted(names), prompts, 11) == names[:11]
    assert describe_pairs(names, prompts) == (
        "Pictures and prompts are paired in their order: 0.png with 'prompt 0', ..., 11.png with 'prompt 11'."
    )
    assert sorted(paths("b2.png", "a10.png", "a.png", "a9.jpg"), key=natural_key) == paths(
        "a9.jpg", "a10.png", "a.png", "b2.png"
    )


@pytest.mark.parametrize(
    ("names", "count"),
    [
        (["1.png", "2.png", "3.png"], 5),
        (["img_0000_512.png", "img_0001_512.jpg", "img_0002_512.png"], 2),
        (["0.png"], 5),
        (["COCO_000042.jpg", "COCO_000051.jpg", "COCO_001000.jpg"], 3),
        (["bear.png", "cat.png", "dog.png"], 3),
        (["0_a.png", "1_b.png", "2_c.png"], 3),
        (["5.png", "3.png"], 0),
    ],
)
def test_pictures_that_are_numbered_from_0_or_1_or_as_many_as_the_prompts_are_paired(names: list, count: int) -> None:
    found = pair(paths(*names), ["prompt"] * count)
    assert found == sorted(paths(*names), key=natural_key)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["0.png", "1.png", "3.png"], "number 1 is followed by 3.png"),
        (["2.png", "3.png"], "the first is 2.png"),
        (["0.png", "0.jpg", "1.png"], "number 0 is followed by 0"),
        (["cat.png", "dog.png"], "their names do not differ in one number alone"),
        (["p0_s0.png", "p0_s1.png", "p1_s0.png", "p1_s1.png"], "their names do not differ in one number alone"),
    ],
)
def test_pictures_whose_numbering_does_not_match_the_prompts_are_refused(names: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=rf"The pictures in pictures cannot be paired .*{reason}.*\. Number the"):
        pair(paths(*names), ["prompt"] * 9)
