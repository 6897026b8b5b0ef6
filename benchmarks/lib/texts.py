"""Prompts of three kinds: an edit of code repeats its prompt, a summary quotes it, a story does neither."""

from __future__ import annotations

_CODE = '''\
class Account:
    """An account of a custommer at a bank."""

    def __init__(self, owner, balance=0):
        self.owner = owner
        self.balance = balance
        self.history = []

    def deposit(self, amount):
        if amount <= 0:
            raise ValueError("amount must be positive")
        self.balance += amount
        self.history.append(("deposit", amount))
        return self.balance

    def withdraw(self, amount):
        if amount <= 0:
            raise ValueError("amount must be positive")
        if amount > self.balance:
            raise ValueError("not enough money")
        self.balance -= amount
        self.history.append(("withdraw", amount))
        return self.balance

    def transfer(self, other, amount):
        self.withdraw(amount)
        other.deposit(amount)

    def statement(self):
        lines = [f"Statement of {self.owner}"]
        for kind, amount in self.history:
            lines.append(f"{kind}: {amount}")
        lines.append(f"balance: {self.balance}")
        return "\\n".join(lines)
'''
_REPORT = """\
The harbour of Lindmouth was rebuilt between 2011 and 2016 after a storm had destroyed its northern wall.
The town council paid a third of the costs, the county and the fishermen's union paid the rest. The new wall
is four hundred metres long and stands two metres higher than the old one. Engineers chose blocks of basalt
from a quarry nearby, because concrete had cracked in every winter since 1978. During the work forty boats
were moved to the southern basin, and the fish market was held in a tent. Since 2016 the number of visitors
has doubled, mostly because of the walk on top of the wall, which leads to the old lighthouse. The
lighthouse itself has been a museum since 2018. It shows maps, lamps and the diary of its last keeper,
Martha Oake, who lived there for thirty-one years. The council now plans a second walk on the southern side,
and a ferry to the island of Sell, where seals rest in spring.
"""
_BEGUN = _CODE[: _CODE.index(" = balance")]
_USER, _ANSWER = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
TEXTS = {
    # The answer has begun, as in an editor that has the rest rewritten: a small model needs the hint.
    "code": f"{_USER}Correct the spelling in this file and show the whole file:\n\n"
    f"```python\n{_CODE}```\n{_ANSWER}```python\n{_BEGUN}",
    "summary": f"{_USER}Summarize this report:\n\n{_REPORT}{_ANSWER}The harbour of Lindmouth was rebuilt",
    "story": f"{_USER}Write a long story about a girl that finds a door at the bottom of a lake.{_ANSWER}",
}


def text_of(kind: str, number: int = 0) -> str:
    """A prompt of a kind; prompts with different numbers differ from the start on."""
    return TEXTS[kind].replace(_USER, f"{_USER}{number}. ", 1) if number else TEXTS[kind]
