"""The command on the files that people have: its scores are those of tokens and labels that stand here by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch

import wherefrom as wf
from tests.models import relative_error
from tests.processes import command_in_process
from tests.runs import only
from tests.test_formats import CHAT, SHAREGPT, UNMARKED, write
from tests.test_huggingface import gpt2, ids, saved_gpt2, tokenizer
from tests.test_pairs import ROWS, bert, saved
from wherefrom.jobs.sources import SOURCES
from wherefrom.runtime.errors import InputError

Said = Callable[..., str]


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Said:
    """Runs the command in this process, beside a directory `model`; what it printed on either stream."""
    saved_gpt2(tmp_path / "model", UNMARKED)
    monkeypatch.chdir(tmp_path)
    return command_in_process(monkeypatch, capsys)


def refused(said: Said, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        said(*arguments)
    assert stopped.value.code == 1
    return " ".join(capsys.readouterr().err.split())


def tokens_of(text: str, counted: int) -> dict[str, Any]:
    """An example whose last `counted` tokens are."""
    found = ids(text)
    return {"input_ids": found, "labels": [-100] * (len(found) - counted) + found[len(found) - counted :]}


# In each format, examples and what they are; the last is the query.
FORMATS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]] = {
    "prompt-completion": (
        [
            {"prompt": "a b ", "completion": "c d"},
            {"prompt": "c ", "completion": "a b"},
            {"prompt": "b ", "completion": "d"},
        ],
        [tokens_of("a b c d <end>", 3), tokens_of("c a b <end>", 3), tokens_of("b d <end>", 2)],
        ["--format", "prompt-completion"],
    ),
    "conversations": (
        [
            {"conversations": SHAREGPT[:2]},
            {"conversations": [SHAREGPT[2], SHAREGPT[1]]},
            {"conversations": SHAREGPT[2:]},
        ],
        [
            tokens_of("user : a b assistant : c d <end>", 3),
            tokens_of("user : e assistant : c d <end>", 3),
            tokens_of("user : e assistant : f <end>", 2),
        ],
        [],
    ),
    "messages": (
        [{"messages": CHAT[:2]}, {"messages": [CHAT[0], CHAT[3]]}, {"messages": CHAT[2:]}],
        [
            tokens_of("user : a b assistant : c d <end>", 8),
            tokens_of("user : a b assistant : f <end>", 7),
            tokens_of("user : e assistant : f <end>", 6),
        ],
        ["--count", "all"],
    ),
    "tokens": (
        [{"input_ids": [3, 4, 5], "completion_mask": [0, 1, 0]}, {"input_ids": [3, 4]}, {"input_ids": [4, 5, 3]}],
        [{"input_ids": [3, 4, 5], "labels": [-100, 4, -100]}, {"input_ids": [3, 4]}, {"input_ids": [4, 5, 3]}],
        [],
    ),
    "text": (
        [{"body": "a b c"}, {"body": "d"}, {"body": "b c a"}],
        [tokens_of("a b c", 3), tokens_of("d", 1), tokens_of("b c a", 3)],
        ["--column", "body", "--no-end-token"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_scores_of_every_format_are_those_of_its_tokens(said: Said, tmp_path: Path, name: str) -> None:
    examples, by_hand, options = FORMATS[name]
    write(Path("train.jsonl"), *examples[:2])
    write(Path("queries.jsonl"), *examples[2:])
    said("fit", "run", "--model", "model", "--train", "train.jsonl", *options, "dot")
    queried = [each for each in options if each != "--no-end-token"]
    said("score", "run", "--queries", "queries.jsonl", *queried, "dot")
    study = wf.Study(tmp_path / "hand", gpt2(), wf.CausalLM(), train=by_hand[:2])
    found = wf.Scores.load(only(Path("run/scores"), "dot"))
    assert relative_error(found.values, study.score(by_hand[2:], wf.Dot()).values) < 1e-6
    shown = said("top", "run")
    said("report", "run", "--output", "page.html")
    if name == "prompt-completion":
        assert "b → d" in shown and "a b → c d" in shown
        assert "a b \n\n→ c d" in Path("page.html").read_text()
    if name == "conversations":
        assert "user: e assistant: f" in shown


def test_a_reward_model_is_scored_on_pairs(said: Said, tmp_path: Path) -> None:
    folder = saved(tmp_path / "reward", bert("BertForSequenceClassification", num_labels=1))
    write(Path("pairs.jsonl"), *ROWS)
    said("fit", "run", "--model", "reward", "--train", "pairs.jsonl", "dot")
    assert "chosen and rejected: the rewards of both are compared" in said(
        "score", "run", "--queries", "pairs.jsonl", "dot"
    )
    study = wf.study_from_pretrained(folder, ROWS)
    found = wf.Scores.load(only(Path("run/scores"), "dot"))
    assert relative_error(found.values, study.score(study.prepare(ROWS), wf.Dot()).values) < 1e-6
    assert "chosen: a b c d" in said("top", "run")


PREFERENCES: dict[str, tuple[list[str], Callable[[Any], wf.Preference]]] = {
    "simpo": (["--beta", "2", "--gamma", "1"], lambda _: wf.Preference(wf.SimPO(beta=2, gamma=1))),
    "dpo": (["--beta", "0.3", "--reference", "before"], lambda before: wf.Preference(wf.DPO(beta=0.3), before)),
    "ipo": (["--reference", "base"], lambda before: wf.Preference(wf.IPO(), before)),
    "kto": (["--reference", "before", "--kl", "0.2"], lambda before: wf.Preference(wf.KTO(kl=0.2), before)),
}  # fmt: skip


@pytest.mark.parametrize("name", PREFERENCES)
def test_a_model_trained_on_preferences_is_scored_by_its_loss(said: Said, tmp_path: Path, name: str) -> None:
    options, task = PREFERENCES[name]
    before: Any = gpt2()  # what is in `model`
    with torch.no_grad():
        before.transformer.wte.weight.add_(0.1)
    before.save_pretrained("before")
    model, start = ("dpo", gpt2()) if "base" in options else ("model", before)
    trained: Any = adapter(Path("dpo")) if model == "dpo" else gpt2()
    columns = ("completion",) if name == "kto" else ("chosen", "rejected")
    labels = [{"label": number % 2} if name == "kto" else {} for number in range(len(ROWS))]
    texts = [
        {"prompt": row["prompt"], **dict(zip(columns, (row["chosen"], row["rejected"]), strict=False)), **label}
        for row, label in zip(ROWS, labels, strict=True)
    ]
    write(Path("pairs.jsonl"), *texts)
    said("fit", "run", "--model", model, "--train", "pairs.jsonl", "--preference", name, *options, "dot")
    assert "completions are judged" in said("score", "run", "--queries", "pairs.jsonl", "dot")
    rows = [
        {"prompt_ids": ids(text["prompt"]), **{f"{each}_ids": ids(f"{text[each]} <end>") for each in columns}, **label}
        for text, label in zip(texts, labels, strict=True)
    ]
    study = wf.Study(tmp_path / "hand", trained.eval(), task(start.eval()), train=rows)
    found = wf.Scores.load(only(Path("run/scores"), "dot"))
    assert relative_error(found.values, study.score(rows, wf.Dot()).values) < 1e-5


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "nothing says with which loss the model was trained on them: give --preference 'dpo'"),
        (["--beta", "0.3"], "--beta 0.3 with no preference loss: expected one of dpo, ipo, kto, orpo, simpo"),
        (["--preference", "dpo", "--gamma", "1"], "--gamma 1.0 with --preference 'dpo': expected what it has"),
        (["--preference", "orpo", "--reference", "before"], "expected None, since this loss compares with no other"),
        (["--preference", "dpo", "--reference", "base"], "has no adapter that could be switched off"),
        (["--preference", "dpo", "--beta", "-1"], "DPO: --beta -1.0: expected a number above 0"),
    ],
)  # fmt: skip
def test_a_training_on_preferences_that_cannot_be_is_refused(
    said: Said, capsys: pytest.CaptureFixture[str], options: list[str], expected: str
) -> None:
    write(Path("pairs.jsonl"), *ROWS)
    assert expected in refused(said, capsys, "fit", "run", "--model", "model", "--train", "pairs.jsonl", *options)
    assert not Path("run", SOURCES).exists()


def test_a_preference_loss_is_not_of_a_reward_model(said: Said, capsys: pytest.CaptureFixture[str]) -> None:
    saved(Path("reward"), bert("BertForSequenceClassification", num_labels=1))
    write(Path("pairs.jsonl"), *ROWS)
    words = ["fit", "run", "--model", "reward", "--train", "pairs.jsonl", "--preference", "simpo"]
    assert "is a loss of causal language models, and reward predicts 'reward'" in refused(said, capsys, *words)


def test_scores_add_up_by_the_files_of_examples(said: Said, tmp_path: Path) -> None:
    texts = {"first": ["a b c", "b c d"], "second": ["c d e", "a a", "e d c b"], "queries": ["a b", "d e"]}
    for name, each in texts.items():
        write(Path(f"{name}.jsonl"), *({"text": text} for text in each))
    said("fit", "run", "--model", "model", "--train", "first.jsonl", "second.jsonl", "dot")
    said("score", "run", "--queries", "queries.jsonl", "dot")
    found = wf.Scores.load(only(Path("run/scores"), "dot"))
    table = pandas.DataFrame(found.by(["first"] * 2 + ["second"] * 3))
    frame = pandas.DataFrame(found.values.double().T.numpy()).groupby(["first"] * 2 + ["second"] * 3)
    for query in (0, 1):
        expected = pandas.DataFrame({"sum": frame[query].sum(), "mean": frame[query].mean()})
        of_query = table[table["query"] == query].set_index("group")
        assert of_query["sum"].is_monotonic_decreasing
        pandas.testing.assert_frame_equal(
            of_query.loc[["first", "second"], ["sum", "mean"]], expected, check_names=False
        )
        assert of_query["train"].to_dict() == {"first": 2, "second": 3}
    shown = said("top", "run", "--query", "1")
    best = max(found.by(["first"] * 2 + ["second"] * 3)[2:], key=lambda each: each.sum)
    largest = float(found.values[1].abs().max())  # as a part of which dot's are shown
    total, mean = best.sum / largest, best.mean / largest
    assert f"{best.group} │ {best.train} │ {total:+,.3g} │ {mean:+,.3g}" in shown
    said("report", "run", "--output", "page.html")
    page = Path("page.html").read_text()
    assert page.count('<th scope="row" dir="auto">second</th><td>3</td>') == 2
    assert "from first" in page
    with pytest.raises(InputError, match="groups: 1 for scores of 5"):
        found.by(["first"])
    # The same texts of other files are other data.
    Path("other.jsonl").write_text(Path("second.jsonl").read_text())
    told = said("fit", "run", "--model", "model", "--train", "first.jsonl", "other.jsonl", "dot")
    assert "of another training text or model than this fit" in told


def adapter(folder: Path) -> Any:
    """An adapter of the model in `model`, with no tokenizer of its own."""
    import peft
    from torch import nn

    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    adapted: Any = peft.get_peft_model(gpt2().from_pretrained("model"), config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, generator=generator)
    adapted.save_pretrained(folder)
    return adapted


def test_an_adapter_finds_its_base_and_later_commands_its_type(said: Said, tmp_path: Path) -> None:
    adapted = adapter(Path("adapter"))
    write(Path("train.jsonl"), {"text": "a b c"}, {"text": "d e"})
    write(Path("queries.jsonl"), {"text": "b c"})
    said("fit", "run", "--model", "adapter", "--train", "train.jsonl", "--dtype", "float64", "dot")
    said("score", "run", "--queries", "queries.jsonl", "dot")
    found = wf.Scores.load(only(Path("run/scores"), "dot"))
    assert found.values.dtype == torch.float64
    examples = [{"input_ids": ids(text + " <end>")} for text in ("a b c", "d e", "b c")]
    study = wf.Study(tmp_path / "hand", adapted.double().eval(), wf.CausalLM(["*lora_*"]), train=examples[:2])
    assert relative_error(found.values, study.score(examples[2:], wf.Dot()).values) < 1e-9
    assert "a b c" in said("top", "run")


def test_options_of_loading_that_do_not_fit_are_named(said: Said, capsys: pytest.CaptureFixture[str]) -> None:
    write(Path("train.jsonl"), {"text": "a b c"})
    fit = ("fit", "run", "--model", "model", "--train", "train.jsonl")
    if find_spec("bitsandbytes") is None:
        told = refused(said, capsys, *fit, "--load-in-4bit")
        assert "A model in 4 or 8 bits needs bitsandbytes: pip install bitsandbytes accelerate." in told
    told = refused(said, capsys, *fit, "--load-in-4bit", "--load-in-8bit")
    assert "--load-in-4bit with --load-in-8bit: leave one of them out." in told
    told = refused(said, capsys, *fit, "--device-map", "auto", "--device", "cpu")
    assert "--device 'cpu' with --device-map 'auto': leave one of them out." in told
    assert "--train '': expected a file" in refused(said, capsys, "fit", "run", "--model", "model", "--train")
    with pytest.raises(InputError, match="dtype='float16': expected float32, bfloat16, float64"):
        wf.study_from_pretrained("model", ["a b"], dtype="float16")
    with pytest.raises(InputError, match="quantization='2bit'"):
        wf.study_from_pretrained("model", ["a b"], quantization="2bit")


def test_a_device_map_places_the_model(said: Said) -> None:
    write(Path("train.jsonl"), {"text": "a b c"})
    said("fit", "run", "--model", "model", "--train", "train.jsonl", "--device-map", "cpu", "dot")
    assert json.loads(Path("run", SOURCES).read_text())["loading"]["device_map"] == "cpu"
    study = wf.study_from_pretrained("model", "train.jsonl", run="other", dtype="bfloat16")
    assert bool(study.score(study.prepare(["a b"]), wf.Dot()).values.isfinite().all())


def test_a_run_directory_decides_of_no_code_that_is_run(said: Said, capsys: pytest.CaptureFixture[str]) -> None:
    """Who shares one would decide it for others; the model's code runs where the command itself is told so."""
    write(Path("train.jsonl"), {"text": "a b c"})
    said("fit", "run", "--model", "model", "--train", "train.jsonl", "--trust-remote-code", "dot")
    written = json.loads(Path("run", SOURCES).read_text())
    assert "trust_remote_code" not in written["loading"]
    config = json.loads(Path("model/config.json").read_text())
    own = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    Path("model/config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": own}))
    Path("model/code.py").write_text("from pathlib import Path\nPath('executed').touch()\n")
    score = ("score", "run", "--queries", "train.jsonl", "dot")
    assert "brings Python code of its own, which is not run. If you trust it, pass --trust-remote-code." in refused(
        said, capsys, *score
    )
    written["loading"]["trust_remote_code"] = True
    Path("run", SOURCES).write_text(json.dumps(written))
    assert "cannot be read" in refused(said, capsys, *score)
    assert not Path("executed").exists()


def test_trusted_code_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a configuration that is a GPT-2's under another name."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    folder = saved_gpt2(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": own}))
    (folder / "own_code.py").write_text(
        "from transformers import GPT2Config, GPT2LMHeadModel\n"
        "class OwnConfig(GPT2Config):\n    model_type = 'own'\n"
        "class OwnModel(GPT2LMHeadModel):\n    config_class = OwnConfig\n"
    )
    with pytest.raises(InputError, match="pass trust_remote_code=True"):
        wf.study_from_pretrained(folder, ["a b"], task=wf.CausalLM())
    study = wf.study_from_pretrained(folder, ["a b"], task=wf.CausalLM(), tokenizer=tokenizer(), trust_remote_code=True)
    assert len(study.train) == 1
