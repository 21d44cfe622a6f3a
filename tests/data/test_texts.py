"""Texts and lists of texts: what is kept of them, and which line an error names."""

import pytest

from sora_jax.data import texts


@pytest.mark.parametrize(
    "text, expected",
    [
        ("  a\tred\r\n ball\u2028rolls\u3000on ", "a red ball rolls on"),
        (
            "\u0645\u06cc\u200c\u0631\u0648\u0645",
            "\u0645\u06cc\u200c\u0631\u0648\u0645",
        ),
        ("\u0915\u094d\u200d\u0937", "\u0915\u094d\u200d\u0937"),
        ("\U0001f468\u200d\U0001f469\ufe0f", "\U0001f468\u200d\U0001f469\ufe0f"),
        ("soft\u00adhyphen \u202aleft\u202c \ufeff", "softhyphen left"),
        ("two\u200bwords", "two words"),
        ("half \ud83d a\x00pair", "half a pair"),
        (" \u200d\u200c ", ""),
    ],
)
def test_a_text_is_one_line_and_keeps_its_joiners(text, expected):
    assert texts.normalise(text) == expected
    assert texts.normalise(expected) == expected


def rows(tmp_path, content, name="list.csv"):
    file = tmp_path / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    found = texts.rows(file, lambda header: texts.check_named(header, ["a"], "lacks a"))
    return [
        (line, fields.reason if isinstance(fields, texts.BadLine) else fields)
        for line, fields in found
    ]


def test_rows_of_a_table_have_the_line_they_begin_on(tmp_path):
    found = rows(tmp_path, '\ufeffa,b\r\n"1\n2",x\n\n"3 ""q"", 4",\r5,y\n')
    assert found == [
        (2, {"a": "1\n2", "b": "x"}),
        (5, {"a": '3 "q", 4', "b": ""}),
        (6, {"a": "5", "b": "y"}),
    ]


TABLE = [
    # A comma, a quote and a field too long cost one row; the next are read.
    (
        "a,b\n1,x, y\n2,z\n",
        2,
        "it has 3 fields, .* names 2: a, b; .*comma in quotes",
        1,
    ),
    ("a,b\n1\n2,z\n", 2, "it has 1 field, and the header names 2: a, b$", 1),
    ('a,b\n1,x\n2,"a "big" dog"\n3,z\n', 3, "a quote ends before its field", 2),
    (f"a,b\n1,{'x' * 140_000}\n2,z\n", 2, "larger than field limit", 1),
    # A quote that stays open takes all that follows.
    ('a,b\n0,w\n1,"x\n2,y\n3,z\n', 3, "never closed; the next 2 lines are taken", 1),
    (
        'a,b\n0,w\n1,"x\n2,"y"\n3,z\n',
        3,
        "before its field.*; the next line is taken",
        2,
    ),
    # A header that is wrong is said once.
    ("A,b\n1,x\n2,y\n", 1, "lacks a: its fields are 'A', 'b', none of a .in lower", 0),
    ("a;b\n1;x\n2;y\n", 1, "header 'a;b' has semicolons", 0),
    ("a\tb\n1\tx\n2\ty\n", 1, "has tabs between its columns", 0),
    ("a,b,a\n1,x,2\n", 1, "names 'a' twice", 0),
    ('"a\nb\n', 1, "never closed", 0),
    # An encoding is that of the whole file.
    ("a,b\n1,x\n2,caf\u00e9\n".encode("cp1252"), 3, r"byte 6 .*0xe9.* not UTF-8", 0),
    ("a,b\n1,x\n".encode("utf-16-le"), 1, "zero bytes, as UTF-16 does; save", 0),
]


@pytest.mark.parametrize("content, line, message, good", TABLE)
def test_a_row_that_cannot_be_read_is_named_by_its_line(
    tmp_path, content, line, message, good
):
    found = rows(tmp_path, content)
    bad = [row for row in found if isinstance(row[1], str)]
    assert len(bad) == 1 and len(found) == 1 + good
    assert bad[0][0] == line
    with pytest.raises(texts.BadLine, match=f"line {line}: .*{message}"):
        raise texts.BadLine(*bad[0])


def test_an_object_a_line(tmp_path):
    content = '{"a": "1\u2028 2"}\r\n\n[1]\n{"a"\n{"a": 2}'
    assert rows(tmp_path, content, "list.jsonl") == [
        (1, {"a": "1\u2028 2"}),
        (3, "it is not an object with fields"),
        (4, "it is not JSON: Expecting ':' delimiter (column 5)"),
        (5, {"a": 2}),
    ]
    ((line, reason),) = rows(tmp_path, "[" * 100_000, "list.jsonl")
    assert line == 1 and "it is not JSON" in reason


def test_lines_count_as_an_editor_counts_them(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\x0ctwo\r\n\n\u2028three\n \n".encode())
    assert texts.lines(tmp_path / "a.txt") == ["one\x0ctwo", "", "\u2028three"]
