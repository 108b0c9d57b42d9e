"""State files: bit-exact, checked, and unable to run code."""

from __future__ import annotations

import struct

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mpilm.errors import CheckpointError
from mpilm.storage.state_file import check_state, read_header, read_state, write_state

SIGNALLING_NAN = struct.unpack("<d", b"\x01\x00\x00\x00\x00\x00\xf4\x7f")[0]

STATE = {
    "model/theta": np.arange(1000, dtype=np.float32),
    "model/empty": np.empty((0, 3)),
    "model/zero_d": np.array(-0.0),
    "model/half": np.array([np.nan, np.inf, 6e-8], np.float16),
    "model/big_endian": np.arange(6, dtype=">f4").reshape(2, 3),
    "model/transposed": np.arange(6).reshape(2, 3).T,
    "model/strided": np.arange(20, dtype=np.int8)[::3],
    "model/mask": np.array([[True], [False]]),
    "random/pcg64": 2**127 + 12345,
    "random/negative": -(2**64),
    "random/int64": [-(2**63), 2**63 - 1][0],
    "lr": float(np.float64(0.1)),
    "nan": SIGNALLING_NAN,
    "steps": 7,
    "flag": True,
    "note": "na\u00efve \0 \ud800 text",
    "nothing": "",
    "blob": bytes(range(256)),
    "a b.c-d/e": b"",
}


def same(a, b):
    """Return whether two entries are equal in type and to the bit."""
    if isinstance(a, np.ndarray):
        return (
            isinstance(b, np.ndarray)
            and (a.dtype, a.shape) == (b.dtype, b.shape)
            and a.tobytes() == b.tobytes()
        )
    if isinstance(a, float):
        return type(b) is float and struct.pack("d", a) == struct.pack("d", b)
    return type(a) is type(b) and a == b


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not same(a[name], b[name])] == []


def test_every_type_comes_back_to_the_bit(tmp_path):
    write_state(tmp_path / "s.h5", STATE, step=12, size=4)
    assert_same(STATE, read_state(tmp_path / "s.h5"))
    assert read_header(tmp_path / "s.h5") == {"step": 12, "size": 4}


PARTS = st.text("abc .-_\u00e9\u6f22", min_size=1, max_size=4).filter(
    lambda part: part.strip(".") and part.isprintable()
)
NAMES = st.lists(PARTS, min_size=1, max_size=3).map("/".join)
NUMBERS = hnp.scalar_dtypes().filter(lambda t: t.kind in "biuf" and t.itemsize <= 8)
ARRAYS = hnp.arrays(NUMBERS, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0))
VALUES = st.one_of(
    ARRAYS, st.integers(), st.floats(), st.text(), st.binary(), st.booleans()
)


def no_name_inside_another(state):
    return not any(b.startswith(a + "/") for a in state for b in state)


@pytest.mark.long
@given(st.dictionaries(NAMES, VALUES, max_size=6).filter(no_name_inside_another))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_state_comes_back(tmp_path, state):
    write_state(tmp_path / "s.h5", state)
    assert_same(state, read_state(tmp_path / "s.h5"))


@pytest.mark.parametrize("value", [np.float32(0.5), np.int64(3), np.bool_(True)])
def test_a_numpy_scalar_comes_back_as_an_array(tmp_path, value):
    write_state(tmp_path / "s.h5", {"x": value})
    assert same(read_state(tmp_path / "s.h5")["x"], np.asarray(value))


@pytest.mark.parametrize(
    "value",
    [
        None,
        [1, 2],
        1j,
        np.array([None]),
        np.array(["text"]),
        np.array([1j]),
        np.zeros(2, "f4,i8"),
        np.zeros(1, "M8[s]"),
        np.zeros(1, np.longdouble),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name(tmp_path, value):
    with pytest.raises(CheckpointError, match=r"'a/b'.*cannot be stored"):
        write_state(tmp_path / "s.h5", {"a/b": value})


@pytest.mark.parametrize(
    "names",
    [[""], ["/a"], ["a/"], ["a//b"], ["./a"], ["a\0"], ["\ud800"], ["a/b", "a"]],
)
def test_bad_names_are_refused(tmp_path, names):
    with pytest.raises(CheckpointError, match="state entry"):
        write_state(tmp_path / "s.h5", dict.fromkeys(names, 1))


def test_truncated_at_any_length_is_one_line(tmp_path):
    path = tmp_path / "s.h5"
    write_state(path, {"theta": np.arange(100), "step": 1})
    whole = path.read_bytes()
    for length in range(0, len(whole), 13):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError) as caught:
            read_state(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)


@pytest.mark.long
def test_a_changed_byte_is_found_or_harmless(tmp_path):
    """HDF5's checksums guard its metadata, ours the content."""
    path = tmp_path / "s.h5"
    state = {"theta": np.arange(300.0), "a/steps": 5, "note": "text"}
    write_state(path, state)
    whole = path.read_bytes()
    random = np.random.default_rng(1)
    num_found = 0
    for place in random.integers(0, len(whole), 200):
        changed = bytearray(whole)
        changed[place] ^= 1 << random.integers(8)
        path.write_bytes(changed)
        try:
            assert_same(state, read_state(path))
        except CheckpointError:
            num_found += 1
    assert num_found > 100  # content is most of the file


def test_every_byte_of_an_array_counts(tmp_path):
    path = tmp_path / "s.h5"
    write_state(path, {"theta": np.full(16, 1.25)})
    whole = path.read_bytes()
    start = whole.index(np.full(16, 1.25).tobytes())
    for place in range(start, start + 16 * 8):
        changed = bytearray(whole)
        changed[place] ^= 0x10
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match="theta does not match its checksum"):
            check_state(path)


def test_a_missing_entry_is_found(tmp_path):
    write_state(tmp_path / "s.h5", {"a": 1, "b": 2})
    with h5py.File(tmp_path / "s.h5", "r+") as file:
        del file["state/b"]
    with pytest.raises(CheckpointError, match="1 entries of 2"):
        read_state(tmp_path / "s.h5")


def replace_with_chunks(group, path):
    del group["x"]
    group.create_dataset("x", data=np.arange(4.0), chunks=(2,))


def replace_with_objects(group, path):
    del group["x"]
    group.create_dataset("x", data=["a", "b"], dtype=h5py.string_dtype())


def replace_with_soft_link(group, path):
    group.move("x", "y")
    group["x"] = h5py.SoftLink("/elsewhere")
    del group["y"]


def replace_with_link_to_a_file(group, path):
    with h5py.File(path.with_name("other.h5"), "w") as other:
        other["x"] = np.arange(4.0)
    del group["x"]
    group["x"] = h5py.ExternalLink("other.h5", "/x")


def replace_with_bytes_of_a_file(group, path):
    secret = path.with_name("secret")
    secret.write_bytes(bytes(32))
    del group["x"]
    group.create_dataset("x", (4,), "f8", external=[(str(secret), 0, 32)])


def replace_with_no_storage(group, path):
    """Declare an exabyte of zeros that takes no room in the file."""
    del group["x"]
    group.create_dataset("x", (2**57,), "f8")


def replace_with_null(group, path):
    del group["x"]
    group["x"] = h5py.Empty("f8")


def replace_checksum(group, path):
    group["x"].attrs["crc32"] = "text"


def replace_type(group, path):
    group["x"].attrs["type"] = np.bytes_("eval")


@pytest.mark.parametrize(
    "change",
    [
        replace_with_chunks,
        replace_with_objects,
        replace_with_soft_link,
        replace_with_link_to_a_file,
        replace_with_bytes_of_a_file,
        replace_with_no_storage,
        replace_with_null,
        replace_checksum,
        replace_type,
    ],
)
def test_a_forged_entry_is_refused(tmp_path, change):
    path = tmp_path / "s.h5"
    write_state(path, {"x": np.arange(4.0)})
    with h5py.File(path, "r+") as file:
        change(file["state"], path)
    with pytest.raises(CheckpointError, match=f"{path}: "):
        read_state(path)


def test_foreign_files_are_named(tmp_path):
    path = tmp_path / "s.h5"
    for read in read_state, check_state, read_header:
        path.unlink(missing_ok=True)
        with pytest.raises(CheckpointError, match=f"{path}: No such file"):
            read(path)
        path.write_text("not HDF5")
        with pytest.raises(CheckpointError, match=f"{path}: not an HDF5 file"):
            read(path)
        with h5py.File(path, "w") as file:
            file["theta"] = 1.0
        with pytest.raises(CheckpointError, match=f"{path}: no mpilm checkpoint file"):
            read(path)
        with pytest.raises(CheckpointError, match=f"{tmp_path}: Is a directory"):
            read(tmp_path)


def test_a_newer_format_is_refused(tmp_path):
    path = tmp_path / "s.h5"
    write_state(path, {})
    with h5py.File(path, "r+") as file:
        file.attrs["version"] = 2
    with pytest.raises(CheckpointError, match="of version 2, this program reads 1"):
        read_state(path)
