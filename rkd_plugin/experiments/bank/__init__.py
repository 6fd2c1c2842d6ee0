"""The teacher bank: what a loss reads of a teacher, computed once for every image of a data set.

A bank is a folder:

* ``bank.json``: version, widths, dtype, number of rows and views, what tells the data and the teacher from others, and
  checksums. It is written last: a folder without it is no bank.
* ``0.npy``, ``1.npy``, ...: an array for each module that is read, ``(views * N, D)``, row ``view * N + index`` for the
  image ``index`` of the data set; bfloat16 as uint16, which NumPy has for it.
* ``0.crc.npy``, ...: the CRC-32 of every row. ``bank.json`` has the SHA-256 of these files, and of itself.

So opening reads four bytes a row, whatever the width, and every row is held against its checksum each time it is read;
``Bank.verify`` does it for all. Nothing in a bank is executed: JSON, and arrays without Python objects.
"""

from rkd_plugin.experiments.bank.files import Bank

__all__ = ["Bank"]
