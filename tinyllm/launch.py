"""``accelerate launch``, except that a failure is one line and not two pages.

python -m tinyllm.launch --num_processes 2 --multi_gpu ... sft_lora.py --dataset my.jsonl

Takes accelerate's own options and passes on the exit code of the process that failed first.
"""

from __future__ import annotations

import logging
import signal
import sys

from tinyllm.errors import EXIT_USER_ERROR, UserError, run_program
from tinyllm.launcher_watch import name_launcher


def main(words: list[str] | None = None) -> int:
    """Start the processes and wait for them; returns the exit code."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    name_launcher()
    args = launch_command_parser().parse_args(words)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch_command(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return explain(rank, failure.exitcode)
    except SignalException as stop:  # passed on to the processes, which have saved and said so
        return 128 + stop.sigval
    except ConnectionError as error:
        raise UserError(f"MASTER_PORT={args.main_process_port} is in use: {error}") from error
    except (DistError, TimeoutError) as error:
        raise UserError(
            f"the nodes did not meet at {args.main_process_ip}:{args.main_process_port} "
            f"({str(error).splitlines()[0]}); is node 0 running, and is the port open?"
        ) from error
    return 0


def explain(rank: int, exit_code: int) -> int:
    """Say how a process ended, unless it said so itself; returns the exit code to pass on."""
    if exit_code == EXIT_USER_ERROR or exit_code > 128:  # our own, or 128 + a signal it has handled
        return exit_code
    if exit_code < 0:
        name = signal.Signals(-exit_code).name
        hint = "; was there enough memory?" if -exit_code == signal.SIGKILL else ""
        print(f"error: process {rank} was ended by {name}{hint}", file=sys.stderr)
        return 128 - exit_code
    print(f"error: process {rank} failed; its own message is above", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    sys.exit(run_program(main))
