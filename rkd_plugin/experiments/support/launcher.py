"""The environment variables of launchers such as ``torchrun`` and ``srun``, read without loading torch."""

from __future__ import annotations

import os
import re


def launched() -> tuple[int, int]:
    """Rank and world size, before there is a process group.

    If ``srun`` has set the variables of SLURM, those that PyTorch reads are set from them.

    Raises:
        ValueError: if SLURM started several processes and no variable names the host of rank 0.
    """
    environ = os.environ
    # The script of a job has the variables of a task as well, but only srun starts steps.
    is_task = "SLURM_PROCID" in environ and ("SLURM_STEP_ID" in environ or "SLURM_JOB_ID" not in environ)
    if "RANK" not in environ and is_task:
        processes = environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS", "1")
        if int(processes) > 1:
            nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
            if "MASTER_ADDR" not in environ and not nodes:
                raise ValueError(
                    "expected the first host in MASTER_ADDR or SLURM_JOB_NODELIST, found neither; export MASTER_ADDR"
                )
            environ.setdefault("MASTER_ADDR", first_host(nodes or ""))
            # Jobs on one host get different ports, below the range that systems assign.
            environ.setdefault("MASTER_PORT", str(20_000 + int(environ.get("SLURM_JOB_ID", 0)) % 10_000))
            environ.update(
                RANK=environ["SLURM_PROCID"], WORLD_SIZE=processes, LOCAL_RANK=environ.get("SLURM_LOCALID", "0")
            )
    return int(environ.get("RANK", 0)), int(environ.get("WORLD_SIZE", 1))


def first_host(nodes: str) -> str:
    """The first host of a list of SLURM.

    Example:
        >>> first_host("gpu[003-006,9]-ib,login"), first_host("localhost")
        ('gpu003-ib', 'localhost')
    """
    return re.sub(r"\[(\d+)[^]]*\]", r"\1", re.split(r",(?![^[]*\])", nodes)[0])
