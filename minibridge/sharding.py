"""Weights, gradients and Adam's state split among processes: FSDP2 (arXiv 2304.11277), and what crosses its border.

A sharded parameter is a DTensor, of which each process holds some rows. Around a forward and a backward pass torch gathers
the rows of one layer at a time and adds up its gradient, which are acts of all processes together.
"""
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from minibridge.model import Decoder

_copies: WeakKeyDictionary[Decoder, Decoder] = WeakKeyDictionary()


def shard(model: Decoder, size: int):
    """Split every parameter among `size` processes, in place; to be done before an optimizer is made.

    The embedding, the last norm and the head stay gathered from a forward pass to the end of its backward pass, so that the
    loss can use the head. All is gathered in fp32, and cast in use: the numbers are those of a run without sharding.
    """
    from torch.distributed.fsdp import fully_shard
    mesh = dist.init_device_mesh(model.device.type, (size,))
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh)
        module.set_gradient_divide_factor(1.0)  # a sum, not a mean
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other


@torch.no_grad()
def sampling_copy(model: Decoder) -> Decoder:
    """A whole copy with the weights of now, cast to the dtype of the activations: the bits that the model's own products
    have. A model has one copy, which is filled anew, so that what torch.compile has made of it stays valid."""
    if model not in _copies:
        with torch.device("meta"):
            _copies[model] = Decoder(model.config).to(model.activation_dtype)
        _copies[model].to_empty(device=model.device)
    for name, tensor in model.state_dict().items():
        _copies[model].get_parameter(name).copy_(whole(tensor.to(model.activation_dtype)))
    return _copies[model]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, sharded or not."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def part(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Of a whole tensor, what this process holds of `parameter`: all of it if that is not sharded."""
    if not hasattr(parameter, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)
