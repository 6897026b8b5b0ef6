"""The imports of a process of `tests.forked` before the fork: libraries, our modules, and no state."""

import gc

import libp2p.host.basic_host
import torch
import transformers.modeling_utils
import transformers.models.llama.modeling_llama
import trio

import client.bridges.sync
import client.connect
import client.swarm
import client.terminal
import node.main
import node.model.attention.decode
import node.model.weights.decode_kernels
import node.model.weights.kernels
import node.monitor.status
import node.network.directory.directory
import node.network.host
import node.serving.server

IMPORTED = (libp2p, torch, transformers, trio, client, node)

gc.collect()
gc.freeze()  # no fork's collections visit these objects, or copy the pages they are on
