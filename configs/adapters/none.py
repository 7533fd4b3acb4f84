"""The frozen model without an adapter: for measuring where one starts from."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Only the method's name."""
    return ConfigDict({"method": "none"})
