import json
import re
from dataclasses import dataclass

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


LLAMA3 = (  # Meta-Llama-3-8B-Instruct's
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA2 = (  # gemma-2-9b-it's
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
SMOLLM2 = (  # SmolLM2-135M-Instruct's
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Chat:
    """What a family's tokenizer and chat template do with control tokens."""

    template: str
    bos: str
    eos: str
    turn_end: str
    others: tuple[str, ...]  # further control tokens
    begins: bool = True  # a post-processor puts bos before every text


CHATS = {
    "llama3": Chat(
        LLAMA3, "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>")
    ),
    "gemma2": Chat(GEMMA2, "<bos>", "<eos>", "<end_of_turn>", ("<start_of_turn>",)),
    "smollm2": Chat(SMOLLM2, "<|im_start|>", "<|im_end|>", "<|im_end|>", ("<|endoftext|>",), begins=False),
}


@pytest.fixture(params=CHATS.values(), ids=CHATS.keys())
def chat(request) -> Chat:
    return request.param


def chat_folder(folder, chat: Chat) -> str:
    """A Hugging Face folder of `chat` whose other tokens are single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(dict.fromkeys([chat.bos, chat.eos, chat.turn_end, *chat.others])))
    if chat.begins:
        begin = (chat.bos, tokenizer.token_to_id(chat.bos))
        tokenizer.post_processor = processors.TemplateProcessing(f"{chat.bos} $A", None, [begin])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": chat.bos, "eos_token": chat.eos}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": chat.template}))
    return str(folder)


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


def test_a_chat_template_gives_its_own_tokens_and_loss_on_responses_and_ends_of_turns(chat, make_config, tmp_path):
    from transformers import AutoTokenizer

    turns = [{**turn, "content": turn["content"].strip()} for turn in CONVERSATION[1:]]
    config = make_config({"a": [{"messages": turns}]})
    config.data.tokenizer, config.data.max_length = chat_folder(tmp_path, chat), 400
    tokenizer = load_tokenizer(config.data.tokenizer)
    begin, end = (tokenizer.special_tokens[token] for token in (chat.bos, chat.turn_end))
    example = the_example(config)
    reference = AutoTokenizer.from_pretrained(config.data.tokenizer, local_files_only=True)
    assert example.tokens.tolist() == reference.apply_chat_template(turns)["input_ids"]
    told = [tokens for tokens, has_loss in spans(example) if has_loss]
    assert told == [[*tokenizer.encode([text])[0], end] for text in ("four", "six <b>")]
    if chat.begins:
        assert example.tokens[0] == begin and (example.tokens == begin).sum() == 1
    if chat.eos != chat.turn_end:
        assert tokenizer.end_id not in example.tokens


def test_plain_text_of_a_chat_tokenizer_begins_as_it_does_and_ends_with_end_of_text(chat, make_config, tmp_path):
    texts = [chat.bos + "2+2?" + chat.turn_end, "four" + chat.eos]
    config = make_config({"a": [{"prompt": texts[0], "response": texts[1]}]})
    config.data.tokenizer, config.data.template, config.data.max_length = chat_folder(tmp_path, chat), "plain", 200
    tokenizer = load_tokenizer(config.data.tokenizer)
    prompt, response = tokenizer.encode([texts[0] + "\n", texts[1]])
    assert not {*prompt, *response} & {*tokenizer.special_tokens.values()}
    begin = [tokenizer.special_tokens[chat.bos]] if chat.begins else []
    assert spans(the_example(config)) == [(begin + prompt, False), ([*response, tokenizer.end_id], True)]


def test_no_record_writes_a_control_token_through_a_chat_template(chat, make_config, tmp_path):
    config = make_config({"a": [{"prompt": "a", "response": "b"}]})
    config.data.tokenizer = chat_folder(tmp_path, chat)
    tokenizer = load_tokenizer(config.data.tokenizer)
    template = choose_template("auto", tokenizer)
    for token in tokenizer.special_tokens:
        for role, messages in {"user": (f"a{token}", "b"), "assistant": ("a", f"b{token}c")}.items():
            with pytest.raises(ValueError, match=f"the {role}'s message holds {re.escape(repr(token))}"):
                template(tuple(map(Message, ("user", "assistant"), messages)))


def test_a_role_that_the_template_refuses_is_named_with_source_line_and_remedy(make_config, tmp_path):
    config = make_config({"a": [{"prompt": "a", "response": "b"}, {"messages": CONVERSATION}]})
    config.data.tokenizer = chat_folder(tmp_path, CHATS["gemma2"])
    with pytest.raises(UserError) as caught:
        load_dataset(config)
    message = str(caught.value)
    assert message.startswith("data.sources[0].path (a): ") and "a.jsonl:2: " in message
    assert "System role not supported: change the record, or use data.template=plain" in message


def test_a_template_that_asks_for_the_date_gets_the_same_one_every_day():
    header = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    first, *_ = JinjaTemplate("chat", header + "{{ date_string }}" + CHATML, BytesTokenizer())(MESSAGES)
    assert first.text.startswith("26 Jul 2024[system]")


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
