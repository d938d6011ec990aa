"""Progress: what a stage tells whoever started it. The pipeline prints it and writes events.jsonl; tests collect it.

A stage never prints. It opens a task, advances it, and says what happened as events with plain values.
"""

from typing import Protocol


class Progress(Protocol):
    """Told by stages, kept by the pipeline."""

    def begin(self, task: str, *, total: int | None, unit: str) -> None:
        """A task starts: "extract", 120000 "tokens". One task at a time; a new one ends the last."""
        ...

    def advance(self, amount: int, detail: str = "") -> None:
        """`amount` more units are done; `detail` is a few words of what is going on ("loss 2.31")."""
        ...

    def end(self) -> None:
        """The task is over."""
        ...

    def event(self, kind: str, **fields: object) -> None:
        """Something worth a line in events.jsonl: JSON values only, never text of the user's data."""
        ...

    def note(self, text: str) -> None:
        """One line for a person: a warning, a choice that was made. Also an event of kind "note"."""
        ...


class Silent:
    """Progress that nobody watches."""

    def begin(self, task: str, *, total: int | None, unit: str) -> None:
        pass

    def advance(self, amount: int, detail: str = "") -> None:
        pass

    def end(self) -> None:
        pass

    def event(self, kind: str, **fields: object) -> None:
        pass

    def note(self, text: str) -> None:
        pass
