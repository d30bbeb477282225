"""Kill a training at random moments, run the same command again, compare the adapter bit by bit.

    python benchmarks/kill_resume.py --kills 40 --processes 1
    python benchmarks/kill_resume.py --kills 40 --processes 2

A tiny base and its data are made on the spot.  One run stays undisturbed; the others are killed with
SIGKILL, half of the time at a random moment, half of the time within the writing of a checkpoint, up
to six times each, and then left to finish.  With two processes it is now one of them, now both; the
survivor has to leave by itself.  Exits with 1 when any adapter differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

ADAPTER = "adapter_model.safetensors"
KILLS_PER_RUN = 6
PATIENCE_SECONDS = 60
EXIT_KILLED, EXIT_FAULT, EXIT_STOPPED = -signal.SIGKILL, 2, 143
ROWS = [{"question": f"{a}加{b}等于几？", "answer": f"{a}加{b}等于{a + b}。"}
        for a in range(8) for b in range(8)]  # fmt: skip


def make_base(folder: Path) -> None:
    """A two-layer llama and a byte-level tokenizer, as ``save_pretrained`` writes them."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|pad|>", "<|endoftext|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator((row["answer"] for row in ROWS), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=special[0], eos_token=special[1]
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Job:
    """One start of the training in forked processes: the libraries are loaded only once.

    Args:
        words: the command line of ``sft_lora.py``.
        processes: how many ranks.
        log: file for what they print.
    """

    def __init__(self, words: list[str], processes: int, log: Path) -> None:
        port = free_port()
        self.codes: dict[int, int] = {}
        self.log = log
        self.running = [fork(words, rank, processes, port, log) for rank in range(processes)]

    def poll(self) -> bool:
        """Whether any process is still there; exit codes are collected."""
        for pid in list(self.running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self.codes[pid] = os.waitstatus_to_exitcode(status)
                self.running.remove(pid)
        return bool(self.running)

    def wait(self, seconds: float = PATIENCE_SECONDS) -> None:
        """Wait for the end of all processes.

        Raises:
            SystemExit: they are still there after that time.
        """
        end = time.monotonic() + seconds
        while self.poll():
            if time.monotonic() > end:
                self.kill(self.running)
                sys.exit(f"a process did not end within {seconds:.0f} s; see {self.log}")
            time.sleep(0.002)

    def kill(self, pids: list[int]) -> None:
        """SIGKILL."""
        for pid in list(pids):
            os.kill(pid, signal.SIGKILL)


def fork(words: list[str], rank: int, processes: int, port: int, log: Path) -> int:
    """Start one rank; returns its process id."""
    if pid := os.fork():
        return pid
    code = 99
    try:
        os.setpgid(0, 0)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if processes > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port),
                           "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
                           "MASTER_ADDR": "127.0.0.1"}  # fmt: skip
        import sft_lora
        from tinyllm.errors import run_program

        code = run_program(lambda: sft_lora.main(words))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Killer:
    """Runs one command again and again into folders of its own, and kills it.

    Args:
        words: the command line without ``--output_dir``.
        seconds: how long an undisturbed run takes.
    """

    def __init__(self, words: list[str], processes: int, work: Path, seconds: float, draw) -> None:
        self.words, self.processes, self.work = words, processes, work
        self.seconds, self.draw = seconds, draw
        self.moments: Counter[str] = Counter()
        self.slowest_survivor = 0.0

    @property
    def kills(self) -> int:
        return sum(self.moments.values())

    def start(self, folder: Path) -> Job:
        words = [*self.words, "--output_dir", str(folder)]
        return Job(words, self.processes, folder.with_suffix(".log"))

    def run_until_finished(self, folder: Path, kills: int) -> int:
        """Kill a run up to ``kills`` times, then let it finish; returns the number of kills."""
        done = 0
        while done < kills:
            job = self.start(folder)
            if not self.wait_for_the_moment(job, folder):
                check_end(job, {0})
                return done
            self.kill(job, folder)
            done += 1
        job = self.start(folder)
        job.wait()
        check_end(job, {0})
        return done

    def wait_for_the_moment(self, job: Job, folder: Path) -> bool:
        """Wait as long as chance says; False when the run was faster."""
        aimed = self.draw.random() < 0.5
        end = time.monotonic() + self.draw.uniform(0, self.seconds * (0.8 if aimed else 1))
        while time.monotonic() < end:
            if not job.poll():
                return False
            time.sleep(0.001)
        while aimed and not writing(folder):
            if not job.poll():
                return False
        if aimed:
            time.sleep(self.draw.uniform(0, 0.02))
        return job.poll() and len(job.running) == self.processes

    def kill(self, job: Job, folder: Path) -> None:
        victims = list(job.running)
        if len(victims) > 1 and (one := self.draw.randrange(len(victims) + 1)) < len(victims):
            victims = [victims[one]]
        moment = what_is_going_on(folder)
        job.kill(victims)
        self.moments[moment] += 1
        killed = time.monotonic()
        job.wait()
        if len(victims) < self.processes:
            self.slowest_survivor = max(self.slowest_survivor, time.monotonic() - killed)
        check_end(job, {EXIT_KILLED, EXIT_FAULT, EXIT_STOPPED, 0})


def writing(folder: Path) -> bool:
    """Whether a checkpoint is being written at this moment."""
    return any(folder.glob(".checkpoint-*.writing"))


def what_is_going_on(folder: Path) -> str:
    """What a kill at this moment hits, by what lies in the folder."""
    if writing(folder):
        return "inside a save"
    if any(folder.glob(".checkpoint-*")):
        return "while an old checkpoint is deleted"
    if (folder / ".finishing").exists():
        return "while the final files are written"
    if not (folder / "run.json").exists():
        return "before the run folder was there"
    return "elsewhere (loading, a step, an evaluation)"


def check_end(job: Job, allowed: set[int]) -> None:
    """Stop everything when a process ended as it never should."""
    strange = set(job.codes.values()) - allowed
    if strange:
        tail = job.log.read_text(errors="replace")[-3000:]
        sys.exit(f"unexpected exit codes {strange}; the last that was said:\n{tail}")


def same(folder: Path, reference: Path) -> bool:
    """Whether adapter, number of steps and losses are the same."""
    names = ("num_steps", "train_loss", "eval_loss", "eval_loss_before")
    stored = [json.loads((f / "run.json").read_text())["results"] for f in (folder, reference)]
    results = [{name: one[name] for name in names} for one in stored]
    adapters = [(f / ADAPTER).read_bytes() for f in (folder, reference)]
    return adapters[0] == adapters[1] and results[0] == results[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        return measure(options, Path(name))


def measure(options, work: Path) -> int:
    """Make the base, run once undisturbed, then kill until the number is reached."""
    import peft  # noqa: F401  (loaded once, before the forks)
    import transformers  # noqa: F401

    import sft_lora  # noqa: F401
    import tinyllm.sft  # noqa: F401

    if not (pid := os.fork()):
        make_base(work / "base")
        os._exit(0)
    os.waitpid(pid, 0)
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = [
        "--base_model_path", str(work / "base"), "--dataset", str(work / "rows.jsonl"),
        "--use_cpu", "True", "--per_device_train_batch_size", "2",
        "--gradient_accumulation_steps", "2", "--num_train_epochs", "2", "--save_strategy", "steps",
        "--save_steps", "2", "--save_total_limit", "3", "--logging_steps", "5",
        "--num_sample_replies", "0", "--eval_share", "0.1", "--disable_tqdm", "True",
        "--report", "False", "--eval_replies", "0",
    ]  # fmt: skip
    reference = work / "reference"
    started = time.monotonic()
    job = Job([*words, "--output_dir", str(reference)], options.processes, work / "reference.log")
    job.wait(600)
    check_end(job, {0})
    seconds = time.monotonic() - started
    print(f"an undisturbed run takes {seconds:.1f} s", flush=True)
    killer = Killer(words, options.processes, work, seconds, random.Random(options.seed))
    equal = runs = 0
    while killer.kills < options.kills:
        folder = work / f"run-{runs}"
        number = killer.run_until_finished(folder, min(KILLS_PER_RUN, options.kills - killer.kills))
        runs += 1
        equal += (right := same(folder, reference))
        print(f"run {runs}: {number} kills, {'same' if right else 'DIFFERENT'}", flush=True)
    return report(options, killer, equal, runs)


def report(options, killer: Killer, equal: int, runs: int) -> int:
    """Print the counts."""
    print(
        f"\n{killer.kills} kills with SIGKILL, {options.processes} process(es), seed {options.seed}"
    )
    for moment, number in killer.moments.most_common():
        print(f"  {number:3d}  {moment}")
    if killer.slowest_survivor:
        print(f"the other process left by itself after at most {killer.slowest_survivor:.1f} s")
    print(f"{equal} of {runs} finished adapters equal the undisturbed one in every bit")
    return 0 if equal == runs else 1


if __name__ == "__main__":
    sys.exit(main())
