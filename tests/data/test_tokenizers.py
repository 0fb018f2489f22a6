import json

import pytest

from megatron_scalebio.config import UserError
from megatron_scalebio.data.tokenizers import BytesTokenizer, load_tokenizer

TEXTS = ["", "plain", " lead and trail \n", "Grüße, 世界 🙂", "<|im_end|> </s> <|endoftext|>", "\x00\x7f"]


def test_bytes_round_trip():
    tokenizer = load_tokenizer("bytes")
    encoded = tokenizer.encode(TEXTS)
    assert [bytes(ids).decode() for ids in encoded] == TEXTS
    assert (tokenizer.end_id, tokenizer.pad_id, tokenizer.vocab_size, tokenizer.begin_id) == (256, 257, 258, None)


def test_bytes_parse_their_control_token_only_when_asked():
    text = "a<|endoftext|>b<|endoftext|>"
    assert BytesTokenizer().encode([text], parse_special=True) == [[97, 256, 98, 256]]
    assert BytesTokenizer().encode([text]) == [list(text.encode())]


@pytest.fixture(scope="module")
def qwen2(shared):
    return load_tokenizer(str(shared / "tokenizers/qwen2"))


def test_qwen2_has_the_ids_of_its_vocabulary(qwen2):
    assert qwen2.vocab_size == 151_646
    assert (qwen2.end_id, qwen2.pad_id, qwen2.begin_id) == (151_645, 151_643, None)
    assert qwen2.special_tokens == {"<|endoftext|>": 151_643, "<|im_start|>": 151_644, "<|im_end|>": 151_645}
    assert "<|im_start|>" in qwen2.chat_template


def test_no_text_becomes_a_control_token_unless_parsed(shared, qwen2):
    names = ["bpe8k", "unigram8k"]
    tokenizers = [load_tokenizer(str(shared / f"tokenizers/spm8k/{name}.model")) for name in names]
    for tokenizer in [*tokenizers, qwen2, BytesTokenizer()]:
        control = set(tokenizer.special_tokens.values())
        text = "a" + "b".join(tokenizer.special_tokens)
        assert not control & set(tokenizer.encode([text])[0])
        assert control <= set(tokenizer.encode([text], parse_special=True)[0])


@pytest.mark.parametrize("name", ["bpe8k", "unigram8k"])
def test_sentencepiece_ids_are_below_its_size_and_nothing_is_added(shared, name):
    tokenizer = load_tokenizer(str(shared / f"tokenizers/spm8k/{name}.model"))
    assert (tokenizer.begin_id, tokenizer.end_id, tokenizer.pad_id, tokenizer.vocab_size) == (1, 2, 3, 8192)
    for ids in tokenizer.encode(TEXTS):
        assert not {1, 2, 3} & set(ids) and max(ids, default=0) < 8192
    assert tokenizer.encode(["<s>a</s>"], parse_special=True)[0][:: len(tokenizer.encode(["a"])[0]) + 1] == [1, 2]


def tiny_folder(folder, begin_is_added: bool, end: bool = True):
    """A Hugging Face folder with six words, made here so that what it adds is known."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3, "<unk>": 4, "c": 9}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if begin_is_added:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 0), ("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    settings |= {"eos_token": "</s>"} if end else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.mark.parametrize("begin_is_added", [True, False])
def test_a_begin_token_exists_only_where_the_tokenizer_adds_it(tmp_path, begin_is_added):
    tokenizer = load_tokenizer(tiny_folder(tmp_path, begin_is_added))
    assert tokenizer.begin_id == (0 if begin_is_added else None)
    assert tokenizer.encode(["a b"]) == [[2, 3]]
    assert tokenizer.pad_id == tokenizer.end_id == 1


def test_the_vocabulary_covers_ids_behind_holes(tmp_path):
    assert load_tokenizer(tiny_folder(tmp_path, True)).vocab_size == 10


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path):
    with pytest.raises(UserError, match="data.tokenizer=.*no end-of-text token"):
        load_tokenizer(tiny_folder(tmp_path, True, end=False))


def test_what_is_no_tokenizer_is_refused_by_name(tmp_path):
    (tmp_path / "damaged.model").write_bytes(b"not a model")
    (tmp_path / "other.txt").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/tokenizer.json").write_text("{")
    reasons = {
        "missing": "no such file or folder",
        "damaged.model": "not a SentencePiece model",
        "other.txt": "must be a Hugging Face folder, a SentencePiece .model file or",
        "folder": "cannot read a tokenizer from this folder",
        "damaged": "cannot read a tokenizer from this folder",
    }
    for name, reason in reasons.items():
        with pytest.raises(UserError) as caught:
            load_tokenizer(str(tmp_path / name))
        assert str(caught.value).startswith(f"data.tokenizer={tmp_path / name}: ") and reason in str(caught.value)
