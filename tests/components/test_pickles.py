"""External pickles: those of any version of NumPy are read, and all others have no effect."""

import pickle
from struct import pack

import numpy as np
import pytest

from rkd_plugin.components.datasets.pickles import read_arrays

CONTENT = {
    "data": np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
    "columns": np.asfortranarray(np.arange(6, dtype=">i4").reshape(2, 3)),
    "every other": np.arange(8.0)[::2],
    "names": np.array(["auk", "jay"]),
    "none": np.zeros((0, 3), np.float32),
    "class_dict": {"auk": np.array([1, 2]), "jay": [3]},
    "labels": [1, np.int64(5), True, None, 2.5, "jay", b"owl", -(2**40)],
}


def of_numpy(content, core):
    """A pickle with the names of modules of NumPy 1 or 2."""
    framed = content[2:3] == b"\x95"
    body = content[11:] if framed else content[2:]
    assert not framed or len(body) == int.from_bytes(content[3:11], "little")
    for module in (b"multiarray", b"numeric"):
        names = [b"numpy.%s.%s" % (name, module) for name in (b"core", b"_core")]
        for name in names:  # as a line, or after its length
            body = body.replace(b"c%s\n" % name, b"cNAME\n").replace(b"\x8c%c%s" % (len(name), name), b"\x8cNAME")
        chosen = names[core == "_core"]
        body = body.replace(b"cNAME\n", b"c%s\n" % chosen).replace(b"\x8cNAME", b"\x8c%c%s" % (len(chosen), chosen))
    return content[:2] + (b"\x95" + pack("<Q", len(body)) if framed else b"") + body


@pytest.mark.parametrize("core", ["core", "_core"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_of_every_protocol_and_numpy(protocol, core, tmp_path):
    path = tmp_path / "a.pickle"
    content = of_numpy(pickle.dumps(CONTENT, protocol), core)
    assert f"numpy.{core}.multiarray".encode() in content
    path.write_bytes(content)
    found = read_arrays("Data", path)
    assert list(found) == list(CONTENT)
    for name, value in CONTENT.items():
        if isinstance(value, np.ndarray):
            assert found[name].dtype == value.dtype
            assert np.array_equal(found[name], value)
    assert found["labels"] == CONTENT["labels"]
    assert found["class_dict"]["auk"].tolist() == [1, 2]


def test_what_python_2_wrote(tmp_path):
    """The bytes that its cPickle writes for CIFAR, and the protocol 0 of its default."""
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85q\x05U\x01bq\x06\x87q\x07Rq\x08"
        b"(K\x01K\x01K\x03\x86q\tcnumpy\ndtype\nq\nU\x02u1q\x0bK\x00K\x01\x87q\x0cRq\r"
        b"(K\x03U\x01|q\x0eNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x0fb\x89T\x03\x00\x00\x00\x00\x80\xffq\x10tq\x11b"
    )
    path = tmp_path / "a.pickle"
    path.write_bytes(b"\x80\x02}q\x01(U\x04dataq\x02" + array + b"U\x0bfine_labelsq\x12]q\x13(K\x07eu.")
    assert read_arrays("Data", path)["data"].tolist() == [[0, 128, 255]]
    assert read_arrays("Data", path)["fine_labels"] == [7]
    path.write_bytes(b"(dp0\nS'fine_labels'\np1\n(lp2\nI7\naL12L\nas.")
    assert read_arrays("Data", path) == {"fine_labels": [7, 12]}


class Raw(bytes):
    """A part of a pickle."""


def encoded(value):
    if isinstance(value, Raw):
        return value
    if isinstance(value, tuple):
        return b"(" + b"".join(map(encoded, value)) + b"t"
    return pickle.dumps(value, 3)[2:-1]


def named(module, name):
    return Raw(f"c{module}\n{name}\n".encode())


def call(function, *arguments):
    return Raw(function + encoded(arguments) + b"R")


def build(target, state):
    return Raw(target + encoded(state) + b"b")


CORE = "numpy.core.multiarray"
NDARRAY, DTYPE = named("numpy", "ndarray"), named("numpy", "dtype")
BYTE, OBJECT = call(DTYPE, "u1", False, True), call(DTYPE, "O8", False, True)
EMPTY = call(named(CORE, "_reconstruct"), NDARRAY, (0,), b"b")
FRAMED = named("numpy.core.numeric", "_frombuffer")
LARGE = 2**40
LONG = Raw(encoded("x" * 4000)[:-1] + b"\x01")  # a string that h\x01 gets again

ATTACKS = {
    "a function": (call(named("os", "system"), "touch executed"), "it names os.system"),
    "a function of numpy": (call(named("numpy", "load"), "executed"), "it names numpy.load"),
    "a name with dots": (Raw(encoded("numpy") + encoded("dtype.newbyteorder") + b"\x93"), "it names numpy.dtype.new"),
    "ndarray over memory": (call(NDARRAY, (LARGE,), BYTE, b"x", 0, (1,)), "not callable"),
    "ndarray of objects": (call(NDARRAY, (1,), OBJECT, b"\x01" * 8), "an array of 'O8'"),
    "begun with another size": (call(named(CORE, "_reconstruct"), NDARRAY, (LARGE,), b"b"), "begins an array in"),
    "begun as another class": (call(named(CORE, "_reconstruct"), DTYPE, (0,), b"b"), "begins an array in another"),
    "dtype of objects": (OBJECT, "an array of 'O8', which are not plain"),
    "dtype of fields": (call(DTYPE, "u1,O8"), "not plain numbers"),
    "dtype of a list": (call(DTYPE, [("a", "O8")]), "not plain numbers"),
    "dtype of no bytes": (call(DTYPE, "S0"), "not plain numbers"),
    "fields of a dtype": (build(BYTE, (3, "|", None, ("a",), {"a": 1}, 1, 1, 0)), "more than plain"),
    "a subarray": (build(BYTE, (3, "|", (BYTE, (LARGE,)), None, None, 1, 1, 0)), "more than plain"),
    "metadata": (build(BYTE, (4, "|", None, None, None, -1, -1, 0, {})), "more than plain"),
    "a huge shape": (call(FRAMED, b"x", BYTE, (LARGE,), "C"), f"an array of .{LARGE},. uint8 in 1 bytes"),
    "a negative shape": (call(FRAMED, b"x", BYTE, (-1, -1), "C"), "with other arguments"),
    "a shape of floats": (call(FRAMED, b"x", BYTE, (1.0,), "C"), "with other arguments"),
    "a shape of many axes": (call(FRAMED, b"", BYTE, (LARGE,) * 33, "C"), "with other arguments"),
    "a size of no index": (call(FRAMED, b"", BYTE, (0, 2**63), "C"), "with other arguments"),
    "characters that do not exist": (call(FRAMED, b"\xff" * 4, call(DTYPE, "U1"), (1,), "C"), "do not exist"),
    "a key of keys": (Raw(b"}" + encoded((1, 2)) + encoded(3) + b"s"), "keys that are no plain"),
    "keys of keys": (Raw(b"}(" + encoded((1, 2)) + encoded(3) + b"u"), "keys that are no plain"),
    "a dictionary of keys of keys": (Raw(b"(" + encoded((1, 2)) + encoded(3) + b"d"), "keys that are no plain"),
    "bytes out of bounds": (call(FRAMED, b"x", call(DTYPE, "f8"), (1,), "C"), "float64 in 1 bytes"),
    "bytes of another kind": (call(FRAMED, [b"x"], BYTE, (1,), "C"), "with other arguments"),
    "an array as bytes": (call(FRAMED, EMPTY, BYTE, (0,), "C"), "with other arguments"),
    "no dtype": (call(FRAMED, b"x", "u1", (1,), "C"), "with other arguments"),
    "a state of objects": (build(EMPTY, (1, (1,), BYTE, False, ["x"])), "with other arguments"),
    "a state out of bounds": (build(EMPTY, (1, (LARGE,), BYTE, False, b"x")), "in 1 bytes"),
    "a state of strides": (build(EMPTY, (1, (1,), BYTE, False, b"x", (LARGE,))), "sets the state of an object"),
    "a dictionary as state": (build(EMPTY, {"shape": (LARGE,)}), "sets the state of an object"),
    "a function's state": (build(named(CORE, "_reconstruct"), {"__doc__": "changed"}), "sets the state of an object"),
    "a class's state": (build(DTYPE, (None, {"set_state": None})), "sets the state of an object"),
    "a scalar of objects": (call(named(CORE, "scalar"), OBJECT, b"\x01" * 8), "an array of 'O8'"),
    "an item of an array": (Raw(EMPTY + encoded(0) + encoded(1) + b"s"), "item assignment"),
    "more bytes than the file": (
        Raw(b"".join(call(named("_codecs", "encode"), text, "latin1") for text in (LONG, Raw(b"h\x01")))),
        "encodes strings in another way",
    ),
    "another encoding": (call(named("_codecs", "encode"), "x", "zip"), "encodes strings in another way"),
    "bytes of a size": (call(named("builtins", "bytes"), LARGE), "takes 1 positional argument"),
    "an object": (Raw(DTYPE + b")\x81"), "the operation NEWOBJ"),
    "an instance": (Raw(b"(ios\nsystem\n"), "the operation INST"),
    "a registered class": (Raw(b"\x82\x01"), "the operation EXT1"),
    "a persistent object": (Raw(b"P1\n"), "the operation PERSID"),
    "a buffer from elsewhere": (Raw(b"\x97"), "the operation NEXT_BUFFER"),
    "no operation": (Raw(b"\xff"), "the operation 255"),
    "bytes that are not there": (Raw(b"\x8e" + pack("<Q", LARGE) + b"x"), "EOFError"),
    "a bytearray that is not there": (Raw(b"\x96" + pack("<Q", LARGE) + b"x"), "EOFError"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_a_pickle_that_is_more_than_arrays_does_nothing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    attack, reason = ATTACKS[name]
    path = tmp_path / "a.pickle"
    path.write_bytes(b"\x80\x03}q\x00(" + encoded("data") + attack + b"u.")
    expected = f"^Data: expected a pickle of arrays in {path}, could not read it: .*{reason}"
    with pytest.raises(ValueError, match=expected) as raised:
        read_arrays("Data", path)
    assert "\n" not in str(raised.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.pickle"]
    path.write_bytes(pickle.dumps(CONTENT, 2))  # and the process is unchanged
    assert np.array_equal(read_arrays("Data", path)["data"], CONTENT["data"])


def test_memory_is_that_of_the_file(tmp_path):
    """The largest index of the memo would need 64 GiB in a list, as in Python's C unpickler."""
    path = tmp_path / "a.pickle"
    path.write_bytes(b"\x80\x03}r\xff\xff\xff\xff(" + encoded("labels") + encoded([3]) + b"u.")
    assert read_arrays("Data", path) == {"labels": [3]}


def test_an_array_whose_state_is_missing_is_not_an_array(tmp_path):
    path = tmp_path / "a.pickle"
    path.write_bytes(b"\x80\x03}(" + encoded("data") + EMPTY + b"u.")
    assert read_arrays("Data", path) == {"data": None}
