"""Who may wait and who gets the next slot, on times that each test makes up."""

import pytest

from jaxlora.engine import Account, Bounds, Limits, Request, SamplingParams
from jaxlora.engine.fair_queue import FairQueue
from jaxlora.engine.slots import Sequence
from jaxlora.errors import Unavailable

A, B, C = (Account(f"{user}/x", user) for user in ("alice", "bob", "carol"))
ALSO_ALICE = Account("alice/y", "alice")


def sequence(account=A, submitted=0.0, prompt=10, priority=0, adapter=None, max_tokens=100):
    return Sequence(Request((1,) * prompt, SamplingParams(max_tokens=max_tokens), None, adapter, account=account, priority=priority), submitted)


def add(queue, *args, **fields):
    made = sequence(*args, **fields)
    queue.add(made)
    return made


def start(queue, found, now=0.0):
    """Gives it a slot and reads its prompt."""
    found.started = now
    queue.start(found)
    found.written = len(found.request.prompt)


def admit(queue, now=0.0):
    """All that get a slot, one after another."""
    admitted = []
    while (found := queue.first(set())) is not None:
        start(queue, found, now)
        admitted.append(found)
    return admitted


def serve(running, tokens):
    """Each gets so many tokens."""
    for each in running:
        each.handed_out += tokens


def test_one_account_is_served_in_order_of_arrival_and_fills_every_slot():
    queue = FairQueue(3, 0, Limits())
    made = [add(queue, submitted=at) for at in range(5)]
    assert admit(queue) == made[:3] and list(queue) == made[3:] and len(queue) == 2
    queue.end(made[1])
    assert admit(queue) == made[3:4]


def test_the_lowest_priority_value_goes_first_within_an_account_only():
    queue = FairQueue(1, 0, Limits())
    other = add(queue, B, submitted=0)
    late, early, urgent = add(queue, submitted=2), add(queue, submitted=1), add(queue, submitted=3, priority=-1)
    order = []
    while len(queue):
        [found] = admit(queue)
        order.append(found)
        queue.end(found)
    assert order == [other, urgent, early, late]


def test_accounts_take_turns_by_what_they_were_served():
    queue = FairQueue(4, 0, Limits())
    for at in range(4):
        add(queue, A, submitted=at)
    for at in range(4):
        add(queue, B, submitted=10 + at)
    assert [each.request.account for each in admit(queue)] == [A, B, A, B]


def test_a_token_of_an_answer_counts_twice_one_of_a_prompt():
    queue = FairQueue(1, 0, Limits())
    first = add(queue, A, prompt=10)
    admit(queue)
    serve([first], 6)
    add(queue, A), add(queue, A)
    queue.add(sequence(B, prompt=21)), queue.add(sequence(B))
    order = []
    queue.end(first)
    for _ in range(3):
        [found] = admit(queue)
        order.append(found.request.account)
        queue.end(found)
    assert order == [B, B, A], "B lags behind A's 10 + 2 * 6 until it had 21"


def test_who_was_away_comes_back_no_further_behind_than_the_credit():
    def turns_until_the_other_is_served(credit):
        queue = FairQueue(1, credit, Limits())
        for _ in range(20):
            found = add(queue, A, prompt=50)
            start(queue, found)
            queue.end(found)
        for at in range(10):
            add(queue, A, prompt=50, submitted=at), add(queue, B, prompt=50, submitted=at + 0.5)
        for turn in range(20):
            [found] = admit(queue)
            if found.request.account is A:
                return turn
            queue.end(found)

    assert turns_until_the_other_is_served(0) == 1, "by as much as the last request that got a slot"
    assert turns_until_the_other_is_served(100) == 3


def test_what_a_slot_is_reserved_for():
    queue = FairQueue(6, 0, Limits(reserved_slots=2))
    for at in range(9):
        add(queue, A, submitted=at)
    running = admit(queue)
    assert len(running) == 4, "alone it takes all that are not reserved"
    other = add(queue, B)
    assert admit(queue) == [other]
    queue.end(running[0])
    assert admit(queue) == [], "two stay free for others"
    more = [add(queue, B, submitted=at) for at in range(3)]
    assert admit(queue) == more[:1], "until it has an equal share of the four"
    queue.end(running[1])
    queue.end(running[2])
    assert [each.request.account for each in admit(queue)] == [A], "the slots that are not reserved go by turns"


def test_many_accounts_may_share_the_reserved_slots():
    queue = FairQueue(4, 0, Limits(reserved_slots=2))
    accounts = [Account(f"user{number}/x", f"user{number}") for number in range(5)]
    for account in accounts:
        add(queue, account), add(queue, account)
    assert [each.request.account for each in admit(queue)] == accounts[:4]


def test_an_account_gets_no_slot_while_it_has_a_prompt_to_read():
    queue = FairQueue(4, 0, Limits())
    first, second, other = add(queue), add(queue), add(queue, B)
    first.started = 0.0
    queue.start(first)
    assert queue.first(set()) is other
    first.written = len(first.request.prompt)
    start(queue, other)
    assert queue.first(set()) is second


def test_whose_prompt_is_read_next():
    queue = FairQueue(4, 0, Limits())
    long, short = add(queue, A, prompt=100), add(queue, B, prompt=10, submitted=1)
    for found in (long, short):
        found.started = found.submitted
        queue.start(found)
    assert queue.next_prompt([long, short]) is short
    serve([short], 50)
    assert queue.next_prompt([long, short]) is long


def test_a_request_whose_adapter_is_on_its_way_is_passed_over():
    queue = FairQueue(4, 0, Limits())
    add(queue, A, adapter="old"), add(queue, B, adapter="slow")
    new = add(queue, A, adapter="new", submitted=1)
    assert queue.first({"old", "slow"}) is new
    assert queue.first({"old", "slow", "new"}) is None


@pytest.mark.parametrize(("kind", "running"), [("adapter", [2, 2, 2]), ("user", [1, 1, 2])])
def test_bounds_on_what_runs_hold_back_and_refuse_nobody(kind, running):
    queue = FairQueue(8, 0, Limits(**{kind: Bounds(max_running=2)}))
    for account in (A, ALSO_ALICE, B):
        for _ in range(3):
            add(queue, account)
    admitted = [each.request.account for each in admit(queue)]
    assert [admitted.count(account) for account in (A, ALSO_ALICE, B)] == running


@pytest.mark.parametrize(
    ("limits", "reason", "words", "who_may"),
    [
        (Limits(max_queue=3), "queue_full", r"the queue is full: 3 requests wait for a slot \(MAX_QUEUE\); try again in 1 s", ()),
        (Limits(adapter=Bounds(max_queue=3)), "queue_share_full", r"3 requests of alice/x wait for a slot \(MAX_QUEUE_PER_ADAPTER\)", (ALSO_ALICE, B)),
        (Limits(user=Bounds(max_queue=3)), "queue_share_full", r"3 requests of alice wait for a slot \(MAX_QUEUE_PER_USER\)", (B,)),
    ],
)
def test_bounds_on_what_waits_refuse_with_the_limit_and_the_seconds(limits, reason, words, who_may):
    queue = FairQueue(2, 0, limits)
    for _ in range(2 + 3):
        add(queue, A)
    admit(queue)
    with pytest.raises(Unavailable, match=words) as caught:
        add(queue, A)
    assert caught.value.reason == reason and caught.value.retry_after_s == 1
    for account in (A, ALSO_ALICE, B):
        if account in who_may:
            add(queue, account)
        else:
            with pytest.raises(Unavailable):
                add(queue, account)


def test_the_base_model_is_named_where_it_is_over_a_bound():
    queue = FairQueue(1, 0, Limits(adapter=Bounds(max_queue=1)))
    add(queue, Account()), add(queue, Account())
    with pytest.raises(Unavailable, match="1 requests of the base model wait"):
        add(queue, Account())


def test_the_seconds_to_wait_are_those_that_slots_took_lately():
    queue = FairQueue(1, 0, Limits(max_queue=1))
    for now in range(0, 1000, 10):
        waiting = add(queue, submitted=float(now))
        start(queue, waiting, now + 10.0)
        queue.end(waiting)
    assert queue.wait_s(1) == 10 and queue.wait_s(3) == 30


def test_tokens_are_given_back_at_the_end():
    queue = FairQueue(1, 0, Limits(burst_s=10, adapter=Bounds(tokens_per_s=11)))
    first = add(queue, prompt=10, max_tokens=100)
    with pytest.raises(Unavailable, match=r"alice/x uses more than 11 tokens a second \(TOKENS_PER_S_PER_ADAPTER\); try again in 1 s") as caught:
        add(queue, prompt=10, max_tokens=1)
    assert caught.value.reason == "rate_limited"
    assert len(queue) == 1
    admit(queue)
    serve([first], 40)
    queue.end(first)
    second = add(queue, prompt=10, max_tokens=50)
    queue.end(second)
    add(queue, prompt=20, max_tokens=40)
    with pytest.raises(Unavailable):
        add(queue, prompt=1, max_tokens=0)


def test_nothing_is_remembered_of_those_who_are_as_far_behind_as_a_newcomer():
    queue = FairQueue(1, 100, Limits())
    for number in range(1000):
        found = add(queue, Account(f"user/{number}", "user"), prompt=60)
        start(queue, found)
        queue.end(found)
    for number in range(100):
        found = add(queue, A, prompt=60)
        start(queue, found)
        queue.end(found)
    assert list(queue._gone) == [A] and not queue._lanes and not queue._waiting and not queue._running
