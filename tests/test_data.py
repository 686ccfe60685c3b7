"""Reading data sets with ids and splitting them, and every way in which the input can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pymape.data.tables import load_ids, load_records, read_table, split_forget, validate_labels

ROWS = [
    {"id": "a", "text": "one, two", "label": 0},
    {"id": "b", "text": 'say "x"', "label": 1},
    {"id": "c", "text": "ü", "label": 0},
]


def _write(path: Path, rows: list[dict] = ROWS) -> Path:
    names = list(rows[0])
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".tsv":
        lines = ["\t".join(names), *("\t".join(str(row[name]) for name in names) for row in rows)]
        path.write_text("\n".join(lines), encoding="utf-8")
    elif path.suffix == ".csv":
        import csv

        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, names)
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({name: [row[name] for row in rows] for name in names}), path)
    return path


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_every_format_holds_the_same_records(tmp_path: Path, suffix: str) -> None:
    records = load_records(_write(tmp_path / f"data.{suffix}"))
    assert records.ids == ["a", "b", "c"]
    assert records.column("text") == ["one, two", 'say "x"', "ü"]
    assert [int(label) for label in records.column("label")] == [0, 1, 0]
    chosen = records.select([2, 0])
    assert (chosen.ids, chosen.column("text")) == (["c", "a"], ["ü", "one, two"])


def test_json_may_hold_columns(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"id": [7, 8], "text": ["x", "y"]}))
    assert load_records(path).ids == ["7", "8"]


def test_fingerprint_changes_with_content_and_order(tmp_path: Path) -> None:
    first = load_records(_write(tmp_path / "a.json"))
    assert first.fingerprint() == load_records(_write(tmp_path / "b.json")).fingerprint()
    assert first.fingerprint() != first.select([1, 0, 2]).fingerprint()
    changed = [*ROWS[:2], ROWS[2] | {"text": "u"}]
    assert first.fingerprint() != load_records(_write(tmp_path / "c.json", changed)).fingerprint()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.txt", "x", r"must end in one of \.csv, .*, got '.*data\.txt'"),
        ("data.csv", "", "must start with a header line"),
        ("data.csv", "id,id\n1,2\n", "distinct column names"),
        ("data.csv", "id,text\n1\n", "must have 2 fields in every row, got 1 in line 2"),
        ("data.csv", 'id,text\n1,"open\n', "readable as csv"),
        ("data.csv", "name,text\n1,x\n", r"id_column must be one of \['name', 'text'\] in .*, got 'id'"),
        ("data.csv", "id,text\n", "at least one record, got none"),
        ("data.csv", "id,text\n1,x\n 1,y\n2,z\n", "must not repeat an id, got '1' more than once"),
        ("data.csv", "id,text\n,x\n", "got an empty id in data row 1"),
        ("data.json", "{", "readable as json"),
        ("data.json", "3", "readable as json"),
        ("data.json", '{"id": [1, 2], "text": ["x"]}', "columns of one length, got {'id': 2, 'text': 1}"),
        ("data.json", '{"id": {"0": 7}, "text": {"0": "x"}}', "must hold lists as columns, got dict in column 'id' of"),
        ("data.json", '{"id": [1, 2], "text": "xy"}', "must hold lists as columns, got str in column 'text' of"),
        ("data.jsonl", '{"id": 1}\n{"name": 2}\n', r"columns \['id'\] in every row, got \['name'\] in row 2"),
        ("data.jsonl", "[1]\n", "must hold objects, got list in row 1"),
        ("data.parquet", "not parquet", "readable as parquet"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_records(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path must be an existing file, got '.*none\.csv'"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(ValueError, match=r"forget must be an existing file of ids, got '.*none\.txt'"):
        load_ids(tmp_path / "none.txt")


def test_ids_come_from_text_or_from_a_table(tmp_path: Path) -> None:
    text = tmp_path / "ids.txt"
    text.write_text("\ufeffb\n\n a \n", encoding="utf-8")
    assert load_ids(text) == ["b", "a"]
    assert load_ids(_write(tmp_path / "ids.csv", ROWS[:2])) == ["a", "b"]
    (tmp_path / "ids.json").write_text('[{"person": 7.0}, {"person": 7.5}, {"person": "7.0"}]')
    assert load_ids(tmp_path / "ids.json", "person") == [
        "7",
        "7.5",
        "7.0",
    ]  # as tables hold 7 beside gaps


def test_no_character_but_a_newline_ends_an_id(tmp_path: Path) -> None:
    text = tmp_path / "ids.txt"
    text.write_bytes("a\u2028b\r\nc\x85d\ne\rf\n\x0bg\x0ch".encode())
    assert load_ids(text) == ["a\u2028b", "c\x85d", "e\rf", "g\x0ch"]


@pytest.mark.parametrize(
    ("content", "message"),
    [("\n \n", "forget must name at least one id, got none"), ("a\nb\na\n", "must not repeat an id, got 'a'")],
)
def test_bad_id_lists(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "ids.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_ids(path)


def test_split_covers_the_records_in_order() -> None:
    split = split_forget(["a", "b", "c", "d"], ["d", "b"])
    assert (split.forget, split.retain) == ([1, 3], [0, 2])
    assert split_forget(["a", "b", "c", "d"], ["d"], ["c", "a"]).retain == [0, 2]


@pytest.mark.parametrize(
    ("forget", "retain", "message"),
    [
        ([], None, "forget must name at least one record, got an empty forget set"),
        (["a"], [], "retain must name at least one record, got an empty retain set"),
        (["x", "a", "y"], None, "forget must name ids of the data, got 'x', 'y' not among 3 records"),
        (["a"], ["z"], "retain must name ids of the data, got 'z'"),
        (["a", "a"], None, "forget must not repeat an id, got 'a' more than once"),
        (["a", "b"], ["b", "c"], "forget and retain must not overlap, got 'b' in both"),
        (["a", "b", "c"], None, "retain must keep at least one record"),
    ],
)
def test_bad_splits(forget: list[str], retain: list[str] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_forget(["a", "b", "c"], forget, retain)


def test_long_lists_of_ids_are_cut_in_messages() -> None:
    with pytest.raises(ValueError, match="got 'x0', 'x1', 'x2' and 7 more not among 1 records"):
        split_forget(["a"], [f"x{number}" for number in range(10)])


def test_labels_are_numbers_or_names() -> None:
    assert validate_labels(["1", 0, "2.0", 1.0], 3) == [1, 0, 2, 1]
    assert validate_labels(["pos", "neg", "1"], 2, {"neg": 0, "pos": 1}) == [1, 0, 1]
    assert validate_labels([0, "1"], 2, {"0": 0, "1": 1}) == [0, 1]


def test_names_that_are_numbers_of_other_classes_are_names_only() -> None:
    stars = {str(number + 1): number for number in range(5)}
    assert validate_labels([1, "5", 3.0], 5, stars) == [0, 4, 2]
    with pytest.raises(ValueError, match="labels must be one of 1, 2, 3, 4, 5, got 0 in data row 2"):
        validate_labels([1, 0], 5, stars)


@pytest.mark.parametrize("label", ["3", -1, "0.5", "good", None, "", "nan"])
def test_labels_out_of_range_are_named_with_their_row(label: object) -> None:
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\), got .* in data row 2"):
        validate_labels([0, label], 3)
