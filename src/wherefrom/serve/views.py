"""What the page shows of a run, as values that JSON has: answers and what is behind them, finished scores, examples.

Texts stay texts. This module knows runs and what people ask of them; it must not know requests, or how a page looks.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from wherefrom.hf.pretrained import PretrainedStudy
from wherefrom.jobs.asking import Asker
from wherefrom.jobs.filtering import filtered, positions_of_each
from wherefrom.jobs.questions import Question
from wherefrom.jobs.sources import SOURCES, RunSources, token_scores_of
from wherefrom.methods import METHODS
from wherefrom.methods.baselines import BM25
from wherefrom.methods.factored import EKFAC, KFAC, Cosine, Diagonal, Dot, Factored
from wherefrom.methods.method import Method
from wherefrom.report.attribution import Found
from wherefrom.report.passages import DatasetPassages, DatasetTokens, Passages, checked_passages, excerpt
from wherefrom.report.reading import Reading, computed_by, reading
from wherefrom.runtime.errors import InputError, check_argument
from wherefrom.scoring.results import Result, Scores, extremes, load_scores
from wherefrom.serve.judgements import Judgements
from wherefrom.serve.work import Tell
from wherefrom.store.files import checked_name, within
from wherefrom.store.fingerprint import QUERIES, TRAIN, check_about
from wherefrom.store.names import finished

Shown = dict[str, Any]

# What can be asked without anything but the run, and in which words.
OFFERED: Mapping[str, str] = {
    EKFAC.name: "EK-FAC influence",
    KFAC.name: "KFAC influence",
    Diagonal.name: "Diagonal influence",
    Dot.name: "Gradient dot product",
    Cosine.name: "Gradient cosine",
    BM25.name: "Shared words (BM25)",
}
LONGEST_TEXT, MOST_TOKENS, MOST_SHOWN = 50_000, 512, 50
_REMEMBERED = 32  # answers, with the tokens that the model wrote
_PATIENCE = 2.0  # seconds that one look through the training examples may take
_EXCERPT = 200
_MOST_GROUPS = 24  # as many of the highest and the lowest sums


class RunViews:
    """A run as the page sees it. Jobs on the model are `answer` and `attribute`; the rest only reads.

    Args:
        sources: what the run was made from.
        study: of the run, with its model.
        read_only: whether nothing may be judged.
    """

    def __init__(self, sources: RunSources, study: PretrainedStudy, *, read_only: bool = False) -> None:
        self._sources, self._study, self.read_only = sources, study, read_only
        self._first = Asker(study, self._method(EKFAC.name))
        self._train = self._first.passages
        self.judgements = Judgements(study.path, self._train.digest, len(self._train))
        self._answers: OrderedDict[tuple[str, str], Question] = OrderedDict()
        self._opening = threading.Lock()
        self._opened = lru_cache(4)(self._open)

    def run(self) -> Shown:
        """The run, and what can be asked of it."""
        names = self._study.pretrained.train
        columns = names[0] if isinstance(names[0], Mapping) else {}
        return {
            "name": self._study.path.resolve().name,
            "model": self._sources.model,
            "train": len(self._train),
            "index": self._first.has_index,
            "methods": [{"name": name, "words": words} for name, words in OFFERED.items()],
            "groupings": self._study.pretrained.groupings,
            "sources": sorted(set(self._train.sources())) if "source" in columns else [],
            "limits": {"text": LONGEST_TEXT, "tokens": MOST_TOKENS},
            "files": self._files(),
            "read_only": self.read_only,
        }

    # Jobs

    def answer(
        self, tell: Tell, prompt: str, answer: str | None, most_tokens: int, temperature: float, seed: int
    ) -> None:
        """Write an answer to a prompt, or take the one that is given; tells it as it grows, then its tokens."""
        check_argument(1 <= most_tokens <= MOST_TOKENS, "max_new_tokens", most_tokens, f"1 to {MOST_TOKENS}")
        if answer is None:
            question = self._first.writer.write(
                prompt,
                max_new_tokens=most_tokens,
                temperature=temperature,
                seed=seed,
                on_text=lambda text: tell("text", {"text": text}),
            )
        else:
            question = self._question(prompt, answer)
        self._remember(question)
        tell("answered", {"prompt": question.prompt, "answer": question.answer, "pieces": list(question.pieces)})

    def attribute(
        self,
        tell: Tell,
        prompt: str,
        answer: str,
        span: tuple[int, int] | None,
        contrast: str | None,
        method: str,
        group: str | None,
        k: int,
    ) -> None:
        """Tell the training examples that share an answer's words, and then those that are behind it.

        Args:
            contrast: another answer, whose scores are subtracted.
            group: a column that scores are added up by.
        """
        check_argument(method in OFFERED, "method", method, f"one of {', '.join(OFFERED)}")
        check_argument(1 <= k <= MOST_SHOWN, "k", k, f"1 to {MOST_SHOWN}")
        question = self._question(prompt, answer)
        self._remember(question)
        if span is not None:
            question = question.of(span)
        other = None if contrast is None else self._question(prompt, contrast)
        candidates = max(100, k)
        shared = self._first.sharing_words(question, k=k, candidates=candidates)
        words = [self._found(each, None) for each in shared or ()]
        tell("shared", {"hits": None if shared is None else words, "pieces": list(question.pieces)})
        asker = self._first.by(self._method(method))
        found = asker.attribute(
            question, contrast=other, k=k, candidates=candidates, group=group, shared_words=asker.has_index
        )
        groups = found.groups or ()
        ends = groups if len(groups) <= _MOST_GROUPS else (*groups[: _MOST_GROUPS // 2], *groups[-_MOST_GROUPS // 2 :])
        tell("found", {
            "span": list(found.span),
            "contrast": found.contrast,
            "method": OFFERED[method],
            "computed_by": found.computed_by,
            "heading": found.read.heading,
            "meaning": found.read.meaning,
            "supporting": [self._found(each, found.read) for each in found.supporting],
            "opposing": [self._found(each, found.read) for each in found.opposing],
            "groups": [[each.group, each.train, found.read(each.sum), found.read(each.mean)] for each in ends],
            "of_groups": len(groups),
            "scored": found.scored,
            "of": found.of,
        })  # fmt: skip

    # Finished scores

    def scores(self) -> Shown:
        """The finished scores of the run, the latest first; those that do not know their queries are counted."""
        there = finished(within(self._study.path, "scores"))
        known = [each for each in there if (each / SOURCES).exists()]
        known.sort(key=lambda each: (each / SOURCES).stat().st_mtime_ns, reverse=True)
        return {"scores": [each.name for each in known], "others": len(there) - len(known)}

    def result(self, name: str) -> Shown:
        """The queries of finished scores."""
        scores, queries, _ = self._opened(checked_name(name))
        whole = isinstance(scores, Scores)
        return {
            "name": name,
            "method": scores.method,
            "computed_by": computed_by(scores),
            "stored": "all scores" if whole else f"the {scores.values.shape[1]} highest and lowest of each query",
            "facts": dict(scores.fingerprint),
            "queries": [_brief(queries, query) for query in range(len(queries))],
        }

    def hits(self, name: str, query: int, k: int) -> Shown:
        """The training examples of the highest and lowest scores of a query."""
        scores, queries, tokens = self._opened(checked_name(name))
        check_argument(0 <= query < len(queries), "query", query, f"0 to {len(queries) - 1}")
        check_argument(1 <= k <= MOST_SHOWN, "k", k, f"1 to {MOST_SHOWN}")
        read = reading(scores, query)
        if isinstance(scores, Scores):
            values = scores.values[query : query + 1].to("cpu", torch.float64)
            ends = extremes(values, torch.arange(values.shape[1]), k)
        else:
            fields = ("values", "train", "lowest_values", "lowest_train")
            ends = {field: getattr(scores, field)[query : query + 1, :k] for field in fields}
        highest, lowest = (
            zip(ends[f"{end}train"][0].tolist(), ends[f"{end}values"][0].tolist(), strict=True)
            for end in ("", "lowest_")
        )
        return {
            "query": _passage(queries, query),
            "heading": read.heading,
            "meaning": read.meaning,
            "supporting": self._listed(query, [each for each in highest if each[1] > 0], read, tokens),
            "opposing": self._listed(query, [each for each in lowest if each[1] < 0], read, tokens),
        }

    # Training examples

    def examples(self, words: str, source: str, verdict: str, start: int, count: int = 25) -> Shown:
        """Training examples that have all words, come from a source and were judged so, from a position on.

        It looks for as many, for a while; `next` says where to go on, and is null at the end.
        """
        terms, judged = words.casefold().split(), self.judgements.read()
        end, until = len(self._train), time.monotonic() + _PATIENCE
        found: list[Shown] = []
        position = max(0, start)
        while position < end and len(found) < count and time.monotonic() < until:
            said = judged.get(position)
            if not verdict or (said is not None and verdict in (said.verdict, "any")):
                passage = self._train[position]
                text = f"{passage.title}\n{passage.label}\n{passage.text}".casefold()
                if (not source or passage.source == source) and all(term in text for term in terms):
                    found.append(_passage(self._train, position))
            position += 1
        return {"examples": found, "next": position if position < end else None, "of": end}

    def example(self, train: int) -> Shown:
        """One of them."""
        check_argument(0 <= train < len(self._train), "train", train, f"0 to {len(self._train) - 1}")
        return _passage(self._train, train)

    def filtered(self, number: int) -> tuple[str, bytes]:
        """One of the run's training files without the examples that were judged to be dropped.

        Raises:
            InputError: examples are not what is in the file, or it has changed; or there is no such file.
        """
        files = self._files()
        if not files:
            raise InputError(
                "The training text was joined and cut into blocks, which are no part of its file: export the "
                "judgements."
            )
        check_argument(0 <= number < len(files), "file", number, f"0 to {len(files) - 1}")
        sources = self._sources.train.read()
        if sum(len(each.examples) for each in sources) != len(self._train):
            raise InputError(f"{self._sources.train}: has changed since the server was started; start it again.")
        dropped = {each.train for each in self.judgements.read().values() if each.verdict == "drop"}
        remaining = set(range(len(self._train))) - dropped
        return filtered(sources[number], files[number], positions_of_each(sources, remaining)[number])

    def _files(self) -> list[str]:
        """Where training examples come from, one by one; none where they are blocks of joined texts."""
        return list(self._sources.train.names) if self._sources.train.preparation.unit == "documents" else []

    def _method(self, name: str) -> Method:
        kind = METHODS[name]
        if issubclass(kind, Factored):
            return kind(empirical=self._sources.empirical, seed=self._sources.seed)
        return kind()

    def _question(self, prompt: str, answer: str) -> Question:
        # The tokens that the model wrote are not always those that a tokenizer would make of the text.
        return self._answers.get((prompt, answer)) or self._first.writer.question(prompt, answer)

    def _remember(self, question: Question) -> None:
        self._answers[question.prompt, question.answer] = question
        self._answers.move_to_end((question.prompt, question.answer))
        while len(self._answers) > _REMEMBERED:
            self._answers.popitem(last=False)

    def _open(self, name: str) -> tuple[Result, Passages, DatasetTokens | None]:
        """Scores, their queries and tokens' parts where these are stored, of the training examples of the run now."""
        with self._opening:
            folder = within(self._study.path, "scores", name)
            scores = load_scores(folder)
            sources = RunSources.of_result(folder, self._sources.loading.trust_remote_code)
            assert sources.queries is not None
            pretrained = sources.pretrained()  # with a tokenizer of its own: a job may use the study's
            queried = pretrained.prepare(sources.queries.names[0], sources.queries.split, sources.queries.preparation)
            texts = DatasetPassages(queried, pretrained.tokenizer)
            about = {QUERIES: texts.digest, TRAIN: self._train.digest}
            check_about(scores.fingerprint, about, "Texts have changed since they were scored: score again.")
            queries, parts = checked_passages(scores, texts, self._train), token_scores_of(folder, scores)
            if parts is None or pretrained.tokenizer is None:
                return scores, queries, None
            return scores, queries, DatasetTokens(parts, self._train.dataset, pretrained.tokenizer)

    def _listed(
        self, query: int, end: Sequence[tuple[int, float]], read: Reading, tokens: DatasetTokens | None
    ) -> list[Shown]:
        found = []
        for rank, (train, score) in enumerate(end, start=1):
            parts = (tokens and tokens(query, train)) or ()
            found.append(self._found(Found.of(rank, train, score, self._train[train], parts), read))
        return found

    def _found(self, found: Found, read: Reading | None) -> Shown:
        """A training example behind a query; without a reading its score is no more than an order."""
        factor = 1.0 if read is None else read.factor
        return {
            "rank": found.rank,
            "train": found.train,
            "raw": found.score,
            "shown": "" if read is None else read(found.score),
            "title": found.passage.title,
            "label": found.passage.label,
            "source": found.passage.source,
            "text": found.passage.text,
            "excerpt": excerpt(found.passage.text, _EXCERPT, found.passage.answer_start),
            "tokens": [[text, factor * part] for text, part in found.tokens],
            "overlaps": [list(each) for each in found.overlaps],
        }


def _passage(passages: Passages, position: int) -> Shown:
    found = passages[position]
    return {
        "train": position,
        "title": found.title,
        "label": found.label,
        "source": found.source,
        "text": found.text,
        "excerpt": excerpt(found.text, _EXCERPT, found.answer_start),
    }


def _brief(passages: Passages, position: int) -> Shown:
    found = passages[position]
    return {"title": found.title, "excerpt": excerpt(found.text, 100, found.answer_start)}
