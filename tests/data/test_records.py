import json

import pytest

from megatron_scalebio.config import UserError
from megatron_scalebio.data import records
from megatron_scalebio.data.records import Message, path_problem, read_records

TURN = (Message("user", "2+2?"), Message("assistant", "4"))
MESSAGES = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
SHAPES = [
    {"prompt": "2+2?", "response": "4", "id": 7},
    {"messages": MESSAGES},
    {"instruction": "2+2?", "output": "4"},
    {"instruction": "2+2?", "input": "", "output": "4"},
    {"instruction": "2+2?", "input": None, "output": "4"},
    {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
    {"items": [{"from": "user", "value": "2+2?"}, {"from": "assistant", "value": "4"}]},
]
GOOD = {"prompt": "a", "response": "b"}


def error_of(path: str) -> str:
    with pytest.raises(UserError) as caught:
        read_records(path, "data.test")
    return str(caught.value)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: next(iter(shape)))
def test_every_shape_of_one_conversation_reads_the_same(write, shape):
    (record,) = read_records(write("a.jsonl", [shape]), "data.test")
    assert record.messages == TURN


def test_alpaca_input_stays_apart_and_joins_the_text(write):
    (record,) = read_records(write("a.jsonl", [{"instruction": "Add", "input": "2, 2", "output": "4"}]), "data.test")
    assert record.messages[0] == Message("user", "Add", "2, 2")
    assert record.messages[0].text == "Add\n2, 2"


def test_a_complete_shape_wins_over_a_key_of_another(write):
    path = write("a.jsonl", [{"prompt": "other", "messages": MESSAGES}, {"text": "other", **SHAPES[0]}])
    assert [record.messages for record in read_records(path, "data.test")] == [TURN, TURN]


def test_text_records_hold_text(write):
    (record,) = read_records(write("a.jsonl", [{"text": " once\n"}]), "data.test")
    assert (record.text, record.messages) == (" once\n", ())


def test_an_array_reads_as_its_lines(write):
    lines = read_records(write("a.jsonl", SHAPES), "data.test")
    for name, layout in (("flat.json", None), ("pretty.json", 2)):
        array = read_records(write(name, json.dumps(SHAPES, indent=layout).encode()), "data.test")
        assert [record.messages for record in array] == [record.messages for record in lines]


def test_blank_lines_byte_order_mark_and_line_separators_are_no_records(write):
    content = b'\xef\xbb\xbf{"prompt": "a", "response": "b\xe2\x80\xa8c"}\r\n\r\n{"prompt": "d", "response": "e"}'
    first, second = read_records(write("a.jsonl", content), "data.test")
    assert first.messages[1].content == "b\u2028c"
    assert second.location.endswith("a.jsonl:3")


BAD = {
    "malformed": (b'{"prompt": "a"', "malformed JSON"),
    "nested too deep": (b"{" + b'"a":[' * 100_000, "malformed JSON"),
    "not an object": (b"3", "not 3"),
    "no known keys": (b'{"title": "a"}', "it has title; known are prompt and response; messages"),
    "no keys": (b"{}", "it has none"),
    "no response": (b'{"prompt": "a"}', 'has "prompt" but no "response"'),
    "no output": (b'{"instruction": "a"}', 'has "instruction" but no "output"'),
    "empty response": (b'{"prompt": "a", "response": " "}', '"response" is empty'),
    "empty text": (b'{"text": ""}', '"text" is empty'),
    "empty output": (b'{"instruction": "a", "output": ""}', '"output" is empty'),
    "null response": (b'{"prompt": "a", "response": null}', '"response" must be a string, not null'),
    "number prompt": (b'{"prompt": 3, "response": "a"}', '"prompt" must be a string, not 3'),
    "list input": (b'{"instruction": "a", "input": [], "output": "b"}', '"input" must be a string, not []'),
    "bad UTF-8": (b'{"prompt": "\xff", "response": "a"}', "not UTF-8: byte 0xff"),
    "half a surrogate pair": (rb'{"prompt": "a\ud800", "response": "a"}', "half a surrogate pair at character 1"),
    "no messages": (b'{"messages": []}', '"messages" must be a list of turns, not []'),
    "a message without content": (b'{"messages": [{"role": "user"}]}', 'messages[0] must be an object with "role"'),
    "unknown role": (b'{"messages": [{"role": "tool", "content": "a"}]}', '"role" is "tool"; known are system'),
    "a role that is no string": (b'{"messages": [{"role": [], "content": "a"}]}', '"role" is []'),
    "empty answer": (b'{"messages": [{"role": "assistant", "content": ""}]}', 'messages[0]: "content" is empty'),
    "last from the user": (b'{"messages": [{"role": "user", "content": "a"}]}', "is from user, not from the assistant"),
    "last from a human": (b'{"items": [{"from": "human", "value": "a"}]}', 'the last of "items" is from user'),
}


@pytest.mark.parametrize("line, reason", BAD.values(), ids=BAD.keys())
def test_a_bad_line_is_named_with_its_file_line_and_rule(write, line, reason):
    message = error_of(write("bad.jsonl", json.dumps(GOOD).encode() + b"\n\n" + line + b"\n"))
    assert "bad.jsonl:3: " in message and reason in message and message.startswith("data.test: ")


def test_of_a_shape_of_many_keys_the_missing_one_is_named(write, monkeypatch):
    monkeypatch.setattr(records, "_SHAPES", ((("question", "answer", "context"), records._from_text),))
    assert 'has "question" but no "context"' in error_of(write("a.jsonl", [{"question": "a", "answer": "b"}]))


def test_five_bad_lines_are_shown_and_the_others_counted(write):
    message = error_of(write("bad.jsonl", [GOOD] + [{"prompt": "a"}] * 7))
    assert [f"bad.jsonl:{line}:" in message for line in range(1, 9)] == [False] + [True] * 5 + [False] * 2
    assert "and 2 more" in message


@pytest.mark.parametrize(
    "content, line, reason",
    [
        (b'[\n{"prompt": "a", "response": "b"},\n{"prompt": "a"}\n]', 3, "no"),
        (b'[\n{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n]', 3, "after an element"),
        (b'[\n{"prompt": "a", "response": "b"}', 2, "the file ends"),
        (b'[{"prompt": "a", "response": "b"}]\n]', 1, "after an element"),
        (b'[{"prompt": "a", "response": "b"},\n\n]', 3, "malformed JSON"),
        (b'[\n\n{"prompt": "\xff"}]', 3, "not UTF-8"),
        (b'[\n{"prompt": "a",\n"response": }]', 3, "malformed JSON"),
    ],
)
def test_an_error_in_an_array_names_its_line(write, content, line, reason):
    message = error_of(write("bad.json", content))
    assert f"bad.json:{line}: " in message and reason in message


@pytest.mark.parametrize("content", [b"", b"\n \n", b"[]", b"[ ]\n"])
def test_a_file_without_records_is_refused(write, content):
    assert "holds no record" in error_of(write("empty.jsonl", content))


def test_a_path_that_is_no_file_of_records_says_why(tmp_path, write):
    assert "no such file" in path_problem(str(tmp_path / "missing.jsonl"))
    assert "is a folder" in path_problem(str(tmp_path))
    assert "is empty" in path_problem(write("empty.jsonl", b""))
    assert path_problem(write("good.jsonl", [GOOD])) is None
    assert "cannot be read" in error_of(str(tmp_path / "missing.jsonl"))
