"""Token-space players: adversaries that replace words and tokens."""

from mixadv.tokens.electra import Detection as Detection
from mixadv.tokens.electra import ReplacedTokenDetection as ReplacedTokenDetection
from mixadv.tokens.ties import generator_config as generator_config
