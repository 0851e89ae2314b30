"""The reader of tables: what spreadsheets, pandas, loggers and NumPy write, read to the same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from refusals import refused

from xlstm_export.errors import InputError
from xlstm_export.sessions.table import Table, read_table, read_tables

EXPECTED = [[1.5, -2.0], [1000.25, np.nan], [3.0, 4.0]]
HOURS = ["2024-01-31T22:00:00", "2024-01-31T23:00:00", "2024-02-01T00:00:00"]


def table(tmp_path: Path, content: str | bytes, name: str = "d.csv") -> Table:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_table(path)


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("a,b\n1.5,-2\n1000.25,NA\n3,4\n", "ab"),
        ("a;b\r\n1,5;-2\r\n1.000,25;\r\n3;4\r\n", "ab"),
        ("a\tb\n1.5\t\u22122\n1000.25\tNaN\n3\t4\n", "ab"),
        ("sep=;\na;b;\n1,5;-2;\n1000,25;n/a;\n3;4;\n", "ab"),
        ("\ufeffa, b\n1.5, -2\n1.00025e3, null\n 3, 4\n\n", "ab"),
        ('"a","b"\n"1,5","-2,0"\n"1000,25","-"\n"3,0","4,0"\n', "ab"),
        (",a,b\n0,1.5,-2\n1,1000.25,\n2,3,4\n", "ab"),
        ("1.5,-2\n1000.25,?\n3,4\n", ("column_1", "column_2")),
        ("# made by a logger\n# a b\n1.5,-2\n1000.25,nan\n3,4\n", ("column_1", "column_2")),
        ("# a,b\n1.5e+00,-2.0e+00\n1000.25,nan\n3,4\n", "ab"),
        ("a|b\n1.5|-2\n1000.25|None\n3|4\n", "ab"),
        ("a;b\n1,5;-2\n1000,25;.\n3;4\n".encode("utf-16"), "ab"),
    ],
)
def test_the_same_numbers_however_they_are_written(
    content: str | bytes, names: str | tuple[str, ...], tmp_path: Path
) -> None:
    found = table(tmp_path, content)
    np.testing.assert_array_equal(found.values, EXPECTED)
    assert found.columns == tuple(names)
    assert (found.times, found.labels, found.ahead(2)) == (None, (), ("+1", "+2"))


def test_latin_1_is_read_with_a_note(tmp_path: Path) -> None:
    found = table(tmp_path, "Zähler;Größe\n1,5;2\n".encode("latin-1"))
    assert found.columns == ("Zähler", "Größe")
    assert "Latin-1" in found.notes[0]


@pytest.mark.parametrize(
    ("first", "second", "third", "ahead"),
    [
        ("2024-01-31 22:00", "2024-01-31 23:00", "2024-02-01 00:00", "2024-02-01 01:00"),
        ("2024-01-31T22:00:00Z", "2024-01-31T23:00:00Z", "2024-02-01T00:00:00Z", "2024-02-01T01:00:00Z"),
        ("2024/01/31 22:00", "2024/01/31 23:00", "2024/02/01 00:00", "2024/02/01 01:00"),
        ("31.01.2024 22:00", "31.01.2024 23:00", "01.02.2024 00:00", "01.02.2024 01:00"),
        ("31/01/2024 22:00", "31/01/2024 23:00", "1/2/2024 0:00", "01/02/2024 01:00"),
        ("1/31/2024 10:00 PM", "1/31/2024 11:00 PM", "2/1/2024 12:00 AM", "02/01/2024 01:00 AM"),
        ("31-Jan-2024 22:00", "31-Jan-2024 23:00", "01-Feb-2024 00:00", "01-Feb-2024 01:00"),
        ("1706738400", "1706742000", "1706745600", "1706749200"),
        ("1706738400000", "1706742000000", "1706745600000", "1706749200000"),
        ("202401312200", "202401312300", "202402010000", "202402010100"),
    ],
)
def test_times_are_read_and_continued_as_they_are_written(
    first: str, second: str, third: str, ahead: str, tmp_path: Path
) -> None:
    found = table(tmp_path, f"time;x\n{first};1,5\n{second};2\n{third};3\n")
    assert found.times is not None
    assert found.times.stamps.tolist() == np.array(HOURS, "datetime64[us]").tolist()
    assert found.labels == (first, second, third)
    assert (found.columns, found.left, found.times.regular) == (("x",), ("time",), True)
    assert found.ahead(1) == (ahead,)


def test_a_zone_is_kept(tmp_path: Path) -> None:
    found = table(tmp_path, "t,x\n2024-02-01T00:00+02:00,1\n2024-02-01T01:00+02:00,2\n")
    assert found.times is not None
    assert found.times.stamps[0] == np.datetime64("2024-01-31T22:00")
    assert found.ahead(1) == ("2024-02-01T02:00+02:00",)


@pytest.mark.parametrize(
    ("days", "ahead"),
    [
        ("2024-01 2024-02 2024-03", "2024-04 2024-05"),
        ("2023-11-30 2023-12-31 2024-01-31", "2024-02-29 2024-03-31"),
        ("2024-01-01 2024-04-01 2024-07-01", "2024-10-01 2025-01-01"),
        ("2021-03-15 2022-03-15 2023-03-15", "2024-03-15 2025-03-15"),
        ("20240227 20240228 20240229", "20240301 20240302"),
        ("01/02/2024 01/09/2024 01/16/2024", "01/23/2024 01/30/2024"),
        ("05/01/2024 06/01/2024 07/01/2024", "08/01/2024 09/01/2024"),  # days by one, or months by one
    ],
)
def test_days_months_quarters_years(days: str, ahead: str, tmp_path: Path) -> None:
    rows = "".join(f"{day},{n}\n" for n, day in enumerate(days.split()))
    found = table(tmp_path, f"date,x\n{rows}")
    if days.startswith("05"):  # what it is, the file does not say
        assert found.times is None
        assert found.labels == tuple(days.split())
        assert found.ahead(2) == ("+1", "+2")
        assert "2024-01-31" in found.notes[0]
    else:
        assert found.ahead(2) == tuple(ahead.split())


def test_dates_and_clock_times_in_two_columns(tmp_path: Path) -> None:
    found = table(tmp_path, "Date;Time;x\n01.02.2024;23:30;1\n02.02.2024;00:00;2\n")
    assert found.columns == ("x",)
    assert found.ahead(1) == ("02.02.2024 00:30",)


def test_series_below_each_other(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    rows = [f"{s},2024-01-0{d},{n * 10 + d}" for n, s in enumerate("ab") for d in (1, 2, 3)]
    path.write_text("\n".join(["station,day,x", *rows]))
    first, second = read_tables(path)
    assert (first.name, first.values[:, 0].tolist(), first.lines) == ("a", [1, 2, 3], (2, 3, 4))
    assert (second.name, second.values[:, 0].tolist(), second.ahead(1)) == (
        "b",
        [11, 12, 13],
        ("2024-01-04",),
    )
    with refused(InputError, "2 series below each other (a, b)"):
        read_table(path)


def test_newest_first_is_turned_round(tmp_path: Path) -> None:
    found = table(tmp_path, "day,x\n2024-01-03,3\n2024-01-02,NA\n2024-01-01,1\n")
    assert found.values[::2, 0].tolist() == [1, 3]
    assert (found.lines, found.cells, found.ahead(1)) == ((4, 3, 2), {(1, 0): "NA"}, ("2024-01-04",))
    assert "newest" in found.notes[0]


def test_gaps_reach_a_model_that_takes_them(tmp_path: Path) -> None:
    """Words in cells, and rows that the file lacks."""
    found = table(tmp_path, "t,x,y\n2024-01-01,1,a\n2024-01-02,NA,b\n2024-01-04,4,c\n2024-01-05,5,d\n")
    filled = found.chosen(1, gaps=True)
    np.testing.assert_array_equal(filled.values[:, 0], [1, np.nan, np.nan, 4, 5])
    assert filled.labels[2] == "2024-01-03"
    assert "1 rows" in filled.notes[-1]
    assert filled.times is not None
    assert filled.times.regular
    with refused(InputError, "line 3, column x: NA is no finite number", "takes no gaps"):
        found.chosen(1)
    (tmp_path / "d.csv").write_text((tmp_path / "d.csv").read_text().replace("NA", "1"))  # the advice
    plain = read_table(tmp_path / "d.csv").chosen(1)
    assert plain.values[:, 0].tolist() == [1, 1, 4, 5]
    assert "equal steps" in plain.notes[-1]


def test_columns_are_chosen_by_name(tmp_path: Path) -> None:
    found = table(tmp_path, "place,b,a\nx,2,1\ny,4,oops\nz,NA,6\n")
    assert found.chosen(1, ["b"], gaps=True).values[:2, 0].tolist() == [2, 4]
    with refused(InputError, "line 3, column a: oops", "like 1.5"):
        found.chosen(2, ["a", "b"], gaps=True)
    with refused(InputError, "no column place of numbers", "holds no numbers"):
        found.chosen(1, ["place"])
    with refused(InputError, "no column c of numbers", "it has b, a"):
        found.chosen(1, ["c"])
    with refused(InputError, "2 columns of numbers (b, a)", "reads 3"):
        found.chosen(3)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no rows"),
        (b"a,b\n", "no rows below its header"),
        (b"a,b\n1,2\n3\n", "line 3: 1 cells, the header has 2"),
        (b"a;b\n1,5;2\n1.5;3\n", "line 3, column a: 1.5 has a decimal point"),
        (b"PK\x03\x04\x14", "is no text"),
        (b"a,b\n\0\0,1\n", "is no text"),
        (b"\xff\xfe", "no rows"),
    ],
)
def test_what_is_no_table(content: bytes, words: str, tmp_path: Path) -> None:
    with refused(InputError, "d.csv", words):
        table(tmp_path, content)


def test_thousands_are_not_taken_for_fractions(tmp_path: Path) -> None:
    found = table(tmp_path, 'a,b\n"1,234",1\n"2,345",2\n')
    with refused(InputError, "1 columns of numbers (b)", "reads 2"):
        found.chosen(2)


def test_a_folder_and_nothing(tmp_path: Path) -> None:
    with refused(InputError, "is a folder"):
        read_table(tmp_path)
    with refused(InputError, "does not exist"):
        read_table(tmp_path / "d.csv")
