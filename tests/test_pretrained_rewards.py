"""Pretrained rewards, small and random, through the same loading code and the same forms of files as the real ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from parts_rewards import (
    MAX_TOKENS,
    SAVE,
    save_aesthetic,
    save_clip,
    save_hpsv3,
    save_hpsv3_package,
    save_image_reward,
    save_open_clip,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import train_rdm_lora
from rdm_diffusers.config.command_line import parse_args
from rdm_diffusers.rewards import Reward, evaluate, load_reward
from rdm_diffusers.rewards.clip import vit_h_config
from rdm_diffusers.rewards.hpsv3 import HpsV3, split_tensors as split_hpsv3
from rdm_diffusers.rewards.image_reward import MEAN, STD, blip_config, split_tensors
from rdm_diffusers.rewards.pretrained import PretrainedReward
from rdm_diffusers.rewards.registry import PRETRAINED_REWARDS
from rdm_diffusers.tiny.captions import CAPTIONS, make_tokenizer
from rdm_diffusers.training.external_rewards import load_rewards

PROMPTS = CAPTIONS[3::60]
READING = [name for name in SAVE if name != "aesthetic"]  # those that read the prompt


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of small random weights for each reward."""
    torch.manual_seed(0)
    found = {}
    for name, save in SAVE.items():
        found[name] = tmp_path_factory.mktemp(name) / "weights"
        save(found[name])
    return found


@pytest.fixture(scope="session")
def hpsv3_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where as much of the package hpsv3 stands as is needed."""
    folder = tmp_path_factory.mktemp("packages")
    save_hpsv3_package(folder)
    return folder


@pytest.fixture(autouse=True)
def installed(hpsv3_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package hpsv3 is installed."""
    monkeypatch.syspath_prepend(str(hpsv3_package))


@pytest.fixture
def reward(folders: dict[str, Path]):
    """Loads a reward from its small weights."""

    def load(name: str, dtype: torch.dtype = torch.float32) -> PretrainedReward:
        loaded = load_reward(f"{name}={folders[name]}", "cpu", dtype).reward
        assert isinstance(loaded, PretrainedReward)
        if isinstance(loaded, HpsV3):
            loaded.pixels = 56 * 56  # 16 patches instead of 1024
        return loaded

    return load


@pytest.fixture
def complaint(folders: dict[str, Path]):
    """The one sentence that loading raises."""

    def load(spec: str) -> str:
        with pytest.raises(ValueError) as raised:
            load_reward(spec, "cpu")
        said = str(raised.value)
        assert "\n" not in said
        assert said.endswith(".")
        return said

    return load


def pictures(count: int = 4, height: int = 40, width: int = 40) -> Tensor:
    """Smooth random pictures away from black and white, whose gradients are wanted."""
    noise = F.interpolate(torch.rand(count, 3, 10, 10), (height, width), mode="bilinear")
    return (0.2 + 0.6 * noise).requires_grad_()


@pytest.mark.parametrize("name", SAVE)
def test_a_reward_gives_one_finite_number_per_picture_and_gradients_to_all_pixels(name: str, reward) -> None:
    images, judge = pictures(), reward(name)
    assert isinstance(judge, Reward)
    scores = evaluate(judge, images, PROMPTS)
    scores.sum().backward()
    assert scores.shape == (4,)
    assert scores.isfinite().all()
    assert (images.grad.abs().amax((1, 2, 3)) > 1e-6).all()
    assert images.grad.isfinite().all()
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in judge.parameters())
    assert not judge.training


@pytest.mark.parametrize("name", SAVE)
def test_gradients_to_the_pixels_are_those_of_finite_differences(name: str, reward) -> None:
    judge = reward(name, torch.float64).double()
    images = pictures(2, 24, 20).detach().double().requires_grad_()
    steps = dict(eps=1e-3, atol=1e-4, rtol=0.01) if name == "hpsv3" else {}  # Qwen's norms and angles are float32
    assert torch.autograd.gradcheck(lambda pixels: judge(pixels, PROMPTS[:2]), images, fast_mode=True, **steps)


@pytest.mark.parametrize("name", SAVE)
def test_batches_of_any_size_give_the_same_scores_and_gradients(name: str, reward) -> None:
    judge, results = reward(name), []
    for size in (1, 3, 16):
        torch.manual_seed(0)
        images, judge.batch_size = pictures(5), size
        scores = evaluate(judge, images, [*PROMPTS, PROMPTS[0]])
        scores.sum().backward()
        results.append((scores, images.grad))
    for scores, gradient in results[1:]:
        torch.testing.assert_close(scores, results[0][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", SAVE)
def test_only_those_that_read_the_prompt_mind_it(name: str, reward) -> None:
    images = pictures(1)
    first, second = (evaluate(reward(name), images, [prompt]) for prompt in PROMPTS[:2])
    assert (first == second) == (name not in READING)


@pytest.mark.parametrize("name", SAVE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_answer_in_float32_and_nearly_the_same(name: str, dtype: torch.dtype, reward) -> None:
    images, half = pictures(), reward(name, dtype)
    scores, exact = evaluate(half, images, PROMPTS), evaluate(reward(name), images, PROMPTS)
    assert half.dtype == dtype
    assert scores.dtype == torch.float32
    scale = {"pickscore": 15, "clip_score": 100}.get(name, 1)
    assert (scores - exact).abs().max() < 0.1 * scale
    scores.sum().backward()
    assert images.grad.isfinite().all()


@pytest.mark.parametrize("name", SAVE)
def test_a_prompt_that_is_too_long_is_cut_off(name: str, reward) -> None:
    scores = evaluate(reward(name), pictures(1), [" ".join(CAPTIONS[:40])])
    assert scores.isfinite().all()


def test_the_folder_named_in_the_arguments_is_loaded_in_the_asked_precision(folders) -> None:
    flags = ["--algorithm", "gndmr", "--reward", f"hpsv2={folders['hpsv2']}:0.5", "--reward_dtype", "bfloat16"]
    (loaded,) = load_rewards(parse_args(flags), torch.device("cpu"))
    assert (loaded.reward.name, loaded.weight) == ("hpsv2.1", 0.5)
    assert loaded.reward.dtype == torch.bfloat16  # type: ignore[attr-defined]


# Each score is the published formula


def test_hpsv2_is_the_cosine_that_open_clip_s_architecture_gives(tmp_path: Path) -> None:
    model, images = save_open_clip(tmp_path / "w"), pictures(height=20)
    judge, tokenizer = load_reward(f"hpsv2={tmp_path / 'w'}", "cpu").reward, make_tokenizer()
    ids = tokenizer(PROMPTS, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids
    pixels = judge.preprocessing(images)  # type: ignore[attr-defined]
    expected = torch.cosine_similarity(model.visual(pixels), model.read(ids, tokenizer.eos_token_id))
    torch.testing.assert_close(evaluate(judge, images, PROMPTS), expected)
    assert expected.std() > 1e-3


@pytest.mark.parametrize(("name", "file"), [("hpsv2", "HPS_v2.1_compressed.pt"), ("hpsv2.0", "HPS_v2_compressed.pt"),
                                            ("hpsv2.1", "HPS_v2.1_compressed.pt")])  # fmt: skip
def test_each_version_of_hpsv2_has_its_own_file(name: str, file: str, tmp_path: Path, complaint) -> None:
    save_open_clip(tmp_path / "w", file)
    for place in (tmp_path / "w", tmp_path / "w" / file):
        assert evaluate(load_reward(f"{name}={place}", "cpu").reward, pictures(), PROMPTS).isfinite().all()
    (tmp_path / "w" / file).rename(tmp_path / "w" / "other.pt")
    assert "The model " in complaint(f"{name}={tmp_path / 'w'}")


def test_hpsv2_reads_the_same_from_a_file_and_from_the_folder_that_it_saves(folders, tmp_path: Path) -> None:
    published, images = load_reward(f"hpsv2={folders['hpsv2']}", "cpu").reward, pictures()
    published.model.save_pretrained(tmp_path)  # type: ignore[attr-defined]
    published.tokenizer.save_pretrained(tmp_path)  # type: ignore[attr-defined]
    again = load_reward(f"hpsv2={tmp_path}", "cpu").reward
    assert torch.equal(evaluate(again, images, PROMPTS), evaluate(published, images, PROMPTS))


def test_hpsv2_takes_safetensors_too(folders, tmp_path: Path) -> None:
    shutil.copytree(folders["hpsv2"], tmp_path / "w")
    file = tmp_path / "w" / "HPS_v2.1_compressed.pt"
    tensors = torch.load(file, weights_only=True)["state_dict"]
    save_file(tensors, file.with_suffix(".safetensors"))
    images = pictures()
    scores = [evaluate(load_reward(f"hpsv2={place}", "cpu").reward, images, PROMPTS)
              for place in (file, file.with_suffix(".safetensors"))]  # fmt: skip
    assert torch.equal(*scores)


def test_clip_score_and_pickscore_are_the_cosine_on_their_scales(tmp_path: Path) -> None:
    model = save_clip(tmp_path)
    with torch.no_grad():
        model.logit_scale.fill_(4.0)
    model.save_pretrained(tmp_path)
    clip_score, pickscore = (load_reward(f"{name}={tmp_path}", "cpu").reward for name in ("clip_score", "pickscore"))
    images, ids = pictures(), make_tokenizer()(PROMPTS, padding=True, return_tensors="pt")
    outputs = model(pixel_values=clip_score.preprocessing(images), **ids)  # type: ignore[attr-defined]
    expected = outputs.logits_per_image.diagonal()
    torch.testing.assert_close(evaluate(pickscore, images, PROMPTS), expected)
    cosine = torch.cosine_similarity(outputs.image_embeds, outputs.text_embeds)
    torch.testing.assert_close(evaluate(clip_score, images, PROMPTS), 100 * cosine)


def test_the_aesthetic_score_is_linear_in_the_unit_embedding_of_the_picture(tmp_path: Path) -> None:
    head = save_aesthetic(tmp_path)
    judge, images = load_reward(f"aesthetic={tmp_path}", "cpu").reward, pictures()
    pixels = judge.preprocessing(images)  # type: ignore[attr-defined]
    pooled = judge.model.vision_model(pixel_values=pixels).pooler_output  # type: ignore[attr-defined]
    embedding = F.normalize(judge.model.visual_projection(pooled), dim=-1)  # type: ignore[attr-defined]
    as_published = nn.Sequential(
        nn.Linear(12, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64),
        nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
    ).eval()  # fmt: skip
    as_published.load_state_dict({key.removeprefix("layers."): value for key, value in head.state_dict().items()})
    torch.testing.assert_close(evaluate(judge, images, PROMPTS), as_published(embedding)[:, 0])


def test_image_reward_is_the_head_on_the_token_that_attended_to_the_picture(tmp_path: Path) -> None:
    vision, text, head = save_image_reward(tmp_path)
    judge, images = load_reward(f"image_reward={tmp_path}", "cpu").reward, pictures()
    ids = judge.tokenizer(PROMPTS, padding=True, return_tensors="pt")  # type: ignore[attr-defined]
    seen = vision(judge.preprocessing(images))  # type: ignore[attr-defined]
    read = text(ids.input_ids, attention_mask=ids.attention_mask, encoder_hidden_states=seen,
                encoder_attention_mask=torch.ones(seen.shape[:2])).last_hidden_state  # fmt: skip
    torch.testing.assert_close(evaluate(judge, images, PROMPTS), (head(read[:, 0]) - MEAN) / STD)


def test_hpsv3_is_the_head_on_the_reward_token_of_qwen_s_own_forward(tmp_path: Path) -> None:
    _, head = save_hpsv3(tmp_path)
    judge, images = load_reward(f"hpsv3={tmp_path}", "cpu").reward, pictures(2)
    assert isinstance(judge, HpsV3)
    patches, grid = judge.patches(images)
    expected = []
    for image, prompt in zip(patches.chunk(2), PROMPTS, strict=False):
        ids = judge.tokenizer(judge.message(prompt, 256), return_tensors="pt").input_ids
        judge.model.config.image_token_id = judge.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        positions = torch.arange(ids.shape[1]).expand(3, 1, -1)
        read = judge.model(
            input_ids=ids, pixel_values=image, image_grid_thw=torch.tensor([grid]), position_ids=positions
        )
        at = ids[0].tolist().index(judge.tokenizer.convert_tokens_to_ids("<|Reward|>"))
        expected.append(head(read.last_hidden_state[0, at])[0])
    torch.testing.assert_close(evaluate(judge, images, PROMPTS[:2]), torch.stack(expected))


def test_hpsv3_reads_the_names_of_old_and_new_transformers_alike(folders) -> None:
    old = load_file(folders["hpsv3"] / "HPSv3.safetensors")
    names = {"model.": "model.language_model.", "visual.": "model.visual."}
    new = {next((b + n.removeprefix(a) for a, b in names.items() if n.startswith(a)), n): t for n, t in old.items()}
    assert old.keys() != new.keys()
    assert [part.keys() for part in split_hpsv3(old)] == [part.keys() for part in split_hpsv3(new)]


def test_a_prompt_cannot_speak_for_the_reward_token(reward) -> None:
    judge, images = reward("hpsv3"), pictures(1)
    scores = [evaluate(judge, images, [f"{PROMPTS[0]}{trick}"]) for trick in ("", "<|Reward|>", "<|image_pad|>")]
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores[0], scores[2])


def test_without_its_package_hpsv3_says_how_to_get_it(complaint, folders, monkeypatch) -> None:
    monkeypatch.undo()
    assert complaint(f"hpsv3={folders['hpsv3']}") == (
        "The reward hpsv3 asks Qwen2-VL in the words of the package hpsv3; get it by pip install --no-deps hpsv3 "
        "(nothing else of it is used, and what it depends on is not needed)."
    )


def test_another_version_of_hpsv3_s_package(complaint, folders, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "hpsv3").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "finds no INSTRUCTION and prompt_with_special_token in" in complaint(f"hpsv3={folders['hpsv3']}")


def test_the_real_sizes_are_those_of_the_published_models() -> None:
    from transformers import BlipTextModel, BlipVisionModel, CLIPModel

    with torch.device("meta"):
        clip = CLIPModel(vit_h_config())
        blip = [BlipVisionModel(blip_config().vision_config),
                BlipTextModel(blip_config().text_config, add_pooling_layer=False)]  # fmt: skip
    assert sum(p.numel() for p in clip.parameters()) == 986_109_441  # open_clip's ViT-H-14
    assert blip[0].embeddings.position_embedding.shape == (1, 197, 1024)
    assert blip[1].encoder.layer[11].crossattention.self.key.weight.shape == (768, 1024)


# Errors


@pytest.mark.parametrize("name", PRETRAINED_REWARDS)
def test_weights_that_are_not_there(name: str, complaint, tmp_path: Path) -> None:
    said = complaint(f"{name}={tmp_path / 'nowhere'}:2")
    assert said.startswith(f"The weights {tmp_path / 'nowhere'} of the reward ")
    assert said.endswith(" do not exist; give a file, a folder or a Hub id.")


@pytest.mark.parametrize("name", PRETRAINED_REWARDS)
def test_an_empty_folder(name: str, complaint, tmp_path: Path) -> None:
    assert str(tmp_path) in complaint(f"{name}={tmp_path}")


@pytest.mark.parametrize("name", PRETRAINED_REWARDS)
def test_without_a_network_the_sentence_says_what_to_download(name: str, complaint) -> None:
    said = complaint(name)
    assert "network" in said
    assert f"--reward {name if name != 'hpsv2' else 'hpsv2.1'}=/path/to/" in said or "--reward clip" in said


def test_the_weights_of_another_reward_are_named_by_what_is_missing(complaint, folders, tmp_path: Path) -> None:
    shutil.copytree(folders["hpsv2"], tmp_path / "w")
    file = tmp_path / "w" / "HPS_v2.1_compressed.pt"
    shutil.copy(folders["image_reward"] / "ImageReward.pt", file)
    said = complaint(f"hpsv2={file}")
    assert said.startswith(f"The weights {file} are not those of the reward hpsv2.1 (missing: logit_scale, ")
    assert "; unknown: blip.text_encoder." in said


def test_a_model_of_another_size_is_named_by_the_shapes(complaint, folders, tmp_path: Path) -> None:
    shutil.copy(folders["hpsv2"] / "HPS_v2.1_compressed.pt", tmp_path)
    said = complaint(f"hpsv2={tmp_path / 'HPS_v2.1_compressed.pt'}")  # no config.json: the real size is expected
    assert "of another shape: " in said
    assert "missing: text_model.encoder.layers.10." in said


def test_a_file_with_code_in_it_is_not_unpickled(complaint, folders, tmp_path: Path) -> None:
    shutil.copytree(folders["image_reward"], tmp_path / "w")
    torch.save({"mlp": nn.Linear(1, 1)}, tmp_path / "w" / "ImageReward.pt")
    said = complaint(f"image_reward={tmp_path / 'w'}")
    assert "cannot be read (UnpicklingError" in said
    assert "never unpickled: download them again, or save the tensors as safetensors." in said


@pytest.mark.parametrize("file", ["w.pt", "w.safetensors"])
def test_a_damaged_file(file: str, complaint, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(b"no weights")
    for name in ("hpsv2", "image_reward", "aesthetic"):
        assert "cannot be read (" in complaint(f"{name}={tmp_path / file}")


def test_a_file_that_is_no_weights(complaint, tmp_path: Path) -> None:
    (tmp_path / "w.txt").write_text("no weights")
    assert complaint(f"hpsv2={tmp_path / 'w.txt'}") == (
        f"The weights {tmp_path / 'w.txt'} of the reward hpsv2.1 are no file of weights; give one of .safetensors, "
        ".pt, .pth, .bin, .ckpt."
    )


def test_a_file_of_something_else_than_tensors(complaint, tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "w.pt")
    assert "hold no table of tensors" in complaint(f"image_reward={tmp_path / 'w.pt'}")


def test_a_folder_of_another_architecture(complaint, folders, tmp_path: Path) -> None:
    shutil.copytree(folders["pickscore"], tmp_path / "w")
    tensors = load_file(tmp_path / "w" / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, tmp_path / "w" / "model.safetensors", {"format": "pt"})
    said = complaint(f"pickscore={tmp_path / 'w'}")
    assert "missing or of another shape: visual_projection.weight" in said


def test_a_missing_tokenizer(complaint, tmp_path: Path) -> None:
    save_clip(tmp_path, tokenizer=False)
    said = complaint(f"pickscore={tmp_path}")
    assert said.startswith("The reward pickscore needs the tokenizer of laion/CLIP-ViT-H-14-laion2B-s32B-b79K, which ")
    assert said.endswith("or put its files (tokenizer.json or vocab.json or vocab.txt) beside the weights.")


def test_a_tokenizer_of_another_model(complaint, folders, tmp_path: Path) -> None:
    shutil.copytree(folders["image_reward"], tmp_path / "w")
    words = [f"word{i}" for i in range(100)]
    (tmp_path / "w" / "tokenizer.json").unlink()
    (tmp_path / "w" / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    assert complaint(f"image_reward={tmp_path / 'w'}") == (
        f"The tokenizer of {tmp_path / 'w'} has 105 tokens, the reward image_reward knows 64; put its own tokenizer "
        "beside the weights."
    )


def test_tiny_rewards_have_no_weights_to_choose(complaint) -> None:
    assert complaint("tiny_bold=/weights:2") == "The reward tiny_bold has no weights to choose; leave =/weights out."


def test_nothing_behind_the_equals_sign(complaint) -> None:
    assert complaint("hpsv2=:2") == (
        "--reward 'hpsv2=' names no weights behind the =; write hpsv2=/path/to/weights, or hpsv2."
    )


def test_unknown_tensors_of_the_published_file_are_not_lost() -> None:
    assert "surprise" in split_tensors({"surprise": torch.zeros(1)})[2]


def test_the_architecture_of_hpsv2_trains_the_tiny_teacher_through_the_code_of_the_real_one(
    folders, tmp_path: Path
) -> None:
    from parts import run_arguments

    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    arguments = run_arguments(
        "tiny", tmp_path / "prompts.txt", tmp_path / "student", algorithm="gndmr", steps_per_rollout=2,
        reward=[f"hpsv2={folders['hpsv2']}:0.5", f"image_reward={folders['image_reward']}"],
    )  # fmt: skip
    train_rdm_lora.main(arguments)
    assert (tmp_path / "student" / "pytorch_lora_weights.safetensors").is_file()
