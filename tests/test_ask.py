"""Questions to a run: against plain scores of examples made by hand, and what readers and programs are given."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

import wherefrom as wf
from tests.test_language import configured
from wherefrom.cli.main import main
from wherefrom.jobs.asking import Asker
from wherefrom.jobs.questions import Question, Writer
from wherefrom.report.attribution import overlaps
from wherefrom.runtime.errors import InputError
from wherefrom.runtime.progress import watched

TEXTS = [
    "the cat sat on the mat and the dog sat too",
    "a dog ran after the cat over the hill",
    "rain fell on the hill and the mat was wet",
    "die Stra\xdfe f\xfchrt zum See \U0001f30a hinunter",
    "the sun was over the hill and the cat ran",
    "a wet dog sat on a wet mat in the rain",
]
PROMPT, ANSWER, OTHER = "a dog ran", " after the cat over the hill", " in the rain"
TEMPLATE = (
    "{% for each in messages %}<{{ each['role'] }}>{{ each['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token, so that a character may be several."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {each: number for number, each in enumerate(["<|end|>", *letters, "th", "the"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=TEMPLATE)


def save_model(folder: Path, encoder_decoder: bool = False) -> Path:
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    if encoder_decoder:
        config = configured(
            T5Config, vocab_size=len(tokenizer), d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, dropout_rate=0,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=0,
        )  # fmt: skip
        T5ForConditionalGeneration(config).save_pretrained(folder)
        return folder
    small = GPT2Config(
        vocab_size=len(tokenizer), n_positions=256, n_embd=8, n_layer=1, n_head=2, initializer_range=0.3,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(small).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("ask") / "model")


@pytest.fixture(scope="module")
def study(folder: Path) -> wf.PretrainedStudy:
    return wf.study_from_pretrained(folder, TEXTS, run=folder.parent / "run", device="cpu", end_token=False)


def by_hand(study: wf.PretrainedStudy, prompt: str, answer: str) -> dict[str, list[int]]:
    before, ids = (study.tokenizer(text)["input_ids"] for text in (prompt, prompt + answer))
    return {"input_ids": ids, "labels": [-100] * len(before) + ids[len(before) :]}


def counted(study: wf.PretrainedStudy, question: Question) -> str:
    """The text of the tokens that are attributed."""
    return str(study.tokenizer.decode([each for each in question.example["labels"] if each != -100]))


def test_scores_are_those_of_an_example_made_by_hand(study: wf.PretrainedStudy) -> None:
    asker = Asker(study)
    found = asker.attribute(asker.writer.question(PROMPT, ANSWER), k=3)
    plain = study.score([by_hand(study, PROMPT, ANSWER)], wf.EKFAC())
    values = plain.values[0].double()
    ends = [values.topk(3, largest=largest) for largest in (True, False)]
    for end, each in zip(ends, (found.supporting, found.opposing), strict=True):
        expected = [(int(train), float(score)) for score, train in zip(*end, strict=True)]
        assert [(hit.train, hit.score) for hit in each] == [
            hit for hit in expected if (hit[1] > 0) == (each is found.supporting)
        ]
    assert found.in_nats
    tokens = len(study.tokenizer(ANSWER)["input_ids"])
    assert found.read.factor == pytest.approx(1 / len(TEXTS) / tokens)
    assert (found.scored, found.of) == (6, 6)


def test_tokens_add_up_to_scores_and_spell_the_text(study: wf.PretrainedStudy) -> None:
    asker = Asker(study)
    other = asker.writer.question(PROMPT, OTHER)
    for contrast in (None, other):
        found = asker.attribute(asker.writer.question(PROMPT, ANSWER), contrast=contrast, k=6)
        for each in (*found.supporting, *found.opposing):
            assert "".join(text for text, _ in each.tokens) == TEXTS[each.train] == each.passage.text
            assert sum(part for _, part in each.tokens) == pytest.approx(each.score, rel=1e-3, abs=1e-3)


def test_a_contrast_is_the_difference_of_summed_losses(study: wf.PretrainedStudy) -> None:
    asker = Asker(study)
    question, other = (asker.writer.question(PROMPT, answer) for answer in (ANSWER, OTHER))
    found = asker.attribute(question, contrast=other, k=6)
    mine, its = study.score([by_hand(study, PROMPT, each) for each in (ANSWER, OTHER)], wf.EKFAC()).values.double()
    scores = {each.train: each.score for each in (*found.supporting, *found.opposing)}
    assert scores == {train: float(value) for train, value in enumerate(mine - its) if value}
    assert found.read.factor == pytest.approx(1 / len(TEXTS))
    assert found.read.heading == "Rise, nats"
    swapped = asker.attribute(other, contrast=question, k=6)
    assert [each.train for each in swapped.supporting] == [each.train for each in found.opposing]


def test_with_an_index_candidates_have_the_same_scores(study: wf.PretrainedStudy, folder: Path) -> None:
    asker = Asker(study)
    exact = asker.attribute(asker.writer.question(PROMPT, ANSWER), k=6)
    indexed = Asker(
        wf.study_from_pretrained(folder, TEXTS, run=folder.parent / "indexed", device="cpu", end_token=False)
    )
    assert not indexed.has_index
    indexed.study.index(wf.EKFAC(), wf.Sketch(numbers=256, chunk=4))
    assert not indexed.has_index  # of chunks, whose scores are not those of examples
    indexed.study.index(wf.EKFAC(), wf.Sketch(numbers=128, bits=8, focus=0.5, seed=3))
    indexed.study.index(wf.EKFAC(), wf.Sketch(numbers=64))
    assert indexed.has_index
    assert not indexed.by(wf.KFAC()).has_index  # whose scores are others
    indexes = sorted(each.name for each in (indexed.study.path / "index").iterdir() if each.is_dir())
    found = indexed.attribute(indexed.writer.question(PROMPT, ANSWER), k=1, candidates=1)
    assert found.scored < found.of == 6
    expected = {each.train: each.score for each in (*exact.supporting, *exact.opposing)}
    for each in (*found.supporting, *found.opposing):
        assert each.score == pytest.approx(expected[each.train], rel=1e-4)
    assert sorted(each.name for each in (indexed.study.path / "index").iterdir() if each.is_dir()) == indexes
    assert indexed._sketch() == wf.Sketch(numbers=128, bits=8, focus=0.5, seed=3)
    everything = indexed.attribute(indexed.writer.question(PROMPT, ANSWER), k=1, candidates=1, group="text")
    assert everything.scored == 6
    assert everything.groups is not None
    assert {each.group: each.sum for each in everything.groups} == pytest.approx(
        {TEXTS[train]: score for train, score in expected.items()}, rel=1e-4
    )


def test_a_span_is_the_tokens_that_it_touches(study: wf.PretrainedStudy) -> None:
    writer = Writer(study)
    whole = writer.question("die", " Stra\xdfe zum \U0001f30a See, dem See")
    assert whole.answer == " Stra\xdfe zum \U0001f30a See, dem See"
    wave = whole.of("\U0001f30a")
    assert len(wave.chosen) == 4  # a byte each
    assert counted(study, wave) == "\U0001f30a"
    sharp = whole.of("a\xdfe")
    assert counted(study, sharp) == "a\xdfe"
    start, stop = sharp.span
    assert whole.answer[start:stop] == "a\xdfe"
    assert whole.of(whole.span).example == whole.example
    part = writer.question("die", " Katze, the Katze", "he")
    assert counted(study, part) == "the"  # one token
    with pytest.raises(InputError, match=r"in the answer 2 times, at the characters 14 .*, 23 "):
        whole.of("See")
    with pytest.raises(InputError, match="span='Meer' is not in the answer: expected a part of ' Stra\xdfe"):
        whole.of("Meer")
    for wrong in ((3, 3), (-1, 2), (0, 99), ""):
        with pytest.raises(InputError, match="span="):
            whole.of(wrong)


def test_the_model_writes_what_is_likeliest(study: wf.PretrainedStudy) -> None:
    seen: list[str] = []
    question = Writer(study).write(PROMPT, max_new_tokens=5, on_text=seen.append)
    ids = study.tokenizer(PROMPT)["input_ids"]
    for _ in range(5):
        ids.append(int(study.model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert list(question.input_ids) == ids[: len(question.input_ids)]
    assert len(seen) == 5
    assert question.answer.startswith(seen[0])
    drawn = [Writer(study).write(PROMPT, temperature=1.0, seed=seed, max_new_tokens=8).answer for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]

    def stop(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Writer(study).write(PROMPT, on_text=stop)
    with pytest.raises(InputError, match="the model takes 256"):
        Writer(study).write("word " * 90)
    with pytest.raises(InputError, match="answer=' ': expected a text"):
        Writer(study).question(PROMPT, " ")


def test_an_answer_does_not_run_into_its_prompt(study: wf.PretrainedStudy) -> None:
    writer = Writer(study)
    assert writer.question(PROMPT, "after it").answer == " after it"
    assert writer.question(PROMPT + " ", "after it").answer == "after it"
    assert writer.question(PROMPT, ", it did").answer == ", it did"


def test_questions_have_the_format_of_the_training_examples(folder: Path) -> None:
    def labelled(train: list[Any]) -> tuple[Question, str]:
        made = wf.study_from_pretrained(folder, train, run=folder.parent / "formats", device="cpu")
        question = Writer(made).question("what ran?", "a dog")
        return question, str(made.tokenizer.decode(question.example["input_ids"]))

    turns = [{"role": "user", "content": "who sat?"}, {"role": "assistant", "content": "the cat"}]
    question, said = labelled([{"messages": turns}] * 2)
    assert said == "<user>what ran?<|end|>\n<assistant>a dog"
    assert question.answer == "a dog"
    assert labelled([{"prompt": turns[:1], "completion": turns[1:]}] * 2)[1] == said
    question, said = labelled([{"question": "who sat?", "answer": "the cat"}] * 2)
    assert said == "Question: what ran?\nAnswer: a dog"
    assert question.answer == " a dog"
    question, said = labelled([{"instruction": "who sat?", "output": "the cat"}] * 2)
    assert said.endswith("### Instruction:\nwhat ran?\n\n### Response:a dog")
    chat = wf.study_from_pretrained(folder, [{"messages": turns}] * 2, run=folder.parent / "formats", device="cpu")
    written = Writer(chat).write("what ran?", max_new_tokens=3)
    said = str(chat.tokenizer.decode(list(written.input_ids)))
    assert said.startswith("<user>what ran?<|end|>\n<assistant>")


def test_an_encoder_decoder_is_asked_too(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", encoder_decoder=True)
    train = [{"prompt": text[:9], "completion": text[9:]} for text in TEXTS]
    study = wf.study_from_pretrained(model, train, device="cpu")
    asker = Asker(study)
    found = asker.attribute(asker.writer.question("a dog", "ran after"), k=6)
    tokenizer = study.tokenizer
    plain = study.score([{"input_ids": tokenizer("a dog")["input_ids"], "labels": tokenizer("ran after")["input_ids"]}])
    scores = {each.train: each.score for each in (*found.supporting, *found.opposing)}
    assert scores == {train: float(value) for train, value in enumerate(plain.values[0]) if value}
    assert asker.writer.write("a dog", max_new_tokens=4).answer
    assert counted(study, asker.writer.question("a dog", "ran after", "after")) == "after"


def test_long_runs_of_words_are_overlaps() -> None:
    text, other = "It is said: THE cat, sat on the mat -- then left.", "the cat sat on the mat then"
    assert [text[start:stop] for start, stop in overlaps(text, other)] == ["THE cat, sat on the mat -- then"]
    assert overlaps(text, "the cat sat on") == []
    twice = "one two three four five six, x, two three four five six"
    found = overlaps(twice, "one two three four five six")
    assert [twice[start:stop] for start, stop in found] == ["one two three four five six", "two three four five six"]


def printed(shown: Any) -> str:
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system="truecolor")
    console.print(shown)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_the_terminal_does_not_obey_texts(folder: Path) -> None:
    hostile = "the \x1b]0;gone\x07 [bold]cat[/bold] \x1b[2J sat \u202e on \x9b5m the mat " * 30
    study = wf.study_from_pretrained(
        folder, [{"text": hostile, "title": "\x1b[31m", "label": "\x07"}] * 2, run=folder.parent / "hostile",
        device="cpu", max_length=90,
    )  # fmt: skip
    asker = Asker(study)
    shown = printed(asker.attribute(asker.writer.question("\x1b[5m", " the \x1b[2J cat"), k=2).shown())
    assert not {each for each in shown if ord(each) < 32 or 127 <= ord(each) < 160} - {"\x1b", "\n"}
    assert "\x1b[2J" not in shown
    assert "\x1b]" not in shown
    assert "[bold]cat[/bold]" in re.sub(r"\x1b\[[0-9;]*m", "", shown)


@pytest.fixture
def command(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, str]]:
    monkeypatch.chdir(folder.parent)

    def run(*arguments: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["wherefrom", *arguments])
        try:
            main()
        except SystemExit as left:
            assert left.code in (None, 0, 1)
        said = capsys.readouterr()
        return said.out, " ".join(said.err.split())

    return run


FOUND = {"rank": int, "train": int, "score": float, "text": str, "answer_start": int, "overlaps": list}


def test_the_command(command: Callable[..., tuple[str, str]], folder: Path) -> None:
    (folder.parent / "a.txt").write_text("\n\n".join(TEXTS[:3]))
    (folder.parent / "b.txt").write_text("\n\n".join(TEXTS[3:]))
    command("fit", "asked", "--model", "model", "--train", "a.txt", "b.txt", "--device", "cpu")
    options = ("ask", "asked", PROMPT, "--answer", ANSWER, "--k", "2", "--device", "cpu")
    out, _ = command(*options, "--group", "source")
    assert "Training on these made it likelier" in out
    assert "By shared words (BM25)" in out
    assert re.search(r"Sum: rise, ┃ +┃\n┃ Source ┃ Examples ┃ nats a token ┃ +Mean ┃", out)
    assert "6 of 6 examples were scored exactly, by ekfac, damping 0.1 x mean eigenvalue." in " ".join(out.split())
    written, _ = command(*options, "--json", "--contrast", OTHER, "--group", "source")
    found = json.loads(written)
    assert found["answer"] == ANSWER
    assert found["contrast"] == OTHER
    assert found["unit"] == "Rise, nats"
    assert found["span"] == {"start": 0, "stop": len(ANSWER), "text": ANSWER}
    assert [{type(each[name]) for each in found["supporting"]} for name in FOUND] == [{kind} for kind in FOUND.values()]
    for each in (*found["supporting"], *found["opposing"]):
        assert each["rise"] == pytest.approx(each["score"] / len(TEXTS))
        assert each["text"] == "".join(token["text"] for token in each["tokens"])
        assert each["source"] in ("a", "b")
    assert {each["train"] for each in found["bm25"]} <= set(range(6))
    assert {each["group"]: each["examples"] for each in found["groups"]} == {"a": 3, "b": 3}
    out, _ = command("ask", "asked", PROMPT, "--json", "--device", "cpu", "--max-new-tokens", "3", "dot")
    assert json.loads(out)["unit"] is None
    for wrong, message in (
        (("--span", "nowhere"), "--span nowhere is not in the answer"),
        (("--group", "topic"), "--group topic: the training examples have the columns"),
        (("--candidates", "1"), "--candidates 1: expected at least the 2 that are shown"),
    ):
        out, err = command(*options, *wrong)
        assert not out
        assert "error:" in err
        assert message.split(":")[0].replace("'", "") in err.replace("'", "")


def test_progress_can_be_watched_and_stopped(folder: Path) -> None:
    study = wf.study_from_pretrained(folder, TEXTS, run=folder.parent / "watched", device="cpu")
    seen: list[tuple[str, int, int]] = []
    with watched(lambda *each: seen.append(each)):
        study.score(study.prepare(TEXTS[:1]), wf.Dot(), execution=wf.Execution(train_batch_size=4))
    assert ("pairwise scores", 6, 6) in seen

    def stop(name: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), watched(stop):
        study.score(study.prepare(TEXTS[1:2]), wf.Dot())
    assert len(study.score(study.prepare(TEXTS[1:2]), wf.Dot()).values) == 1
