from __future__ import annotations

import pickle

from raysys.errors import UserError, nearest


def test_message_and_hint_are_kept_apart_and_shown_together():
    error = UserError("config: unknown key 'lr'", hint="did you mean 'learning_rate'?")
    assert error.message == "config: unknown key 'lr'"
    assert error.hint == "did you mean 'learning_rate'?"
    assert str(error) == "config: unknown key 'lr'\n  hint: did you mean 'learning_rate'?"
    assert str(UserError("only this")) == "only this"
    assert isinstance(error, ValueError)


def test_an_error_of_a_worker_arrives_whole():
    for error in (UserError("message", "hint"), UserError("message")):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is UserError
        assert (copy.message, copy.hint, str(copy)) == (error.message, error.hint, str(error))


def test_nearest():
    assert nearest("lerning_rate", ["epochs", "learning_rate"]) == "did you mean 'learning_rate'?"
    assert nearest("zzz", ["b", "a"]) == "known: a, b"
