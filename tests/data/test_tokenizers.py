import io
import json
from contextlib import nullcontext

import pytest

from megatron_scalebio.config import UserError
from megatron_scalebio.data.dataset import load_dataset
from megatron_scalebio.data.tokenizers import BytesTokenizer, load_tokenizer
from megatron_scalebio.rules import check_config

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


@pytest.fixture(scope="module")
def gemma2_model(tmp_path_factory):
    """A SentencePiece model with Gemma-2's choices: ids of the special pieces, bytes for the unseen, spaces as is."""
    from sentencepiece import SentencePieceTrainer

    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat", "a dog ran to the cat"] * 10),
        model_writer=written,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "eos_piece": "<eos>", "bos_piece": "<bos>"},
        user_defined_symbols=["<start_of_turn>", "<end_of_turn>"],
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("gemma2") / "tokenizer.model"
    path.write_bytes(written.getvalue())
    return path


def test_a_sentencepiece_model_keeps_every_text_and_adds_nothing(gemma2_model):
    from sentencepiece import SentencePieceProcessor

    tokenizer = load_tokenizer(str(gemma2_model))
    assert (tokenizer.pad_id, tokenizer.end_id, tokenizer.begin_id, tokenizer.vocab_size) == (0, 1, 2, 300)
    texts = [*TEXTS, "the  cat\n\n sat", "<bos>a<eos><pad><unk>"]
    encoded = tokenizer.encode(texts)
    assert SentencePieceProcessor(model_file=str(gemma2_model)).decode(encoded) == texts
    assert not {0, 1, 2, 3} & {i for ids in encoded for i in ids}  # 3 stands for what is lost
    assert tokenizer.encode(["<bos>a<eos>"], parse_special=True) == [[2, *tokenizer.encode(["a"])[0], 1]]


def test_user_defined_pieces_are_text_and_no_control_tokens(gemma2_model):
    tokenizer = load_tokenizer(str(gemma2_model))
    assert tokenizer.special_tokens == {"<pad>": 0, "<eos>": 1, "<bos>": 2}
    assert tokenizer.encode(["<end_of_turn>"]) == [[5]]


def test_records_through_a_sentencepiece_model_begin_and_end_once(gemma2_model, make_config):
    config = make_config({"a": [{"prompt": "<bos>the cat", "response": "sat<eos>"}, {"text": "a dog"}]})
    config.data.tokenizer = str(gemma2_model)
    for example in load_dataset(config).train[0]:
        assert [i for i in example.tokens.tolist() if i < 4] == [2, 1]
        assert example.tokens[[0, -1]].tolist() == [2, 1] and example.loss_mask[[0, -1]].tolist() == [False, True]


def test_a_folder_that_cannot_be_read_names_its_sentencepiece_model(gemma2_model, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    model = tmp_path / "tokenizer.model"
    model.write_bytes(gemma2_model.read_bytes())
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(tmp_path))
    assert str(caught.value).endswith(f"; data.tokenizer={model} reads that SentencePiece model")


def tiny_folder(folder, begin_is_added: bool, end: bool = True):
    """A Hugging Face folder with six words, made here so that what it adds is known."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3, "<unk>": 4, "c": 9}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens(["b"])  # an added token that controls nothing
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
    assert tokenizer.special_tokens == {"<s>": 0, "</s>": 1}
    assert tokenizer.pad_id == tokenizer.end_id == 1


def test_the_vocabulary_covers_ids_behind_holes(tmp_path):
    tokenizer = load_tokenizer(tiny_folder(tmp_path, True))
    assert tokenizer.vocab_size == 10
    assert tokenizer.encode(["c"]) == [[9]]


@pytest.mark.parametrize("rows, refused", [(9, True), (10, False), (64, False), (None, False)])
def test_a_model_needs_a_row_for_every_id_and_may_have_more(tmp_path, make_config, rows, refused):
    config = make_config({"a": [{"text": "a b c"}]})
    config.data.tokenizer, config.model.shape.vocab_size = tiny_folder(tmp_path, True), rows
    tokenizer = load_dataset(config).tokenizer
    with pytest.raises(UserError) if refused else nullcontext() as caught:
        check_config(config, 1, tokenizer.vocab_size)
    if refused:
        assert f"vocab_size={rows}" in str(caught.value) and "10 ids" in str(caught.value)
        assert f"data.tokenizer={config.data.tokenizer}" in str(caught.value)


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path):
    with pytest.raises(UserError, match="data.tokenizer=.*no end-of-text token"):
        load_tokenizer(tiny_folder(tmp_path, True, end=False))


@pytest.mark.parametrize("model_type", ["qwen2", "gemma2", "llama"])
def test_a_checkpoint_folder_without_tokenizer_files_is_refused(tmp_path, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>", "eos_token": "<eos>"}))
    with pytest.raises(UserError, match="holds no vocabulary|cannot read a tokenizer"):
        load_tokenizer(str(tmp_path))


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
