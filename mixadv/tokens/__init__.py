"""Token-space players: adversaries that replace words and tokens, and the learner's answers."""

from mixadv.tokens.chat import ChatBatch, answer_losses, chat_batch, preference_batches
from mixadv.tokens.chat_games import continuous_at, latent_at, rewritten
from mixadv.tokens.chat_length import shortened
from mixadv.tokens.chat_references import capo, latent_dpo
from mixadv.tokens.pretraining.electra import Detection, ReplacedTokenDetection
from mixadv.tokens.pretraining.macbert import CorrectionCollator
from mixadv.tokens.pretraining.rows import WordTokenizer, sentence_order
from mixadv.tokens.pretraining.selection import WordSelection
from mixadv.tokens.pretraining.ties import generator_config
from mixadv.tokens.reading.masked import masked_predictions, predictions_at
from mixadv.tokens.reading.neighbours import Neighbours
from mixadv.tokens.reading.words import Words
from mixadv.tokens.substitution.attacks import Attack, attack_summary
from mixadv.tokens.substitution.augmentation import adversarial_rows, substitute_words
from mixadv.tokens.substitution.candidates import (
    Candidates,
    MaskedCandidates,
    SimilarWords,
    Typos,
)
from mixadv.tokens.substitution.constraints import FUNCTION_WORDS, Similarity
from mixadv.tokens.substitution.game import (
    SubstitutionGame,
    dropout_masks,
    learner_samples,
    single_substitutions,
    solve_games,
    substitution_game,
)
from mixadv.tokens.substitution.greedy import WordSubstitution
from mixadv.tokens.substitution.growing import grown_game

__all__ = [
    "FUNCTION_WORDS",
    "Attack",
    "Candidates",
    "ChatBatch",
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
    "answer_losses",
    "attack_summary",
    "capo",
    "chat_batch",
    "continuous_at",
    "dropout_masks",
    "generator_config",
    "grown_game",
    "latent_at",
    "latent_dpo",
    "learner_samples",
    "masked_predictions",
    "predictions_at",
    "preference_batches",
    "rewritten",
    "sentence_order",
    "shortened",
    "single_substitutions",
    "solve_games",
    "substitute_words",
    "substitution_game",
]
