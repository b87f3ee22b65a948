"""The engine in this process, over the transformers model."""

from gspo_megatron.rollout.embedded.engine import EmbeddedEngine as EmbeddedEngine
