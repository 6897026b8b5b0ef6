"""The imports of a process of `tests.forked` before the fork: the large libraries, and no state."""

import libp2p.host.basic_host
import torch
import transformers.modeling_utils
import transformers.models.llama.modeling_llama
import trio

IMPORTED = (libp2p, torch, transformers, trio)
