import pytest

from sora_jax.generation import prompt_file


def read(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    return prompt_file.read(tmp_path / name)


def test_text_has_a_prompt_a_line(tmp_path):
    rows = read(tmp_path, "a.txt", "\ufeffa cat\n\n  ein Bär \n")
    assert rows == [{"prompt": "a cat"}, {"prompt": "ein Bär"}]


def test_csv_has_a_header_and_typed_columns(tmp_path):
    rows = read(
        tmp_path,
        "a.csv",
        'prompt,seed,guidance_scale,image\n"a cat, running",3,2.5,\na dog,,,cat.png\n',
    )
    assert rows == [
        {"prompt": "a cat, running", "seed": 3, "guidance_scale": 2.5},
        {"prompt": "a dog", "image": str(tmp_path / "cat.png")},
    ]


def test_jsonl_has_an_object_a_line(tmp_path):
    rows = read(
        tmp_path,
        "a.jsonl",
        '{"prompt": "a", "seed": 4, "id": "x-1"}\n\n{"prompt": "b"}',
    )
    assert rows == [{"prompt": "a", "seed": 4, "id": "x-1"}, {"prompt": "b"}]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.yaml", "x", "not a .txt, .csv or .jsonl"),
        ("a.txt", " \n", "holds no prompt"),
        ("a.csv", "promt\nx\n", r"line 1: 'promt' is unknown; there are id, prompt"),
        ("a.csv", "seed\n3\n", "line 1: it has no prompt: its fields are 'seed'"),
        ("a.csv", "prompt,seed\na,1.5\n", "line 2: seed is a whole number, not '1.5'"),
        ("a.csv", "prompt\na,b\n", "line 2: it has 2 fields, and the header names 1"),
        ("a.csv", "prompt,seed\na\n", "line 2: it has 1 field, and the header names 2"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt"', "line 2: it is not JSON"),
        ("a.jsonl", '["a"]', "line 1: it is not an object"),
        ("a.jsonl", '{"prompt": 3}', "line 1: prompt is text, not 3"),
        ("a.jsonl", '{"prompt": "a", "seed": 1.5}', "seed is a whole number, not 1.5"),
        ("a.jsonl", '{"prompt": "a", "seed": true}', "seed is a whole number"),
        (
            "a.jsonl",
            '{"prompt": "a", "seed": 1e999}',
            "seed is a whole number, not inf",
        ),
        ("a.jsonl", '{"prompt": "a", "fps": "fast"}', "fps is a number, not 'fast'"),
        ("a.jsonl", '{"prompt": "a", "id": "../x"}', r"id '../x' names a file"),
        (
            "a.jsonl",
            '{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}',
            "line 2: it and line 1 would both be written to x.mp4",
        ),
        (
            "a.jsonl",
            '{"prompt": "A cat"}\n\n{"prompt": "b", "id": "00000-A-cat"}',
            "line 3: it and line 1 would both be written to 00000-a-cat.mp4",
        ),
        ("a.csv", "Prompt,seed\na,3\n", "line 1: 'Prompt' is unknown; .*lower case"),
        ("a.csv", "prompt\tseed\na\t3\n", "line 1: the header .* has tabs"),
        ("a.csv", "prompt,seed\nx,1\na caf\udce9,3\n", "line 3: byte 6 .* not UTF-8"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, name, text)


def test_file_names_are_safe_and_in_order():
    assert prompt_file.file_name(3, {"prompt": "A red/blue ..\\ cat"}) == (
        "00003-a-red-blue-cat.mp4"
    )
    assert prompt_file.file_name(0, {"prompt": "日本"}) == "00000-clip.mp4"
    assert prompt_file.file_name(0, {"prompt": "x" * 300}) == f"00000-{'x' * 60}.mp4"
    assert prompt_file.file_name(0, {"prompt": "a", "id": "k.1"}) == "k.1.mp4"
