"""Training from a teacher bank instead of a teacher."""

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
    """Replace the teacher in a recipe by the bank that it names.

    Args:
        config: the recipe as torchdistill loads it; it is changed in place.
        data: the recipe as plain data, for which `problems` finds none.

    Raises:
        ValueError: if the checkpoint of the teacher exists, and has other weights than those of the bank.
    """
    path = data["recipe"]["teacher_bank"]
    bank = Bank(path)
    checkpoint = config["models"]["teacher_model"].get("src_ckpt")
    # Without a checkpoint the weights are not compared: a bank can be used without the network.
    if bank.header and checkpoint and Path(checkpoint).is_file():
        found = of_weights(read_weights(Path(checkpoint)))
        if found != bank.header["teacher"]["weights"]:
            raise ValueError(
                f"the teacher bank {path} is of another teacher: its weights are not those of {checkpoint}; write one "
                "for that checkpoint with `rkd embed`, or give the checkpoint of the bank"
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
