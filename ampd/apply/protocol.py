"""The crash protocol: what the history says of a statement before it is sent, while it runs, and once it is done.

What can run in a transaction is recorded as done in that very transaction: it is done and recorded, or neither. A
statement that cannot is in doubt from the moment it is sent until it is recorded as done. So that it was begun is
recorded first; and whoever finds such a record asks the database how far the statement came.

    state     the history says          meaning
    --------  ------------------------  -----------------------------------------------------------------------
    READY     n done, n begun           nothing of it has run
    RECORDED  n done, n + 1 begun       it is about to be sent
    SENT      n done, n + 1 begun       it was sent, and there is no answer yet
    REFUSED   n done, n + 1 begun       the server has said that it failed; it may have left something behind
    TRIED     n done, n begun           it was sent without a record: the server is bound to refuse it, or to leave
                                        things as they are, and what a later run found would not be its work
    IN_DOUBT  n done, n + 1 begun       an earlier run has recorded it, and nobody saw it end
    DONE      n + 1 done, n + 1 begun   it has done its work

`TRANSITIONS` is what can happen in each state, and `AFTER_A_CRASH` where the next run begins if this one ends there
without another word. "Statement" stands for a unit, too: explicit transactions go in one piece. Pure.
"""

from __future__ import annotations

from enum import Enum, auto


class State(Enum):
    """What is known of the statement to run next."""

    READY = auto()
    RECORDED = auto()
    SENT = auto()
    REFUSED = auto()
    TRIED = auto()
    IN_DOUBT = auto()
    DONE = auto()

    @property
    def recorded(self) -> bool:
        """Return whether the history says that the statement was begun, and not that it is done."""
        return self in (State.RECORDED, State.SENT, State.REFUSED, State.IN_DOUBT)


class Step(Enum):
    """What a run does, or learns."""

    COMMIT = auto()  # it ran in a transaction, together with the record that it is done
    RECORD = auto()  # it is recorded as begun
    SEND = auto()  # it is sent; again, if it was refused for want of a lock
    REFUSE = auto()  # the server refuses it
    WITHDRAW = auto()  # the record is taken back: it was never sent, or it failed and nothing of it is left
    FINISH = auto()  # it is recorded as done: it has succeeded, or the database shows that it had


TRANSITIONS = {
    (State.READY, Step.COMMIT): State.DONE,
    (State.READY, Step.RECORD): State.RECORDED,
    (State.READY, Step.SEND): State.TRIED,
    (State.RECORDED, Step.SEND): State.SENT,
    (State.RECORDED, Step.WITHDRAW): State.READY,
    (State.SENT, Step.REFUSE): State.REFUSED,
    (State.SENT, Step.FINISH): State.DONE,
    (State.REFUSED, Step.SEND): State.SENT,
    (State.REFUSED, Step.WITHDRAW): State.READY,
    (State.TRIED, Step.SEND): State.TRIED,
    (State.TRIED, Step.REFUSE): State.TRIED,
    (State.TRIED, Step.FINISH): State.DONE,
    (State.IN_DOUBT, Step.SEND): State.SENT,
    (State.IN_DOUBT, Step.FINISH): State.DONE,
}

# A statement of which no trace in the catalog tells how far it came is not IN_DOUBT then, but a conflict for a person.
AFTER_A_CRASH = {
    State.READY: State.READY,
    State.RECORDED: State.IN_DOUBT,
    State.SENT: State.IN_DOUBT,
    State.REFUSED: State.IN_DOUBT,
    State.TRIED: State.READY,
    State.IN_DOUBT: State.IN_DOUBT,
    State.DONE: State.DONE,
}


class Protocol:
    """The state of one statement."""

    def __init__(self, state: State) -> None:
        self.state: State = state

    def take(self, step: Step) -> None:
        """Go on to the next state.

        Raises:
            KeyError: there is no such step in this state; a bug of ampd.
        """
        self.state = TRANSITIONS[self.state, step]
