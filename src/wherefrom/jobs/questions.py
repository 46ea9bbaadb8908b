"""Questions: a prompt and an answer as the tokens that a run's model was trained on, of which the answer's are counted.

A model writes the answer, or it is given. This module knows tokenizers and models that write; it knows no scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from wherefrom.hf.encoding import Encoder
from wherefrom.hf.formats import Chat, readable
from wherefrom.hf.pretrained import PretrainedStudy
from wherefrom.report.passages import token_pieces
from wherefrom.runtime.errors import InputError, check_argument, first_line, require
from wherefrom.runtime.placement import execution_device
from wherefrom.tasks.losses import IGNORED

Span = str | tuple[int, int]
"""A phrase that stands once in an answer, or where it begins and ends, in characters."""


@dataclass(frozen=True)
class Question:
    """A prompt and an answer, of which some tokens are attributed.

    Attributes:
        prompt: as it was asked.
        pieces: the answer, cut into its tokens; a character of several tokens stands with the last of them.
        chosen: the tokens that are attributed, positions in `pieces`.
        input_ids: what the model reads.
        answer_ids: of the pieces; of a causal model they stand at the end of `input_ids`.
        encoder_decoder: whether the model reads the prompt alone, and writes the answer elsewhere.
        shown: the columns `text` and `answer_start`, for readers.
    """

    prompt: str
    pieces: Sequence[str]
    chosen: range
    input_ids: Sequence[int]
    answer_ids: Sequence[int]
    encoder_decoder: bool
    shown: dict[str, Any]

    @property
    def answer(self) -> str:
        """Its text, as its tokens have it."""
        return "".join(self.pieces)

    @property
    def span(self) -> tuple[int, int]:
        """Where in the answer what is attributed begins and ends, in characters; whole tokens."""
        ends = [0, *accumulate(map(len, self.pieces))]
        return ends[self.chosen.start], ends[self.chosen.stop]

    @property
    def example(self) -> dict[str, Any]:
        """What a study scores: `input_ids`, and `labels` that are -100 but for what is attributed."""
        labels = [each if position in self.chosen else IGNORED for position, each in enumerate(self.answer_ids)]
        if not self.encoder_decoder:
            labels = [IGNORED] * (len(self.input_ids) - len(labels)) + labels
        return {"input_ids": list(self.input_ids), "labels": labels, **self.shown}

    def of(self, span: Span) -> Question:
        """The same with another part of the answer: the tokens that a span touches.

        Raises:
            InputError: the phrase is not in the answer, or there more than once; or the span is outside of it.
        """
        start, stop = self._found(span) if isinstance(span, str) else span
        fits = 0 <= start < stop <= len(self.answer)
        check_argument(fits, "span", span, f"a part of the {len(self.answer)} characters of the answer")
        touched = [position for position, (first, last) in enumerate(self._bounds) if first < stop and start < last]
        return replace(self, chosen=range(touched[0], touched[-1] + 1))

    @cached_property
    def _bounds(self) -> list[tuple[int, int]]:
        """The characters of each token; those of a token without text are those of the next that has some."""
        found, end = [], 0
        for piece in self.pieces:
            found.append((end, end + len(piece)))
            end += len(piece)
        for position in range(len(found) - 2, -1, -1):
            if found[position][0] == found[position][1]:
                found[position] = found[position + 1]
        return found

    def _found(self, phrase: str) -> tuple[int, int]:
        found_at = [at for at in range(len(self.answer)) if phrase and self.answer.startswith(phrase, at)]
        if len(found_at) == 1:
            return found_at[0], found_at[0] + len(phrase)
        if not found_at:
            raise InputError(f"span={phrase!r} is not in the answer: expected a part of {self.answer!r}.")
        where = ", ".join(f"{at} (…{self.answer[max(0, at - 12) : at + len(phrase) + 12]!r}…)" for at in found_at)
        raise InputError(
            f"span={phrase!r} is in the answer {len(found_at)} times, at the characters {where}: give more of what "
            "stands around the one that is meant."
        )


class Writer:
    """Makes questions for a study's model, in the format that it was trained on.

    Raises:
        InputError: the model writes no answers, or has no tokenizer.
    """

    def __init__(self, study: PretrainedStudy) -> None:
        self._pretrained, self._model = study.pretrained, study.model
        self._encoder: Encoder = study.pretrained.encoder()
        self._tokenizer = self._encoder.tokenizer

    def question(self, prompt: str, answer: str, span: Span | None = None) -> Question:
        """A prompt with an answer that is given; all of it is attributed unless there is a `span`.

        The answer follows the prompt as it is, with a space between where a letter would touch another one.

        Raises:
            InputError: the answer is empty, both together are too long, or the span is not in it.
        """
        check_argument(bool(answer.strip()), "answer", answer, "a text")
        answer = self._apart(prompt, answer)
        try:
            encoded = self._encoder.encode(self._pretrained.answered(prompt, answer), {}, 0)
        except InputError:
            raise
        except Exception as error:  # whatever tokenizers and chat templates make of texts that are not theirs
            raise InputError(f"prompt={prompt!r}: makes no tokens ({first_line(error)}).") from error
        if self._encoder.target == "seq2seq":
            answer_ids = encoded["labels"]
        else:
            labels = encoded.get("labels", encoded["input_ids"])
            answer_ids = encoded["input_ids"][next(at for at, each in enumerate(labels) if each != IGNORED) :]
        return self._made(prompt, answer, encoded["input_ids"], answer_ids, span)

    def write(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        span: Span | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Question:
        """A prompt with the model's own answer.

        Args:
            max_new_tokens: it stops there, at the end of what the model takes, or where the model ends.
            temperature: 0 takes the likeliest token each time; above, tokens are drawn.
            seed: of drawn tokens.
            on_text: is given the answer as far as it is written, after each token; what it raises stops the writing.

        Raises:
            InputError: the model ends at once, the prompt leaves it no room, or an argument is impossible.
        """
        check_argument(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "at least 1")
        check_argument(0 <= temperature < 100, "temperature", temperature, "0, or a number above it")
        ids = self._prompt_ids(prompt)
        causal, longest = self._encoder.target == "causal", self._pretrained.longest
        longest_answer = max_new_tokens if longest is None or not causal else min(max_new_tokens, longest - len(ids))
        if longest_answer < 1 or (longest is not None and len(ids) > longest):
            raise InputError(
                f"prompt has {len(ids):,} tokens, and the model takes {longest:,} with its answer: shorten it."
            )
        device = execution_device(self._model)
        inputs = torch.tensor([ids], device=device)
        drawn = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        plain = {"temperature": None, "top_k": None, "top_p": None}
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            written: Tensor = self._model.generate(  # type: ignore[operator]
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=longest_answer,
                do_sample=bool(temperature),
                num_beams=1,
                pad_token_id=self._tokenizer.pad_token_id or self._tokenizer.eos_token_id or 0,
                streamer=None if on_text is None else self._streamer(on_text, len(ids) if causal else 1),
                **{**plain, **drawn},
            )
        answer_ids = written[0, len(ids) if causal else 1 :].tolist()
        special = set(self._tokenizer.all_special_ids)
        while answer_ids and answer_ids[-1] in special:
            answer_ids.pop()
        answer = self._encoder.decoded(answer_ids)
        if not answer.strip():
            raise InputError(f"The model ends its answer to {prompt[:80]!r} at once: give an answer to attribute.")
        return self._made(prompt, answer, [*ids, *answer_ids] if causal else ids, answer_ids, span)

    def _made(
        self, prompt: str, answer: str, input_ids: Sequence[int], answer_ids: Sequence[int], span: Span | None
    ) -> Question:
        encoder_decoder, longest = self._encoder.target == "seq2seq", self._pretrained.longest
        if longest is not None and len(input_ids) > longest:
            raise InputError(
                f"prompt and answer have {len(input_ids):,} tokens, and the model takes {longest:,}: shorten them."
            )
        pieces = token_pieces(self._tokenizer, answer_ids if encoder_decoder else input_ids)[-len(answer_ids) :]
        # What the chat template or the tokenizer puts behind an answer is not attributed.
        whole = "".join(pieces)
        end = whole.rfind(answer.strip()) + len(answer.strip()) if answer.strip() in whole else len(whole)
        ends = list(accumulate(map(len, pieces)))
        count = next(position for position, each in enumerate(ends, 1) if each >= end)
        behind = len(pieces) - count
        remaining = input_ids if encoder_decoder or not behind else input_ids[:-behind]
        shown = readable(self._pretrained.answered(prompt, answer))
        found = Question(prompt, pieces[:count], range(count), remaining, answer_ids[:count], encoder_decoder, shown)
        return found if span is None else found.of(span)

    def _apart(self, prompt: str, answer: str) -> str:
        """An answer that does not run into the prompt; a chat template keeps them apart itself."""
        chat = isinstance(self._pretrained.answered(prompt, answer), Chat)
        touching = all(each.isascii() and each.isalnum() for each in (prompt[-1:], answer[:1]))
        return f" {answer}" if touching and not chat and self._encoder.target == "causal" else answer

    def _prompt_ids(self, prompt: str) -> list[int]:
        """What the model reads before it writes."""
        content = self._pretrained.answered(prompt, "")
        if isinstance(content, Chat):
            return self._encoder.chat_ids(content.messages[: content.answer.start], {}, answering=True)
        ids = self._encoder.ids(content.prompt)
        special = set(self._tokenizer.all_special_ids)
        while self._encoder.target == "causal" and len(ids) > 1 and ids[-1] in special and content.prompt:
            ids.pop()  # an end that the tokenizer puts there, which the model would go on from
        if not ids:
            raise InputError(f"prompt={prompt!r} has no token: give a text that the model goes on from.")
        return ids

    def _streamer(self, on_text: Callable[[str], None], skipped: int) -> Any:
        """What `generate` gives its tokens to: those of the prompt first, then one at a time."""
        decode, written = self._encoder.decoded, list[int]()

        class Streamer(require("transformers").generation.streamers.BaseStreamer):  # type: ignore[misc]
            def put(self, value: Tensor) -> None:
                written.extend(value.flatten().tolist())
                if len(written) > skipped:
                    on_text(decode(written[skipped:]))

            def end(self) -> None: ...

        return Streamer()
