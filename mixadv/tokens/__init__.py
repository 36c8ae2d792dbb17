"""Token-space players: adversaries that replace words and tokens, and the learner's answers."""

from mixadv.tokens.attacks import Attack, summary
from mixadv.tokens.augmentation import adversarial_rows, substituted
from mixadv.tokens.candidates import Candidates, SimilarWords, Typos
from mixadv.tokens.constraints import FUNCTION_WORDS, Similarity
from mixadv.tokens.electra import Detection, ReplacedTokenDetection
from mixadv.tokens.finite import (
    SubstitutionGame,
    dropout_masks,
    learner_samples,
    solve_all,
    substitution_game,
    substitutions,
)
from mixadv.tokens.macbert import CorrectionCollator
from mixadv.tokens.masked import masked_predictions, predictions_at
from mixadv.tokens.masked_candidates import MaskedCandidates
from mixadv.tokens.neighbours import Neighbours
from mixadv.tokens.rows import WordTokenizer, sentence_order
from mixadv.tokens.selection import WordSelection
from mixadv.tokens.substitution import WordSubstitution
from mixadv.tokens.ties import generator_config
from mixadv.tokens.words import Words

__all__ = [
    "FUNCTION_WORDS",
    "Attack",
    "Candidates",
    "CorrectionCollator",
    "Detection",
    "MaskedCandidates",
    "Neighbours",
    "ReplacedTokenDetection",
    "SimilarWords",
    "Similarity",
    "SubstitutionGame",
    "Typos",
    "WordSelection",
    "WordSubstitution",
    "WordTokenizer",
    "Words",
    "adversarial_rows",
    "dropout_masks",
    "generator_config",
    "learner_samples",
    "masked_predictions",
    "predictions_at",
    "sentence_order",
    "solve_all",
    "substituted",
    "substitution_game",
    "substitutions",
    "summary",
]
