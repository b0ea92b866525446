"""What imports print that has nothing to say to the user of a tool."""

import logging
import warnings


def quiet_imports() -> None:
    """For tools that need no GPU: call it before megatron or torch's C++ extensions are imported."""
    warnings.filterwarnings("ignore", module="megatron")  # about layers, optimizers and ranks: there are none here
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # that there is no GPU
