"""The teacher bank: what a loss reads of a teacher, computed once for every item of a data set; on torch and NumPy.

A bank is a folder:

* ``bank.json``: version, widths, dtype, number of rows and views, the fingerprints of data and teacher, and checksums.
  It is written last: a folder without it is no bank.
* ``0.npy``, ``1.npy``, ...: an array for each module that is read, ``(views * N, D)``, row ``view * N + index`` for the
  item ``index`` of the data set; bfloat16 as uint16, which NumPy has for it.
* ``checksums.npy``: ``(shards, arrays)``, the CRC-32 of every shard, ``shard_rows`` rows that follow each other, plus
  2^32 once the shard is written. ``bank.json`` has the SHA-256 of this file, and of itself.

So opening reads a few bytes for a thousand rows, and a process checks a shard when it first reads a row of it;
``Bank.verify`` checks all. Nothing in a bank can run code: JSON, and arrays without Python objects.
"""

from rkd_plugin.teacher_bank.bank import Bank

__all__ = ["Bank"]
