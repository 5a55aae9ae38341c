"""The embedded teacher's captions, tokenizer, handwriting, classifier and files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from transformers import CLIPTokenizer

from rdm_diffusers.evaluation import measure, teacher_sampler
from rdm_diffusers.families import load_teacher
from rdm_diffusers.tiny import (
    TINY_FLOW_NAME,
    TINY_NAME,
    TINY_TEACHER,
    TINY_TEACHERS,
    TINY_V_NAME,
    is_tiny,
    resolve_teacher,
)
from rdm_diffusers.tiny.captions import BACKGROUNDS, CAPTIONS, DRAWINGS, INKS, MAX_TOKENS, make_tokenizer, parse_caption
from rdm_diffusers.tiny.classifier import FEATURE_DIM, DrawingClassifier, load_classifier
from rdm_diffusers.tiny.domains import domain_of
from rdm_diffusers.tiny.reference import REFERENCES, load_quality, load_statistics

FOLDER = Path(TINY_TEACHER).parent
CLASSES = {
    TINY_NAME: StableDiffusionPipeline,
    TINY_V_NAME: StableDiffusionPipeline,
    TINY_FLOW_NAME: StableDiffusion3Pipeline,
}
either = pytest.mark.parametrize("name", TINY_TEACHERS)


def test_there_are_240_captions_of_which_24_are_held_out() -> None:
    assert len(CAPTIONS) == len(set(CAPTIONS)) == len(DRAWINGS) == 10 * len(INKS) * len(BACKGROUNDS) == 240
    assert sum(drawing.held_out for drawing in DRAWINGS) == 24


def test_each_colour_pair_misses_exactly_one_digit_and_each_digit_is_missed() -> None:
    held_out = [drawing for drawing in DRAWINGS if drawing.held_out]
    pairs = Counter((drawing.ink, drawing.background) for drawing in held_out)
    assert set(pairs.values()) == {1}
    assert len(pairs) == 24
    assert {drawing.digit for drawing in held_out} == set(range(10))


def test_a_caption_names_its_drawing() -> None:
    assert all(parse_caption(drawing.caption) == drawing for drawing in DRAWINGS)
    assert "a red seven on a blue background" in CAPTIONS


def test_an_unknown_caption_is_one_clear_sentence() -> None:
    with pytest.raises(ValueError, match="does not know the caption 'a red cat'; write it like 'a black zero"):
        parse_caption("a red cat")


@pytest.mark.parametrize("which", ["made", "embedded"])
def test_every_caption_has_nine_tokens_its_words_and_the_two_ends(which: str) -> None:
    folder = Path(TINY_TEACHER) / "tokenizer"
    tokenizer = make_tokenizer() if which == "made" else CLIPTokenizer.from_pretrained(folder)
    tokens = [tuple(tokenizer(caption).input_ids) for caption in CAPTIONS]
    assert {len(each) for each in tokens} == {9}
    assert len(set(tokens)) == 240
    assert tokenizer.model_max_length == MAX_TOKENS


def test_a_tokenizer_made_again_is_the_same() -> None:
    assert make_tokenizer().get_vocab() == make_tokenizer().get_vocab()


@pytest.mark.parametrize("text", ["cat", "zebra", "a pink 3, please!", "something else"])
def test_any_other_text_has_tokens_letter_by_letter(text: str) -> None:
    tokenizer = make_tokenizer()
    tokens = tokenizer(text).input_ids
    assert tokenizer.unk_token_id not in tokens[1:-1]
    assert tokenizer.decode(tokens, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")


def test_handwriting_renders_what_is_asked_in_zero_to_one() -> None:
    pytest.importorskip("sklearn")
    from rdm_diffusers.tiny.handwriting import Handwriting

    images = Handwriting(torch.Generator().manual_seed(0)).draw(list(DRAWINGS))
    assert images.shape == (240, 3, 32, 32)
    assert 0 <= images.min() <= images.max() <= 1
    corners = images[:, :, 0, 0]  # where there is no ink
    backgrounds = torch.tensor([list(BACKGROUNDS.values())[drawing.background] for drawing in DRAWINGS])
    assert (corners - backgrounds).abs().mean() < 0.05


def test_handwriting_is_decided_by_its_generator_alone() -> None:
    pytest.importorskip("sklearn")
    from rdm_diffusers.tiny.handwriting import Handwriting

    torch.manual_seed(1)
    one = Handwriting(torch.Generator().manual_seed(0))
    first = one.draw(one.random_drawings(8))
    torch.manual_seed(2)
    other = Handwriting(torch.Generator().manual_seed(0))
    assert torch.equal(first, other.draw(other.random_drawings(8)))
    assert not any(drawing.held_out for drawing in one.random_drawings(2000))
    assert any(drawing.held_out for drawing in one.random_drawings(2000, held_out=True))


def test_the_shipped_classifier_reads_digit_ink_and_background() -> None:
    pytest.importorskip("sklearn")
    from rdm_diffusers.tiny.handwriting import Handwriting

    classifier = load_classifier()
    images = Handwriting(torch.Generator().manual_seed(3)).draw(list(DRAWINGS))
    correct = classifier.correct(images, list(DRAWINGS))
    assert classifier.features(images).shape == (240, FEATURE_DIM)
    assert correct["all"].float().mean() > 0.9
    assert torch.equal(correct["all"], correct["digit"] & correct["ink"] & correct["background"])


def test_features_pass_gradients_to_the_pictures() -> None:
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    DrawingClassifier().features(images).sum().backward()
    assert images.grad is not None
    assert images.grad.abs().max() > 0


@either
def test_an_embedded_teacher_is_safetensors_only_and_small(name: str) -> None:
    files = [path for path in Path(TINY_TEACHERS[name]).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert sum(path.stat().st_size for path in files) <= 10 * 2**20


@either
def test_an_embedded_teacher_is_a_stock_pipeline_that_names_no_foreign_path(name: str) -> None:
    index = json.loads((Path(TINY_TEACHERS[name]) / "model_index.json").read_text())
    configs = "".join(path.read_text() for path in Path(TINY_TEACHERS[name]).rglob("*.json"))
    assert index["_class_name"] == CLASSES[name].__name__
    assert "_name_or_path" not in configs
    assert type(load_teacher(name, torch.float32).pipeline) is CLASSES[name]


@pytest.mark.parametrize(
    ("name", "prediction_type", "tokens", "latents"),
    [
        (TINY_NAME, "epsilon", 12, (4, 8, 8)),
        (TINY_V_NAME, "v_prediction", 12, (4, 8, 8)),
        (TINY_FLOW_NAME, "flow_prediction", 13, (4, 8, 8)),
    ],
)
def test_an_embedded_teacher_is_loaded_frozen_and_found_by_name(
    name: str, prediction_type: str, tokens: int, latents: tuple[int, int, int]
) -> None:
    teacher = load_teacher(name, torch.float32)
    assert is_tiny(name) and resolve_teacher(name) == TINY_TEACHERS[name]
    assert not any(parameter.requires_grad for parameter in teacher.denoiser.parameters())
    assert teacher.prediction_type == prediction_type
    assert teacher.family.latent_shape(teacher.pipeline, None) == latents
    assert teacher.encode_prompts(domain_of(name).captions[:3]).tensors["prompt_embeds"].shape[:2] == (3, tokens)


def test_any_other_name_is_no_embedded_teacher() -> None:
    assert not is_tiny("me/model") and resolve_teacher("me/model") == "me/model"


def test_all_references_of_a_domain_have_the_same_training_pictures() -> None:
    names = [name for name in TINY_TEACHERS if domain_of(name) is domain_of(TINY_NAME)]
    first, *others = (load_statistics(name)["data"] for name in names)
    for other in others:
        assert torch.equal(first.mean, other.mean) and torch.equal(first.covariance, other.covariance)


@either
def test_the_reference_statistics_are_means_and_covariances_of_the_feature_net(name: str) -> None:
    statistics = load_statistics(name)
    assert set(statistics) == {"teacher", "teacher_unguided", "data"}
    for each in statistics.values():
        assert each.mean.shape == (domain_of(name).feature_dim,)
        assert each.covariance.shape == (domain_of(name).feature_dim,) * 2
        assert torch.allclose(each.covariance, each.covariance.T)
        assert torch.linalg.eigvalsh(each.covariance).min() > -1e-6


@either
def test_the_shipped_quality_names_what_the_metrics_need(name: str) -> None:
    quality = load_quality(name)
    assert {"fd_to_teacher", "fd_to_data", "prompt_accuracy", "num_images"} <= quality.keys()
    assert quality["guidance_scale"] == REFERENCES[name].guidance_scale


@pytest.mark.parametrize(
    ("name", "options"), [(TINY_NAME, {}), (TINY_V_NAME, {}), (TINY_FLOW_NAME, {"max_sequence_length": 1})]
)
def test_an_embedded_teacher_draws_what_it_is_asked_and_is_measured(name: str, options: dict) -> None:
    pipeline = load_teacher(name, torch.float32).pipeline
    sampler = teacher_sampler(pipeline, "dpm-solver++", 10, guidance_scale=2.0, **options)
    metrics = measure(sampler, "dpm-solver++", num_images=240, teacher=name)
    assert metrics.nfe == 20
    assert metrics.prompt_accuracy is not None and metrics.prompt_accuracy > 0.97
    assert metrics.fd_to_teacher is not None and 0 < metrics.fd_to_teacher < 100
