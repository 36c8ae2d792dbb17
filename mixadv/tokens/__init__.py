"""Token-space players: adversaries that replace words and tokens."""

from mixadv.tokens.augmentation import adversarial_rows as adversarial_rows
from mixadv.tokens.candidates import Candidates as Candidates
from mixadv.tokens.candidates import MaskedCandidates as MaskedCandidates
from mixadv.tokens.candidates import SimilarWords as SimilarWords
from mixadv.tokens.candidates import Typos as Typos
from mixadv.tokens.constraints import FUNCTION_WORDS as FUNCTION_WORDS
from mixadv.tokens.constraints import Similarity as Similarity
from mixadv.tokens.electra import Detection as Detection
from mixadv.tokens.electra import ReplacedTokenDetection as ReplacedTokenDetection
from mixadv.tokens.finite import SubstitutionGame as SubstitutionGame
from mixadv.tokens.finite import dropout_masks as dropout_masks
from mixadv.tokens.finite import learner_samples as learner_samples
from mixadv.tokens.finite import play as play
from mixadv.tokens.finite import solve_all as solve_all
from mixadv.tokens.finite import substitutions as substitutions
from mixadv.tokens.masked import masked_predictions as masked_predictions
from mixadv.tokens.masked import predictions_at as predictions_at
from mixadv.tokens.substitution import Attack as Attack
from mixadv.tokens.substitution import WordSubstitution as WordSubstitution
from mixadv.tokens.substitution import summary as summary
from mixadv.tokens.ties import generator_config as generator_config
from mixadv.tokens.words import Words as Words
