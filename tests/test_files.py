import os
import resource

import pytest

from nabla_attn.files import (
    is_whole,
    read_json,
    read_lines,
    read_object,
    whole_file,
    write_text,
)


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


def test_a_full_disk_is_one_error_that_names_the_file(tmp_path):
    import numpy as np
    import safetensors.torch as safe
    import torch

    from nabla_attn.generation.video import write_video

    def write_safetensors(path):
        with whole_file(path) as temporary:
            safe.save_file({"a": torch.zeros(10_000)}, temporary)

    def write_frames(path):
        frames = np.random.default_rng(0).integers(0, 255, (9, 64, 64, 3), np.uint8)
        write_video(frames, path, 8)

    def write_pickle(path):
        with whole_file(path) as temporary:
            torch.save({"a": torch.zeros(10_000)}, temporary)

    ways = [
        write_safetensors,
        write_frames,
        write_pickle,
        lambda path: write_text(path, "x" * 9999),
    ]
    child = os.fork()
    if not child:
        # A limit on the size of files fails where a full disk does.
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        failed = 0
        for index, write in enumerate(ways):
            try:
                write(tmp_path / f"{index}.bin")
            except OSError as error:
                path = tmp_path / f"{index}.bin"
                is_named = str(error) == f"cannot write {path}: file too large."
                failed += is_named and error.errno == 27
            except BaseException:
                pass
        os._exit(failed)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == len(ways)
    assert not list(tmp_path.iterdir())


def test_lines_are_read_or_refused_one_by_one(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntw\xf6\n" + b"x" * 100 + b"\n\nlast\xe2\x80\xa8line")
    lines = [(n, line if isinstance(line, str) else None) for n, line in read_lines(path, 50)]
    assert lines == [(1, "one"), (2, None), (3, None), (4, ""), (5, "last\u2028line")]
    path.write_bytes(b"x" * 50 + b"\n" + b"y" * 49 + b"\n")
    assert [isinstance(line, str) for _, line in read_lines(path, 50)] == [False, True]


def test_empty_is_not_whole(tmp_path):
    path = tmp_path / "a"
    assert not is_whole(path) and not is_whole(tmp_path)
    path.touch()
    assert not is_whole(path)
    path.write_text("x")
    assert is_whole(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"height": 480, "height": 16}', "'height' is there twice"),
        ('[{"a": {"b": 1, "b": 1}}]', "'b' is there twice"),
        ("[" * 100_000, "it is nested too deeply"),
        ("[" * 500 + "]" * 500, "it is nested too deeply"),
        ('{"height": NaN}', "height: NaN is not a number in JSON"),
        ('{"scale": -Infinity}', "-Infinity is not a number in JSON"),
        ('{"scale": 1e999}', "1e999 is too large a number"),
        ('{"seed": 1' + "0" * 400 + "}", r"10000000000000000000\.\.\. is beyond 64 bits"),
        ('{"seed": ' + "9" * 5000 + "}", r"\.\.\. is beyond 64 bits"),
    ],
)
def test_json_of_which_something_would_be_dropped_is_refused(tmp_path, text, words):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=rf"a\.json: not valid JSON \(.*{words}"):
        read_json(tmp_path / "a.json")


def test_what_is_no_object_is_refused_by_name(tmp_path):
    for text in ("[]", "3", '"text"', "null"):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match=r"a\.json: expected an object"):
            read_object(tmp_path / "a.json")


def test_json_of_editors_that_mark_utf8(tmp_path):
    (tmp_path / "a.json").write_text('{"a": "é"}', encoding="utf-8-sig")
    assert read_json(tmp_path / "a.json") == {"a": "é"}
