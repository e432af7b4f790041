"""The newest Python SDK (4.1.5): its synchronous clients, and of its asynchronous ones what they do in their own way."""

import asyncio
import datetime
import logging
import time

import kubemq
from kubemq.pubsub.events_store_subscription import EventStoreStartPosition as Start

from cases import ADDRESS, case, crash, equal, main, until

logging.basicConfig(level=logging.WARNING)


# Queues


def queues():
    return kubemq.QueuesClient(address=ADDRESS, client_id="python4", send_timeout=60.0)


def message(body, channel="orders", **policy):
    return kubemq.QueueMessage(channel=channel, body=body, metadata="about", tags={"key": "value"}, **policy)


def send(client, *bodies, **more):
    for body in bodies:
        sent = client.send_queue_message(message(body, **more))
        equal((sent.is_error, sent.error), (False, None), "send")


def receive(client, most=10, channel="orders", wait=20, **more):
    # The SDK gives up half a second after the broker's time is over, which a busy machine may need.
    client._get_downstream_receiver().timeout_buffer = 60.0
    found = client.receive_queue_messages(channel=channel, max_messages=most, wait_timeout_in_seconds=wait, **more)
    equal((found.is_error, found.error), (False, ""), "receive")
    return found


def bodies(response):
    return [found.body for found in response.messages]


def left(client, channel="orders", wait=1, count=1):
    """What is in a queue that nobody holds: a receive is answered when the first message is there, so it may take several."""
    found = []
    while len(found) < count:
        more = bodies(client.pull(channel, 100, wait))
        found += more
        if not more:
            break
    return found


@case
def ping():
    with queues() as client:
        found = client.ping()
        assert found.version.startswith("2.") and found.host, found


@case
def send_and_receive():
    with queues() as client:
        sent = client.send_queue_message(message(b"a"))
        equal((sent.is_error, bool(sent.id)), (False, True), sent)
        assert abs(sent.sent_at.timestamp() - time.time()) < 60, sent
        send(client, b"b", b"c")
        found = receive(client, 2)
        equal(bodies(found), [b"a", b"b"])
        first = found.messages[0]
        equal((first.id, first.channel, first.metadata, first.tags), (sent.id, "orders", "about", {"key": "value"}))
        equal((first.sequence, first.receive_count, first.is_re_routed, first.from_client_id), (1, 1, False, "python4"))
        found.ack_all()
        found = receive(client)
        equal(bodies(found), [b"c"])
        found.messages[0].ack()
        equal(bodies(receive(client, wait=1)), [], "an empty queue")


@case
def unary_calls():
    with queues() as client:
        sent = client.send_queue_message_simple(message(b"a"))
        equal(sent.is_error, False, sent)
        equal(left(client), [b"a"])


@case
def batch():
    with queues() as client:
        sent = client.send_queue_messages_batch([message(b"%d" % n) for n in range(20)])
        equal((sent.have_errors, [result.error for result in sent.results]), (False, [None] * 20), sent)
        found = receive(client, 20)
        equal(bodies(found), [b"%d" % n for n in range(20)])
        found.ack_all()


@case
def peek():
    with queues() as client:
        send(client, b"a", b"b")
        for _ in range(2):
            equal(bodies(client.peek_queue_messages("orders", 10, 1)), [b"a", b"b"])
        equal(bodies(receive(client)), [b"a", b"b"], "after the peeks")


@case
def ack_all_of_a_queue():
    with queues() as client:
        send(client, b"a", b"b", b"c")
        start = time.monotonic()
        equal(client.ack_all_queue_messages("orders"), 3)
        assert time.monotonic() - start < 40, "the SDK asks for 60 s, and there is nothing to wait for"
        equal(client.ack_all_queue_messages("orders", 1), 0)


@case
def auto_ack():
    with queues() as client:
        send(client, b"a", b"b")
        equal(bodies(receive(client, auto_ack=True)), [b"a", b"b"])
        equal(left(client), [])


@case
def expiration():
    with queues() as client:
        send(client, b"short", expiration_in_seconds=1)
        send(client, b"long", expiration_in_seconds=600)
        time.sleep(1.2)
        equal(bodies(receive(client)), [b"long"])


@case
def delay():
    with queues() as client:
        start = time.monotonic()
        send(client, b"late", delay_in_seconds=20)
        send(client, b"now")
        equal(left(client), [b"now"])
        equal(left(client, wait=40), [b"late"])
        assert time.monotonic() - start > 19.9, "when it was due"


@case
def dead_letter():
    with queues() as client:
        send(client, b"bad", max_receive_count=3, max_receive_queue="letters")
        for attempt in range(1, 4):
            found = receive(client)
            equal([held.receive_count for held in found.messages], [attempt])
            found.messages[0].nack()
        found = receive(client, channel="letters")
        equal(bodies(found), [b"bad"])
        letter = found.messages[0]
        equal((letter.is_re_routed, letter.re_route_from_queue, letter.receive_count), (True, "orders", 1))
        letter.ack()
        equal(left(client), [], "delivered three times, never a fourth")


@case
def reject():
    with queues() as client:
        send(client, b"a", b"b")
        receive(client, 1).messages[0].nack()
        found = receive(client)
        equal([(held.body, held.receive_count) for held in found.messages], [(b"b", 1), (b"a", 2)], "the rejected one is last")
        found.reject_all()
        found = receive(client)
        equal([(held.body, held.receive_count) for held in found.messages], [(b"b", 2), (b"a", 3)], "all of them, in order")
        found.ack_all()


@case
def requeue():
    with queues() as client:
        send(client, b"a", b"b", b"c")
        found = receive(client)
        found.messages[1].re_queue("other")
        equal(left(client, "other", 20), [b"b"])
        found.messages[0].ack()
        found.messages[2].ack()
        send(client, b"d", b"e")
        receive(client).re_queue_all("other")
        equal(left(client, "other", 20, 2), [b"d", b"e"], "in their order")
        equal(left(client), [])


# No case extends a visibility time: this SDK has no call for it, only its generated descriptors know it.


@case
def resend_modified():
    """This SDK has no call for it: its users send the new message and acknowledge the old one."""
    with queues() as client:
        send(client, b"before")
        held = receive(client).messages[0]
        send(client, held.body.replace(b"before", b"after"), channel="other")
        held.ack()
        equal(left(client, "other"), [b"after"])
        equal(left(client), [])


@case
def close_transaction():
    with queues() as client:
        send(client, b"a", b"b", b"c")
        found = receive(client)
        found.messages[0].ack()
        found.close_transaction()
        again = receive(client)
        equal([(held.body, held.sequence, held.receive_count) for held in again.messages], [(b"b", 2, 1), (b"c", 3, 1)], "back in place")
        again.ack_all()


@case
def consumer_that_goes_away():
    with queues() as client:
        send(client, b"a", b"b")
        with queues() as other:
            equal(bodies(receive(other)), [b"a", b"b"])
        found = receive(client).messages
        if len(found) < 2:
            # They come back one after the other.
            found += receive(client).messages
        equal([(held.body, held.receive_count) for held in found], [(b"a", 1), (b"b", 1)], "back in place, uncounted")


@case
def long_poll_is_served_at_once():
    with queues() as client, queues() as sender:
        import threading

        threading.Timer(0.5, lambda: send(sender, b"a")).start()
        start = time.monotonic()
        equal(bodies(receive(client, wait=30)), [b"a"])
        assert time.monotonic() - start < 20, "as soon as it was there"


@case
def refusals():
    with queues() as client:
        for wrong in (message(b"a", delay_in_seconds=80_000), message(b"a", expiration_in_seconds=80_000)):
            sent = client.send_queue_message(wrong)
            assert sent.is_error and "exceed max" in sent.error, sent


@case
def large_message():
    with queues() as client:
        body = bytes(3_900_000)
        send(client, body)
        found = receive(client)
        equal([len(held.body) for held in found.messages], [len(body)])


@case
def asynchronous_queues():
    """The whole of a poll is settled over a second stream here."""

    async def run():
        async with kubemq.AsyncQueuesClient(address=ADDRESS, client_id="python4-async") as client:
            (await client._get_upstream_sender())._send_timeout = 60.0

            async def poll(channel="orders"):
                found = await client.receive_queue_messages(channel, max_messages=10, wait_timeout_seconds=20)
                equal(found.is_error, False, found.error)
                return found

            for body in (b"a", b"b"):
                equal((await client.send_queue_message(message(body))).is_error, False)
            found = await poll()
            equal(bodies(found), [b"a", b"b"])
            await found.reject_all()
            found = await poll()
            equal([(held.body, held.receive_count) for held in found.messages], [(b"a", 2), (b"b", 2)])
            await found.re_queue_all("other")
            found = await poll("other")
            equal(bodies(found), [b"a", b"b"])
            await found.messages[0].async_ack()
            await found.messages[1].async_nack()
            found = await poll("other")
            equal(bodies(found), [b"b"])
            await found.ack_all()
            empty = await client.receive_queue_messages("other", max_messages=10, wait_timeout_seconds=1)
            equal(bodies(empty), [])

    asyncio.run(run())


# Events


def pubsub(client_id="python4"):
    return kubemq.PubSubClient(address=ADDRESS, client_id=client_id)


def event(channel, body):
    return kubemq.EventMessage(channel=channel, body=body, metadata="about", tags={"key": "value"})


def stored(channel, body):
    return kubemq.EventStoreMessage(channel=channel, body=body, metadata="about", tags={"key": "value"})


class Listener:
    """A subscription, and what it got. A subscription is not confirmed: it listens once a probe has come."""

    def __init__(self, client, channel, group="", start=None, **value):
        self.client, self.seen, self.errors, self.token = client, [], [], kubemq.CancellationToken()
        about = dict(channel=channel, group=group, on_receive_event_callback=self.seen.append, on_error_callback=self.errors.append)
        if start is None:
            client.subscribe_to_events(kubemq.EventsSubscription(**about), self.token)
        else:
            client.subscribe_to_events_store(kubemq.EventsStoreSubscription(events_store_type=start, **value, **about), self.token)

    def bodies(self):
        return [found.body for found in list(self.seen) if found.body != b"probe"]

    def listens(self, channel):
        def probed():
            self.client.send_event(event(channel, b"probe"))
            return any(found.body == b"probe" for found in list(self.seen))

        until(probed, f"the subscription of {channel}: {self.errors}", pause=0.05)
        return self


@case
def events():
    with pubsub() as client:
        listener = Listener(client, "news").listens("news")
        client.send_event(event("news", b"a"))
        client.send_event(event("news.other", b"b"))
        client.send_event(event("news", b"c"))
        until(lambda: len(listener.bodies()) == 2, "the events")
        equal(listener.bodies(), [b"a", b"c"])
        found = listener.seen[-1]
        equal((found.channel, found.metadata, found.tags), ("news", "about", {"key": "value"}))
        equal(listener.errors, [])


@case
def event_stream():
    with pubsub() as client:
        listener = Listener(client, "news").listens("news")
        for number in range(50):
            client.publish_event(event("news", b"%d" % number))
        until(lambda: len(listener.bodies()) == 50, "the events")
        equal(listener.bodies(), [b"%d" % number for number in range(50)])


@case
def event_groups():
    with pubsub() as client:
        members = [Listener(client, "work", group="billing") for _ in range(2)]
        for member in members:
            member.listens("work")
        for number in range(50):
            client.send_event(event("work", b"%d" % number))
        until(lambda: sum(len(member.bodies()) for member in members) >= 50, "the events")
        shared = sorted(sum((member.bodies() for member in members), []))
        equal(shared, sorted(b"%d" % number for number in range(50)), "each event once in the group")


@case
def event_wildcards():
    with pubsub() as client:
        one, more = (Listener(client, pattern).listens("eu.x") for pattern in ("eu.*", "eu.>"))
        for channel in ("eu.a", "eu.a.b", "us.a", "eu.c"):
            client.send_event(event(channel, channel.encode()))
        until(lambda: len(more.bodies()) == 3 and len(one.bodies()) == 2, "the events")
        equal((one.bodies(), more.bodies()), ([b"eu.a", b"eu.c"], [b"eu.a", b"eu.a.b", b"eu.c"]))


@case
def events_store():
    with pubsub() as client:
        sent = client.send_event_store(stored("log", b"a"))
        equal((sent.sent, sent.error), (True, ""), sent)
        listener = Listener(client, "log", start=Start.StartFromFirst)
        client.send_event_store(stored("log", b"b"))
        until(lambda: len(listener.seen) == 2, f"the events {listener.errors}")
        about = [(found.sequence, found.body, found.metadata, found.tags) for found in listener.seen]
        equal(about, [(1, b"a", "about", {"key": "value"}), (2, b"b", "about", {"key": "value"})])
        assert abs(listener.seen[0].timestamp.timestamp() - time.time()) < 60, listener.seen[0]


@case
def events_store_start_positions():
    with pubsub("sender") as client:
        for body in (b"1", b"2", b"3"):
            client.send_event_store(stored("log", body))
        # This SDK sends whole seconds, rounded down.
        time.sleep(32)
        between = datetime.datetime.now()
        for body in (b"4", b"5"):
            client.send_event_store(stored("log", body))
        positions = {
            "first": (dict(start=Start.StartFromFirst), [b"1", b"2", b"3", b"4", b"5"]),
            "last": (dict(start=Start.StartFromLast), [b"5"]),
            "sequence": (dict(start=Start.StartAtSequence, events_store_sequence_value=4), [b"4", b"5"]),
            "time": (dict(start=Start.StartAtTime, events_store_start_time=between), [b"4", b"5"]),
            "delta": (dict(start=Start.StartAtTimeDelta, events_store_time_delta_seconds=25), [b"4", b"5"]),
        }
        # One client of its own for each: where a client was is remembered.
        listeners = {name: Listener(pubsub(name), "log", **how) for name, (how, _) in positions.items()}
        for name, (_, found) in positions.items():
            listener = listeners[name]
            until(lambda: len(listener.bodies()) >= len(found), f"{name}: {listener.errors}")
            equal(listener.bodies(), found, name)
        new, sent = Listener(pubsub("new"), "log", start=Start.StartFromNew), []

        def next_event():
            sent.append(b"new %d" % len(sent))
            client.send_event_store(stored("log", sent[-1]))
            return new.bodies()

        # Which of these is the first one it sees depends on when it began to listen; from there on it sees all.
        until(next_event, f"new only: {new.errors}", pause=0.1)
        client.send_event_store(stored("log", b"end"))
        until(lambda: new.bodies()[-1] == b"end", "the last event")
        equal(new.bodies(), (sent + [b"end"])[-len(new.bodies()):], "new only")
        for name, (_, found) in positions.items():
            listener = listeners[name]
            until(lambda: listener.bodies()[-1] == b"end", f"live events of {name}")
            equal(listener.bodies(), found + sent + [b"end"], f"{name}, then live without gap or repetition")


@case
def events_store_groups():
    with pubsub("sender") as client:
        members = [Listener(pubsub(f"member{n}"), "log", group="billing", start=Start.StartFromFirst) for n in range(2)]
        sent = [b"%d" % number for number in range(40)]
        for body in sent:
            client.send_event_store(stored("log", body))
        until(lambda: sum(len(member.bodies()) for member in members) >= 40, "the events")
        equal(sorted(sum((member.bodies() for member in members), [])), sorted(sent), "each event once in the group")


@case
def events_store_goes_on_where_the_client_was():
    with pubsub("sender") as client:
        client.send_event_store(stored("log", b"a"))
        with pubsub("reader") as reader:
            listener = Listener(reader, "log", start=Start.StartFromFirst)
            until(listener.bodies, "the first event")
            listener.token.cancel()
        client.send_event_store(stored("log", b"b"))
        with pubsub("reader") as reader:
            listener = Listener(reader, "log", start=Start.StartFromFirst)
            until(listener.bodies, f"the second event: {listener.errors}")
            equal(listener.bodies(), [b"b"])


@case
def asynchronous_events():
    async def run():
        async with kubemq.AsyncPubSubClient(address=ADDRESS, client_id="python4-async") as client:
            for body in (b"a", b"b"):
                sent = await client.send_event_store(stored("log", body))
                equal(sent.sent, True, sent)
            found = []
            subscription = kubemq.EventsStoreSubscription(
                channel="log", events_store_type=Start.StartFromFirst, on_receive_event_callback=lambda _: None
            )
            async for received in client.subscribe_to_events_store(subscription):
                found.append((received.sequence, received.body))
                if len(found) == 2:
                    break
            equal(found, [(1, b"a"), (2, b"b")])

    asyncio.run(asyncio.wait_for(run(), 60))


# Commands and queries


def requests():
    return kubemq.CQClient(address=ADDRESS, client_id="python4")


class Responder:
    def __init__(self, client, kind, answer, group=""):
        self.client, self.seen, self.errors = client, [], []
        subscription, subscribe = {
            "command": (kubemq.CommandsSubscription, client.subscribe_to_commands),
            "query": (kubemq.QueriesSubscription, client.subscribe_to_queries),
        }[kind]

        def handle(request):
            self.seen.append(request.body)
            client.send_response_message(answer(request))

        about = {f"on_receive_{kind}_callback": handle, "on_error_callback": self.errors.append}
        subscribe(subscription(channel="ask", group=group, **about), kubemq.CancellationToken())


def command(client, body=b"do", timeout=30):
    about = dict(channel="ask", body=body, metadata="about", tags={"key": "value"})
    return client.send_command(kubemq.CommandMessage(timeout_in_seconds=timeout, **about))


def query(client, body=b"question", timeout=30, **cache):
    about = dict(channel="ask", body=body, metadata="about", tags={"key": "value"})
    return client.send_query(kubemq.QueryMessage(timeout_in_seconds=timeout, **about, **cache))


def ready(ask):
    """Asks until somebody answers: a subscription is not confirmed."""

    def answered():
        try:
            return ask(b"probe", 1)
        except Exception as error:
            assert "301" in str(error), error

    return until(answered, "a responder")


@case
def commands():
    with requests() as client:

        def answer(request):
            equal((request.metadata, request.tags), ("about", {"key": "value"}))
            good = request.body != b"bad"
            return kubemq.CommandResponse(command_received=request, is_executed=good, error="" if good else "no")

        responder = Responder(client, "command", answer)
        ready(lambda body, timeout: command(client, body, timeout))
        equal(command(client).is_executed, True, responder.errors)
        failed = command(client, b"bad")
        equal((failed.is_executed, failed.error), (False, "no"))


@case
def command_timeout():
    with requests() as client:
        start = time.monotonic()
        try:
            answer = command(client, timeout=1)
        except Exception as error:
            assert "Error 301" in str(error), error
        else:
            raise AssertionError(f"nobody is there, and yet: {answer}")
        assert time.monotonic() - start > 0.9, "after the time-out, not before"


@case
def queries():
    with requests() as client:
        Responder(
            client,
            "query",
            lambda request: kubemq.QueryResponse(
                query_received=request, is_executed=True, body=request.body.upper(), metadata="answered", tags={"a": "b"}
            ),
        )
        ready(lambda body, timeout: query(client, body, timeout))
        found = query(client)
        equal((found.is_executed, found.body, found.metadata, found.tags), (True, b"QUESTION", "answered", {"a": "b"}))


@case
def query_timeout():
    with requests() as client:

        def answer(request):
            time.sleep(0 if request.body == b"probe" else 12)
            return kubemq.QueryResponse(query_received=request, is_executed=True, body=b"late")

        Responder(client, "query", answer)
        ready(lambda body, timeout: query(client, body, timeout))
        try:
            found = query(client, timeout=1)
        except Exception as error:
            assert "Error 301" in str(error), error
        else:
            raise AssertionError(f"too late, and yet: {found}")


@case
def query_cache():
    with requests() as client:

        def answer(request):
            return kubemq.QueryResponse(query_received=request, is_executed=True, body=b"%d" % len(responder.seen))

        responder = Responder(client, "query", answer)
        ready(lambda body, timeout: query(client, body, timeout))
        first, second = (query(client, cache_key="k", cache_ttl_in_seconds=30) for _ in range(2))
        equal((first.cache_hit, second.cache_hit, second.body), (False, True, first.body))
        equal(query(client, cache_key="other", cache_ttl_in_seconds=30).cache_hit, False)
        time.sleep(31)
        late = query(client, cache_key="k", cache_ttl_in_seconds=30)
        equal(late.cache_hit, False, "its time is over")
        assert late.body != first.body, late.body


# A broker that comes again


def again(about, attempt):
    """What is tried until it works, each time with a client of its own."""

    def tried():
        try:
            return attempt()
        except Exception:
            return None

    return until(tried, about, seconds=40, pause=0.2)


@case
def subscriptions_go_on_after_a_crash():
    """A client for each: a subscription that connects again closes the connection of its client's others, which then may
    stand still, and the sending streams of this SDK lose messages to streams that are gone. On any server."""
    with pubsub("reader") as reader, pubsub("listener") as listener, requests() as responder:
        live = Listener(listener, "news").listens("news")
        log = Listener(reader, "log", start=Start.StartFromFirst)
        Responder(responder, "command", lambda request: kubemq.CommandResponse(command_received=request, is_executed=True))
        with pubsub("sender") as sender:
            sender.send_event_store(stored("log", b"before"))
        until(log.bodies, "the first event")
        crash()

        def store():
            with pubsub("sender") as sender:
                return sender.send_event_store(stored("log", b"after")).sent

        def send():
            with pubsub("sender") as sender:
                sender.send_event(event("news", b"after"))
            return live.bodies()

        def ask():
            with requests() as client:
                return command(client, timeout=1).is_executed

        again("a stored event", store)
        again("events", send)
        again("commands", ask)
        until(lambda: b"after" in log.bodies(), f"stored events: {log.errors}", seconds=40)
        # What was delivered a moment before the crash may come again.
        equal(sorted({(found.sequence, found.body) for found in log.seen}), [(1, b"before"), (2, b"after")])


@case
def messages_outlive_a_crash():
    with queues() as client:
        send(client, b"a", b"b")
        send(client, b"late", delay_in_seconds=25)
        receive(client, 1).messages[0].nack()
        held = receive(client, 1)
        equal(bodies(held), [b"b"])
        crash()

    def found():
        with queues() as client:
            return client.peek_queue_messages("orders", 10, 1).messages

    until(lambda: len(again("the broker", found)) == 3, "the delayed message")
    with queues() as client:
        about = [(held.body, held.sequence, held.receive_count) for held in receive(client).messages]
        equal(about, [(b"b", 2, 1), (b"a", 3, 2), (b"late", 4, 1)], "in place, with their sequences and counts")


# Channels


@case
def channels():
    with queues() as client:
        equal(client.create_queues_channel("orders"), True)
        send(client, b"a", b"b")
        receive(client, 1).ack_all()
        found = client.list_queues_channels("ord")
        equal([(channel.name, channel.type, channel.is_active) for channel in found], [("orders", "queues", True)])
        equal((found[0].incoming.messages, found[0].outgoing.messages), (2, 1), found[0])
        equal(client.list_queues_channels("nothing like it"), [])
        equal(client.delete_queues_channel("orders"), True)
        equal((client.list_queues_channels(), left(client)), ([], []), "deleted with what was in it")
    with pubsub() as client:
        for create, list_all, delete, kind in [
            (client.create_events_channel, client.list_events_channels, client.delete_events_channel, "events"),
            (client.create_events_store_channel, client.list_events_store_channels, client.delete_events_store_channel, "events_store"),
        ]:
            equal(create(f"a.{kind}"), True)
            equal([(channel.name, channel.type) for channel in list_all()], [(f"a.{kind}", kind)])
            equal(delete(f"a.{kind}"), True)
            equal(list_all(), [])
    with requests() as client:
        for create, list_all, delete, kind in [
            (client.create_commands_channel, client.list_commands_channels, client.delete_commands_channel, "commands"),
            (client.create_queries_channel, client.list_queries_channels, client.delete_queries_channel, "queries"),
        ]:
            equal(create(f"a.{kind}"), True)
            equal([(channel.name, channel.type) for channel in list_all()], [(f"a.{kind}", kind)])
            equal(delete(f"a.{kind}"), True)
            equal(list_all(), [])


if __name__ == "__main__":
    main()
