import json

import pytest

from megatron_scalebio.config import Config, SourceConfig, load_config


@pytest.fixture
def write(tmp_path):
    """write(name, records or bytes) -> path, as a string."""

    def write_file(name: str, content) -> str:
        path = tmp_path / name
        if not isinstance(content, bytes):
            content = "".join(json.dumps(record) + "\n" for record in content).encode()
        path.write_bytes(content)
        return str(path)

    return write_file


@pytest.fixture
def make_config(write):
    """make_config({source: records}, validation records, test records) -> Config with max_length 64."""

    def make(sources: dict, validation=None, test=None) -> Config:
        config = load_config(None, [])
        config.data.max_length = 64
        config.data.sources = [SourceConfig(name, write(f"{name}.jsonl", rows)) for name, rows in sources.items()]
        config.data.validation = write("val.jsonl", validation or [{"prompt": "v", "response": "v"}])
        config.data.test = write("test.jsonl", test) if test else None
        return config

    return make
