"""What the launcher of a process says about it, read without loading torch."""

from __future__ import annotations

import os
import re


def launched() -> tuple[int, int]:
    """Rank and number of processes as the launcher says, before they have joined.

    What SLURM's ``srun`` says becomes ``torchrun``'s variables, which PyTorch reads.

    Raises:
        ValueError: if SLURM started several processes and nothing says where the first of them is.
    """
    said = os.environ
    # The script of a job has a task's variables as well, though it is none: srun alone starts steps.
    is_task = "SLURM_PROCID" in said and ("SLURM_STEP_ID" in said or "SLURM_JOB_ID" not in said)
    if "RANK" not in said and is_task:
        processes = said.get("SLURM_STEP_NUM_TASKS") or said.get("SLURM_NTASKS", "1")
        if int(processes) > 1:
            nodes = said.get("SLURM_STEP_NODELIST") or said.get("SLURM_JOB_NODELIST")
            if "MASTER_ADDR" not in said and not nodes:
                raise ValueError(
                    "expected the first host in MASTER_ADDR or SLURM_JOB_NODELIST, found neither; export MASTER_ADDR"
                )
            said.setdefault("MASTER_ADDR", first_host(nodes or ""))
            # Jobs that share a host get ports of their own, below those that systems hand out.
            said.setdefault("MASTER_PORT", str(20_000 + int(said.get("SLURM_JOB_ID", 0)) % 10_000))
            said.update(RANK=said["SLURM_PROCID"], WORLD_SIZE=processes, LOCAL_RANK=said.get("SLURM_LOCALID", "0"))
    return int(said.get("RANK", 0)), int(said.get("WORLD_SIZE", 1))


def first_host(nodes: str) -> str:
    """The first of SLURM's list of hosts.

    Example:
        >>> first_host("gpu[003-006,9]-ib,login"), first_host("localhost")
        ('gpu003-ib', 'localhost')
    """
    return re.sub(r"\[(\d+)[^]]*\]", r"\1", re.split(r",(?![^[]*\])", nodes)[0])
