"""Names for files that a run writes."""

from __future__ import annotations


class FreeNames:
    """Gives names to files, so that two of one name do not overwrite each other."""

    def __init__(self) -> None:
        self._owners: dict[str, str] = {}
        self._numbered: dict[tuple[str, str], str] = {}
        self._next: dict[str, int] = {}

    def take(self, name: str, owner: str, suffix: str = "") -> str:
        """`name` with its suffix for what comes from `owner`; numbered if another one has it."""
        key = self.find(name, owner, suffix)
        self._owners[key] = owner
        if key != name + suffix:
            self._numbered[name + suffix, owner] = key
        return key

    def find(self, name: str, owner: str, suffix: str = "") -> str:
        """The name that `take` would give, without taking it."""
        plain = name + suffix
        if self._owners.get(plain, owner) == owner:
            return plain
        if (plain, owner) in self._numbered:
            return self._numbered[plain, owner]
        number = self._next.get(plain, 2)
        while f"{name}_{number}{suffix}" in self._owners:
            number += 1
        self._next[plain] = number  # the next one need not count from the start
        return f"{name}_{number}{suffix}"
