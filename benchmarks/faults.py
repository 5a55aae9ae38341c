"""Is anything lost, or silently wrong? Commands are killed at their file operations, and read damaged files.

    python benchmarks/faults.py --work_dir faults

Writes `results/faults.json`: every trial with its seed, its fault and its outcome, and the counts of the outcomes. The
judgement does not rely on the tested code: it uses tensors and numbers that were never in a file, and an undisturbed
run. An interrupted campaign continues where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import datasets
import fault_checkpoints
import fault_runs
import fault_students
import torch
from fault_damage import DAMAGES
from fault_scenes import DamageScene, KillScene
from fault_trials import BAD, GOOD, Moment, Verdict, judged, kill, moments, watched

QUIET = {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
ROOMS = (fault_checkpoints, fault_students, fault_runs)
SCENES: dict[str, KillScene | DamageScene] = {
    scene.name: scene for room in ROOMS for scene in (*room.KILLS, *room.DAMAGE)
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, help="a sample of so many; by default all of them")
    parser.add_argument("--seed", type=int, default=0, help="of the sample, and of where files are damaged")
    parser.add_argument("--scenes", nargs="+", choices=list(SCENES), default=list(SCENES), metavar="NAME")
    parser.add_argument("--work_dir", type=Path, required=True, help="finished trials are kept here")
    parser.add_argument("--output", type=Path, help="where else than results/faults.json the result goes")
    args = parser.parse_args(argv)
    os.environ |= QUIET
    torch.set_num_threads(1)  # forks of a process with a pool of threads would wait for it for ever
    args.work_dir.mkdir(parents=True, exist_ok=True)
    tempfile.tempdir, before = workspace().name, tempfile.tempdir
    try:
        trials = run_all(args)
    finally:
        tempfile.tempdir = before
    record = {"seed": args.seed, "summary": summary(trials), "trials": trials}
    write(record, args.output)
    return record


@cache
def workspace() -> tempfile.TemporaryDirectory:
    """The folder of all temporary files, until the process ends."""
    place = tempfile.TemporaryDirectory(prefix="faults-")
    datasets.config.HF_DATASETS_CACHE = Path(place.name, "datasets")
    return place


def run_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs the chosen trials that `work_dir` lacks; the records of all chosen ones."""
    file = args.work_dir / f"trials-{args.seed}.jsonl"
    done = {line["id"]: line for line in map(json.loads, file.read_text().splitlines())} if file.exists() else {}
    chosen = plan(args.scenes, args.seed, args.trials)
    for number, trial in enumerate(chosen, 1):
        if trial["id"] in done:
            continue
        started = time.perf_counter()
        done[trial["id"]] = trial | run(trial) | {"seconds": round(time.perf_counter() - started, 2)}
        with open(file, "a") as lines:
            lines.write(json.dumps(done[trial["id"]]) + "\n")
        print(f"{number}/{len(chosen)} {trial['id']}: {done[trial['id']]['outcome']}", flush=True)
    return [done[trial["id"]] for trial in chosen]


def plan(scenes: Sequence[str], seed: int, most: int | None) -> list[dict[str, Any]]:
    """The trials to run, which depend on the seed only."""
    found = [trial for name in scenes for trial in trials_of(SCENES[name], seed)]
    if most is None or most >= len(found):
        return found
    chosen = sorted(Random(f"{seed}/sample").sample(range(len(found)), most))
    return [found[i] for i in chosen]


def trials_of(scene: KillScene | DamageScene, seed: int) -> list[dict[str, Any]]:
    """All of a scene's trials."""
    if isinstance(scene, DamageScene):
        return list(_damages(scene, seed))
    place = copy_of(scene.name)
    found = [
        {"scene": scene.name, "number": moment.number, "half": moment.half, "done": f"killed {what}"}
        for moment, what in moments(place, scene.act)
    ]
    shutil.rmtree(place)
    if scene.most is not None and scene.most < len(found):
        chosen = sorted(Random(f"{seed}/{scene.name}").sample(range(len(found)), scene.most))
        found = [found[i] for i in chosen]
    return [{"id": f"{scene.name}/{one['number']}{'h' if one['half'] else ''}", "seed": seed, **one} for one in found]


def _damages(scene: DamageScene, seed: int) -> Iterator[dict[str, Any]]:
    folder = prepared(scene.name)
    files = sorted({path.relative_to(folder) for pattern in scene.files for path in folder.glob(pattern)})
    for file in (file for file in files if (folder / file).is_file() and (folder / file).stat().st_size):
        for kind in scene.kinds:
            for number in range(scene.rounds if kind not in ("emptied", "missing", "swapped") else 1):
                if kind != "swapped" or other_of(scene, folder, file) is not None:
                    common = {"scene": scene.name, "file": str(file), "kind": kind}
                    yield {"id": f"{scene.name}/{file}/{kind}/{number}", "seed": seed, **common}


def other_of(scene: DamageScene, folder: Path, file: Path) -> Path | None:
    """Another's file of the same kind, with other contents."""
    if scene.other is not None:
        found = [folder / scene.other / Path(*file.parts[depth:]) for depth in (0, 1)]
    else:
        found = sorted(path for path in (folder / file).parent.glob(f"*{file.suffix}") if path.name != file.name)
    return next((path for path in found if path.is_file()), None)


@cache
def prepared(name: str) -> Path:
    """A scene's folder as it is before any fault."""
    scene, place = SCENES[name], empty_place()
    place.mkdir()
    scene.prepare(place)
    folder = Path(tempfile.mkdtemp(prefix="prepared-"), "folder")
    place.rename(folder)
    if isinstance(scene, KillScene):
        scene.reference()
    return folder


@cache
def undamaged(name: str) -> Any:
    """The result of a scene's reader without damage."""
    scene = SCENES[name]
    assert isinstance(scene, DamageScene)
    place = copy_of(name)
    result = scene.read(place)
    shutil.rmtree(place)
    return result


def copy_of(name: str) -> Path:
    """A copy of a scene's folder."""
    pristine, place = prepared(name), empty_place()
    shutil.copytree(pristine, place)
    return place


def empty_place() -> Path:
    """The path of every trial's folder, which does not exist yet; always the same, because some files hold its name."""
    place = Path(tempfile.gettempdir(), "trial")
    shutil.rmtree(place, ignore_errors=True)
    return place


def run(trial: dict[str, Any]) -> dict[str, Any]:
    """One trial: its fault and its outcome."""
    scene, place = SCENES[trial["scene"]], copy_of(trial["scene"])
    if isinstance(scene, KillScene):
        died = kill(place, scene.act, Moment(trial["number"], trial["half"]))
        verdict = judged(lambda: scene.judge(place))
        done = trial["done"] if died else "ended before it was killed"
    else:
        expected = undamaged(scene.name)
        place = copy_of(scene.name)
        file = Path(trial["file"])
        other = other_of(scene, place, file)
        done = DAMAGES[trial["kind"]](place / file, Random(f"{trial['seed']}/{trial['id']}"), other)
        verdict = judged(lambda: _watched(scene, place, file, expected))
    shutil.rmtree(place)
    found = verdict.found.replace(str(place), "FOLDER").replace(workspace().name, "WORK")
    return {"done": done, "outcome": verdict.outcome, "found": found}


def _watched(scene: DamageScene, place: Path, file: Path, expected: Any) -> Verdict:
    names = [file.name, file.parent.name] if len(file.parts) > 1 else [file.name]
    return watched(lambda: scene.read(place), lambda result: scene.same(result, expected, file.name), names)


def summary(trials: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The counts of the outcomes, over all trials and by scene."""
    scenes = dict.fromkeys(trial["scene"] for trial in trials)
    counts = {name: Counter(trial["outcome"] for trial in trials if trial["scene"] == name) for name in scenes}
    total = Counter(trial["outcome"] for trial in trials)
    return {
        "trials": len(trials),
        "outcomes": {outcome: total[outcome] for outcome in (*GOOD, *BAD)},
        "scenes": {name: dict(sorted(count.items())) for name, count in counts.items()},
    }


def write(record: dict[str, Any], path: Path | None) -> None:
    """Writes the result to a path, by default among the other results."""
    if path is not None:
        path.write_text(json.dumps(record, indent=2) + "\n")
        return
    from runs import write_result

    write_result("faults", record)


if __name__ == "__main__":
    outcomes = main()["summary"]["outcomes"]
    sys.exit(any(outcomes[bad] for bad in BAD))
