"""What the tasks ask: prompts of exact length, needles at their depths, answers as the tokenizer cuts them."""

import json
import random
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import processors

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation import tasks
from pdtrim_deploy.evaluation.corpora import Document
from pdtrim_deploy.evaluation.task_report import TaskFigures
from pdtrim_deploy.evaluation.tasks import agreement, choice, needle, perplexity, social_iqa
from pdtrim_deploy.evaluation.tasks.judge import Judgement
from pdtrim_deploy.models.loading import load_model, load_tokenizer
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.plan import KVSend, ModelShape, PDPlan

WORDS = ("river", "stone", "garden", "window", "paper", "morning", "summer", "walked", "quietly", "toward", "village")


@pytest.fixture(scope="module")
def setting(tiny_llama_dir: Path, cache):
    rng = random.Random(0)
    sentences = lambda: " ".join(" ".join(rng.choices(WORDS, k=8)).capitalize() + "." for _ in range(60))  # noqa: E731
    documents = tuple(Document(f"d{n}", sentences()) for n in range(12))
    model = load_model(tiny_llama_dir)
    shape = ModelShape(
        architecture="LlamaForCausalLM", fingerprint="f", num_blocks=6, num_kv_heads=2, head_dim=16,
        kv_dtype="float32",
    )  # fmt: skip
    tokenizer = load_tokenizer(tiny_llama_dir)
    return tasks.Setting(tokenizer, PDOracle(model, model, PDPlan.dense(shape)), documents, cache, size=2)


def changed(setting, **values):
    return tasks.Setting(**{**setting.__dict__, **values})


def questions(count):
    return [
        choice.Question(f"{n}: {WORDS[n % 7]}. Why?", (f"no {n}", f"yes {WORDS[n % 5]}", "it may be"), n % 3)
        for n in range(count)
    ]


def test_needles_lie_at_their_depths_and_are_asked_for(setting):
    task = needle.prepare(setting, prompt=600)
    (part,) = task.parts
    assert part.prompts.shape == (20, 600)
    assert part.groups[:10] == ("0%", "11%", "22%", "33%", "44%", "56%", "67%", "78%", "89%", "100%")
    for prompt, answers, lengths, group in zip(
        part.prompts, part.continuations, part.lengths, part.groups, strict=True
    ):
        text = setting.tokenizer.decode(prompt)
        about = text[text.rindex("The secret code of the ") :]
        codes = [setting.tokenizer.decode(row[:n]) for row, n in zip(answers, lengths, strict=True)]
        fact = f" {about}{codes[0]}."
        assert text.count(fact) == 1
        assert about.endswith(" vault")
        assert len(set(codes)) == 5
        assert all(code.startswith(" is ") and code[4:].isdigit() and len(code) == 9 for code in codes)
        question = text.index("\n\nQuestion: ")
        assert text.index(fact) / (question - len(fact)) == pytest.approx(float(group[:-1]) / 100, abs=0.08)
        if group not in ("0%", "100%"):
            assert text[text.index(fact) - 1] == "."  # behind a sentence


def test_a_needle_counts_only_when_every_token_of_the_code_is_right(setting):
    task = needle.prepare(setting, prompt=600)
    (part,) = task.parts
    continuations, lengths = part.continuations[:3], part.lengths[:3]
    skip = len(" is")  # the tiny tokenizer knows bytes
    top = continuations.clone()
    top[0, 0, 0] += 1  # what prefill judges is not asked
    top[1, 0, skip] += 1  # the space before the code is
    logprobs = torch.full(continuations.shape, -1.0)
    logprobs[2, 3, -1] = -0.5  # a wrong code that is likelier
    scores = task.read(continuations, lengths, Judgement(logprobs, top))
    assert scores["exact"].tolist() == [1.0, 0.0, 1.0]
    assert scores["choice"].tolist() == [0.0, 0.0, 0.0]  # ties are wrong
    logprobs[:2, 0] = -0.9
    scores = task.read(continuations, lengths, Judgement(logprobs, top))
    assert scores["choice"].tolist() == [1.0, 1.0, 0.0]
    assert scores["code_nll"].tolist() == pytest.approx([0.9, 0.9, 1.0])


def test_choice_prompts_are_examples_and_the_question_of_exact_length(setting):
    examples, judged = questions(60), [choice.Question("What now?", ("go", "stay a while", "sleep"), 1)] * 2
    task = choice.prepare(setting, prompt=200, questions=(examples, judged))
    (part,) = task.parts
    assert part.prompts.shape == (2, 200)
    texts = [setting.tokenizer.decode(prompt) for prompt in part.prompts]
    assert all(prompt.endswith("\n\nWhat now?\nAnswer:") for prompt in texts)
    assert texts[0] != texts[1]  # other examples for each
    solved = {f"{q.text}\nAnswer: {q.choices[q.right]}" for q in examples}
    for block in texts[0].split("\n\n")[1:-1]:
        assert block in solved
    answers = [setting.tokenizer.decode(row[:n]) for row, n in zip(part.continuations[0], part.lengths[0], strict=True)]
    assert answers == [" stay a while", " go", " sleep"]  # the right one first
    with pytest.raises(UserError, match="task choice has 2 questions, not 3"):
        choice.prepare(changed(setting, size=3), questions=(examples, judged))
    with pytest.raises(UserError, match="60 examples do not fill a prompt of 9999 tokens"):
        choice.prepare(setting, prompt=9999, questions=(examples, judged))


def test_seeds_decide(setting):
    for prepare in (
        lambda s: needle.prepare(s, prompt=600),
        lambda s: choice.prepare(s, prompt=200, questions=(questions(60), questions(9))),
        lambda s: perplexity.prepare(s, (16, 32), 8),
        lambda s: agreement.prepare(s, 24, 6),
    ):
        first, again, other = (prepare(changed(setting, seed=seed)).parts[0] for seed in (1, 1, 2))
        assert torch.equal(first.prompts, again.prompts)
        assert torch.equal(first.continuations, again.continuations)
        assert not torch.equal(first.prompts, other.prompts)


def test_prompts_begin_with_bos_where_the_tokenizer_has_it(setting, tiny_llama_dir: Path):
    """Once, and first, as in serving: the model was trained so, and its attention sink is there."""
    tokenizer = load_tokenizer(tiny_llama_dir)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", 1)]
    )
    begun = changed(setting, tokenizer=tokenizer)
    tasks = {
        "needle": needle.prepare(begun, prompt=600),
        "choice": choice.prepare(begun, prompt=200, questions=(questions(60), questions(9))),
        "perplexity": perplexity.prepare(begun, (16, 32), 8),
        "agreement": agreement.prepare(begun, 24, 6),
    }
    for name, task in tasks.items():
        for part in task.parts:
            bos = part.prompts == tokenizer.bos_token_id
            assert bos[:, 0].all(), name
            assert bos.sum() == len(bos), name
    short, long = tasks["perplexity"].parts
    assert torch.equal(short.prompts[:, 1:], long.prompts[:, 17:])
    assert [part.prompts.shape[1] for part in (*tasks["needle"].parts, *tasks["choice"].parts)] == [600, 200]


def test_all_prompt_lengths_judge_the_same_tokens(setting):
    short, long = perplexity.prepare(setting, (16, 32), 8).parts
    assert torch.equal(short.continuations, long.continuations)
    assert torch.equal(short.prompts, long.prompts[:, 16:])
    assert (short.groups, long.groups) == (("16", "16"), ("32", "32"))


def test_over_all_prompt_lengths_the_standard_error_is_that_of_texts(setting):
    task, cut = perplexity.prepare(changed(setting, size=5), (16, 32), 8), KVSend(mode="sparse", n_first=1, n_last=2)
    dense, pd = task.measure([setting.dense, setting.dense.with_kv((cut,) * 6)])
    differences = torch.tensor(pd.values["nll"]) - torch.tensor(dense.values["nll"])
    of_texts = differences.view(2, 5).mean(0)
    (whole, *_) = TaskFigures.of(dense, pd).figures
    assert (whole.group, whole.items) == (None, 10)
    assert whole.difference == pytest.approx(float(of_texts.mean()), rel=1e-4)
    assert whole.stderr == pytest.approx(float(of_texts.std()) / 5**0.5, rel=1e-4)
    single = perplexity.prepare(changed(setting, size=1), (16, 32), 8).measure([setting.dense])[0]
    assert TaskFigures.of(single, single).figures[0].stderr is None


def test_agreement_follows_the_dense_model(setting):
    (part,) = agreement.prepare(setting, 24, 6).parts
    model: transformers.PreTrainedModel = setting.dense.decode_model
    expected = model.generate(part.prompts[:1], max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert part.continuations[0, 0].tolist() == expected[0, 24:].tolist()


def test_a_task_that_the_context_cannot_hold_is_refused(setting):
    long = (Document("long", "word " * 3000),)
    with pytest.raises(UserError, match="task perplexity needs a context of 2112 tokens, the model has 1024"):
        tasks.prepare("perplexity", changed(setting, documents=long, size=1))
    with pytest.raises(UserError, match="holds no text beside needle and question"):
        needle.prepare(setting, prompt=100)


def test_social_iqa_is_parsed(tmp_path: Path):
    rows = [
        ("Jo left. Why did Jo leave? A: to rest; B: be seen; C: had to.", "B"),
        ("Jo left. How would Jo feel? A: same; B: same; C: other.", "A"),
        ("Jo: A man. What next?  A: walk; B: see A; B or C; C: run .", "C"),
    ]
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        lines = [json.dumps({"input": [{"role": "user", "content": text}], "ideal": ideal}) for text, ideal in rows]
        archive.writestr("evals/registry/data/theory_of_mind/socialiqa/test.jsonl", "\n".join(lines) + "\n")
    parsed = [(d.id, json.loads(d.text)) for d in social_iqa.parse(tmp_path / "x.whl")]
    assert parsed == [
        ("0000", ["Jo left. Why did Jo leave?", ["to rest", "be seen", "had to"], 1]),
        ("0002", ["Jo: A man. What next?", ["walk", "see A; B or C", "run"], 2]),
    ]


@pytest.mark.parametrize("task", [perplexity, needle, agreement], ids=lambda task: task.__name__.rpartition(".")[2])
def test_texts_of_one_document_count_as_one_in_errors(setting, task):
    few = changed(setting, documents=setting.documents[:3], size=1 if task is needle else 6)
    dense, cut = setting.dense, setting.dense.with_kv((KVSend(mode="sparse", n_first=1, n_last=8),) * 6)
    prepared = task.prepare(few, **({"lengths": (40, 60), "tokens": 8} if task is perplexity else {"prompt": 160}))
    before, after = prepared.measure([dense, cut])
    measure = next(iter(after.values))
    documents = prepared.documents * len(prepared.parts)
    assert set(documents) == {0, 1, 2}
    pairs = zip(documents, after.values[measure], before.values[measure], strict=True)
    apart = [(document, value - base) for document, value, base in pairs]
    mean = sum(difference for _, difference in apart) / len(apart)
    squares = sum(sum(value - mean for of, value in apart if of == document) ** 2 for document in range(3))
    assert after.against(before, measure).stderr == pytest.approx((squares * 3 / 2) ** 0.5 / len(apart))
    assert TaskFigures.of(before, after).subjects == documents
