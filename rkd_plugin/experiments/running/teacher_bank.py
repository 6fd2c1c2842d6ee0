"""A run that learns from a teacher bank in place of its teacher."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rkd_plugin.experiments.recipe.schema import stages
from rkd_plugin.experiments.recipe.teacher_bank import teacher_reads
from rkd_plugin.experiments.running.weights import read_weights
from rkd_plugin.teacher_bank import Bank
from rkd_plugin.teacher_bank.fingerprint import of_weights


def learn_from_bank(config: dict[str, Any], data: Mapping[Any, Any]) -> None:
    """Put the bank that a recipe names into what torchdistill loaded of it, in place of the teacher.

    Args:
        config: as torchdistill's loader made it; changed.
        data: the same as plain data, without `problems`.

    Raises:
        ValueError: if the teacher's checkpoint is there, and holds other weights than the bank was written with.
    """
    path = data["recipe"]["teacher_bank"]
    bank = Bank(path)
    checkpoint = config["models"]["teacher_model"].get("src_ckpt")
    # Without it the bank is taken at its word: whoever has the vectors need not have the network.
    if bank.header and checkpoint and Path(checkpoint).is_file():
        found = of_weights(read_weights(Path(checkpoint)))
        if found != bank.header["teacher"]["weights"]:
            raise ValueError(
                f"the teacher bank {path} is of another teacher: its weights are not those of {checkpoint}; write one "
                "of that checkpoint with `rkd embed`, or give its own"
            )
    place = (
        dict(zip(("module_path", "module_io"), next(iter(teacher_reads(data))), strict=True)) if not bank.arrays else {}
    )
    config["models"]["teacher_model"] = {"key": "BankTeacher", "kwargs": {"bank": path, **place}}
    for stage in stages(config).values():
        is_silent = stage["teacher"].get("forward_proc") == "no_forward"
        forward = "no_forward" if is_silent else "forward_batch_supp_dict"
        stage["teacher"] = {"forward_proc": forward, "requires_grad": False}
        if "train_data_loader" in stage:
            wrapper = {"key": "WithTeacherBank", "kwargs": {"bank": path}}
            stage["train_data_loader"] = {**stage["train_data_loader"], "dataset_wrapper": wrapper}
