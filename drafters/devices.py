"""The device that a command computes on."""

import torch


def choose_device(name: str, field: str = "device") -> torch.device:
    """The torch device of this name; `auto` is cuda if there is a GPU. Raises ValueError, with the field, if there is
    no such GPU."""
    count = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= count:
        found = f"{count} GPU(s), counted from 0" if count else "no GPU"
        raise ValueError(f"{field}: {name}, and torch finds {found} on this machine; use auto or cpu")
    return device
