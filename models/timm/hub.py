"""Where timm's published weights are: in the local cache, or on the hub if it can be reached."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

FILES = ("model.safetensors", "pytorch_model.bin")


def cached_weights(name: str) -> str | None:
    """Path of the weights of timm's model `name` in the cache of the hub; None if they are not there.

    Models whose weights are in a format of their own are left to timm itself.
    """
    import timm
    from huggingface_hub import try_to_load_from_cache

    config = timm.get_pretrained_cfg(name.removeprefix("timm/"))
    if config is None or not config.hf_hub_id or config.custom_load:
        return None
    repository, _, revision = config.hf_hub_id.partition("@")
    for file in (config.hf_hub_filename, *FILES):
        path = try_to_load_from_cache(repository, file, revision=revision or None) if file else None
        if isinstance(path, str):
            return path
    return None


def hub_is_reachable() -> bool:
    """Whether the hub's name resolves (a proxy would resolve it for us): a quick no instead of minutes of retries."""
    from huggingface_hub import constants

    if getproxies():
        return True
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True
