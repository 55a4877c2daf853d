"""SGD and Adam as eager code.

The methods of torch's optimizers are wrapped for torch.compile, which this project does not use. The wrappers import
torch._dynamo, torch._inductor and sympy on the first call: 1.5 to 2 s of processor time at the start of every training.
"""

import inspect
from typing import Any

import torch
from torch.optim import Optimizer

_WRAPPED = ("step", "zero_grad", "add_param_group", "state_dict", "load_state_dict")


def _eager(kind: type[Optimizer]) -> type[Any]:
    """Return a subclass whose methods are those inside of the wrappers. Its arithmetic is that of ``kind``."""
    methods: dict[str, Any] = {name: inspect.unwrap(getattr(kind, name)) for name in _WRAPPED}
    methods["step"] = torch.no_grad()(methods["step"])  # the wrapper of ``step`` also disables gradients
    return type(kind.__name__, (kind,), methods)


SGD = _eager(torch.optim.SGD)
Adam = _eager(torch.optim.Adam)
