"""What evaluations lean on: known distances, honest intervals, references, prompt sets, and comparisons that refuse."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rdm_diffusers.evaluation import command
from rdm_diffusers.evaluation.features import Reference, load_features, load_reference, resize_clean, save_reference
from rdm_diffusers.evaluation.measuring import measure_reward
from rdm_diffusers.evaluation.pictures import list_images, read_batches, save_image
from rdm_diffusers.evaluation.prompt_sets import load_prompt_set
from rdm_diffusers.evaluation.records import compare, digest_of_files, digest_of_tensors, digest_of_texts
from rdm_diffusers.frechet import GaussianStatistics, distance_with_interval, weights_without_each_group
from rdm_diffusers.rewards import load_reward
from rdm_diffusers.tiny.captions import CAPTIONS

STANDARD = GaussianStatistics(torch.zeros(8, dtype=torch.float64), torch.eye(8, dtype=torch.float64))
KNOWN = 8 * 0.3**2 + 8 * 0.2**2  # from N(0, 1) to N(0.3, 1.2^2), in 8 dimensions


def drawn(seed: int, count: int) -> Tensor:
    """Samples `[N, 8]` whose distribution is `KNOWN` from `STANDARD`."""
    return 0.3 + 1.2 * torch.randn(count, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def write_pictures(folder: Path, count: int, side: int = 32, seed: int = 0) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    for i in range(count):
        save_image(torch.rand(3, side, side, generator=generator), folder / f"{i}.png", folder / ".aside.png")
    return folder


def test_the_extrapolated_distance_of_gaussians_is_the_known_one() -> None:
    found = distance_with_interval(drawn(0, 50_000), STANDARD)
    assert found.extrapolated == pytest.approx(KNOWN, abs=3 * (found.standard_error or 0))
    exact = drawn(0, 50_000)
    exact = (exact - exact.mean(0)) @ torch.linalg.cholesky(torch.cov(exact.T)).inverse().T * 1.2 + 0.3
    assert distance_with_interval(exact, STANDARD).value == pytest.approx(KNOWN, rel=1e-3)


def test_the_interval_holds_what_as_many_pictures_give_and_the_extrapolation_has_no_bias() -> None:
    found = [distance_with_interval(drawn(seed, 120), STANDARD) for seed in range(100)]
    expected = float(np.mean([one.value for one in found]))
    held = [one.low <= expected <= one.high for one in found if one.low is not None and one.high is not None]
    assert len(held) == 100 and 0.88 <= np.mean(held) <= 1
    extrapolated = [one.extrapolated or 0.0 for one in found]
    assert expected > 1.2 * KNOWN
    assert np.mean(extrapolated) == pytest.approx(KNOWN, abs=3 * np.std(extrapolated) / 10)


def test_prompts_with_several_pictures_each_are_strata() -> None:
    """Half of the spread is between prompts, where a balanced sample has no error."""
    prompts = 3 * torch.randn(40, 8, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

    def balanced(seed: int) -> Tensor:
        return prompts.repeat(6, 1) + drawn(seed, 240)

    spread = float(np.std([distance_with_interval(balanced(seed), STANDARD).value for seed in range(60)]))
    errors = [distance_with_interval(balanced(seed), STANDARD, 40).standard_error or 0.0 for seed in range(10)]
    careless = [distance_with_interval(balanced(seed), STANDARD).standard_error or 0.0 for seed in range(10)]
    assert np.mean(errors) == pytest.approx(spread, rel=0.35)
    assert np.mean(careless) > 1.4 * spread


def test_every_stratum_keeps_its_weight_without_each_group() -> None:
    strata = torch.arange(103) % 20
    total = torch.bincount(strata).double()
    for weights in weights_without_each_group(strata):
        assert torch.allclose(torch.zeros(20).double().index_add(0, strata, weights), total)
        assert 0 < (weights == 0).sum() < 12


def test_weighted_statistics_are_those_of_repeated_samples_up_to_the_unbiased_factor() -> None:
    features, weights = drawn(0, 50), torch.tensor([1.0, 3.0] * 25)
    repeated = torch.cat([features, features[1::2], features[1::2]])
    statistics, expected = GaussianStatistics.of(features, weights), torch.cov(repeated.T, correction=0)
    assert torch.allclose(statistics.mean, repeated.mean(0))
    assert torch.allclose(statistics.covariance * (1 - 10 * 25 / 100**2), expected)


def test_too_few_pictures_have_a_warning_and_no_interval() -> None:
    found = distance_with_interval(drawn(0, 30), STANDARD)
    assert (found.low, found.high, found.extrapolated) == (None, None, None)
    assert found.warning is not None and "30 images are few for 8 features" in found.warning
    assert distance_with_interval(drawn(0, 80), STANDARD).warning is None


def test_a_reference_may_be_a_folder_or_the_statistics_made_of_it(tmp_path: Path) -> None:
    folder, features = write_pictures(tmp_path / "data", 40), load_features("tiny")
    reference = load_reference(str(folder), "data", features)
    save_reference(reference, features, tmp_path / "data.safetensors")
    again = load_reference(str(tmp_path / "data.safetensors"), "data", features)
    assert again.as_dict() == reference.as_dict() and again.num_images == 40
    mean, covariance = reference.statistics.mean.numpy(), reference.statistics.covariance.numpy()
    np.savez(tmp_path / "data.npz", mu=mean, sigma=covariance)
    foreign = load_reference(str(tmp_path / "data.npz"), "data", features)
    for one in (again, foreign):
        assert torch.equal(one.statistics.covariance, reference.statistics.covariance)


def test_statistics_of_other_features_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    features = load_features("tiny")
    other = copy.copy(features)
    object.__setattr__(other, "weights_sha256", "0" * 64)
    save_reference(Reference(STANDARD, "", "x"), other, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"was made with other features .*; make it again with --features tiny"):
        load_reference(str(tmp_path / "other.safetensors"), "data", features)
    for name, sentence in {
        "a.safetensors": "holds no statistics of rdm-evaluate",
        "a.npz": "has no mu and sigma",
    }.items():
        (tmp_path / name).write_bytes(b"nothing")
        with pytest.raises(ValueError, match=sentence):
            load_reference(str(tmp_path / name), "data", features)
    with pytest.raises(ValueError, match="The reference has 8 features and the pictures have 64"):
        distance_with_interval(torch.rand(50, 64), STANDARD)


def test_the_inception_features_name_their_extra_where_it_is_missing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "cleanfid", None)
    for name in ("inception", "inception-clean"):
        with pytest.raises(ImportError, match=r"pip install 'rdm-diffusers\[eval\]'"):
            load_features(name)
    with pytest.raises(ValueError, match=r"--feature_weights missing\.pth does not exist"):
        load_features("inception", "missing.pth")
    with pytest.raises(ValueError, match="pictures of 32 x 32 pixels, not 64 x 64; use --features inception"):
        load_features("tiny").of_files(list_images(write_pictures(tmp_path / "large", 2, side=64)))


def test_the_clean_resize_is_pillows_bicubic_without_rounding() -> None:
    image = torch.randint(80, 176, (3, 50, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    resized = resize_clean(image)
    assert resized.shape == (3, 299, 299) and resized.dtype == torch.float32
    rounded = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((299, 299), Image.Resampling.BICUBIC)
    assert (resized - torch.from_numpy(np.array(rounded)).permute(2, 0, 1).float()).abs().max() < 2
    assert not torch.equal(resized, resized.round())


def test_pictures_of_unlike_sizes_are_read_in_their_order(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "mixed", 3)
    Image.new("L", (20, 10), 7).save(folder / "1b.png")
    assert [tuple(batch.shape) for batch in read_batches(list_images(folder))] == [
        (2, 3, 32, 32), (1, 3, 10, 20), (1, 3, 32, 32)
    ]  # fmt: skip


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "pictures", 2)
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"The picture .*1\.png cannot be read"):
        list(read_batches(list_images(folder)))


def test_a_rewards_mean_leaves_out_and_counts_what_is_not_finite(tmp_path: Path) -> None:
    folder, reward = write_pictures(tmp_path / "pictures", 4), tmp_path / "reward.py"
    reward.write_text("def judge(images, prompts):\n    return [float(prompt) for prompt in prompts]\n")
    prompts = ["1", "nan", "2", "6"]
    found = measure_reward(list_images(folder), prompts, load_reward(f"{reward}:judge", "cpu").reward)
    assert found == {"mean": 3, "standard_error": pytest.approx(np.std([1, 2, 6], ddof=1) / 3**0.5), "invalid": 0.25}
    alone = measure_reward(list_images(folder)[:1], ["5"], load_reward(f"{reward}:judge", "cpu").reward)
    assert alone == {"mean": 5, "standard_error": None, "invalid": 0}


def test_prompt_sets_are_read_from_copies_of_their_datasets(tmp_path: Path) -> None:
    benchmark = tmp_path / "hpdv2" / "benchmark"
    benchmark.mkdir(parents=True)
    for style in ("anime", "concept-art", "paintings", "photo"):
        (benchmark / f"{style}.json").write_text(json.dumps([f"{style} {i}" for i in range(3)]))
    prompts = load_prompt_set(f"hpdv2={tmp_path / 'hpdv2'}")
    assert prompts[:5] == ["anime 0", "concept-art 0", "paintings 0", "photo 0", "anime 1"] and len(prompts) == 12
    (tmp_path / "parti").mkdir()
    (tmp_path / "parti" / "PartiPrompts.tsv").write_text("Prompt\tCategory\na cat\tAnimals\na dog\tAnimals\n")
    assert load_prompt_set(f"parti={tmp_path / 'parti'}") == ["a cat", "a dog"]
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "train.jsonl").write_text('{"caption": "a bus", "id": 1}\n{"caption": "a car", "id": 2}\n')
    assert load_prompt_set(f"coco={tmp_path / 'coco'}") == ["a bus", "a car"]
    assert load_prompt_set("tiny") == list(CAPTIONS)


def test_prompt_sets_out_of_reach_are_one_sentence(tmp_path: Path) -> None:
    for name in ("hpdv2", "coco", "parti", f"hpdv2={tmp_path}"):
        with pytest.raises(ValueError, match=r"The prompts \w+ could not be loaded \(.*\); connect to the network"):
            load_prompt_set(name)
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match=r"empty\.txt holds no prompts; write one a line"):
        load_prompt_set(str(tmp_path / "empty.txt"))


def test_digests_tell_contents_apart_and_nothing_else(tmp_path: Path) -> None:
    assert digest_of_texts(["ab", "c"]) != digest_of_texts(["a", "bc"])
    tensors = {"a": torch.arange(6.0), "b": torch.ones(2, dtype=torch.bfloat16)}
    assert digest_of_tensors(tensors) == digest_of_tensors(dict(reversed(tensors.items())))
    assert digest_of_tensors(tensors) != digest_of_tensors({**tensors, "a": torch.arange(6.0).reshape(2, 3)})
    assert digest_of_tensors(tensors, 3) != digest_of_tensors({**tensors, "a": torch.arange(6.0) + 1}, 3)
    large = torch.zeros(2**24 + 4, dtype=torch.int8)  # beyond what float32 counts
    before, large[-1] = digest_of_tensors({"a": large}, 1024), 1
    assert digest_of_tensors({"a": large}, 1024) != before
    for name in ("a", "b"):
        (tmp_path / name).write_text("same")
    assert digest_of_files([tmp_path / "a"]) == digest_of_files([tmp_path / "b"])


@pytest.fixture(scope="module")
def two_folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The evaluations of two folders of 48 pictures."""
    root = tmp_path_factory.mktemp("two")
    for seed, name in enumerate("ab"):
        pictures = write_pictures(root / f"{name}-pictures", 48, seed=seed)
        options = ["--prompts", "tiny", "--reference_data", "tiny", "--reward", "tiny_bold"]
        command.main(["--images", str(pictures), "--output_dir", str(root / name), *options])
    return root / "a", root / "b"


def test_two_like_evaluations_are_shown_side_by_side(two_folders, capsys) -> None:
    capsys.readouterr()
    command.main(["compare", str(two_folders[0]), str(two_folders[1] / "evaluation.json")])
    lines = capsys.readouterr().out.splitlines()
    a, b = (json.loads((folder / "evaluation.json").read_text())["metrics"]["fd_to_data"] for folder in two_folders)
    row = next(line for line in lines if line.startswith("| fd_to_data |")).split(" | ")
    assert row[1:3] == [f"{a['value']:.4g}", f"{b['value']:.4g}"]
    assert row[3].startswith(f"{b['value'] - a['value']:+.4g} ± ")
    assert any(line.startswith("| tiny_bold |") for line in lines)


@pytest.mark.parametrize(
    ("path", "value"),
    [("num_images", 47), ("first_seed", 3), ("dtype", "bfloat16"), ("prompts.sha256", "x"), ("features.resize", "box"),
     ("features.weights_sha256", "x"), ("reference.data.sha256", "x"), ("versions.torch", "0"),
     ("rewards.tiny_bold", "x")],
)  # fmt: skip
def test_unlike_evaluations_are_refused_naming_what_differs_unless_it_is_let_differ(
    path: str, value: object, two_folders
) -> None:
    a = json.loads((two_folders[0] / "evaluation.json").read_text())
    b = copy.deepcopy(a)
    *outer, name = path.split(".")
    place = b["settings"]
    for key in outer:
        place = place[key]
    place[name] = value
    with pytest.raises(
        ValueError, match=f"cannot be compared, because their settings differ: {path} is .* and {value}"
    ):
        compare(a, b)
    assert "| fd_to_data |" in compare(a, b, [path.split(".")[0]])


def test_what_is_no_evaluation_cannot_be_compared(two_folders, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("[]")
    for path in (tmp_path / "other.json", tmp_path / "missing.json"):
        with pytest.raises(ValueError, match="is not a record of rdm-evaluate"):
            command.main(["compare", str(two_folders[0]), str(path)])
