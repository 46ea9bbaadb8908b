"""Asking a run where an answer comes from: candidates, exact scores, tokens, shared words.

What `wherefrom ask` prints and a page can show: an `Asker` is made once for a run, and asked again and again. It prints
nothing; what takes long says so in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from copy import copy
from functools import cached_property

import torch
from torch import Tensor

from wherefrom.hf.pretrained import PretrainedStudy
from wherefrom.jobs.questions import Question, Writer
from wherefrom.methods.baselines import BM25, SharedWords
from wherefrom.methods.factored import EKFAC, Factored
from wherefrom.methods.index.sketches import Sketch
from wherefrom.methods.method import Method
from wherefrom.methods.retrieval import TwoStage
from wherefrom.planning.machine import matmul_speed
from wherefrom.report.attribution import Attribution, Found
from wherefrom.report.passages import DatasetPassages, DatasetTokens
from wherefrom.report.reading import Reading, computed_by, contrast_reading, reading
from wherefrom.runtime.errors import InputError, check_argument
from wherefrom.scoring.keep import Tokens, Top
from wherefrom.scoring.results import Result, Scores, TopScores
from wherefrom.store.files import within
from wherefrom.store.names import known_fingerprint

logger = logging.getLogger("wherefrom")

Pieces = Callable[[int], list[tuple[str, float]]]
"""The tokens of the training example at a position, each with its part of the score."""


class Asker:
    """Answers where what a run's model says comes from.

    Args:
        study: of a run, as `RunSources.study` makes it.
        method: whose scores are exact; `EKFAC()` unless given.

    Raises:
        InputError: the model writes no answers, or has no tokenizer.
    """

    def __init__(self, study: PretrainedStudy, method: Method | None = None) -> None:
        self.study, self.method = study, method or EKFAC()
        self.writer = Writer(study)

    def by(self, method: Method) -> Asker:
        """The same with another method; what was read of the training examples is read once for both."""
        other = copy(self)
        other.method = method
        return other

    def attribute(
        self,
        question: Question,
        *,
        contrast: Question | None = None,
        k: int = 5,
        candidates: int = 100,
        group: str | None = None,
        shared_words: bool = True,
    ) -> Attribution:
        """The training examples behind an answer.

        With an index in the run, its `candidates` highest and lowest and BM25's highest are scored exactly, else all
        training examples. Scores lie in the run directory, as any do.

        Args:
            question: what `writer` has made.
            contrast: another answer, whose scores are subtracted: what speaks for the first *and not* for this one.
            k: how many examples of each sign.
            group: a column of the training examples that scores are added up by; then all of them are scored.
            shared_words: also look for the examples that share the answer's words, by BM25.

        Raises:
            InputError: an argument is impossible, or the training examples lack the column.
            WherefromError: see `wherefrom.runtime.errors`; what was finished before stays valid.
        """
        check_argument(k >= 1, "k", k, "at least 1")
        check_argument(candidates >= k, "candidates", candidates, f"at least the {k} that are shown")
        groups = None if group is None else self.study.pretrained.column(group)
        questions = [question] if contrast is None else [question, contrast]
        shared = self._shared(question, candidates) if shared_words else None
        scores = self._scores(questions, candidates, shared, every=groups is not None)
        train, values = _differences(scores)
        read = self._read(scores, question, contrast, values)
        order = values.argsort(descending=True, stable=True)
        highest, lowest = order[values[order] > 0][:k], order.flip(0)[values[order.flip(0)] < 0][:k]
        chosen = [[(int(train[at]), float(values[at])) for at in end] for end in (highest, lowest)]
        pieces = self._pieces(questions, [position for end in chosen for position, _ in end])
        supporting, opposing = (self._found(question, end, pieces) for end in chosen)
        return Attribution(
            prompt=question.prompt,
            answer=question.answer,
            span=question.span,
            contrast=None if contrast is None else contrast.answer,
            method=scores.method,
            computed_by=computed_by(scores),
            read=read,
            in_nats=scores.rise_per_score is not None,
            supporting=supporting,
            opposing=opposing,
            shared=None if shared is None else self._found(question, shared[:k], lambda _: []),
            groups=None if groups is None else Scores(values.unsqueeze(0), {}).by(groups),
            column=group,
            scored=len(train),
            of=len(self.study.train),
        )

    def sharing_words(self, question: Question, *, k: int = 5, candidates: int = 100) -> list[Found] | None:
        """The examples that share words with the prompt and the answer, which take no time to find: those of
        `attribute`; None where BM25 is missing.
        """
        shared = self._shared(question, candidates)
        return None if shared is None else self._found(question, shared[:k], lambda _: [])

    @cached_property
    def passages(self) -> DatasetPassages:
        """The training examples for readers."""
        return DatasetPassages(self.study.train, self.study.tokenizer)

    @cached_property
    def words(self) -> SharedWords:
        """The training examples by their words."""
        return SharedWords(BM25().texts(self.study.train))

    @property
    def has_index(self) -> bool:
        """Whether the run has an index of the method, which names candidates."""
        return self._sketch() is not None

    def _sketch(self) -> Sketch | None:
        """That of the run's indexes of the method; of several, the one of most numbers, on which most depends. None is
        of chunks: their scores are not those of examples.
        """
        folders = within(self.study.path, "index").glob("*")
        shards = (next(each.rglob("manifest.json"), None) for each in folders)  # all of an index are of one sketch
        found = [known_fingerprint(file.parent) for file in shards if file is not None]
        of_method = [Sketch.of(each) for each in found if each and each.get("method") == self.method.name]
        whole = [each for each in of_method if each.chunk is None]
        return max(whole, key=lambda each: (each.numbers, each.bits), default=None)

    def _scores(
        self, questions: Sequence[Question], count: int, shared: Sequence[tuple[int, float]] | None, every: bool
    ) -> Result:
        """Exact scores of all training examples, or of candidates, the same for all questions."""
        queries, total = [each.example for each in questions], len(self.study.train)
        method = self.method
        sketch = None if every else self._sketch()
        if sketch is None or not isinstance(method, Factored) or method.compressed:
            if isinstance(method, Factored):
                every_one = "All" if every else "The run has no index of whole examples, so all"
                logger.info(
                    f"{every_one} {total:,} training examples are scored exactly, in at least "
                    f"{self._seconds(queries):,.1f} s once factors are there."
                )
            return self.study.score(queries, method)
        index = self.study.index(type(method)(empirical=method.empirical, seed=method.seed), sketch)
        best = index.query(queries, min(count, total))
        positions = torch.cat([best.train.flatten(), best.lowest_train.flatten()]).tolist()
        both = torch.tensor(sorted({*positions, *(position for position, _ in shared or ())}))
        logger.info(f"{len(both):,} of {total:,} training examples are candidates, and scored exactly.")
        stages = TwoStage(first=both.expand(len(queries), -1), then=method)
        return self.study.score(queries, stages, keep=Top(len(both)))

    def _seconds(self, queries: list[dict[str, object]]) -> float:
        """The least time that the scores take, the operations of the plan at the speed of a large product."""
        plan = self.study.plan(queries, self.method)
        flop = sum(each.flop for each in plan.stages() if each.name in ("query gradients", "pairwise scores"))
        return flop / matmul_speed(plan.job.device, plan.form.dtype)

    def _read(self, scores: Result, question: Question, contrast: Question | None, values: Tensor) -> Reading:
        if contrast is None:
            return reading(scores)
        if scores.rise_per_score is None:
            return reading(Scores(values.unsqueeze(0), scores.fingerprint))
        return contrast_reading(scores, len(question.chosen))

    def _shared(self, question: Question, count: int) -> list[tuple[int, float]] | None:
        """The examples that share words with the prompt and the answer, the best first; None where BM25 is missing."""
        try:
            values = self.words.scores([f"{question.prompt} {question.answer}"])[0]
        except InputError as error:
            logger.warning(f"Shared words are not looked for: {error}")
            return None
        best = values.topk(min(count, len(values)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [(position, score) for position, score in pairs if score > 0]

    def _pieces(self, questions: Sequence[Question], positions: Sequence[int]) -> Pieces:
        """The tokens of the examples that are shown; none where the method or the model has no scores of tokens."""
        if not (isinstance(self.method, Factored) and positions) or questions[0].encoder_decoder:
            return lambda _: []
        pairs = tuple((query, position) for query in range(len(questions)) for position in positions)
        found = self.study.score([each.example for each in questions], self.method, keep=Tokens(pairs=pairs))
        tokens = DatasetTokens(found, self.study.train, self.study.tokenizer)

        def pieces(position: int) -> list[tuple[str, float]]:
            mine, *others = (tokens(query, position) or () for query in range(len(questions)))
            parts = [part for _, part in mine]
            for other in others:
                parts = [part - its for part, (_, its) in zip(parts, other, strict=True)]
            return [(text, part) for (text, _), part in zip(mine, parts, strict=True)]

        return pieces

    def _found(self, question: Question, chosen: Sequence[tuple[int, float]], pieces: Pieces) -> list[Found]:
        return [
            Found.of(rank, position, score, self.passages[position], pieces(position), question.answer)
            for rank, (position, score) in enumerate(chosen, start=1)
        ]


def _differences(scores: Result) -> tuple[Tensor, Tensor]:
    """Training positions [n], ascending, and the first query's scores, less those of a second if there is one."""
    if isinstance(scores, TopScores):
        order = scores.train.argsort(dim=1)
        train, values = scores.train.gather(1, order)[0], scores.values.gather(1, order)
    else:
        train, values = torch.arange(scores.values.shape[1]), scores.values
    wide = values.to("cpu", torch.float64)
    return train, wide[0] if len(wide) == 1 else wide[0] - wide[1]
