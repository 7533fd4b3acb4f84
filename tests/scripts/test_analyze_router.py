"""What routers are said to specialise on: labels and their shuffling, information from counts, and a whole analysis."""

import json
import math
import re

import numpy as np
import pytest
import tokenizers

from scripts import assemble, router_figures, router_labels
from scripts.router_information import entropy, grouped, information, told
from scripts.run_results import read_run
from sira_jax.errors import ConfigError
from sira_jax.training.train_state import init_adapter, split_params
from tasks.vocabularies import TokenizersVocabulary
from tests.scripts.adapter_runs import TASKS, make_runner, make_runs
from tests.scripts.flagged import imported


def batches():
    """Two batches: three examples of tasks 0, 1, 1 packed in two rows; one of task 0, as an encoder-decoder has them."""
    return [
        {
            "decoder_input_tokens": np.array([[5, 6, 7, 8, 0], [9, 9, 9, 0, 0]]),
            "decoder_segment_ids": np.array([[1, 1, 2, 2, 0], [1, 1, 1, 0, 0]]),
            "task_ids": np.array([[0, 0, 1, 1, 0], [1, 1, 1, 0, 0]]),
        },
        {
            "decoder_input_tokens": np.array([[5, 5, 0]]),
            "decoder_segment_ids": np.array([[1, 1, 0]]),
            "task_ids": np.array([[0, 0, 0]]),
        },
    ]


def test_examples_are_dealt_whole():
    seen = set()
    for seed in range(40):
        first, second = router_labels.shuffle_examples(batches(), seed)
        rows = [*first["task_ids"].tolist(), *second["task_ids"].tolist()]
        labels = (rows[0][0], rows[0][2], rows[1][0], rows[2][0])
        assert rows == [
            [labels[0]] * 2 + [labels[1]] * 2 + [0],
            [labels[2]] * 3 + [0, 0],
            [labels[3]] * 2 + [0],
        ]
        assert sorted(labels) == [0, 0, 1, 1]
        seen.add(labels)
    assert len(seen) == 6
    # What was given stays as it was.
    assert batches()[0]["task_ids"].tolist() == [[0, 0, 1, 1, 0], [1, 1, 1, 0, 0]]


def test_both_stacks_of_an_encoder_decoder_get_the_examples_label():
    batch = {
        **batches()[0],
        "encoder_input_tokens": np.array([[1, 2, 3], [4, 4, 0]]),
        "encoder_segment_ids": np.array([[2, 2, 1], [1, 1, 0]]),
        "encoder_task_ids": np.array([[1, 1, 0], [1, 1, 0]]),
    }
    for seed in range(5):
        (changed,) = router_labels.shuffle_examples([batch], seed)
        decoder, encoder = changed["task_ids"], changed["encoder_task_ids"]
        assert encoder.tolist() == [
            [decoder[0, 2], decoder[0, 2], decoder[0, 0]],
            [decoder[1, 0], decoder[1, 0], 0],
        ]
    assert router_labels.token_counts([batch]) == [7, 5]


def test_tokens_get_labels_and_are_dealt_one_by_one():
    label_of = np.arange(20) % 4
    labelled = router_labels.label_tokens(batches(), label_of)
    assert labelled[0]["task_ids"].tolist() == [[1, 2, 3, 0, 0], [1, 1, 1, 0, 0]]
    shuffled = router_labels.shuffle_tokens(labelled, 1)[0]["task_ids"]
    is_token = batches()[0]["decoder_segment_ids"] > 0
    assert sorted(shuffled[is_token]) == sorted(labelled[0]["task_ids"][is_token])
    assert (shuffled != labelled[0]["task_ids"]).any()
    assert (shuffled[~is_token] == 0).all()
    assert router_labels.frequent_tokens(batches(), 2) == [5, 9]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("12", "number"),
        (" 7", "number"),
        ("१", "number"),
        ("), ", "punctuation"),
        ("$", "punctuation"),
        (" ", "space"),
        ("\n", "space"),
        ("▁", "space"),
        ("▁tarehe", "Latin letters"),
        ("é", "Latin letters"),
        ("জুলাই", "other letters"),
        ("<0xE0>", "other"),
        ("<|im_end|>", "other"),
        ("", "other"),
        ("<", "punctuation"),
    ],
)
def test_kinds_of_tokens(text, kind):
    assert router_labels.kind_of(text) == kind


def test_parts_of_characters_have_no_kind():
    """Byte-level pieces are written with Latin letters, whatever they are parts of."""
    pieces = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({piece: i for i, piece in enumerate([*pieces, "abc"])}, [])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    vocabulary = TokenizersVocabulary(tokenizer.to_str(), eos_id=tokenizer.token_to_id("<eos>"))
    kinds = router_labels.kinds_in(vocabulary)
    named = {text: router_labels.KINDS[kinds[i]] for text, i in tokenizer.get_vocab().items()}
    # The first byte of Telugu is written as this letter.
    assert "తె".encode()[0] == ord("à")
    assert named["à"] == "other"
    assert (named["a"], named["abc"], named["7"]) == ("Latin letters", "Latin letters", "number")
    assert named["Ġ"] == "space"


def test_the_verdict_says_when_experts_do_not_specialise():
    real, blurred = statistics([[1, 0], [0, 1], [0.5, 0.5]]), statistics([[0.5, 0.5]] * 3)
    with imported("analyze_router") as module:
        verdict = module._verdict
    assert verdict("task", told(blurred, [real], blurred)).startswith(
        "No specialisation on the task: "
    )
    assert "was learned" in verdict("task", told(real, [blurred], real))
    assert verdict("task", told(real, [blurred], blurred)).startswith("The experts specialise on")


def test_information_is_the_drop_of_entropy():
    rng = np.random.default_rng(0)
    counts_ZE = rng.integers(0, 20, (5, 4)).astype(float)
    counts_ZE[2] = 0
    total = counts_ZE.sum()
    # H(Z) + H(E) - H(Z, E), in loops.
    expected = 0.0
    for z in range(5):
        for e in range(4):
            joint = counts_ZE[z, e] / total
            if joint:
                expected += joint * math.log(
                    joint / (counts_ZE[z].sum() / total * counts_ZE[:, e].sum() / total)
                )
    weight_Z = counts_ZE.sum(1)
    load_ZE = counts_ZE / np.maximum(weight_Z, 1)[:, None]
    assert information(load_ZE, weight_Z) == pytest.approx(expected)
    assert entropy(np.array([1.0, 0.0, 3.0])) == pytest.approx(
        -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    )
    assert information(np.eye(3), np.ones(3)) == pytest.approx(math.log(3))
    assert information(np.full((3, 4), 0.25), np.ones(3)) == pytest.approx(0.0)


def statistics(load_ZE, weight_Z=(3.0, 1.0, 2.0)):
    return {
        "q": {
            "task_expert_load": np.array([load_ZE, np.full((3, 2), 0.5)]),
            "task_tokens": np.array([weight_Z, weight_Z]),
        }
    }


def test_what_is_told_is_held_against_chance():
    # Labels 0 and 1 share an expert, which groups cannot tell from one.
    real = statistics([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    blurred = statistics([[0.6, 0.4], [0.5, 0.5], [0.5, 0.5]])
    found = told(real, [blurred, real, blurred], blurred)
    share = 1 / 3
    split = -(share * math.log(share) + (1 - share) * math.log(1 - share))
    np.testing.assert_allclose(found.real_L["q"], [split, 0.0], atol=1e-12)
    assert found.labels == 3
    assert found.bound == pytest.approx(entropy(np.array([3.0, 1.0, 2.0])))
    # One of three shufflings is as good as the real labels, which count themselves.
    assert found.p == 2 / 4
    assert found.above == (0, 2)
    assert told(real, [blurred, blurred], real).above == (1, 2)
    assert told(real, [blurred], real).p == 1 / 2
    assert found.risen == 1
    assert found.before < found.mean / 10
    assert told(real, [blurred], real).risen == 0
    assert told(real, [blurred], real).before == pytest.approx(found.mean)
    both = told(real, [blurred], blurred, groups=[[0, 1], [2]])
    assert both.labels == 2
    assert both.bound == pytest.approx(split)
    np.testing.assert_allclose(both.real_L["q"], [split, 0.0], atol=1e-12)
    load_LUE, weight_LU = grouped(blurred["q"], [[0, 1], [], [2]])
    np.testing.assert_allclose(load_LUE[0, 0], [(3 * 0.6 + 0.5) / 4, (3 * 0.4 + 0.5) / 4])
    assert weight_LU[0].tolist() == [4.0, 0.0, 2.0]


def test_effective_experts():
    line = {f"train/router/expert_load/{i:03}": load for i, load in enumerate((0.5, 0.5, 0.0))}
    assert router_figures.effective_experts({"step": 1, **line}) == pytest.approx(2.0)
    assert router_figures.effective_experts({"step": 1, "train/loss": 2.0}) is None


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return make_runs(tmp_path_factory.mktemp("runs"))


def test_a_whole_analysis(runs, tmp_path, monkeypatch, capsys):
    lines = [
        {"step": s, "train/router/gate_entropy": 1.0 / s, "train/router/dropped_share": 0.1}
        for s in (1, 2)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (runs / "sira" / "metrics.jsonl").write_text(text)
    call = make_runner(runs, monkeypatch, capsys)
    arguments = ("--workdir={0}/sira", "--examples=6", "--shuffles=2", "--tokens=8")
    out = call("analyze_router", *arguments, f"--out={tmp_path}")
    assert "The expert tells" in out
    assert re.search(r"specialis\w+ on the task", out)
    assert "In training 10.00% of the pairs were dropped up to step 2" in out
    assert "shufflings" in out
    content = json.loads((tmp_path / "analysis.json").read_text())
    assert set(content["information"]) == {"task", "language", "kind of token", "token"}
    assert content["tasks"] == TASKS
    for value in content["information"].values():
        assert 0 <= value["mean_nats"] <= value["bound_nats"] + 1e-9
        assert value["p"] in (pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0)
        assert all(len(layers) == 2 for layers in value["by_layer"].values())
    # Two tasks, each a language of its own.
    told_of = content["information"]
    assert told_of["task"]["mean_nats"] == pytest.approx(told_of["language"]["mean_nats"])
    assert told_of["token"]["labels"] == 9
    # The routers' statistics are those of scripts/evaluate.py, whose model counts as many labels as there are tasks.
    plan = assemble.Plan(assemble.read_experiment(None, str(runs / "sira")))
    loaded, _ = plan.load_tasks("test", 6)
    frozen = split_params(plan.load_base().params)[1]
    model = plan.model(2)
    adapter, _ = assemble.restore_adapter(
        plan.experiment, plan.mesh, model, frozen, str(runs / "sira"), "latest"
    )
    report = plan.loss_evaluator(model, frozen, loaded, "test").run(adapter)[1]
    for projection, expected in report["projections"].items():
        for field, values in expected.items():
            np.testing.assert_allclose(
                content["routers"][projection][field], values, rtol=1e-5, atol=1e-6
            )
        both = zip(expected["task_expert_load"], expected["task_tokens"], strict=True)
        loads = [information(np.array(load), np.array(weight)) for load, weight in both]
        assert told_of["task"]["by_layer"][projection] == pytest.approx(loads, abs=1e-6)
    # Before training the routers are those of the run's seed.
    fresh = init_adapter(model, plan.experiment.train.seed)
    report = plan.loss_evaluator(model, frozen, loaded, "test").run(fresh)[1]
    for projection, expected in report["projections"].items():
        both = zip(expected["task_expert_load"], expected["task_tokens"], strict=True)
        loads = [information(np.array(load), np.array(weight)) for load, weight in both]
        found = told_of["task"]["by_layer_before_training"][projection]
        assert found == pytest.approx(loads, abs=1e-6)
    page = (tmp_path / "analysis.html").read_text()
    figures = {path.name for path in tmp_path.glob("*.png")}
    assert figures == {
        "expert_load.png",
        "gate_entropy.png",
        "information.png",
        "preferences.png",
        "task_routing.png",
        "training.png",
    }
    assert page.count("data:image/png;base64,") == len(figures)
    assert (
        read_run("sira", runs / "sira").router is None
    )  # The run directory's own report is left alone.


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lora", r"adapter\.method='lora' has no router"),
        ("frozen", "the frozen model has no router"),
    ],
)
def test_methods_without_routers_are_named(runs, tmp_path, monkeypatch, capsys, name, message):
    call = make_runner(runs, monkeypatch, capsys)
    with pytest.raises(ConfigError, match=message):
        call("analyze_router", f"--workdir={{0}}/{name}", f"--out={tmp_path}", "--examples=2")
