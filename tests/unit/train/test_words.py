"""Words of the mini CLIP: glosses of WordNet, keywords of emoji, and their nearest emoji by the sentence encoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from train.data.images import DataError
from train.mini.captions import Emoji
from train.mini.clip_text import KNOWN, NEAREST, known_names, nearest_names
from train.mini.words import emoji_words, read_wordnet

BOAT = Emoji("26f5", "sailboat", ("boat", "sea"), 5)
TROLL = Emoji("1f9cc", "troll", ("fairy tale", "sea"), 1)


@pytest.fixture
def wordnet(tmp_path: Path) -> Path:
    """A folder with a few words in the format of WordNet's database."""
    data = {
        "noun": [
            "00000001 18 n 01 mouse 0 000 | person who is quietly timid",
            '00000002 05 n 01 mouse 0 000 | any of numerous small rodents; "a field mouse"',
            "00000003 06 n 02 dinghy 0 rowing_boat 0 000 | a small boat",
            "00000004 05 n 01 Mus 0 000 | a genus of mice",
        ],
        "verb": ["00000005 38 v 01 mouse 0 000 | go stealthily", "00000006 38 v 01 sail 0 000 | travel on water"],
        "adj": ["00000007 00 a 01 tiny 0 000 | very small"],
    }
    index = {
        "noun": [
            "mouse n 2 1 @ 2 1 00000001 00000002",
            "dinghy n 1 1 @ 1 0 00000003",
            "rowing_boat n 1 1 @ 1 0 00000003",
            "mus n 1 1 @ 1 0 00000004",
        ],
        "verb": ["mouse v 1 1 @ 1 0 00000005", "sail v 1 1 @ 1 0 00000006"],
        "adj": ["tiny a 1 0 1 0 00000007"],
    }
    for name, parts in (("data", data), ("index", index)):
        for part, lines in parts.items():
            (tmp_path / f"{name}.{part}").write_text("  1 the licence\n" + "".join(f"{line}  \n" for line in lines))
    return tmp_path


def test_lemma_gets_the_gloss_of_its_most_common_concrete_sense(wordnet: Path) -> None:
    texts = read_wordnet(wordnet, 100, seed=0)
    assert texts["mouse"] == "mouse: any of numerous small rodents"
    assert texts["rowing boat"] == "rowing boat: a small boat"
    assert texts["a small boat"] == "a small boat" and texts["sail"] == "sail: travel on water"
    assert texts["tiny"] == "tiny: very small" and "mus" not in texts


def test_nouns_come_first_in_a_limited_list_of_words(wordnet: Path) -> None:
    few = read_wordnet(wordnet, 4, seed=0)
    assert len(few) == 4 and {"mouse", "dinghy", "rowing boat"} < set(few)
    assert few == read_wordnet(wordnet, 4, seed=0)


def test_folder_without_wordnet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="wordnet-base"):
        read_wordnet(tmp_path, 10, seed=0)


def test_words_map_to_the_emoji_that_have_them() -> None:
    words = emoji_words([BOAT, TROLL])
    assert words["a sailboat"] == ["26f5"] and words["sea"] == ["26f5", "1f9cc"]
    assert list(words) == sorted(words)


def test_rare_word_is_nearest_to_its_gloss_and_keyword_to_its_emoji(tmp_path: Path) -> None:
    emoji = [BOAT, TROLL, *(Emoji(str(i), f"clock {i}", (), 0) for i in range(NEAREST - 2))]
    words = ["dinghy", "rawr"]
    meant = ["dinghy: a small boat of shallow draft with seats and oars", "rawr"]
    known = torch.zeros(2, len(emoji))
    nearest, shares = nearest_names(words, meant, emoji, known, tmp_path)
    assert emoji[int(nearest[0, 0])] is BOAT and shares[0, 0] > 0.9
    assert torch.allclose(shares.sum(1), torch.ones(2))
    number = {e.code: i for i, e in enumerate(emoji)}
    for owner in (BOAT, TROLL):  # the emoji with the keyword is the nearest
        known = known_names(words, {"rawr": [owner.code, "not drawn"]}, number)
        assert known.count_nonzero() == 1 and known[1, number[owner.code]] == KNOWN
        nearest, _ = nearest_names(words, meant, emoji, known, tmp_path)
        assert emoji[int(nearest[1, 0])] is owner
