"""How healing trains: interrupted anywhere, in 16 bits, by LoRA, in a time limit, with few logits at a time."""

import pytest
import torch
import transformers
from stagepairs import kl, pair_of
from tinypd import text, tiny

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.pruning.healing import StateFile, heal
from pdtrim_deploy.pruning.healing.learnt import learnt
from pdtrim_deploy.pruning.healing.losses import HiddenLoss, LogitLoss
from pdtrim_deploy.pruning.healing.paired import PairedTest, Split
from pdtrim_deploy.pruning.healing.stage_reader import StageReader
from pdtrim_deploy.pruning.healing.training import Trainer
from pdtrim_deploy.pruning.healing.weights import FullWeights, LoraWeights
from pdtrim_deploy.pruning.students.regression import FROZEN
from pdtrim_deploy.recipe.healing import HealingSection

SECTION = HealingSection(
    prefill_steps=4, decode_steps=4, learning_rate=1e-3, sweep=(1.0, 3.0), regression=0.5, batch=2
)  # fmt: skip


@pytest.fixture(autouse=True)
def _short_trials(monkeypatch):
    """Of four steps each, before a run of four."""
    monkeypatch.setattr(HealingSection, "SHORT", 1)
    monkeypatch.setattr(HealingSection, "LEAST_STEPS", 4)


class Killed(BaseException):
    pass


def weights_of(healed):
    """What training came to, kept or not."""
    return {f"{block}.{name}": t for block, ts in healed.items() for name, t in ts.items()}


@pytest.fixture
def trained(monkeypatch):
    """The tensors that each training ended with, in order."""
    ends = []
    for kind in (FullWeights, LoraWeights):

        def tensors(self, plain=kind.tensors):
            ends.append({block: dict(ts) for block, ts in plain(self).items()})
            return ends[-1]

        monkeypatch.setattr(kind, "tensors", tensors)
    return ends


@pytest.mark.parametrize(("method", "stage"), [("full", "decode"), ("lora", "prefill")])
def test_what_is_killed_goes_on_to_the_same_bits(method, stage, tmp_path, trained):
    """Killed behind many of its steps, those of trials among them, and while it writes."""
    pair, ids = pair_of(tiny("Llama")), text(12, 16)
    section = SECTION.model_copy(update={"method": method})
    heal(pair, stage, ids, section)
    steps = 2 * 4 + 4

    def goes_on(after):
        seen = 0

        def note(line):
            nonlocal seen
            seen += ": step " in line
            if after is not None and seen > after:
                raise Killed

        try:
            heal(pair, stage, ids, section, note, file=StateFile(tmp_path / "state", "text", every_s=0))
        except Killed:
            seen -= 1  # not written down
        return seen

    done = 0
    while len(trained) < 2:
        done += goes_on(1 if done else 3)
    assert done == steps
    first, second = map(weights_of, trained)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_state_of_other_training_or_half_a_file_does_not_count(tmp_path):
    pair, ids, path = pair_of(tiny("Llama")), text(12, 16), tmp_path / "state"
    heal(pair, "prefill", ids, SECTION, file=StateFile(path, "text"))
    assert StateFile(path, "text").load() is not None
    assert StateFile(path, "other").load() is None
    path.write_bytes(path.read_bytes()[:-100])
    assert StateFile(path, "text").load() is None


class Clock:
    """Ten seconds a step."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        for kind in (HiddenLoss, LogitLoss):

            def backward(loss, ids, plain=kind.backward):
                self.now += 10
                return plain(loss, ids)

            monkeypatch.setattr(kind, "backward", backward)

    def __call__(self):
        return self.now


def test_time_is_kept_over_interruptions(monkeypatch, tmp_path):
    monkeypatch.setattr(HealingSection, "SHORT", 20)
    monkeypatch.setattr(HealingSection, "LEAST_STEPS", 1)
    pair, ids = pair_of(tiny("Llama")), text(12, 16)
    clock, steps = Clock(monkeypatch), []
    section = SECTION.model_copy(update={"decode_steps": 10**6, "minutes": 5.0})

    def note(line):
        if ": step " in line:
            steps.append(line)
            if len(steps) in (3, 17):
                clock.now += 10_000  # nobody trained
                raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            heal(pair, "decode", ids, section, note, file=StateFile(tmp_path / "s", "text", every_s=0), clock=clock)
    healed = heal(pair, "decode", ids, section, note, file=StateFile(tmp_path / "s", "text", every_s=0), clock=clock)
    assert healed.training["seconds"] == pytest.approx(300, abs=11)
    # Two steps of ten seconds were not written down when it was killed.
    assert len(steps) == pytest.approx(300 / 10 + 2, abs=1)
    phases = {phase["loss"]: phase["seconds"] for phase in healed.training["phases"]}
    assert phases["hidden states"] == pytest.approx(phases["logits"], abs=21)


def test_hidden_states_are_fitted_layer_by_layer():
    """The loss is that of what transformers' own layers give; no gradient leaves its layer."""
    pair, ids = pair_of(tiny("Llama"), prefill=(2,), decode=(2,)), text(2, 16)
    model, outputs = pair.stage("prefill"), {}
    weights = FullWeights(model, pair.plan.layers("prefill"), learnt(pair, "prefill", model))
    for name, layers in (("dense", pair.model.model.layers), ("stage", model.model.layers)):
        for number, layer in enumerate(layers):
            layer.register_forward_hook(lambda _, __, out, key=(name, number): outputs.update({key: out.detach()}))
    with torch.no_grad():
        pair.model(ids)
        model(ids)
    expected = 0.0
    for number, block in enumerate((0, 2, 3, 4)):  # layer 1 stands in front of the gap: block 3 reads what 2 gave
        ours, dense = outputs["stage", number], outputs["dense", block]
        expected += float(((ours - dense).square().sum(-1) / dense.square().sum(-1)).mean()) / 4
    reader = StageReader(pair, "prefill", model, None)
    assert HiddenLoss(reader, [True] * 4).backward(ids) == pytest.approx(expected, rel=1e-4)
    together = [p.grad.clone() for p in weights.masters]
    for p in weights.masters:
        p.grad = None
    HiddenLoss(reader, [True, True, False, False]).backward(ids)
    half = len(together) // 2
    assert all(p.grad is None for p in weights.masters[half:])
    assert any(gradient.abs().sum() > 0 for gradient in together[half:])
    for first, p in zip(together[:half], weights.masters[:half], strict=True):
        torch.testing.assert_close(first * 2, p.grad)


@pytest.mark.parametrize("recomputes", [False, True])
def test_logits_exist_for_few_tokens_at_a_time(recomputes, monkeypatch):
    pair, ids = pair_of(tiny("Llama")), text(2, 24)
    model, rows = pair.stage("prefill"), []
    weights = FullWeights(model, pair.plan.layers("prefill"), learnt(pair, "prefill", model))
    reader = StageReader(pair, "prefill", model, None, recomputes)
    value = LogitLoss(reader).backward(ids)
    assert value == pytest.approx(kl(pair, "prefill", ids), rel=1e-4)
    whole = [p.grad.clone() for p in weights.masters]
    vocabulary = model.lm_head.out_features
    monkeypatch.setattr("pdtrim_deploy.pruning.healing.reader._LOGITS_AT_ONCE", 5 * vocabulary)
    for head in (model.lm_head, pair.model.lm_head):
        head.register_forward_hook(lambda _, __, out: rows.append(out.shape[:-1].numel()))
    for p in weights.masters:
        p.grad = None
    assert LogitLoss(reader).backward(ids) == pytest.approx(value, rel=1e-5)
    for p, gradient in zip(weights.masters, whole, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-7)
    assert max(rows) == 5
    assert sum(rows) == 2 * 48
    assert reader.divergences(ids, 2).shape == (2,)
    assert max(rows) == 5


@pytest.mark.parametrize("recomputes", [False, True])
def test_layers_run_again_for_their_gradients_if_their_values_are_not_kept(recomputes):
    pair, ids, runs = pair_of(tiny("Llama")), text(2, 24), []
    model = pair.stage("prefill")
    FullWeights(model, pair.plan.layers("prefill"), learnt(pair, "prefill", model))
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda *_: runs.append(1))  # the second run ends before the layer does
    LogitLoss(StageReader(pair, "prefill", model, None, recomputes)).backward(ids)
    assert len(runs) == len(model.model.layers) * (1 + recomputes)


def test_gradient_checkpointing_changes_no_bit(trained):
    pair, ids = pair_of(tiny("Llama")), text(12, 16)
    for recomputes in (False, True):
        heal(pair, "decode", ids, SECTION.model_copy(update={"gradient_checkpointing": recomputes, "sweep": (1.0,)}))
    first, second = map(weights_of, trained)
    assert all(torch.equal(first[name], second[name]) for name in first)


def with_experts():
    config = transformers.Qwen3MoeConfig(
        vocab_size=97, hidden_size=24, moe_intermediate_size=16, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, initializer_range=0.3,
        attn_implementation="sdpa", max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.Qwen3MoeForCausalLM(config).eval()


@pytest.mark.parametrize("family", ["Llama", "Qwen3Moe"])
def test_lora_is_merged(family, trained):
    model, ids = with_experts() if family == "Qwen3Moe" else tiny(family), text(64, 24)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    section = HealingSection(decode_steps=24, method="lora", lora_rank=4, learning_rate=1e-2, sweep=(1.0,), batch=4)
    pair = pair_of(model)
    done = heal(pair, "decode", ids, section)
    changed = trained[0]
    assert done.test.after == pytest.approx(kl(pair.with_changes("decode", changed), "decode", ids[-8:]), rel=1e-3)
    assert done.test.difference < 0
    assert set(changed) == set(pair.plan.layers("decode"))
    inside = dict(model.model.layers[4].named_parameters())
    for name, tensor in changed[4].items():
        assert not name.startswith(FROZEN)
        rank = torch.linalg.matrix_rank((tensor - inside[name]).detach(), rtol=1e-3)
        assert (rank <= 4).all()
        assert tensor.shape == inside[name].shape
    if family == "Qwen3Moe":
        assert {"mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"} <= set(changed[4])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("method", ["full", "lora"])
def test_small_changes_are_not_lost_in_16_bits(method, monkeypatch, trained):
    """The optimiser's tensors are float32, what computes and what is written is the model's."""
    model = tiny("Llama").bfloat16()
    pair, ids = pair_of(model), text(64, 24)
    seen = set()
    plain = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self: (seen.update(p.dtype for group in self.param_groups for p in group["params"]), plain(self))[1],
    )
    rate = 1e-2 if method == "lora" else 2e-3
    section = HealingSection(decode_steps=24, method=method, learning_rate=rate, sweep=(1.0,), batch=4)
    done = heal(pair, "decode", ids, section)
    assert seen == {torch.float32}
    assert done.test.difference < 0
    assert {tensor.dtype for tensor in weights_of(trained[0]).values()} == {torch.bfloat16}
    if method == "full":
        stage = pair.stage("decode")
        weights = FullWeights(stage, pair.plan.layers("decode"), learnt(pair, "decode", stage))
        name = "mlp.up_proj.weight"
        start = weights.tensors()[4][name].clone()
        for _ in range(64):  # each too small for bfloat16
            for master in weights.masters:
                master.data.mul_(1 + 1e-4)
            weights.push()
        grown = weights.tensors()[4][name].float() / start.float()
        assert float(grown.nanmean()) == pytest.approx(1.0064, abs=1e-3)


def test_the_best_rate_of_the_trials_goes_on(monkeypatch):
    pair, ids = pair_of(tiny("Llama")), text(48, 24)
    swept = heal(pair, "prefill", ids, SECTION.model_copy(update={"sweep": (1e4, 1.0, 1e-4)}))
    tried = swept.training["sweep"]
    assert list(tried) == ["10", "0.001", "1e-07"]
    assert swept.training["learning_rate"] == 1e-3 == float(min(tried, key=tried.get))


def test_few_steps_try_no_rate(monkeypatch):
    """The first factor's is used: where steps are few, and where a trial's time turns out to be short."""
    monkeypatch.setattr(HealingSection, "SHORT", 20)
    monkeypatch.setattr(HealingSection, "LEAST_STEPS", 5)
    pair, ids, clock = pair_of(tiny("Llama")), text(12, 16), Clock(monkeypatch)
    section = SECTION.model_copy(update={"sweep": (3.0, 1.0)})
    for update, seconds in (({}, 40), ({"decode_steps": 1000, "minutes": 2.0}, 120)):
        training = heal(pair, "decode", ids, section.model_copy(update=update), clock=clock).training
        assert (training["learning_rate"], training["sweep"]) == (0.003, {})
        assert training["seconds"] == pytest.approx(seconds, abs=10)


def test_a_rate_whose_loss_is_no_number_is_not_chosen(monkeypatch):
    calls = []

    def backward(self, ids, plain=HiddenLoss.backward):
        calls.append(1)
        return float("nan") if len(calls) == 2 else plain(self, ids)

    monkeypatch.setattr(HiddenLoss, "backward", backward)
    healed = heal(pair_of(tiny("Llama")), "prefill", text(12, 16), SECTION)
    assert healed.training["sweep"]["0.001"] is None  # JSON has no infinity
    assert healed.training["learning_rate"] == 0.003


def test_a_rate_whose_divergence_is_no_number_is_not_chosen(monkeypatch):
    calls = []

    def divergence(self, plain=Trainer._divergence):
        calls.append(1)
        return float("nan") if len(calls) == 1 else plain(self)

    monkeypatch.setattr(Trainer, "_divergence", divergence)
    section = SECTION.model_copy(update={"regression": 0.0})
    training = heal(pair_of(tiny("Llama")), "prefill", text(12, 16), section).training
    assert (training["learning_rate"], training["sweep"]["0.001"]) == (0.003, None)


def test_text_has_one_use():
    ids = text(40, 4)
    split = Split.of(ids, chooses=True)
    assert [len(part) for part in (split.fit, split.chosen, split.judged)] == [28, 4, 8]
    assert torch.equal(torch.cat((split.fit, split.chosen, split.judged)), ids)
    assert len(Split.of(ids, chooses=False).fit) == 32
    assert [len(part) for part in vars(Split.of(ids[:4], chooses=True)).values()] == [1, 1, 2]


def test_the_paired_test_knows_its_error():
    before = torch.tensor([1.0, 3.0, 2.0, 5.0], dtype=torch.float64)
    test = PairedTest.of(before, before - torch.tensor([0.1, 0.2, 0.3, 0.2]))
    assert (test.difference, test.stderr) == pytest.approx((-0.2, 0.04082), rel=1e-3)
    assert test.kept
    assert not PairedTest.of(before, before - torch.tensor([0.1, 0.9, -0.3, 0.1])).kept  # 0.2 ± 0.26
    assert not PairedTest.of(before, before + torch.tensor([0.1, 0.2, 0.3, 0.2])).kept


def test_without_peft_it_says_what_to_do(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"healing\.method lora needs peft: install the build extra"):
        heal(pair_of(tiny("Llama")), "decode", text(8, 16), SECTION.model_copy(update={"method": "lora"}))
