"""Whatever is wrong with a command line is one clear sentence, before anything long is done."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from parts import PROMPTS, make_run, run_arguments

import train_rdm_lora
from rdm_diffusers.config import RunConfig, optimizers
from rdm_diffusers.config.command_line import parse_args
from rdm_diffusers.config.presets import TINY_DEFAULTS
from rdm_diffusers.config.refused import REFUSED
from rdm_diffusers.distillation import DMD, GNDM
from rdm_diffusers.tiny import TINY_NAME
from rdm_diffusers.tiny.captions import CAPTIONS
from rdm_diffusers.training.assembly import make_objective
from rdm_diffusers.training.prompts import load_prompts
from rdm_diffusers.training.run_folder import check_resumable


@pytest.fixture
def complaint(teacher_folder: Path, prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """What the program says of a run with some arguments changed; it must be one line."""

    def run(**changes) -> str:
        options = {"teacher": teacher_folder, "prompts_file": prompts_file, "output_dir": tmp_path / "student"}
        options |= {name: changes.pop(name) for name in list(changes) if name in options}
        capsys.readouterr()
        with pytest.raises((ValueError, SystemExit)) as caught:
            train_rdm_lora.main(run_arguments(**options, **changes))
        said = str(caught.value)
        if isinstance(caught.value, SystemExit):
            said = capsys.readouterr().err.strip().splitlines()[-1]
        assert "\n" not in said
        return said

    return run


def test_an_unknown_algorithm(complaint) -> None:
    assert "--algorithm is ddpo; it must be dmd, gndm, gndmr," in complaint(algorithm="ddpo")


def test_a_missing_teacher_folder(complaint, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert complaint(teacher=missing) == (
        f"The teacher folder {missing} does not exist; check the path or give a Hub model id."
    )


def test_a_teacher_that_is_not_on_the_hub(complaint) -> None:
    assert (
        "The teacher 'nobody/nothing' is neither a local folder nor in the cache, and the Hub cannot be"
        in complaint(teacher="nobody/nothing")
    )


def test_a_lora_given_as_the_teacher(complaint, tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"")
    assert "is a LoRA, not a teacher; give the model that it was trained on." in complaint(teacher=tmp_path / "lora")


def test_a_folder_that_is_no_pipeline(complaint, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "has no model_index.json; give a folder that a diffusers pipeline saved." in complaint(
        teacher=tmp_path / "empty"
    )


def test_a_teacher_of_a_family_that_is_not_supported(complaint, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "AudioLDMPipeline"}))
    assert "Teachers of class AudioLDMPipeline are not supported; supported are StableDiffusionPipeline" in complaint(
        teacher=tmp_path
    )


def test_a_damaged_model_index_is_not_called_a_missing_folder(complaint, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "Stable')
    said = complaint(teacher=tmp_path)
    assert "model_index.json" in said
    assert "no local folder" not in said


def test_a_missing_prompts_file(complaint, tmp_path: Path) -> None:
    said = complaint(prompts_file=tmp_path / "missing.txt")
    assert said == f"--prompts_file {tmp_path / 'missing.txt'} does not exist; give a text file with one prompt a line."


def test_an_empty_prompts_file(complaint, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n  \n")
    assert "holds no prompts; write one a line." in complaint(prompts_file=tmp_path / "empty.txt")


def test_no_prompts_for_a_real_teacher(complaint) -> None:
    assert complaint(prompts_file=None) == "No prompts: give --prompts_file, or --dataset_name with --caption_column."


def test_a_group_larger_than_the_batch(complaint) -> None:
    assert "An update has 8 samples" in complaint(group_size=16)
    assert "which is not a multiple of 16 (--group_size x --steps_per_rollout)" in complaint(group_size=16)


def test_a_batch_that_is_no_whole_number_of_groups(complaint) -> None:
    assert "An update has 8 samples" in complaint(group_size=3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_train_steps", 0),
        ("num_student_steps", 0),
        ("train_batch_size", 0),
        ("gradient_accumulation_steps", -1),
        ("group_size", 0),
        ("rank", 0),
        ("learning_rate", 0.0),
        ("validation_steps", 0),
        ("checkpointing_steps", 0),
        ("fake_updates_per_step", -1),
        ("num_validation_images", 0),
        ("max_train_samples", 0),
        ("num_renoisings", 0),
        ("reuse_rollouts", 0),
        ("reward_tilt", 0.0),
        ("fake_learning_rate", 0.0),
    ],
)
def test_a_number_that_must_be_positive(complaint, name: str, value: float) -> None:
    assert f"--{name} is {value}; it must be" in complaint(**{name: value})


@pytest.mark.parametrize("eta", [1.5, 0.5])
def test_an_eta_that_no_stock_scheduler_samples(complaint, eta: float) -> None:
    assert f"--eta is {eta}; it must be 1 or 0" in complaint(eta=eta)


@pytest.mark.parametrize("strength", [2.0, -0.5, float("nan")])
def test_a_correction_stronger_than_the_bias(complaint, strength: float) -> None:
    said = complaint(gndm_lambda=strength)
    assert f"--gndm_lambda is {strength}; it must lie in [0, 1]." in said


@pytest.mark.parametrize("strength", [None, 0.5])
def test_a_correction_without_a_group(complaint, strength: float | None) -> None:
    assert "--group_size 1 needs --gndm_lambda 0." in complaint(group_size=1, gndm_lambda=strength)


def test_rewards_without_the_algorithm_that_takes_them_and_the_reverse(complaint) -> None:
    assert complaint(algorithm="gndmr").endswith(
        "--algorithm gndmr needs external rewards: add --reward name, for example --reward tiny_bold."
    )
    for algorithm in ("gndm", "dmd"):
        assert complaint(algorithm=algorithm, reward="tiny_bold").endswith(
            f"--algorithm {algorithm} takes no rewards; use --algorithm gndmr or leave --reward out."
        )


def test_a_reward_named_twice(complaint) -> None:
    said = complaint(algorithm="gndmr", reward=["tiny_bold", "tiny_bold:2"])
    assert said == "Two of the rewards tiny_bold, tiny_bold:2 have one name; name each once."


def test_a_preset_that_contradicts_the_algorithm(complaint) -> None:
    said = complaint(algorithm="dmd", preset="gndm-fast")
    assert said.endswith("--algorithm dmd is the preset dmd2; leave --preset gndm-fast out or use gndm.")


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"sid_alpha": 1.2}, "--sid_alpha would have no effect with --algorithm gndm; leave it out."),
        ({"algorithm": "sid", "sim_c": 1}, "--sim_c would have no effect with --algorithm sid; leave it out."),
        (
            {"algorithm": "sim", "decoupled_guidance": True},
            "--algorithm sim has gradients through the teacher at one time, and --decoupled_guidance has two; leave "
            "that out.",
        ),
        (
            {"fake_score_unconditional": True},
            "GNDM corrects a fake score that knows its group's prompt: --fake_score_unconditional needs "
            "--gndm_lambda 0.",
        ),
    ],
)
def test_settings_of_the_family_that_do_not_go_together(complaint, changes: dict, sentence: str) -> None:
    assert complaint(**changes).endswith(sentence)


def test_a_black_box_in_groups_of_one(complaint) -> None:
    said = complaint(algorithm="gndmr", reward="tiny_prompt_black_box", group_size=1, gndm_lambda=0)
    assert said == (
        "The reward tiny_prompt_black_box gives no gradients, so its scores are compared within groups: raise "
        "--group_size above 1."
    )


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5])
def test_a_reward_share_that_leaves_nothing_to_fidelity(complaint, share: float) -> None:
    said = complaint(algorithm="gndmr", reward="tiny_bold", reward_share=share)
    assert said.endswith(f"--reward_share is {share}; it must lie in [0, 1), or be 1 with --projection_guard.")


def test_a_reward_share_of_one_is_allowed_with_the_projection_guard_alone() -> None:
    flags = ["--algorithm", "gndmr", "--reward", "tiny_bold", "--reward_share", "1", "--projection_guard"]
    assert parse_args(flags).rewards.reward_share == 1


@pytest.mark.parametrize("changes", [{}, {"reuse_rollouts": 2, "eta": 0}])
def test_importance_weights_where_nothing_is_to_be_weighed(complaint, changes: dict) -> None:
    said = complaint(importance_weighting="clipped", **changes)
    assert "it needs --reuse_rollouts above 1 and --eta above 0." in said


@pytest.mark.parametrize("name", ["max_train_steps", "checkpointing_steps"])
def test_a_checkpoint_or_an_end_in_the_middle_of_a_rollouts_service(complaint, name: str) -> None:
    said = complaint(**{"reuse_rollouts": 3, "max_train_steps": 6, "checkpointing_steps": 6, name: 4})
    assert f"--{name} is 4; it must be a multiple of --reuse_rollouts 3, so that no checkpoint falls between" in said


def test_more_trained_states_than_the_rollout_has(complaint) -> None:
    assert "--steps_per_rollout 3 is more than the 2 steps of a rollout" in complaint(steps_per_rollout=3)


@pytest.mark.parametrize("steps, states", [(1, 1), (2, 2), (3, 2), (4, 4), (8, 4)])
def test_the_tiny_teachers_rollouts_train_as_many_states_as_they_have(steps: int, states: int) -> None:
    assert parse_args(["--num_student_steps", str(steps)]).method.steps_per_rollout == states


@pytest.mark.parametrize("samples, states", [(16, 4), (24, 2), (8, 2), (4, 1)])
def test_the_tiny_teachers_train_as_many_states_of_a_rollout_as_divide_an_updates_samples(
    samples: int, states: int
) -> None:
    assert parse_args(["--train_batch_size", str(samples)]).method.steps_per_rollout == states
    assert (
        parse_args(
            ["--train_batch_size", "2", "--gradient_accumulation_steps", str(samples // 2)]
        ).method.steps_per_rollout
        == states
    )


def test_an_unknown_learning_rate_schedule(complaint) -> None:
    assert "wavy" in complaint(lr_scheduler="wavy")


def test_lora_layers_that_the_teacher_does_not_have(complaint) -> None:
    assert "to_nowhere" in complaint(lora_layers="to_nowhere")


def test_a_resolution_that_the_autoencoder_cannot_have(complaint) -> None:
    said = complaint(resolution="30x40")
    assert said == (
        "This teacher draws no pictures of 30 x 40 pixels, because each side must be a multiple of 8; the nearest size "
        "is 32x40."
    )


def test_an_output_folder_that_cannot_be_written(complaint, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = complaint(output_dir=tmp_path / "file" / "student")
    assert said == f"--output_dir {tmp_path / 'file' / 'student'} cannot be written (Not a directory); choose another."


def test_an_output_folder_of_another_run(complaint, tmp_path: Path) -> None:
    (tmp_path / "student" / "checkpoint-10").mkdir(parents=True)
    assert "holds the checkpoints or the student of another run; add --resume_from_checkpoint latest" in complaint()


def test_an_output_folder_of_a_finished_student(complaint, tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "rdm_config.json").write_text("{}")
    assert "holds the checkpoints or the student of another run" in complaint()


def test_resuming_where_there_is_nothing(complaint) -> None:
    assert "There is no checkpoint in" in complaint(resume_from_checkpoint="latest")


def test_resuming_with_another_rank_and_seed(
    complaint, teacher_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    argv = run_arguments(teacher_folder, prompts_file, tmp_path / "student", checkpointing_steps=2)
    train_rdm_lora.main(argv)
    said = complaint(resume_from_checkpoint="latest", rank=3, seed=5)
    assert "The checkpoint was made with other arguments: " in said
    assert "--rank (was 2, is 3)" in said
    assert "--seed (was 0, is 5)" in said


def test_folders_are_recorded_by_their_full_path_and_older_records_of_them_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("teacher", "vae", "tiny"):  # the name of an embedded teacher goes before a folder's
        Path(folder).mkdir()
    flags = ["--pretrained_model_name_or_path", "teacher", "--pretrained_vae_model_name_or_path", "vae"]
    arguments = parse_args(flags).as_arguments()
    names = {flag.removeprefix("--"): arguments[flag.removeprefix("--")] for flag in flags[::2]}
    assert list(names.values()) == [str(tmp_path / "teacher"), str(tmp_path / "vae")]
    older = dict(zip(names, flags[1::2], strict=True))
    assert check_resumable(arguments, arguments | older) is None
    others = [
        parse_args(["--pretrained_model", name]).teacher.pretrained_model_name_or_path for name in ("tiny", "me/model")
    ]
    assert others == ["tiny", "me/model"]


@pytest.mark.parametrize(("schedule", "free"), [("constant", True), ("cosine", False)])
def test_the_end_of_a_scheduled_learning_rate_is_kept_on_resume(schedule: str, free: bool) -> None:
    saved = parse_args(["--lr_scheduler", schedule, "--max_train_steps", "10"]).as_arguments()
    args = parse_args(["--lr_scheduler", schedule, "--max_train_steps", "20"]).as_arguments()
    if free:
        assert check_resumable(args, saved) is None
        return
    with pytest.raises(ValueError, match="--max_train_steps \\(was 10, is 20\\)"):
        check_resumable(args, saved)


@pytest.mark.parametrize(
    "flag", ["--pretrained_model_name_or_path", "--pretrained_model", "--pretrained_teacher_model"]
)
def test_the_teacher_has_three_names(flag: str) -> None:
    assert parse_args([flag, "me/model"]).teacher.pretrained_model_name_or_path == "me/model"


def test_the_rank_has_two_names_and_is_the_default_alpha() -> None:
    student = parse_args(["--lora_rank", "8"]).student
    assert (student.rank, student.lora_alpha) == (8, 8)


def test_the_tiny_teacher_has_defaults_of_its_own_that_flags_override() -> None:
    tiny, real = (parse_args(words).as_arguments() for words in ([], ["--pretrained_model", "me/model"]))
    assert tiny["pretrained_model_name_or_path"] == TINY_NAME
    assert {name: tiny[name] for name in TINY_DEFAULTS} == TINY_DEFAULTS
    assert (real["rank"], real["guidance_scale"], real["learning_rate"]) == (64, 7.5, 1e-4)
    assert parse_args(["--rank", "3"]).student.rank == 3


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], ("group", 1, 1.0)),
        (["--gndm_lambda", "0"], ("group", 1, 0.0)),
        (["--gndm_lambda", "0.5"], ("group", 1, 0.5)),
        (["--algorithm", "dmd"], ("sample", 5, 0.0)),
        (["--algorithm", "gndmr", "--reward", "tiny_bold"], ("group", 1, 1.0)),
        (["--advantage_normalization", "batch", "--fake_updates_per_step", "3"], ("batch", 3, 1.0)),
        (["--preset", "gndm-fast"], ("group", 1, 1.0)),
        (["--preset", "gndm-literal"], ("std", 5, 0.0)),
        (["--preset", "gndm-literal", "--gndm_lambda", "0.5"], ("std", 5, 0.5)),
        (["--preset", "gndm", "--fake_updates_per_step", "0"], ("group", 0, 1.0)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_defaults_follow_the_algorithm_and_the_preset_and_a_flag_beats_both(flags: list[str], expected: tuple) -> None:
    config = parse_args(flags)
    method = config.method
    assert (method.advantage_normalization, method.fake_updates_per_step, method.gndm_lambda) == expected
    objective = make_objective(config)
    assert (objective.advantage_normalization, objective.gndm_lambda) == (expected[0], expected[2])
    assert objective.group_size == 4


def test_the_preset_dmd2_is_the_algorithm_dmd() -> None:
    configs = [parse_args(["--preset", "dmd2"]), parse_args(["--algorithm", "dmd"])]
    preset, algorithm = (config.as_arguments() for config in configs)
    assert {name for name in preset if preset[name] != algorithm[name]} == {"preset", "algorithm"}
    assert make_objective(configs[0]) == make_objective(configs[1]) == replace(DMD(group_size=4), steps_per_rollout=4)


def test_the_flags_of_the_correction_reach_the_objective() -> None:
    flags = ["--bias_estimator", "noise", "--gndm_lambda", "0.25", "--group_size", "8"]
    flags += ["--pool_steps", "0.75", "--steps_per_rollout", "2"]
    assert make_objective(parse_args(flags)) == GNDM(
        group_size=8, gndm_lambda=0.25, advantage_normalization="group", bias_estimator="noise", steps_per_rollout=2,
        pool_steps=0.75,
    )  # fmt: skip


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_of_the_bias_outside_0_to_1(complaint, share: float) -> None:
    assert complaint(pool_steps=share).endswith(f"--pool_steps is {share}; it must lie in [0, 1].")


def test_a_token_goes_to_huggingface_hub_and_out_of_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "the one before")
    assert "hub_token" not in parse_args(["--push_to_hub"]).as_arguments()
    assert os.environ["HF_TOKEN"] == "the one before"
    args = parse_args(["--push_to_hub", "--hub_token", "hf_secret"])
    assert os.environ["HF_TOKEN"] == "hf_secret"
    assert "hf_secret" not in str(args)


@pytest.mark.parametrize("tracker", ["wandb", "all"])
def test_a_token_and_a_tracker_that_keeps_the_command_line(
    complaint, monkeypatch: pytest.MonkeyPatch, tracker: str
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    said = complaint(hub_token="hf_secret", report_to=tracker)
    assert f"--hub_token would be recorded by --report_to {tracker}, with the command line; leave it out" in said
    assert "hf_secret" not in said and "HF_TOKEN" not in os.environ


def test_a_lora_of_a_local_teacher_that_is_to_be_pushed(complaint, teacher_folder: Path) -> None:
    said = complaint(push_to_hub=True)
    assert said.startswith(f"This LoRA student needs {teacher_folder}, a folder that others do not have; train it from")


def test_a_name_that_no_repository_can_have(complaint) -> None:
    said = complaint(teacher=TINY_NAME, push_to_hub=True, hub_model_id="me/my student", steps_per_rollout=2)
    assert said.startswith("'me/my student' is no name of a repository; give NAME or USER/NAME")


def test_where_to_push_is_free_on_resume() -> None:
    saved = parse_args([]).as_arguments()
    flags = ["--push_to_hub", "--hub_model_id", "me/x", "--hub_private_repo", "--hub_revision", "v2"]
    assert check_resumable(parse_args([*flags, "--hub_commit_message", "done"]).as_arguments(), saved) is None


def prompts_of(**changes) -> list[str]:
    """The prompts of a run of the tiny teacher."""
    return load_prompts(RunConfig.of(**changes).prompts, TINY_NAME)


def test_prompts_come_from_a_file_from_a_datasets_column_or_with_the_tiny_teacher(
    prompts_file: Path, tmp_path: Path
) -> None:
    rows = [{"caption": "a cat"}, {"caption": ""}, {"caption": "a dog"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = dict(dataset_name=str(tmp_path), caption_column="caption")
    assert prompts_of(prompts_file=str(prompts_file)) == list(PROMPTS)
    assert prompts_of(**dataset) == ["a cat", "a dog"]
    assert prompts_of(**dataset, max_train_samples=1) == ["a cat"]
    assert prompts_of() == list(CAPTIONS)
    with pytest.raises(ValueError, match=r"--caption_column text is not in .*; its columns are caption\."):
        prompts_of(dataset_name=str(tmp_path))


def test_8_bit_adam_without_a_package_for_it_is_refused_at_once(complaint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    assert "--use_8bit_adam needs bitsandbytes or torchao: pip install 'rdm-diffusers[8bit]'." in complaint(
        use_8bit_adam=True, prompts_file="missing.txt"
    )
    assert parse_args(["--use_8bit_adam", "--dry_run"]).memory.use_8bit_adam
    for name, package, extra in (
        ("paged_adamw_8bit", "bitsandbytes", "8bit"),
        ("adamw_torch_4bit", "torchao", "quant"),
    ):
        assert f"--optim {name} needs {package}: pip install 'rdm-diffusers[{extra}" in complaint(optim=name)


def test_two_flags_for_the_optimiser_exclude_each_other(complaint) -> None:
    said = complaint(use_8bit_adam=True, optim="paged_adamw_8bit")
    assert "--use_8bit_adam and --optim paged_adamw_8bit exclude each other; leave one of them out." in said


def test_an_updates_samples_are_groups_times_members_times_states(
    teacher_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    flags = dict(train_batch_size=4, gradient_accumulation_steps=4, steps_per_rollout=2)
    it = make_run(run_arguments(teacher_folder, prompts_file, tmp_path, **flags))
    assert it.distillation.groups_per_update * 4 * 2 == 16 == it.config.optimisation.samples_per_update


# --- files of settings ----------------------------------------------------------------------------------------------


def test_a_runs_file_makes_the_same_configuration_again(tmp_path: Path) -> None:
    flags = [
        "--algorithm",
        "gndmr",
        "--reward",
        "tiny_bold:2",
        "--reward",
        "tiny_prompt",
        "--no-use_ema",
        "--seed",
        "3",
    ]
    config = parse_args([*flags, "--lora_alpha", "4"])
    (tmp_path / "config.yaml").write_text(config.as_yaml())
    again = parse_args(["--config", str(tmp_path / "config.yaml")])
    assert again.as_arguments() == config.as_arguments()
    assert parse_args(shlex.split(str(again.command))[3:]).as_arguments() == config.as_arguments()
    assert RunConfig.from_yaml(tmp_path / "config.yaml") == replace(config, command=None)


def test_flags_go_before_the_file_and_bring_what_follows_from_them(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(parse_args(["--rank", "8", "--teacher_target", "score"]).as_yaml())
    config = parse_args(["--config", str(tmp_path / "run.yaml"), "--rank", "2", "--learning_rate", "0.5"])
    assert (config.student.rank, config.student.lora_alpha) == (2, 2)
    assert config.optimisation.fake_learning_rate == 0.5


def test_a_file_may_use_any_name_of_a_flag_and_text_for_numbers(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("pretrained_model: tiny-v\nlora_rank: '3'\nlearning_rate: 1e-3\n")
    config = RunConfig.from_yaml(tmp_path / "run.yaml")
    assert config.teacher.pretrained_model_name_or_path == "tiny-v"
    assert (config.student.rank, config.optimisation.learning_rate) == (3, 1e-3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rnak: 3", "There is no setting rnak in"),
        ("rank: 0", "--rank is 0; it must be at least 1"),
        ("rank: many", "--rank: 'many' is no whole number; it must"),
        ("rank: 2.5", "--rank: '2.5' is no whole number; it must"),
        ("use_ema: 3", "--use_ema is 3; it must be true or false."),
        ("student: full", "configures a student of kind full, which is not lora; use another file."),
        ("hub_token: x", "There is no setting hub_token in"),
        ("[1, 2]", "holds no flags; give a YAML file"),
        ("a: [", "cannot be read ("),
        ("dataset_name: https://me:hunter2@host.org/x", "dataset_name holds what looks like a password"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture, text: str, said: str
) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SystemExit):
        parse_args(["--config", str(tmp_path / "run.yaml")])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in last and "hunter2" not in last


def test_a_file_that_is_not_there(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--config", "missing.yaml"])
    assert "--config missing.yaml cannot be read (No such file or directory); give" in capsys.readouterr().err


# --- retired flags --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["debias_pool", "black_box_form", "num_perturbations", "perturbation_scale"])
def test_a_retired_flag_is_named_with_the_release_that_has_it(complaint, flag: str) -> None:
    assert complaint(**{flag: 1}).endswith(
        f"--{flag} was retired after release 0.1.0 (docs/method.md says why); leave it out, or use that release."
    )


def test_a_record_of_0_1_0_is_read_if_its_retired_flags_did_nothing_and_refused_otherwise() -> None:
    retired = dict(debias_pool=1, black_box_form="tilt", num_perturbations=4, perturbation_scale=0.1)
    config = parse_args(["--rank", "3"])
    record = config.as_arguments() | retired | {"command": "x", "num_processes": 1}
    assert RunConfig.from_record(record) == replace(config, command=None)
    for change in ({"debias_pool": 2}, {"black_box_form": "group"}, {"gndm_lambda": "james_stein"}):
        with pytest.raises(ValueError, match=r"was retired after release 0\.1\.0"):
            RunConfig.from_record(record | change)
        with pytest.raises(ValueError, match=r"was retired after release 0\.1\.0"):
            check_resumable(config.as_arguments(), record | change)


@pytest.mark.parametrize("name", REFUSED)
def test_a_flag_that_other_scripts_have_is_refused_with_the_reason(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "run.yaml").write_text(f"{name}: 0.1\n")
    for words in ([f"--{name}", "0.1"], [f"--{name}=0.1"], ["--config", str(tmp_path / "run.yaml")]):
        with pytest.raises(SystemExit):
            parse_args(words)
        assert f"--{name} is not offered, because " in capsys.readouterr().err
