import pytest

from nabla_attn.files import read_json


def test_json_is_read_or_refused_by_name(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": ["ä"]}', encoding="utf-8")
    assert read_json(path) == {"a": ["ä"]} == read_json(str(path), max_bytes=2**20)
    with pytest.raises(ValueError, match=r"a\.json is larger than 0 MiB"):
        read_json(path, max_bytes=10)
    with pytest.raises(ValueError, match=r"cannot read .*b\.json: no such file"):
        read_json(tmp_path / "b.json")
    with pytest.raises(ValueError, match="cannot read"):
        read_json(tmp_path)
    for bad in (b"{", b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"a\.json: not valid JSON"):
            read_json(path)
