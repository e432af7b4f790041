"""The oldest Python SDK that still loads (2.4.0): as its users write it, one transaction a stream."""

import datetime
import time

from kubemq.commandquery.lowlevel.initiator import Initiator
from kubemq.commandquery.lowlevel.request import Request
from kubemq.commandquery.request_type import RequestType
from kubemq.commandquery.responder import Responder
from kubemq.commandquery.response import Response
from kubemq.events.lowlevel.event import Event
from kubemq.events.lowlevel.sender import Sender
from kubemq.events.subscriber import Subscriber
from kubemq.grpc import QueueMessagePolicy
from kubemq.queue.message import Message
from kubemq.queue.message_queue import MessageQueue
from kubemq.subscription.events_store_type import EventsStoreType
from kubemq.subscription.subscribe_request import SubscribeRequest
from kubemq.subscription.subscribe_type import SubscribeType
from kubemq.tools.listener_cancellation_token import ListenerCancellationToken

from cases import ADDRESS, case, equal, main, until


# Queues


def queue(name="orders", wait=1):
    return MessageQueue(name, "python2", ADDRESS, 32, wait)


def message(body, **policy):
    return Message(body=body, metadata="about", tags=[("key", "value")], policy=QueueMessagePolicy(**policy))


def send(target, *bodies, **policy):
    for body in bodies:
        result = target.send_queue_message(message(body, **policy))
        equal((result.is_error, result.error), (False, ""), "send")


def bodies(response):
    equal((response.is_error, response.error), (False, ""), "receive")
    return [received.Body for received in response.messages]


def fine(response):
    equal(response.is_error, False, response.error)
    return response


def receive(transaction, visibility=60, wait=20):
    """Another thread of the SDK learns of the end of the last stream, a moment after the answer."""
    until(lambda: not transaction.stream, "the end of the last transaction")
    return transaction.receive(visibility, wait)


@case
def ping():
    found = queue().ping()
    assert found.Version.startswith("2."), found
    assert found.Host and found.ServerStartTime > 1_600_000_000 and found.ServerUpTimeSeconds >= 0, found


@case
def send_and_receive():
    orders = queue()
    result = orders.send_queue_message(message(b"a"))
    assert result.message_id and not result.is_error, result
    assert abs(result.sent_at / 1e9 - time.time()) < 60, result.sent_at
    send(orders, b"b", b"c")
    received = orders.receive_queue_messages(2)
    equal(bodies(received), [b"a", b"b"])
    equal(received.messages_received, 2)
    first = received.messages[0]
    equal((first.MessageID, first.Channel, first.Metadata), (result.message_id, "orders", "about"))
    equal(dict(first.Tags), {"key": "value"})
    equal((first.Attributes.Sequence, first.Attributes.ReceiveCount, first.Attributes.ReRouted), (1, 1, False))
    equal(bodies(orders.receive_queue_messages(10)), [b"c"])
    equal(bodies(orders.receive_queue_messages(10)), [], "an empty queue")


@case
def batch():
    orders = queue()
    sent = orders.send_queue_messages_batch([message(b"%d" % n) for n in range(20)])
    equal((sent.have_errors, [result.Error for result in sent.result]), (False, [""] * 20))
    equal(bodies(orders.receive_queue_messages()), [b"%d" % n for n in range(20)])


@case
def peek():
    orders = queue()
    send(orders, b"a", b"b")
    for _ in range(2):
        equal(bodies(orders.peek_queue_message(10)), [b"a", b"b"])
    equal(bodies(orders.receive_queue_messages(10)), [b"a", b"b"], "after the peeks")


@case
def ack_all():
    orders = queue()
    send(orders, b"a", b"b", b"c")
    equal(fine(orders.ack_all_queue_messages()).affected_messages, 3)
    equal(fine(orders.ack_all_queue_messages()).affected_messages or 0, 0)
    equal(bodies(orders.receive_queue_messages()), [])


@case
def expiration():
    orders = queue()
    send(orders, b"short", ExpirationSeconds=1)
    send(orders, b"long", ExpirationSeconds=600)
    time.sleep(1.2)
    equal(bodies(orders.receive_queue_messages()), [b"long"])


@case
def delay():
    orders = queue(wait=20)
    start, clock = time.monotonic(), time.time()
    sent = orders.send_queue_message(message(b"late", DelaySeconds=1))
    assert sent.delayed_to > clock * 1e9, sent.delayed_to
    equal(bodies(orders.receive_queue_messages()), [b"late"])
    assert time.monotonic() - start > 0.9, "when it was due"


@case
def dead_letter():
    orders, letters = queue(), queue("letters")
    send(orders, b"bad", MaxReceiveCount=3, MaxReceiveQueue="letters")
    transaction = orders.create_transaction()
    for attempt in range(1, 4):
        held = fine(receive(transaction))
        equal(held.message.Attributes.ReceiveCount, attempt)
        fine(transaction.rejected_message(held.message.Attributes.Sequence))
    received = letters.receive_queue_messages()
    equal(bodies(received), [b"bad"])
    attributes = received.messages[0].Attributes
    equal((attributes.ReRouted, attributes.ReRoutedFromQueue, attributes.ReceiveCount), (True, "orders", 1))
    equal(bodies(orders.receive_queue_messages()), [], "delivered three times, never a fourth")


@case
def transaction_ack():
    orders = queue()
    send(orders, b"a", b"b")
    transaction = orders.create_transaction()
    for body in (b"a", b"b"):
        held = fine(receive(transaction))
        equal(held.message.Body, body)
        fine(transaction.ack_message(held.message.Attributes.Sequence))
    empty = receive(transaction, wait=1)
    assert empty.is_error and "138" in empty.error, empty.error


@case
def transaction_ack_of_another_sequence():
    orders = queue()
    send(orders, b"a")
    transaction = orders.create_transaction()
    held = fine(receive(transaction))
    wrong = transaction.ack_message(held.message.Attributes.Sequence + 7)
    assert wrong.is_error and "125" in wrong.error, wrong.error
    fine(transaction.ack_message(held.message.Attributes.Sequence))


@case
def transaction_reject():
    orders = queue()
    send(orders, b"a", b"b")
    transaction = orders.create_transaction()
    held = fine(receive(transaction))
    fine(transaction.rejected_message(held.message.Attributes.Sequence))
    received = orders.receive_queue_messages()
    equal(bodies(received), [b"b", b"a"], "the rejected one is last")
    equal([found.Attributes.ReceiveCount for found in received.messages], [1, 2])


@case
def extend_visibility():
    orders = queue()
    send(orders, b"slow")
    transaction = orders.create_transaction()
    held = fine(receive(transaction, visibility=20))
    fine(transaction.extend_visibility(60))
    time.sleep(21)
    equal(bodies(queue().receive_queue_messages()), [], "held, so nobody else sees it")
    fine(transaction.ack_message(held.message.Attributes.Sequence))


@case
def visibility_ends():
    orders = queue()
    send(orders, b"slow")
    transaction = orders.create_transaction()
    held = fine(receive(transaction, visibility=1))
    time.sleep(6)
    late = transaction.ack_message(held.message.Attributes.Sequence)
    assert late.is_error and "129" in late.error, late.error
    received = queue(wait=20).receive_queue_messages()
    equal(bodies(received), [b"slow"])
    equal(received.messages[0].Attributes.ReceiveCount, 2)


@case
def resend_to_another_queue():
    orders, other = queue(), queue("other")
    send(orders, b"moved")
    transaction = orders.create_transaction()
    fine(receive(transaction))
    fine(transaction.resend("other"))
    equal(bodies(other.receive_queue_messages()), [b"moved"])
    equal(bodies(orders.receive_queue_messages()), [])


@case
def resend_modified():
    orders, other = queue(), queue("other")
    send(orders, b"before")
    transaction = orders.create_transaction()
    modified = fine(receive(transaction)).message
    modified.Channel, modified.Metadata, modified.Body = "other", "changed", b"after"
    fine(transaction.modify(modified))
    received = other.receive_queue_messages()
    equal(bodies(received), [b"after"])
    equal(received.messages[0].Metadata, "changed")
    equal(bodies(orders.receive_queue_messages()), [])


@case
def consumer_that_goes_away():
    orders = queue()
    send(orders, b"a")
    transaction = orders.create_transaction()
    fine(receive(transaction, visibility=60))
    transaction.inner_stream.cancel()
    received = queue(wait=20).receive_queue_messages()
    equal(bodies(received), [b"a"], "long before its visibility ends")


@case
def refusals():
    wrong = queue("a queue").send_queue_message(message(b"a"))
    assert wrong.is_error and "120" in wrong.error, wrong.error
    empty = queue().send_queue_message(Message(body=b"", metadata=""))
    assert empty.is_error and "110" in empty.error, empty.error
    many = queue().receive_queue_messages(5000)
    assert many.is_error and "122" in many.error, many.error


# Events


class Listener:
    """A subscription, and what it got. A subscription is not confirmed: it listens once a probe has come."""

    def __init__(self, channel, group="", client="", start=None, value=0):
        self.seen, self.errors, self.token = [], [], ListenerCancellationToken()
        stored = start is not None
        request = SubscribeRequest(
            channel=channel,
            client_id=client or f"listener-{id(self)}",
            events_store_type=start or EventsStoreType.Undefined,
            events_store_type_value=value,
            group=group,
            subscribe_type=SubscribeType.EventsStore if stored else SubscribeType.Events,
        )
        Subscriber(ADDRESS).subscribe_to_events(request, self.got, self.errors.append, self.token)

    def got(self, event):
        self.seen.append((event.channel, event.body, event.metadata, dict(event.tags or {})))

    def bodies(self):
        return [body for _, body, _, _ in list(self.seen) if body != b"probe"]

    def listens(self, channel):
        def probed():
            send_event(channel, b"probe")
            return any(body == b"probe" for _, body, _, _ in self.seen)

        until(probed, f"the subscription of {channel}: {self.errors}", pause=0.05)
        return self


def event(channel, body, store=False):
    return Event(channel=channel, client_id="python2", store=store, metadata="about", body=body, tags=[("key", "value")])


def send_event(channel, body, store=False):
    result = Sender(ADDRESS).send_event(event(channel, body, store))
    equal((result.sent, result.error), (True, ""), "send")


@case
def events():
    one, two = Listener("news").listens("news"), Listener("news").listens("news")
    send_event("news", b"a")
    for listener in (one, two):
        until(listener.bodies, "the event")
        equal([entry for entry in listener.seen if entry[1] != b"probe"], [("news", b"a", "about", {"key": "value"})])
    send_event("news.other", b"b")
    send_event("news", b"c")
    until(lambda: len(one.bodies()) == 2, "the last event")
    equal(one.bodies(), [b"a", b"c"])


@case
def event_stream():
    listener = Listener("news").listens("news")
    answers = []
    Sender(ADDRESS).stream_event((event("news", b"%d" % n) for n in range(10)), answers.append)
    until(lambda: len(listener.bodies()) == 10, "the events")
    equal(listener.bodies(), [b"%d" % n for n in range(10)])
    equal(answers, [], "plain events that are accepted are not answered")


@case
def event_groups():
    members = [Listener("work", group="billing") for _ in range(2)]
    alone = Listener("work").listens("work")
    # Each member has had a probe: both are there.
    for member in members:
        member.listens("work")
    for number in range(50):
        send_event("work", b"%d" % number)
    until(lambda: len(alone.bodies()) == 50, "the events without a group")
    until(lambda: sum(len(member.bodies()) for member in members) == 50, "the events of the group")
    equal(sorted(sum((member.bodies() for member in members), [])), sorted(alone.bodies()), "each event once in the group")


@case
def event_wildcards():
    one, more = Listener("eu.*").listens("eu.x"), Listener("eu.>").listens("eu.x")
    for channel in ("eu.a", "eu.a.b", "us.a", "eu.c"):
        send_event(channel, channel.encode())
    until(lambda: len(more.bodies()) == 3, "the events")
    equal(more.bodies(), [b"eu.a", b"eu.a.b", b"eu.c"])
    until(lambda: len(one.bodies()) == 2, "the events")
    equal(one.bodies(), [b"eu.a", b"eu.c"])


@case
def events_store():
    send_event("log", b"a", store=True)
    listener = Listener("log", client="reader", start=EventsStoreType.StartFromFirst)
    send_event("log", b"b", store=True)
    until(lambda: len(listener.bodies()) == 2, f"the events {listener.errors}")
    equal(listener.seen, [("log", b"a", "about", {"key": "value"}), ("log", b"b", "about", {"key": "value"})])


@case
def events_store_stream():
    answers = []
    Sender(ADDRESS).stream_event((event("log", b"%d" % n, store=True) for n in range(10)), answers.append)
    equal([(answer.sent, answer.error) for answer in answers], [(True, "")] * 10, "every stored event is answered")
    listener = Listener("log", start=EventsStoreType.StartFromFirst)
    until(lambda: len(listener.bodies()) == 10, "the events")
    equal(listener.bodies(), [b"%d" % n for n in range(10)])


@case
def events_store_start_positions():
    for body in (b"1", b"2", b"3"):
        send_event("log", body, store=True)
    time.sleep(32)
    between = time.time()
    for body in (b"4", b"5"):
        send_event("log", body, store=True)
    positions = [
        ("first", EventsStoreType.StartFromFirst, 0, [b"1", b"2", b"3", b"4", b"5"]),
        ("last", EventsStoreType.StartFromLast, 0, [b"5"]),
        ("sequence", EventsStoreType.StartAtSequence, 4, [b"4", b"5"]),
        ("time in nanoseconds", EventsStoreType.StartAtTime, int(between * 1e9) - 500_000_000, [b"4", b"5"]),
        ("time delta", EventsStoreType.StartAtTimeDelta, 25, [b"4", b"5"]),
    ]
    listeners = [(name, Listener("log", start=start, value=value), found) for name, start, value, found in positions]
    for name, listener, found in listeners:
        until(lambda: len(listener.bodies()) >= len(found), f"{name}: {listener.errors}")
        equal(listener.bodies(), found, name)
    new = Listener("log", start=EventsStoreType.StartNewOnly)
    # Which of these is the first one it sees depends on when it began to listen; from there on it sees all.
    sent = []

    def next_event():
        sent.append(b"new %d" % len(sent))
        send_event("log", sent[-1], store=True)
        return new.bodies()

    until(next_event, f"new only: {new.errors}", pause=0.1)
    send_event("log", b"end", store=True)
    until(lambda: new.bodies()[-1] == b"end", "the last event")
    equal(new.bodies(), (sent + [b"end"])[-len(new.bodies()):], "new only")
    for name, listener, found in listeners:
        until(lambda: listener.bodies()[-1] == b"end", f"live events of {name}")
        equal(listener.bodies(), found + sent + [b"end"], f"{name}, then live without gap or repetition")


@case
def events_store_goes_on_where_the_client_was():
    first = Listener("log", client="reader", start=EventsStoreType.StartFromFirst)
    send_event("log", b"a", store=True)
    until(first.bodies, "the first event")
    first.token.cancel()
    until(lambda: first.errors, "the end of the subscription")
    send_event("log", b"b", store=True)
    listeners = []

    def heard():
        # The SDK tells of the end before the broker knows of it, which then refuses a second one of this name.
        if not listeners or "registered" in str(listeners[-1].errors):
            listeners.append(Listener("log", client="reader", start=EventsStoreType.StartFromFirst))
        return listeners[-1].bodies()

    until(heard, "the second event")
    equal(listeners[-1].bodies(), [b"b"])


# Commands and queries


class Answers:
    """A responder; `answer` makes the response to a request."""

    def __init__(self, kind, answer, group=""):
        self.seen, self.errors = [], []

        def handle(request):
            self.seen.append(request.body)
            response = Response(request)
            response.client_id, response.timestamp = "responder", datetime.datetime.now()
            answer(request, response)
            return response

        request = SubscribeRequest(
            channel="ask",
            client_id=f"responder-{id(self)}",
            events_store_type=EventsStoreType.Undefined,
            events_store_type_value=0,
            group=group,
            subscribe_type=kind,
        )
        Responder(ADDRESS).subscribe_to_requests(request, handle, self.errors.append)


def ask(kind, body=b"question", timeout=30_000, key="", ttl=0):
    request = Request(
        body=body, metadata="about", cache_key=key, cache_ttl=ttl, channel="ask", client_id="python2", timeout=timeout,
        request_type=kind, tags=[("key", "value")],
    )
    return Initiator(ADDRESS).send_request(request)


def ready(kind):
    """Asks until somebody answers."""

    def answered():
        try:
            return ask(kind, b"probe", timeout=1000)
        except Exception as error:
            assert "301" in str(error), error

    return until(answered, "a responder")


@case
def commands():
    def answer(request, response):
        equal((request.metadata, dict(request.tags)), ("about", {"key": "value"}))
        response.executed, response.error = request.body != b"bad", "" if request.body != b"bad" else "no"

    responder = Answers(SubscribeType.Commands, answer)
    ready(RequestType.Command)
    done = ask(RequestType.Command, b"good")
    equal((done.executed, done.error, done.client_id), (True, "", "responder"), responder.errors)
    failed = ask(RequestType.Command, b"bad")
    equal((failed.executed, failed.error), (False, "no"))


@case
def command_timeout():
    start = time.monotonic()
    try:
        answer = ask(RequestType.Command, timeout=500)
    except Exception as error:
        assert "Error 301" in str(error), error
    else:
        raise AssertionError(f"nobody is there, and yet: {answer}")
    assert time.monotonic() - start > 0.4, "after the time-out, not before"


@case
def queries():
    def answer(request, response):
        response.executed, response.body, response.metadata = True, request.body.upper(), "answered"

    Answers(SubscribeType.Queries, answer)
    ready(RequestType.Query)
    found = ask(RequestType.Query)
    equal((found.executed, found.body, found.metadata, found.cache_hit), (True, b"QUESTION", "answered", False))


@case
def query_timeout():
    Answers(SubscribeType.Queries, lambda request, response: time.sleep(0 if request.body == b"probe" else 12))
    ready(RequestType.Query)
    try:
        answer = ask(RequestType.Query, timeout=500)
    except Exception as error:
        assert "Error 301" in str(error), error
    else:
        raise AssertionError(f"too late, and yet: {answer}")


@case
def query_cache():
    def answer(_, response):
        response.executed, response.body = True, b"%d" % len(responder.seen)

    responder = Answers(SubscribeType.Queries, answer)
    ready(RequestType.Query)
    first, second = (ask(RequestType.Query, key="k", ttl=30) for _ in range(2))
    equal((first.cache_hit, second.cache_hit), (False, True))
    equal(second.body, first.body)
    other = ask(RequestType.Query, key="other", ttl=30)
    equal(other.cache_hit, False)
    time.sleep(31)
    late = ask(RequestType.Query, key="k", ttl=30)
    equal(late.cache_hit, False, "its time is over")
    assert late.body != first.body, late.body


@case
def request_groups():
    def answer(_, response):
        response.executed = True

    members = [Answers(SubscribeType.Commands, answer, group="workers") for _ in range(2)]
    until(lambda: ready(RequestType.Command) and all(member.seen for member in members), "both members")
    for number in range(20):
        equal(ask(RequestType.Command, b"%d" % number).executed, True)
    # A probe that was given up may still come.
    commands = [body for member in members for body in member.seen if body != b"probe"]
    equal(len(commands), 20, "each command to one of the group")


if __name__ == "__main__":
    main()
