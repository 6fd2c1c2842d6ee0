"""The teacher bank: precomputed teacher outputs for every item of a data set. It needs torch and NumPy only.

A bank is a folder:

* ``bank.json``: version, widths, dtype, number of rows and views, the fingerprints of data and teacher, and checksums.
  It is written last: a folder without it is not a bank.
* ``0.npy``, ``1.npy``, ...: an array ``(views * N, D)`` for each module that a loss reads, with row
  ``view * N + index`` for the item ``index`` of the data set; bfloat16 as uint16, since NumPy has no bfloat16.
* ``checksums.npy``: ``(shards, arrays)``, the CRC-32 of every shard of ``shard_rows`` consecutive rows, plus 2^32 once
  the shard is written. ``bank.json`` has the SHA-256 of this file, and of itself.

Opening a bank reads a few bytes per thousand rows, and a process checks a shard when it first reads a row of it;
``Bank.verify`` checks all. Nothing in a bank can run code: it contains JSON, and arrays without Python objects.
"""

from rkd_plugin.teacher_bank.bank import Bank

__all__ = ["Bank"]
