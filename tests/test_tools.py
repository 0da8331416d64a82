"""One door for numbers and one for names; files that are whole or not there."""

import json
import os

import numpy as np
import pytest
import torch

from kklip_nb.tools import (as_array, booleans, cache_dir, check_found, file_hash, finite_matrix, finite_numbers, known_ids, row_numbers, same_ids, save_tensors, whole_number,
                            write_atomically)

ROWS = [[0.5, -1.25], [2.0, 0.125], [4.0, 8.0]]  # exact in every precision
FORMS = {
    "list": ROWS, "tuple": tuple(map(tuple, ROWS)), "arrays": [np.array(r) for r in ROWS], "half": np.array(ROWS, np.float16),
    "long": np.array(ROWS, np.longdouble), "fortran": np.asfortranarray(ROWS), "strided": np.repeat(ROWS, 2, 1)[:, ::2], "reversed": np.array(ROWS)[::-1, ::-1][::-1, ::-1],
    "big-endian": np.array(ROWS, ">f4"), "read-only": np.frombuffer(np.array(ROWS).tobytes()).reshape(3, 2), "bfloat16": torch.tensor(ROWS).bfloat16(),
    "float8": torch.tensor(ROWS).to(torch.float8_e5m2), "gradient": torch.tensor(ROWS, requires_grad=True), "transposed": torch.tensor(ROWS).T.contiguous().T,
    "result": torch.tensor(ROWS, requires_grad=True) * 1, "rows": [torch.tensor(r, requires_grad=True) for r in ROWS], "scalars": [[torch.tensor(x) for x in r] for r in ROWS],
    "negative view": torch.complex(torch.tensor(ROWS), -torch.tensor(ROWS)).conj().imag,
}


@pytest.mark.parametrize("form", FORMS)
def test_numbers_come_in_by_one_door(form):
    found = finite_matrix("embeddings", FORMS[form])
    assert type(found) is np.ndarray and found.dtype == np.float64
    np.testing.assert_array_equal(found, ROWS)
    np.testing.assert_array_equal(np.asarray(as_array(FORMS[form]), float), ROWS)
    np.testing.assert_array_equal(finite_numbers("values", FORMS[form][1]), ROWS[1])


def test_whole_numbers_are_numbers():
    for values in ([[1, 2]], np.ones((1, 2), np.uint8), torch.ones(1, 2, dtype=torch.long)): assert finite_matrix("x", values).dtype == np.float64
    with pytest.raises(ValueError, match="x have|x has"): finite_matrix("x", [[True, False]])


def test_a_home_folder_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KKLIP_CACHE", "~/kept")
    assert cache_dir() == tmp_path / "kept"


def test_a_matrix_is_a_copy():
    given = np.array(ROWS)
    finite_matrix("embeddings", given)[0] = 7
    np.testing.assert_array_equal(given, ROWS)


@pytest.mark.parametrize("values, says", [
    ([[1.0], [np.nan]], "NaN"), ([[1.0], [np.inf]], "infinite"), ([[1.0], [1.0, 2.0]], "one length"), (np.ones(3), r"\(3,\)"),
    (np.ones((0, 3)), r"\(0, 3\)"), (np.ones((3, 0)), r"\(3, 0\)"), ([["a"]], "dtype"), (np.ones((2, 2), bool), "bool"), (np.ones((2, 2), complex), "complex"), (None, "dtype")])
def test_other_matrices_are_refused_by_name(values, says):
    with pytest.raises(ValueError, match=f"embeddings.*{says}"): finite_matrix("embeddings", values)


def test_a_row_of_numbers_takes_whole_numbers_and_hits():
    np.testing.assert_array_equal(finite_numbers("hits", [True, False, 2, 0.5]), [1, 0, 2, 0.5])
    for values, says in ((3.0, "shape"), ([], "shape"), ([[1.0]], "shape"), (["a"], "numbers"), ([1.0, np.nan], "NaN"), ([1.0, [2.0]], "numbers")):
        with pytest.raises(ValueError, match=f"hits.*{says}"): finite_numbers("hits", values)


def test_names_stay_apart_that_a_text_array_would_join():
    names = ["a", "a\0", "b", "a", "", "\0", None, "1", 1]
    (ids,) = same_ids(names)
    assert ids.dtype == np.int64
    assert ((ids[:, None] == ids) == [[type(a) is type(b) and a == b for a in names] for b in names]).all()
    assert same_ids(["b", "a", "c", "a"], ["d", "B"])[0].tolist() == [2, 1, 3, 1]  # in order: B a b c d
    left, right = same_ids(["x", "y"], ["y", "z", "x"])
    assert (left[:, None] == right).tolist() == [[False, False, True], [True, False, False]]


def test_names_that_read_the_same_are_one():
    names = ["caf\u00e9", "cafe\u0301", "caf\u00e9\u00a0", "cafe", "two  words", "two words", float("nan"), None]
    assert same_ids(names)[0][[0, 1, 2]].tolist() == [same_ids(names)[0][0]] * 3
    assert len(set(same_ids(names)[0].tolist())) == 4


def test_rows_by_number_or_by_mask():
    for rows in ([0, 2], (0, 2), np.array([True, False, True]), [True, False, True], torch.tensor([0, 2]), iter([0, 2]), np.array([0, 2], np.uint8), range(0, 3, 2)):
        found = row_numbers("train", rows, 3)
        assert found.dtype == np.int64 and found.tolist() == [0, 2]
    assert row_numbers("train", [], 3).shape == (0,) and row_numbers("train", np.array([1, 0, 1]), 3).tolist() == [1, 0, 1]
    for wrong, says in (([3], "run from 3 to 3"), ([-1], "run from -1"), ([0.0], "float64"), ([True], "bool"), ([[0]], "shape"), (["a"], "dtype")):
        with pytest.raises(ValueError, match=f"train.*{says}"): row_numbers("train", wrong, 3)


def test_booleans_and_whole_numbers():
    np.testing.assert_array_equal(booleans("right", [[0, 1.0], [True, 0]]), [[False, True], [True, False]])
    for wrong in ([0.5], [np.nan], ["a"], [[1], [1, 0]]):
        with pytest.raises(ValueError, match="right.*booleans"): booleans("right", wrong)
    assert [whole_number("k", k) for k in (1, 5.0, np.int64(3), torch.tensor(2))] == [1, 5, 3, 2]
    for wrong in (0, -1, 2.5, None, "a", np.inf, np.nan):
        with pytest.raises(ValueError, match="k=.*at least 1"): whole_number("k", wrong)


def test_names_may_be_arrays_and_tensors():
    found = same_ids(torch.tensor([3, 4, 3]), np.array([4, 5]), [np.int64(3), torch.tensor(5)], iter([5]))
    assert [f.tolist() for f in found] == [[0, 1, 0], [1, 2], [0, 2], [2]]
    assert [f.tolist() for f in same_ids(np.array(["é", "a"]), ["a"], [])] == [[1, 0], [0], []]
    for wrong in ([["a"]], torch.ones(2, 2)):
        with pytest.raises(ValueError, match="ids.*expected text or numbers"): same_ids(wrong)
        with pytest.raises(ValueError, match="ids.*expected text or numbers"): known_ids("groups", wrong)
    assert known_ids("groups", iter(["b", "a", "b "])).tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="groups hold missing values"): known_ids("groups", ["a", None])


def test_the_cache_is_where_the_user_says(tmp_path, monkeypatch):
    monkeypatch.setenv("KKLIP_CACHE", str(tmp_path / "a" / "b"))
    assert cache_dir() == tmp_path / "a" / "b" and cache_dir().is_dir()
    monkeypatch.setenv("KKLIP_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    if os.name == "posix" and os.uname().sysname == "Linux": assert cache_dir() == tmp_path / "xdg" / "kklip_nb"


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path, seen = tmp_path / "new" / "file.txt", []
    def write(part):
        part.write_text("all of it")
        seen.append((part.parent == path.parent, part.name.startswith("."), path.exists()))
    assert write_atomically(str(path), write) == path and path.read_text() == "all of it"
    def stopped(part):
        part.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): write_atomically(path, stopped)
    assert seen == [(True, True, False)] and path.read_text() == "all of it" and os.listdir(path.parent) == ["file.txt"]


def test_the_same_tensors_give_the_same_bytes_and_come_back(tmp_path):
    from safetensors import safe_open
    x = np.arange(6, dtype=np.float32).reshape(2, 3).T
    a = save_tensors(tmp_path / "a", dict(x=x), dict(p="1", q="ü"))
    b = save_tensors(tmp_path / "b", dict(x=x.copy()), dict(q="ü", p="1"))
    assert file_hash(a) == file_hash(b) != file_hash(save_tensors(tmp_path / "c", dict(x=x), dict(p="2", q="ü")))
    with safe_open(a, framework="numpy") as file:
        np.testing.assert_array_equal(file.get_tensor("x"), x)
        assert file.metadata() == dict(p="1", q="ü")
    header = a.read_bytes()
    json.loads(header[8:8 + int.from_bytes(header[:8], "little")])  # other readers can read it


def test_what_differs_is_listed_and_the_rest_is_not():
    check_found("f", dict(a="1", b="2"), dict(a="1"), "do it again")
    check_found("f", dict(a="1"), {}, "do it again")
    with pytest.raises(ValueError) as error: check_found("f", dict(a="1", b="2"), dict(a="1", b="3", c="4"), "do it again")
    assert str(error.value) == "f was made otherwise; as {what: (found, wanted)}: {'b': ('2', '3'), 'c': (None, '4')}; do it again"


def test_a_single_number_keeps_its_shape(tmp_path):
    from safetensors.numpy import load_file
    assert load_file(save_tensors(tmp_path / "a", dict(x=np.array(3.0)), {}))["x"].shape == ()
