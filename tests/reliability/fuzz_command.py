"""The command under wrong arguments: every subcommand, in this process, on a tiny model and a shelf of bad files.

A command may do its work, say in one `error:` line what is wrong, or be refused by the parser of arguments. It may not
end in any other exception, leave a file half written, or touch what an earlier command has finished.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from unittest.mock import patch

import datasets
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tests.reliability.command_lines import BAD_TEXTS, TEXTS, command_lines, drawn_files
from tests.reliability.drawing import drawn
from tests.reliability.outcomes import Outcome
from wherefrom.cli.main import main
from wherefrom.scoring.results import load_scores

WORDS = sorted({word for text in TEXTS for word in text.split()})


def measure(folder: Path, count: int, number: int) -> list[Outcome]:
    """Run `count` command lines drawn from the seed `number`."""
    shelf = Shelf(folder)
    ends: Counter[int | str] = Counter()

    @drawn(count, number)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        files, arguments = data.draw(drawn_files(), "files"), data.draw(command_lines(), "arguments")
        ends[shelf.run(arguments, files)] += 1

    run()
    done, refused, parsed = ends[0], ends[1], ends[2]
    return [
        Outcome(
            "command lines of all subcommands with wrong values and files",
            sum(ends.values()),
            f"{done} did their work, {refused} ended with one line that names the error, {parsed} were refused by the "
            "parser of arguments; no traceback, no file left half written, earlier results untouched.",
        )
    ]


# What stands on the shelf


class Shelf:
    """A directory of models, texts and a finished run, and a place beside them where each command runs."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "outer" / "inner"
        self.case, self.finished = self.root / "case", folder / "finished"
        datasets.config.HF_DATASETS_CACHE = folder / "cache"
        for parent in (self.root / "texts", self.case):
            parent.mkdir(parents=True)
        for name, content in BAD_TEXTS.items():
            (self.root / "texts" / name).write_bytes(content)
        datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(str(self.root / "texts" / "good.parquet"))
        datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(self.root / "texts" / "saved"))
        datasets.Dataset.from_dict({"text": [[1], [2]]}).to_parquet(str(self.root / "texts" / "lists.parquet"))
        _write_models(self.root)
        self._kept = {each for parent in (self.root, self.root.parent) for each in parent.iterdir()}
        self._make_run()

    def _make_run(self) -> None:
        """A run with factors and scores, which most commands start from."""
        fit = ["fit", "run", "--model", "../model", "--train", "../texts/good.txt", "--max-length", "12"]
        score = ["score", "run", "--queries", "../texts/good.jsonl", "--tokens", "1"]
        for arguments in (fit, [*score], [*score[:-2], "--top-only", "2"]):
            status, said = self._called(arguments)
            assert status == 0, said
        self.case.rename(self.finished)

    def run(self, arguments: list[str], files: Mapping[str, bytes]) -> int:
        """The exit status of a command line that ended as it should."""
        # A command that goes wrong must not be able to write outside of the shelf.
        assert not [each for each in arguments if each.startswith("/") or "../../.." in each]
        shutil.rmtree(self.case, ignore_errors=True)
        shutil.copytree(self.finished, self.case)
        for name, content in files.items():
            (self.case / name).write_bytes(content)
        before = _contents(self.case)
        status, said = self._called(arguments)
        after = _contents(self.case)
        errors = sum(line.startswith("error: ") for line in said.splitlines())
        assert "Traceback" not in said, said
        assert status in (0, 1, 2), f"status {status}: {said}"
        assert errors == (status == 1), said
        assert not [name for name in after if ".part" in Path(name).suffixes], after.keys()
        if status and "--overwrite" not in arguments:
            changed = {name for name, content in before.items() if after.get(name) != content}
            assert not changed, changed
        if status == 0 and arguments[0] == "score" and "--explain" not in arguments:
            self._check_scores()
        for parent in (self.root, self.root.parent):
            for each in set(parent.iterdir()) - self._kept:
                shutil.rmtree(each) if each.is_dir() else each.unlink()
        return status

    def _check_scores(self) -> None:
        for manifest in (self.case / "run" / "scores").glob("*/manifest.json"):
            if "tokens" not in manifest.parent.name:
                assert bool(load_scores(manifest.parent).values.isfinite().all())

    def _called(self, arguments: list[str]) -> tuple[int, str]:
        """Exit status, and what was printed on the standard output and error."""
        self.case.mkdir(exist_ok=True)
        with _streams() as said, _inside(self.case), patch.object(sys, "argv", ["wherefrom", *arguments]):
            try:
                main()
                status = 0
            except SystemExit as stop:
                assert stop.code is None or isinstance(stop.code, int), stop.code
                status = stop.code or 0
        return status, said()


@contextlib.contextmanager
def _streams() -> Iterator[Callable[[], str]]:
    """Standard output and error as a terminal in UTF-8 has them: not every string can be written to them."""
    output = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    error = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")

    def said() -> str:
        for stream in (output, error):
            stream.flush()
        return b"".join(stream.buffer.getvalue() for stream in (output, error)).decode()

    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
        yield said


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _write_models(root: Path) -> None:
    """A good model, and what else may be found under a model's name."""
    vocabulary = {word: place for place, word in enumerate(["<unk>", *WORDS])}
    _write_model(root / "model", vocabulary, len(vocabulary))
    _write_model(root / "narrow", vocabulary, len(vocabulary) - 6)
    _write_model(root / "spoilt", vocabulary, len(vocabulary), spoilt=True)
    for name in ("config", "listed", "unknown", "weights", "cut", "tokens", "words", "other", "negative"):
        shutil.copytree(root / "model", root / name)
    (root / "config" / "config.json").write_text('{"model_type": ')
    (root / "listed" / "config.json").write_text("[]")
    (root / "unknown" / "config.json").write_text('{"model_type": "no-such-model"}')
    (root / "weights" / "model.safetensors").unlink()
    content = (root / "cut" / "model.safetensors").read_bytes()
    (root / "cut" / "model.safetensors").write_bytes(content[: len(content) // 2])
    (root / "tokens" / "tokenizer.json").write_text("{}")
    for each in (root / "words").glob("tokenizer*"):
        each.unlink()
    config = json.loads((root / "model" / "config.json").read_text())
    (root / "other" / "config.json").write_text(json.dumps({**config, "n_embd": 12}))
    (root / "negative" / "config.json").write_text(json.dumps({**config, "n_layer": -1, "vocab_size": "many"}))
    shutil.copytree(root / "model", root / "bert")
    bert = BertConfig(
        vocab_size=len(vocabulary), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    BertForMaskedLM(bert).save_pretrained(root / "bert")


def _write_model(path: Path, vocabulary: Mapping[str, int], size: int, spoilt: bool = False) -> None:
    tokenizer = Tokenizer(models.WordLevel(dict(vocabulary), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(path)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=size, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    if spoilt:
        with torch.no_grad():
            model.transformer.wte.weight[1] = float("nan")
    model.save_pretrained(path)
