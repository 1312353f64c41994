"""Which statement is stopped when the process grows by more than statements may take."""

from flight_oplog.sql import memory
from flight_oplog.sql.memory import SLACK_BYTES, Watch, own_bytes

MIB = 1 << 20


def test_the_youngest_of_those_under_which_the_process_grew_is_stopped() -> None:
    size = [100 * MIB]
    watch = Watch(10 * MIB, lambda: size[0])
    old, young = watch.begin(), watch.begin()
    size[0] += SLACK_BYTES + 2 * 3 * 10 * MIB
    late = watch.begin()
    assert [each.is_to_stop() for each in (old, young, late)] == [False, False, False], "that much they may take"
    size[0] += 1
    assert [each.is_to_stop() for each in (old, young, late)] == [False, True, False]


def test_what_a_stopped_statement_held_is_given_back_before_another_is_chosen() -> None:
    size = [0]
    watch = Watch(MIB, lambda: size[0])
    first, second = watch.begin(), watch.begin()
    size[0] = 1 << 40
    assert second.is_to_stop()
    second.stop()
    assert not first.is_to_stop()
    watch._stopped -= memory.BETWEEN_SECONDS
    assert first.is_to_stop()
    first.end()
    assert not first.is_to_stop()


def test_memory_of_the_process_is_told_by_the_system() -> None:
    before = own_bytes()
    held = bytearray(64 * MIB)
    held[:: 1 << 12] = b"x" * len(held[:: 1 << 12])
    assert 32 * MIB < own_bytes() - before < 200 * MIB
