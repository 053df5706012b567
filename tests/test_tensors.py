"""safetensors in and out: the library's own bytes, and hostile files refused with the file named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from loratool.errors import FormatError, LoratoolError
from loratool.tensors import (
    CONTENT_HASH,
    DTYPES,
    Tensor,
    block_rows,
    content_hash,
    digest,
    numpy_dtype,
    peak,
    read_safetensors,
    write_safetensors,
)
from tests.laws import examples
from tests.samples import normal

READABLE = [d.name for d in DTYPES.values() if d.numpy]


def bits(dtype: str, *shape: int) -> Tensor:
    """Every tensor of this dtype and shape has some bits set, NaN payloads included."""
    there = numpy_dtype(dtype)
    count = int(np.prod(shape)) * there.itemsize
    raw = np.random.default_rng(0).integers(0, 2 if dtype == "BOOL" else 256, count, np.uint8)
    return Tensor.of(raw.view(there).reshape(shape))


def library_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    import torch
    from safetensors.torch import save

    def own(tensor: Tensor) -> Any:
        raw = np.ascontiguousarray(tensor.array()).reshape(-1).view(np.uint8)
        return torch.from_numpy(raw).view(getattr(torch, DTYPES[tensor.dtype].torch)).reshape(tensor.shape)

    return save({name: own(tensor) for name, tensor in tensors.items()}, metadata or None)


# -- the library's own bytes ---------------------------------------------------------------------------------


@pytest.mark.peer
def test_all_dtypes_are_written_as_the_library_writes_them(tmp_path: Path) -> None:
    tensors = {f"{name.lower()}.{n}": bits(name, 3, n) for n in (2, 1) for name in READABLE}
    tensors |= {"scalar": normal(), "empty": normal(0, 4), "größer": normal(2, dtype="F16")}
    write_safetensors(tmp_path / "x", tensors, {"format": "pt"})
    assert (tmp_path / "x").read_bytes() == library_bytes(tensors, {"format": "pt"})


@pytest.mark.peer
@examples(40)
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=9).filter(
            lambda name: name != "__metadata__"
        ),
        st.tuples(st.sampled_from(READABLE), st.lists(st.integers(0, 4), max_size=3)),
        min_size=1,
        max_size=6,
    )
)
def test_any_table_is_written_as_the_library_writes_it(table: dict[str, Any]) -> None:
    import tempfile

    tensors = {name: bits(dtype, *shape) for name, (dtype, shape) in table.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x")
        write_safetensors(path, tensors, {})
        assert path.read_bytes() == library_bytes(tensors, {})
        again = read_safetensors(path)
        assert list(again.tensors) == sorted(tensors, key=list(again.tensors).index)
        assert all(tensor.same_bytes(again.tensors[name]) for name, tensor in tensors.items())


def test_metadata_keeps_its_order_and_its_words(tmp_path: Path) -> None:
    metadata = {"z": 'ü\n"\\', "a": "", "format": "pt"}
    write_safetensors(tmp_path / "x", {"w": normal(2)}, metadata)
    assert list(read_safetensors(tmp_path / "x").metadata.items()) == list(metadata.items())


def test_rows_are_read_without_the_rest(tmp_path: Path) -> None:
    tensor = normal(9, 2, 3, dtype="BF16")
    write_safetensors(tmp_path / "x", {"first": normal(5), "w": tensor}, {})
    stored = read_safetensors(tmp_path / "x").tensors["w"]
    assert (stored.load(4, 7) == tensor.array()[4:7]).all()
    assert stored.region is not None and stored.region.nbytes == 9 * 2 * 3 * 2


def test_a_file_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(LoratoolError, match="cannot write: File exists"):
        write_safetensors(tmp_path / "x", {"w": normal(2)}, {})
    assert (tmp_path / "x").read_text() == "mine"


def test_large_tensors_are_streamed_whole(tmp_path: Path) -> None:
    """More than one chunk, both from memory and from another file."""
    values = np.random.default_rng(0).standard_normal((700, 2100), np.float32)
    write_safetensors(tmp_path / "x", {"w": Tensor.of(values)}, {})
    write_safetensors(tmp_path / "y", dict(read_safetensors(tmp_path / "x").tensors), {})
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    assert (read_safetensors(tmp_path / "y").tensors["w"].array() == values).all()


# -- handles -------------------------------------------------------------------------------------------------


@examples(40)
@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_views_load_what_numpy_would(rows: int, columns: int, data: st.DataObject) -> None:
    tensor = normal(rows, columns)
    start = data.draw(st.integers(0, columns))
    stop = data.draw(st.integers(start, columns))
    assert (tensor.T.load(start, stop) == tensor.array().T[start:stop]).all()
    flat = tensor.reshape(columns, rows)
    assert (flat.load(start, stop) == tensor.array().reshape(columns, rows)[start:stop]).all()


@pytest.mark.parametrize(("dtype", "digits"), [("BF16", 8), ("F16", 11), ("F32", 24)])
@examples(100)
@given(data=st.data())
def test_a_cast_rounds_once_to_nearest_even(dtype: str, digits: int, data: st.DataObject) -> None:
    """From float64 too, where numpy and torch stop over at float32 and round twice; llm trap 57."""
    from fractions import Fraction

    whole = data.draw(st.integers(2 ** (digits - 1), 2**digits - 1))
    part = data.draw(st.sampled_from((0, 1)) | st.integers(0, 2**20)) + data.draw(st.sampled_from((0, 2**19)))
    value = (whole + part / 2**20 + data.draw(st.sampled_from((0.0, 2.0**-28)))) * 2.0**-7
    value *= data.draw(st.sampled_from((1, -1)))
    assume(abs(value) < 2 ** (digits - 7))
    expected = Fraction(round(Fraction(value) * 2**7), 2**7)
    assert Tensor.of(np.array([value])).cast(dtype).item() == expected


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_a_cast_keeps_what_has_no_digits(dtype: str) -> None:
    values = np.array([np.nan, np.inf, -np.inf, 1e300, -1e300, 0.0, -0.0, 1e-320])
    expected = [np.nan, np.inf, -np.inf, np.inf, -np.inf, 0.0, -0.0, 0.0]
    found = Tensor.of(values).cast(dtype).array().astype(np.float64)
    np.testing.assert_array_equal(found, expected)
    assert list(np.signbit(found[-3:])) == [False, True, False]


def test_a_cast_that_overflows_is_infinite_for_others_to_refuse() -> None:
    assert np.isinf(Tensor.of(np.array([1e6], np.float32)).cast("F16").array()).all()


def test_one_value_is_a_value_whatever_its_shape() -> None:
    assert Tensor.of(np.float32(3)).item() == Tensor.of(np.array([[3]], np.int64)).item() == 3.0
    with pytest.raises(FormatError, match="one value expected"):
        normal(2).item()


def test_a_shape_of_another_size_is_refused() -> None:
    with pytest.raises(FormatError, match="cannot view"):
        normal(2, 3).reshape(4)


# -- the content hash ----------------------------------------------------------------------------------------


def hash_of(tensors: dict[str, Tensor]) -> str:
    return content_hash((name, t.dtype, t.shape, digest(t)) for name, t in tensors.items())


def test_the_content_hash_is_blind_to_layout_and_to_nothing_else(tmp_path: Path) -> None:
    tensors = {"a": normal(1400, 900), "b": normal(3), "c": normal(0, 2)}
    found = hash_of(tensors)
    write_safetensors(tmp_path / "x", tensors, {CONTENT_HASH: "", "format": "pt"})
    again = read_safetensors(tmp_path / "x")
    assert again.metadata == {CONTENT_HASH: found, "format": "pt"}
    assert hash_of(dict(reversed(again.tensors.items()))) == found
    assert block_rows((1400, 900)) < 1400  # more than one block
    other = tensors["a"].array().copy()
    other[-1, -1] = -other[-1, -1]
    for changed in (
        {"a": Tensor.of(other)},
        {"a": tensors["a"].reshape(900, 1400)},
        {"c": normal(0, 3)},
        {"b": tensors["b"].cast("F64")},
        {"d": normal(1)},
    ):
        assert hash_of(tensors | changed) != found
    assert hash_of({"x": tensors["a"], **{k: v for k, v in tensors.items() if k != "a"}}) != found


# -- hostile files -------------------------------------------------------------------------------------------


def file_of(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


EIGHT = b"\0" * 8
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a safetensors file"),
    "stub": (b"{}", "not a safetensors file"),
    "text": (b"hello, this is a long enough text", "not a safetensors file"),
    "only_a_length": ((2).to_bytes(8, "little"), "not a safetensors file"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git-LFS pointer"),
    "html": (b"<!DOCTYPE html><html></html>", "web page"),
    "html_lower": (b"<html><body>404</body></html>", "web page"),
    "zip": (b"PK\x03\x04" + EIGHT, "zip archive"),
    "pickle": (b"\x80\x02}q\x00." + EIGHT, "pickle"),
    "gguf": (b"GGUF\x03\0\0\0" + EIGHT, "GGUF"),
    "huge_header": (file_of({"a": entry()}, EIGHT, 2**63), "over the limit"),
    "long_header": (file_of({"a": entry()}, EIGHT, 5000), "inside its header"),
    "list": (file_of(b"{[]}"), "malformed safetensors header"),
    "not_utf8": (file_of(b'{"\xff": 1}'), "malformed safetensors header"),
    "deep": (file_of(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "malformed"),
    "huge_number": (file_of(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b"]}}"), "malformed"),
    "twice": (
        file_of(b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}", EIGHT),
        "occurs twice",
    ),
    "overlap": (file_of({"a": entry(), "b": entry(offsets=(4, 12))}, EIGHT * 2), "overlap or leave a hole"),
    "same_place": (file_of({"a": entry(), "b": entry()}, EIGHT), "overlap or leave a hole"),
    "hole": (file_of({"a": entry(), "b": entry(offsets=(12, 20))}, EIGHT * 3), "overlap or leave a hole"),
    "starts_late": (file_of({"a": entry(offsets=(4, 12))}, EIGHT * 2), "overlap or leave a hole"),
    "truncated": (file_of({"a": entry()}, b"\0" * 7), "1 bytes are missing"),
    "trailing": (file_of({"a": entry()}, b"\0" * 9), "1 bytes follow"),
    "dtype": (file_of({"a": entry("F31")}, EIGHT), "unknown dtype 'F31'"),
    "dtype_list": (file_of({"a": entry([])}, EIGHT), "malformed|unknown dtype"),
    "negative": (file_of({"a": entry(shape=(-2,))}, EIGHT), "no sizes"),
    "negative_offset": (file_of({"a": entry(offsets=(-8, 0))}, EIGHT), "no sizes"),
    "boolean": (file_of({"a": entry(shape=(2, True))}, EIGHT), "no sizes"),
    "fraction": (file_of({"a": entry(shape=(2.0,))}, EIGHT), "no sizes"),
    "text_size": (file_of({"a": entry(shape=("2",))}, EIGHT), "no sizes"),
    "overflow": (file_of({"a": entry(shape=(2**61, 2**61))}, EIGHT), "do not hold"),
    "many_axes": (file_of({"a": entry(shape=(2, *[1] * 40))}, EIGHT), "no sizes"),
    "wrong_size": (file_of({"a": entry(shape=(3,))}, EIGHT), "8 bytes do not hold F32"),
    "half_byte": (file_of({"a": entry("F4", (3,), (0, 1))}, b"\0"), "do not hold"),
    "three_offsets": (file_of({"a": entry(offsets=(0, 4, 8))}, EIGHT), "malformed safetensors entry"),
    "no_shape": (file_of({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, EIGHT), "malformed safetensors entry"),
    "no_table": (file_of({"a": 3}), "malformed safetensors entry"),
    "metadata_list": (file_of({"__metadata__": []}), "metadata is not"),
    "metadata_number": (file_of({"__metadata__": {"a": 1}}), "metadata is not"),
    "metadata_nested": (file_of({"__metadata__": {"a": {"b": "c"}}}), "metadata is not"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_by_name(name: str, tmp_path: Path) -> None:
    """llm trap 61 and diffusion trap 63 among them: an LFS pointer is called one; stubs of two bytes."""
    data, message = HOSTILE[name]
    path = tmp_path / "innocent.safetensors"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=message) as caught:
        read_safetensors(path)
    assert str(path) in str(caught.value)


@examples(200)
@given(st.integers(0, 200), st.integers(0, 255))
def test_a_flipped_byte_of_the_header_is_read_or_refused(position: int, value: int) -> None:
    """Whatever a header says, nothing but FormatError comes of it."""
    import tempfile

    whole = bytearray(file_of({"__metadata__": {"k": "v"}, "a": entry(), "b": entry("U8", (3,), (8, 11))}, b"\1" * 11))
    whole[position % len(whole)] = value
    with tempfile.NamedTemporaryFile() as file:
        file.write(whole)
        file.flush()
        try:
            found = read_safetensors(Path(file.name))
        except FormatError as error:
            assert re.search(re.escape(file.name), str(error))
        else:
            assert sum(t.nbytes for t in found.tensors.values()) <= 11


def test_a_missing_file_is_no_format_error(tmp_path: Path) -> None:
    with pytest.raises(LoratoolError, match="cannot read: No such file") as caught:
        read_safetensors(tmp_path / "absent.safetensors")
    assert caught.value.exit_code == 1


def test_a_file_cut_after_it_was_opened_is_an_error_and_no_garbage(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", {"w": normal(64)}, {})
    stored = read_safetensors(tmp_path / "x").tensors["w"]
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-4])
    with pytest.raises(FormatError, match="ends early"):
        stored.array()


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8"])
@pytest.mark.parametrize("value", [0.0, 7.0, 64.0, -3.0, 0.30078125])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_value_of_a_file_is_read_as_numpy_reads_it(
    dtype: str, value: float, shape: tuple[int, ...], tmp_path: Path
) -> None:
    if dtype[0] in "IU" and (value < 0 or value % 1):
        value = 5.0
    made = Tensor.of(np.full(shape, value), dtype)
    write_safetensors(tmp_path / "x.safetensors", {"first": Tensor.of(np.ones(3, np.float32)), "x": made}, {})
    read = read_safetensors(tmp_path / "x.safetensors").tensors["x"]
    assert read.item() == float(read.array().reshape(-1)[0]) == value


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_the_largest_value_is_found_among_the_bits(dtype: str) -> None:
    values = Tensor.of(np.random.default_rng(0).standard_normal((9, 8)) * 3, dtype).array().copy()
    assert peak(values) == peak(-values.T) == np.abs(values.astype(np.float64)).max()
    assert (peak(values[:0]), peak(-0 * values)) == (0, 0)
    values[3, 3] = -np.inf
    assert peak(values) == np.inf
    values[2, 2] = -np.nan
    assert np.isnan(peak(values))
