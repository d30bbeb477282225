"""What a launch was asked for against what it became; shares of rows; checks of what is saved."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY, make_model, train_arguments
from torch.utils.data import BatchSampler, SequentialSampler

import sft_lora
from tinyllm import deepspeed_ops, errors, launch_check
from tinyllm.batches import collate, nothing_to_learn
from tinyllm.errors import UserError
from tinyllm.finish import write_adapter
from tinyllm.launch import explain
from tinyllm.launch_plan import PLAN_VARIABLE, Plan, asked_plan, check_processes
from tinyllm.lora import add_lora
from tinyllm.rank_share import RankShare
from tinyllm.saved_adapter import check_saved_adapter
from tinyllm.settings import LoraSettings
from tinyllm.trainer import SftTrainer


def test_the_plan_of_the_launcher():
    said = {PLAN_VARIABLE: "processes=16 device=cuda engine=deepspeed zero=3 dtype=bfloat16"}
    plan = asked_plan(said | {"WORLD_SIZE": "2"})
    assert plan == Plan(16, "cuda", "deepspeed", 3, "bfloat16", "the launcher")


def test_the_plan_of_other_launchers(tmp_path):
    torchrun = asked_plan({"WORLD_SIZE": "2", "SLURM_STEP_NUM_TASKS": "1"})
    assert (torchrun.processes, torchrun.engine) == (2, None)
    assert asked_plan({"SLURM_STEP_NUM_TASKS": "4"}).processes == 4
    assert asked_plan({"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"}).engine == "deepspeed"
    assert asked_plan({}, ["bash"]).processes is None
    words = ["python", "/venv/bin/accelerate", "launch", "--cpu", "--num_processes", "2", "x.py"]
    assert asked_plan({}, words).processes == 2
    assert asked_plan({}, ["accelerate", "launch", "--num_processes=3", "x.py"]).processes == 3
    config = REPOSITORY / "configs" / "accelerate_ddp.yaml"
    assert asked_plan({}, ["accelerate", "launch", "--config_file", str(config)]).processes == 2


def test_processes_that_train_alone_are_refused():
    check_processes(Plan(), 1, True)
    check_processes(Plan(2), 2, False)
    with pytest.raises(UserError, match=r"asks for 2 process.*but 1 train.*--use_cpu True"):
        check_processes(Plan(2, by="WORLD_SIZE=2"), 1, False)
    with pytest.raises(UserError, match=r"NPROC=2 ./script/sft_lora.sh"):
        check_processes(Plan(2, by="accelerate launch"), 1, True)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("processes=2 device=cpu", "the launcher asks for 2 process"),
        ("processes=1 device=cuda", "the launcher asks for cuda, this process got cpu"),
        ("processes=1 device=cpu engine=ddp", "asks for ddp, but the Trainer runs single"),
        ("processes=1 engine=deepspeed zero=2", "asks for deepspeed, but the Trainer runs single"),
        ("processes=1 engine=single zero=2", "asks for ZeRO-2, but DeepSpeed runs ZeRO-0"),
        ("processes=1 dtype=bfloat16", "the base's weights are .*float32.*chose bfloat16"),
    ],
)
def test_a_run_that_is_not_the_plan_stops_before_training(
    base_folder, data_file, tmp_path, monkeypatch, plan, message
):
    monkeypatch.setenv(PLAN_VARIABLE, plan)
    with pytest.raises(UserError, match=message):
        sft_lora.main(train_arguments(base_folder, data_file, tmp_path / "run"))
    assert not list(tmp_path.glob("run/adapter*"))


def test_a_precision_changed_behind_the_launcher(base_folder, data_file, tmp_path, monkeypatch):
    monkeypatch.setenv(PLAN_VARIABLE, "processes=1 dtype=float32")
    words = train_arguments(base_folder, data_file, tmp_path / "run", "--torch_dtype", "bfloat16")
    with pytest.raises(UserError, match="set PRECISION instead"):
        sft_lora.main(words)


def test_several_gpus_in_one_process_are_one():
    args = SimpleNamespace(n_gpu=8, _n_gpu=8)
    assert "8 GPUs found, one is used" in launch_check.use_one_gpu(args)[0] and args._n_gpu == 1
    assert launch_check.use_one_gpu(SimpleNamespace(n_gpu=1)) == []


def test_an_adapter_in_half_precision_is_refused_with_deepspeed():
    args = SimpleNamespace(bf16=True, fp16=False, deepspeed_plugin=SimpleNamespace(zero_stage=2))
    with pytest.raises(UserError, match="--bf16 True with DeepSpeed"):
        launch_check.check_deepspeed(SimpleNamespace(training=args))
    args = SimpleNamespace(bf16=False, fp16=False, deepspeed_plugin=SimpleNamespace(zero_stage=3))
    run = SimpleNamespace(save_full_model=True)
    with pytest.raises(UserError, match="--save_full_model True with ZeRO-3"):
        launch_check.check_deepspeed(SimpleNamespace(training=args, run=run))


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 19])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_every_row_once_and_step_together(rows, ranks):
    steps = BatchSampler(SequentialSampler(range(rows)), 2 * ranks, False)
    shares = [list(RankShare(steps, rank, ranks)) for rank in range(ranks)]
    assert {len(share) for share in shares} == {len(steps)} == {len(RankShare(steps, 0, ranks))}
    for number, whole in enumerate(steps):
        together = [row for share in shares for row in share[number]]
        assert together == whole
        assert all(len(share[number]) <= 2 for share in shares)


def test_a_rank_without_rows_adds_nothing(tokenizer, base_folder, data_file, tmp_path):
    from test_trainer import encoded

    from tinyllm.command_line import parse_settings

    settings, _ = parse_settings(
        train_arguments(base_folder, data_file, tmp_path, "--eval_strategy", "no")
    )
    model = add_lora(make_model(), settings.lora).train()
    trainer = SftTrainer(model, settings.training, encoded(tokenizer), None, tokenizer, 64)
    empty = collate([])
    assert [len(empty[name]) for name in ("input_ids", "labels", "lengths")] == [0, 0, 0]
    loss = trainer.sum_of_losses(model, nothing_to_learn(empty))
    loss.backward()
    assert loss.item() == 0.0
    assert all(not p.grad.any() for p in model.parameters() if p.requires_grad)


def save(model, folder, change=None):
    state = model.state_dict()
    if change is not None:
        name = next(n for n in state if "lora_B" in n)
        state[name] = change(state[name])
    folder.mkdir()
    if change is None:
        write_adapter(model, folder)
    else:
        model.save_pretrained(folder, state_dict=state)
    return folder


def test_saved_adapters_are_held_against_the_model(tmp_path):
    model = add_lora(make_model(), LoraSettings(lora_r=4))
    good = save(model, tmp_path / "fresh")
    assert not check_saved_adapter(good, model, learned=False).has_effect
    with pytest.raises(UserError, match="every B matrix is zero"):
        check_saved_adapter(good, model, learned=True)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    assert check_saved_adapter(save(model, tmp_path / "b"), model, learned=True).has_effect
    for name, change, message in [
        ("empty", lambda t: t[:0].clone(), "saved with 0 of"),
        ("half", lambda t: t[:16].clone(), "saved with 64 of 128 numbers"),
        ("bf16", lambda t: t.bfloat16(), "saved as torch.bfloat16"),
        ("nan", lambda t: t * float("nan"), "no numbers"),
    ]:
        with pytest.raises(UserError, match=message):
            check_saved_adapter(save(model, tmp_path / name, change), model, learned=True)


def test_what_deepspeed_would_compile(tmp_path, monkeypatch):
    compiled = deepspeed_ops.compiled_optimizer
    assert compiled({}) is None
    assert compiled({"optimizer": {"type": "AdamW"}}) == "its optimizer AdamW"
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    assert compiled(offload) == "its optimizer for offloading"
    assert compiled(offload | {"zero_force_ds_cpu_optimizer": False}) is None


def test_locks_of_interrupted_compilations_are_removed(tmp_path):
    old, new = tmp_path / "py311_cpu" / "fused_adam", tmp_path / "py311_cpu" / "cpu_adam"
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / "lock").touch()
    long_ago = time.time() - 2 * deepspeed_ops.QUIET_SECONDS
    os.utime(old / "lock", (long_ago, long_ago))
    notes = deepspeed_ops.clear_locks(tmp_path)
    assert not (old / "lock").exists() and (new / "lock").exists()
    assert any("removed" in note for note in notes) and any("delete" in note for note in notes)
    assert deepspeed_ops.clear_locks(tmp_path / "nowhere") == []


def test_processes_that_fail_alike_say_it_once(monkeypatch, tmp_path, capsys):
    def fail(message):
        def main():
            raise UserError(message)

        return errors.run_program(main)

    monkeypatch.setattr(errors.tempfile, "gettempdir", lambda: str(tmp_path))
    assert [fail("a"), fail("a")] == [2, 2]  # alone
    assert capsys.readouterr().err == "error: a\nerror: a\n"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert [fail("a"), fail("b"), fail("a")] == [2, 2, 2]
    assert capsys.readouterr().err == "error: a\nerror: b\n"
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0))
    assert fail("a") == 2 and capsys.readouterr().err == "error: a\n"


def test_how_processes_end(capsys):
    assert explain(0, 2) == 2 and explain(1, 143) == 143
    assert capsys.readouterr().err == ""
    assert explain(1, -9) == 137
    assert "process 1 was ended by SIGKILL; was there enough memory?" in capsys.readouterr().err
    assert explain(3, 1) == 1
    assert "process 3 failed" in capsys.readouterr().err


def test_the_probe_says_why_deepspeed_cannot_be_used(tmp_path):
    (tmp_path / "deepspeed.py").write_text("raise OSError('CUDA_HOME does not\\nexist')")
    code = "from tinyllm.launch_probe import deepspeed_problem as p; print(p())"
    path = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": path})  # fmt: skip
    assert done.stdout.strip() == "OSError: CUDA_HOME does not exist"
