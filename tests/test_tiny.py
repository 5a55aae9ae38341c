"""The embedded teacher's captions, tokenizer, handwriting, classifier and files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

from rdm_diffusers.evaluation import measure, teacher_sampler
from rdm_diffusers.families import load_teacher
from rdm_diffusers.tiny import TINY_NAME, TINY_TEACHER, resolve_teacher
from rdm_diffusers.tiny.captions import BACKGROUNDS, CAPTIONS, DRAWINGS, INKS, parse_caption
from rdm_diffusers.tiny.classifier import FEATURE_DIM, DrawingClassifier, load_classifier
from rdm_diffusers.tiny.reference import QUALITY, STATISTICS, load_quality, load_statistics
from rdm_diffusers.tiny.tokenizer import MAX_TOKENS, make_tokenizer

FOLDER = Path(TINY_TEACHER).parent
built = pytest.mark.skipif(not (FOLDER / STATISTICS).exists(), reason="the reference statistics are not built yet")


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


def test_the_embedded_teacher_is_safetensors_only_and_small() -> None:
    files = [path for path in Path(TINY_TEACHER).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert sum(path.stat().st_size for path in files) <= 10 * 2**20


def test_the_embedded_teacher_is_a_stock_pipeline_that_names_no_foreign_path() -> None:
    index = json.loads((Path(TINY_TEACHER) / "model_index.json").read_text())
    configs = "".join(path.read_text() for path in Path(TINY_TEACHER).rglob("*config.json"))
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert "_name_or_path" not in configs
    assert type(load_teacher(TINY_NAME, torch.float32).pipeline) is StableDiffusionPipeline


def test_the_embedded_teacher_is_loaded_frozen_and_found_by_name() -> None:
    teacher = load_teacher(TINY_NAME, torch.float32)
    assert resolve_teacher(TINY_NAME) == TINY_TEACHER
    assert resolve_teacher("me/model") == "me/model"
    assert not any(parameter.requires_grad for parameter in teacher.denoiser.parameters())
    assert teacher.prediction_type == "epsilon"
    assert teacher.family.latent_shape(teacher.pipeline, None) == (4, 8, 8)
    assert teacher.family.encode_prompts(teacher.pipeline, CAPTIONS[:3]).tensors["prompt_embeds"].shape[:2] == (3, 12)


@built
def test_the_reference_statistics_are_means_and_covariances_of_the_feature_net() -> None:
    statistics = load_statistics()
    assert set(statistics) == {"teacher", "data"}
    for each in statistics.values():
        assert each.mean.shape == (FEATURE_DIM,)
        assert each.covariance.shape == (FEATURE_DIM, FEATURE_DIM)
        assert torch.allclose(each.covariance, each.covariance.T)
        assert torch.linalg.eigvalsh(each.covariance).min() > -1e-6


@built
def test_the_shipped_quality_names_what_the_metrics_need() -> None:
    assert (FOLDER / QUALITY).exists()
    assert {"fd_to_teacher", "fd_to_data", "prompt_accuracy", "num_images"} <= load_quality().keys()


def test_the_embedded_teacher_draws_what_it_is_asked_and_is_measured() -> None:
    sampler = teacher_sampler(load_teacher("tiny", torch.float32).pipeline, "dpm-solver++", 10, guidance_scale=2.0)
    metrics = measure(sampler, "dpm-solver++", num_images=240)
    assert metrics.nfe == 20
    assert metrics.prompt_accuracy is not None and metrics.prompt_accuracy > 0.97
    assert metrics.fd_to_teacher is not None and 0 < metrics.fd_to_teacher < 100
