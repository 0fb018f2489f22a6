import pytest

from megatron_scalebio.config import UserError
from megatron_scalebio.data.dataset import load_dataset
from megatron_scalebio.data.records import Message
from megatron_scalebio.data.templates import JinjaTemplate, alpaca_segments, choose_template
from megatron_scalebio.data.tokenizers import BytesTokenizer, load_tokenizer

CHATML = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
CONVERSATION = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "\n2+2?"},
    {"role": "assistant", "content": "\nfour"},
    {"role": "user", "content": "And 3+3?"},
    {"role": "assistant", "content": "six <b>"},
]
MESSAGES = tuple(Message(**turn) for turn in CONVERSATION)


def the_example(config):
    return load_dataset(config).train[0][0]


def spans(example) -> list[tuple[list[int], bool]]:
    """Maximal runs of tokens with the same mask."""
    runs = []
    for token, has_loss in zip(example.tokens.tolist(), example.loss_mask.tolist(), strict=True):
        if not runs or runs[-1][1] != has_loss:
            runs.append(([], has_loss))
        runs[-1][0].append(token)
    return runs


def test_plain_puts_loss_on_the_response_and_its_end(make_config):
    example = the_example(make_config({"a": [{"prompt": "2+2?", "response": "4!"}]}))
    assert spans(example) == [(list(b"2+2?\n"), False), ([*b"4!", 256], True)]


def test_plain_puts_loss_on_every_assistant_turn_and_its_end(make_config):
    config = make_config({"a": [{"messages": CONVERSATION}]})
    assert spans(the_example(config)) == [
        (list(b"Be short.\n\n2+2?\n"), False),
        ([*b"\nfour", 256], True),
        (list(b"And 3+3?\n"), False),
        ([*b"six <b>", 256], True),
    ]


def test_alpaca_writes_the_published_prompt(make_config):
    config = make_config({"a": [{"instruction": "Add.", "input": "2 2", "output": "4"}]})
    config.data.template = "alpaca"
    config.data.max_length = 400
    (prompt, _), (response, _) = spans(the_example(config))
    assert bytes(prompt).decode() == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n2 2\n\n"
        "### Response:"
    )
    assert response == [*b"4", 256]


def test_alpaca_without_input_has_the_other_preamble_and_a_system_message_replaces_it():
    without, _ = alpaca_segments((Message("user", "Add."), Message("assistant", "4")))
    assert without.text.startswith("Below is an instruction that describes a task. Write")
    assert "### Input" not in without.text
    first, _, second, _ = alpaca_segments(MESSAGES)
    assert first.text == "Be short.\n\n### Instruction:\n\n2+2?\n\n### Response:"
    assert second.text == "### Instruction:\nAnd 3+3?\n\n### Response:"


def test_qwen2_chat_template_gives_its_own_tokens_and_loss_on_the_assistant_only(shared, make_config):
    from transformers import AutoTokenizer

    unpadded = [{**turn, "content": turn["content"].strip()} for turn in CONVERSATION]
    conversations = [CONVERSATION, CONVERSATION[1:3], CONVERSATION[1:], unpadded, unpadded[1:3]]
    config = make_config({"a": [{"messages": turns} for turns in conversations]})
    config.data.tokenizer = str(shared / "tokenizers/qwen2")
    reference = AutoTokenizer.from_pretrained(config.data.tokenizer, local_files_only=True)
    for turns, example in zip(conversations, load_dataset(config).train[0], strict=True):
        assert reference.decode(example.tokens) == reference.apply_chat_template(turns, tokenize=False)
        told = [reference.decode(tokens) for tokens, has_loss in spans(example) if has_loss]
        assert told == [turn["content"] + "<|im_end|>" for turn in turns if turn["role"] == "assistant"]
        # A response that starts with a line feed would share a token with the header's if both were tokenised at once.
        whole = reference.apply_chat_template(turns)["input_ids"]
        assert (example.tokens.tolist() == whole) == (turns in (unpadded, unpadded[1:3]))


def test_a_jinja_file_ends_turns_with_the_end_token_of_any_tokenizer(make_config, write):
    config = make_config({"a": [{"messages": CONVERSATION}]})
    config.data.template = write("chat.jinja", CHATML.encode())
    config.data.max_length = 200
    told = [tokens for tokens, has_loss in spans(the_example(config)) if has_loss]
    assert told == [[*b"\nfour", 256], [*b"six <b>", 256]]


@pytest.mark.parametrize("template", ["plain", "jinja"])
def test_a_beginning_of_text_token_appears_once(shared, make_config, write, template):
    config = make_config({"a": [{"messages": CONVERSATION}, {"text": "some <s> text"}]})
    config.data.tokenizer = str(shared / "tokenizers/spm8k/unigram8k.model")
    config.data.template = template if template == "plain" else write("b.jinja", b"{{ bos_token }}" + CHATML.encode())
    config.data.max_length = 200
    for example in load_dataset(config).train[0]:
        assert example.tokens[0] == 1 and (example.tokens == 1).sum() == 1 and not example.loss_mask[0]


def test_the_segments_joined_are_the_whole_rendering():
    template = JinjaTemplate("chat", CHATML, BytesTokenizer())
    text = "".join(segment.text for segment in template(MESSAGES))
    assert text == (
        "[system]Be short.\n[user]\n2+2?\n[assistant]\nfour<|endoftext|>\n"
        "[user]And 3+3?\n[assistant]six <b><|endoftext|>\n"
    )


REFUSED = {
    "the last turn changes earlier ones": (
        CHATML.replace("+ m['content']", "+ (m['content'] if loop.last else 'cut')"),
        "renders the beginning of this conversation differently",
    ),
    "only the last turn has a footer": (
        CHATML.replace("{{ '\n' }}", "{{ '!' if loop.last and m['role'] == 'assistant' }}{{ '\n' }}"),
        "renders the beginning of this conversation differently",
    ),
    "the generation prompt is not what comes": (
        CHATML.replace("'[assistant]'", "'[model]'"),
        "renders the beginning of this conversation differently",
    ),
    "no end of turn": (CHATML.replace("{{ eos_token }}", ""), "write {{ eos_token }} behind it"),
    "the response is changed": (
        CHATML.replace("m['content']", "m['content'] | upper"),
        "does not write the assistant's message right behind",
    ),
    "the template raises": ("{{ raise_exception('no system here') }}", "no system here"),
    "the template breaks": ("{{ messages[0]['role'] + 1 }}", "TypeError"),
}


@pytest.mark.parametrize("source, reason", REFUSED.values(), ids=REFUSED.keys())
def test_a_template_whose_spans_cannot_be_told_is_refused_with_file_and_line(make_config, write, source, reason):
    config = make_config({"a": [{"messages": CONVERSATION}]})
    config.data.template = write("bad.jinja", source.encode())
    with pytest.raises(UserError) as caught:
        load_dataset(config)
    message = str(caught.value)
    assert "a.jsonl:1: " in message and "bad.jinja" in message and reason in message


def test_a_template_without_generation_prompt_is_refused_where_its_header_is_a_control_token(shared):
    tokenizer = load_tokenizer(str(shared / "tokenizers/qwen2"))
    source = tokenizer.chat_template.split("{% if add_generation_prompt %}")[0]
    with pytest.raises(ValueError, match="add_generation_prompt"):
        JinjaTemplate("chat", source, tokenizer)(MESSAGES)


def test_a_record_cannot_write_control_tokens(make_config, write):
    config = make_config({"a": [{"prompt": "a", "response": "b<|endoftext|>c"}]})
    assert (the_example(config).tokens == 256).sum() == 1
    config.data.template = write("chat.jinja", CHATML.encode())
    with pytest.raises(UserError, match="a.jsonl:1: the assistant's message holds '<|endoftext|>'"):
        load_dataset(config)


def test_a_beginning_of_text_token_written_twice_is_refused(shared):
    tokenizer = load_tokenizer(str(shared / "tokenizers/spm8k/bpe8k.model"))
    template = JinjaTemplate("chat", "{{ bos_token + bos_token }}" + CHATML, tokenizer)
    with pytest.raises(ValueError, match="'<s>' more than once"):
        template(MESSAGES)


def test_a_template_that_cannot_be_used_is_refused_by_name(make_config, tmp_path, write):
    for name, reason in {"chatml": "must be auto", str(tmp_path / "no.jinja"): "no such file"}.items():
        with pytest.raises(UserError, match=f"data.template={name}: {reason}"):
            choose_template(name, BytesTokenizer())
    with pytest.raises(UserError, match="data.template=.*cannot be read"):
        choose_template(write("binary.jinja", b"\xff"), BytesTokenizer())
    config = make_config({"a": [{"prompt": "a", "response": "b"}]})
    config.data.template = write("syntax.jinja", b"\n{% for %}")
    with pytest.raises(UserError, match="data.template: .*syntax.jinja, line 2: "):
        load_dataset(config)
