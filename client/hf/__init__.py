"""A model in a swarm as a transformers model: `generate`, `pipeline`, `Trainer`, peft run as they are.

    from client.hf import AutoDistributedModelForCausalLM

    with AutoDistributedModelForCausalLM.from_pretrained(None, peers=["/ip4/.../tcp/.../p2p/..."]) as model:
        print(model.generate(ids, max_new_tokens=20))

The class of the model is the library's own; embedding and head are modules here, the blocks are at the
servers.  The names are those of Petals (`petals.AutoDistributedModelForCausalLM`, `RemoteSequential`).
"""

from client.hf.access import SwarmAccess
from client.hf.auto import (
    AutoDistributedModel,
    AutoDistributedModelForCausalLM,
    AutoDistributedModelForSequenceClassification,
    AutoDistributedModelForTokenClassification,
    from_swarm,
)
from client.hf.blocks import InferenceSession, RemoteSequential
from client.hf.cache import RemoteCache

__all__ = [
    "AutoDistributedModel",
    "AutoDistributedModelForCausalLM",
    "AutoDistributedModelForSequenceClassification",
    "AutoDistributedModelForTokenClassification",
    "InferenceSession",
    "RemoteCache",
    "RemoteSequential",
    "SwarmAccess",
    "from_swarm",
]
