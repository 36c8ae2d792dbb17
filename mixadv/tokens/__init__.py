"""Token-space players: adversaries that replace words and tokens."""

from mixadv.tokens.augment import substituted as substituted
from mixadv.tokens.macbert import CorrectionCollator as CorrectionCollator
from mixadv.tokens.neighbours import Neighbours as Neighbours
from mixadv.tokens.rows import WordTokenizer as WordTokenizer
from mixadv.tokens.rows import sentence_order as sentence_order
from mixadv.tokens.selection import WordSelection as WordSelection
