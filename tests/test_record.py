import json
import stat
from dataclasses import replace

import pytest

from nabla_attn.files import check_writable, whole_file, write_text
from nabla_attn.record import RunRecord, collect_versions, describe_device


@pytest.fixture
def record():
    return RunRecord(
        kind="generate",
        config={"prompt": "a red circle", "schedule": None},
        seed=7,
        versions=collect_versions(),
        device=describe_device("cpu"),
        numbers={"seconds": {"text": 0.25}, "rows": [[1.0, 0.5], [None, 1]]},
    )


def test_json_round_trip(record, tmp_path):
    assert RunRecord.from_json(record.to_json()) == record
    record.save(tmp_path / "deep" / "run.json")
    assert RunRecord.load(tmp_path / "deep" / "run.json") == record
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["run.json"]


def test_versions_and_device_say_what_ran(record):
    assert {"python", "torch", "diffusers", "nabla_attn"} <= record.versions.keys()
    assert "thread" in record.device


def test_numbers_must_be_finite_and_plain(record):
    with pytest.raises(ValueError, match=r"numbers.rows\[1\] is nan"):
        replace(record, numbers={"rows": [1.0, float("nan")]})
    with pytest.raises(ValueError, match=r"numbers.psnr is a complex"):
        replace(record, numbers={"psnr": 1j})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": "7"}, "'seed' must be int"),
        ({"seed": True}, "'seed' must be int"),
        ({"numbers": []}, "'numbers' must be dict"),
        ({"schema": 99}, "schema 99"),
        ({"surprise": 1}, "unknown surprise"),
        ({"kind": None}, "'kind' must be str"),
    ],
)
def test_hostile_json_is_refused(record, change, message, tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(json.loads(record.to_json()) | change))
    with pytest.raises(ValueError, match=message) as caught:
        RunRecord.load(path)
    assert str(path) in str(caught.value)


def test_a_number_that_a_record_lacks_is_named(record, tmp_path):
    record = replace(record, numbers={"rows": [{"seconds": 1.0}]})
    record.save(tmp_path / "run.json")
    numbers = RunRecord.load(tmp_path / "run.json").numbers
    assert numbers == record.numbers
    for asked in (lambda: numbers["fps"], lambda: numbers["rows"][0]["fps"]):
        with pytest.raises(ValueError, match=r"run\.json: the record lacks 'fps'"):
            asked()


@pytest.mark.parametrize(
    "text", ["", "[1]", "{", "{}", '{"a": NaN}', "[" * 100_000, "[" * 500 + "]" * 500, "1" * 5000]
)
def test_not_a_record(text):
    with pytest.raises(ValueError, match="run record"):
        RunRecord.from_json(text)


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_files_are_as_readable_as_others(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "other").touch()
    with whole_file(tmp_path / "a.safetensors") as temporary:
        save_file({}, temporary)
    with whole_file(tmp_path / "secret", private=True) as temporary:
        temporary.write_text("token")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes["a.safetensors"] == modes["other"] and modes["secret"] == 0o600


def test_two_writers_of_one_name_do_not_meet(tmp_path):
    path = tmp_path / ("x" * 246 + ".mp4")
    with whole_file(path) as first, whole_file(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_check_writable_names_the_reason(tmp_path):
    assert check_writable(tmp_path / "new" / "a.mp4").parent.is_dir()
    with pytest.raises(ValueError, match="is a folder"):
        check_writable(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write"):
        check_writable(tmp_path / "file" / "a.mp4")
