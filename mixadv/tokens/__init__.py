"""Token-space players: adversaries that replace words and tokens."""

from mixadv.tokens.attacks import Attack as Attack
from mixadv.tokens.attacks import summary as summary
from mixadv.tokens.augmentation import adversarial_rows as adversarial_rows
from mixadv.tokens.candidates import Candidates as Candidates
from mixadv.tokens.candidates import SimilarWords as SimilarWords
from mixadv.tokens.candidates import Typos as Typos
from mixadv.tokens.constraints import FUNCTION_WORDS as FUNCTION_WORDS
from mixadv.tokens.constraints import Similarity as Similarity
from mixadv.tokens.masked import MaskedCandidates as MaskedCandidates
from mixadv.tokens.substitution import WordSubstitution as WordSubstitution
