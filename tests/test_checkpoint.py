"""Checkpoint folders: complete or absent, every damage noticed, nothing unpickled that could act."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import zipfile

import pytest
import torch

from tinyllm import checkpoint
from tinyllm.pickles import weights_only

FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
ABOUT = {"step": 7, "processes": 1, "ranks": [0], "identity": {}}


def fill(folder, lacking: str = ""):
    folder.mkdir()
    for name in FILES:
        if name != lacking:
            torch.save({"value": torch.arange(10)}, folder / name)
    if lacking != "trainer_state.json":
        (folder / "trainer_state.json").write_text("{}")
    return folder


def sealed(run, step: int = 7, lacking: str = "", about: dict = ABOUT):
    target = run / f"checkpoint-{step}"
    checkpoint.seal(fill(checkpoint.scratch_of(target), lacking), target, about)
    return target


def test_a_sealed_checkpoint_has_no_problem(tmp_path):
    target = sealed(tmp_path)
    assert checkpoint.problem(target) is None
    assert set(checkpoint.read_manifest(target)["files"]) == {*FILES, "trainer_state.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-7"]


@pytest.mark.parametrize(
    ("lacking", "what"),
    [("optimizer.pt", "no optimizer state"), ("scheduler.pt", "no scheduler state"),
     ("rng_state.pth", "no random state"), ("trainer_state.json", "no trainer state"),
     ("adapter_model.safetensors", "no weights")],
)  # fmt: skip
def test_a_checkpoint_that_lacks_a_state_is_refused(tmp_path, lacking, what):
    assert what in checkpoint.problem(sealed(tmp_path, lacking=lacking))


def test_the_random_state_of_every_rank_is_wanted(tmp_path):
    about = ABOUT | {"processes": 2, "ranks": [0, 1]}
    assert "no random state (rng_state_0.pth)" in checkpoint.problem(sealed(tmp_path, about=about))


def test_any_flipped_byte_is_noticed(tmp_path):
    target = sealed(tmp_path)
    draw = random.Random(1)
    for path in sorted(target.iterdir()):
        content = path.read_bytes()
        for place in {0, len(content) - 1, *(draw.randrange(len(content)) for _ in range(5))}:
            damaged = bytearray(content)
            damaged[place] ^= 1 << draw.randrange(8)
            path.write_bytes(damaged)
            said = checkpoint.problem(target)
            blank = path.name == checkpoint.MANIFEST and damaged.split() == content.split()
            assert said is not None or blank, (path.name, place)
        path.write_bytes(content)
    assert checkpoint.problem(target) is None


def test_files_cut_short_or_missing_are_named(tmp_path):
    target = sealed(tmp_path)
    whole = (target / "optimizer.pt").read_bytes()
    (target / "optimizer.pt").write_bytes(whole[:-1])
    assert "optimizer.pt is damaged: " in checkpoint.problem(target)
    (target / "optimizer.pt").unlink()
    assert checkpoint.problem(target) == "optimizer.pt is missing"
    (target / checkpoint.MANIFEST).unlink()
    assert "never completed" in checkpoint.problem(target)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("form", ["torch", "plain"])
def test_a_pickle_with_code_is_refused_unopened(tmp_path, name, form):
    trap = Trap(str(tmp_path / "sprung"))
    target = tmp_path / "checkpoint-7"
    scratch = fill(checkpoint.scratch_of(target))
    if form == "torch":
        torch.save({"state": trap}, scratch / name)
    else:
        (scratch / name).write_bytes(pickle.dumps(trap))
    checkpoint.seal(scratch, target, ABOUT)  # an attacker can write a manifest as well
    assert name in checkpoint.problem(target)
    assert not (tmp_path / "sprung").exists()


def test_nothing_is_unpickled_even_when_a_library_asks_for_it(tmp_path):
    torch.save({"state": Trap(str(tmp_path / "sprung"))}, tmp_path / "x.pt")
    with weights_only(with_deepspeed=False), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "x.pt", weights_only=False)
    assert not (tmp_path / "sprung").exists()
    assert zipfile.is_zipfile(tmp_path / "x.pt")


class Killed(BaseException):
    """What a kill looks like from inside: nothing after it runs."""


@pytest.mark.parametrize("there_before", [False, True])
def test_a_kill_between_any_two_steps_of_a_save_leaves_a_good_checkpoint(
    tmp_path, monkeypatch, there_before
):
    calls, last = 0, 10**6

    def counted(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > last:
                raise Killed
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(os, "fsync", counted(os.fsync))
    monkeypatch.setattr(os, "rename", counted(os.rename))
    monkeypatch.setattr(shutil, "rmtree", counted(shutil.rmtree))
    monkeypatch.setattr(type(tmp_path), "rename", counted(type(tmp_path).rename))
    for number in range(1, 100):
        run = tmp_path / str(number)
        run.mkdir()
        calls, last = 0, 10**6
        sealed(run, step=5)
        if there_before:
            sealed(run, step=7)
        calls, last = 0, number
        try:
            sealed(run, step=7)
            checkpoint.prune(run, 1, {"checkpoint-7"})
            finished = calls < number
        except Killed:
            finished = False
        calls, last = 0, 10**6
        good = [one.step for one in checkpoint.find(run) if checkpoint.problem(one.path) is None]
        bad = [one.step for one in checkpoint.find(run) if checkpoint.problem(one.path)]
        assert good and not bad, number
        checkpoint.remove_leftovers(run)
        assert all(path.name.startswith("checkpoint-") for path in run.iterdir())
        if there_before:
            assert 7 in [one.step for one in checkpoint.find(run)]
        if finished:
            assert good == [7] and number > 10
            return
    pytest.fail("the save never came to its end")


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    for step in (2, 10, 9, 30):
        sealed(tmp_path, step)
    checkpoint.prune(tmp_path, 2, {"checkpoint-30", "checkpoint-9"})
    assert [one.step for one in checkpoint.find(tmp_path)] == [30, 9]
    checkpoint.prune(tmp_path, None, {"checkpoint-30"})
    checkpoint.prune(tmp_path, 1, {"checkpoint-30"})
    assert [one.step for one in checkpoint.find(tmp_path)] == [30]


def test_the_manifest_is_plain_json(tmp_path):
    stored = json.loads((sealed(tmp_path) / checkpoint.MANIFEST).read_text())
    assert stored["content"]["step"] == 7
