"""The newest Python SDK against the broker: every pattern, as its users write it."""

import sys
import threading
import time

import kubemq
import kubemq.pubsub.events_store_subscription

ADDRESS = sys.argv[1]
NAME = f"sdk4-{time.time_ns()}"


def check(name, condition, about=""):
    print(("ok " if condition else "FAILED ") + name + (f": {about!r}" if not condition else ""), flush=True)
    if not condition:
        sys.exit(1)


def queues():
    with kubemq.QueuesClient(address=ADDRESS, client_id="python4") as client:
        queue = f"{NAME}.orders"
        check("ping", client.ping().version.startswith("2."), client.ping())
        check("create", client.create_queues_channel(queue))
        check("list", [found.name for found in client.list_queues_channels(NAME)] == [queue])
        for number in range(3):
            sent = client.send_queue_message(kubemq.QueueMessage(channel=queue, body=b"%d" % number, tags={"n": str(number)}))
            check("send", not sent.is_error, sent.error)
        batch = client.send_queue_messages_batch([kubemq.QueueMessage(channel=queue, body=b"b%d" % n) for n in range(2)])
        check("batch", not batch.have_errors, batch)
        peeked = client.peek_queue_messages(queue, 10, 1)
        check("peek", [m.body for m in peeked.messages] == [b"0", b"1", b"2", b"b0", b"b1"], peeked)
        got = client.receive_queue_messages(channel=queue, max_messages=2, wait_timeout_in_seconds=2)
        check("receive", [m.body for m in got.messages] == [b"0", b"1"], got)
        check("tags", got.messages[0].tags.get("n") == "0", got.messages[0].tags)
        got.messages[0].ack()
        got.messages[1].nack()
        got = client.receive_queue_messages(channel=queue, max_messages=10, wait_timeout_in_seconds=2)
        check("rejected comes last, counted", (got.messages[-1].body, got.messages[-1].receive_count) == (b"1", 2), got)
        got.messages[0].re_queue(f"{NAME}.other")
        for message in got.messages[1:]:
            message.ack()
        other = client.pull(f"{NAME}.other", 10, 2)
        check("requeued", [m.body for m in other.messages] == [b"2"], other)
        empty = client.receive_queue_messages(channel=queue, max_messages=1, wait_timeout_in_seconds=1)
        check("empty", not empty.is_error and not empty.messages, empty)
        client.send_queue_message(kubemq.QueueMessage(channel=queue, body=b"late", delay_in_seconds=1))
        client.send_queue_message(kubemq.QueueMessage(channel=queue, body=b"gone", expiration_in_seconds=1))
        time.sleep(1.5)
        left = client.pull(queue, 10, 2)
        check("delay and expiration", [m.body for m in left.messages] == [b"late"], left)
        dead = kubemq.QueueMessage(channel=queue, body=b"dead", max_receive_count=2, max_receive_queue=f"{NAME}.dead")
        client.send_queue_message(dead)
        for _ in range(2):
            client.receive_queue_messages(channel=queue, max_messages=1, wait_timeout_in_seconds=2).messages[0].nack()
        letters = client.pull(f"{NAME}.dead", 10, 2)
        check("dead letter", [m.body for m in letters.messages] == [b"dead"], letters)
        client.send_queue_message(kubemq.QueueMessage(channel=queue, body=b"x"))
        check("ack all", client.ack_all_queue_messages(queue, 1) == 1)
        check("delete", client.delete_queues_channel(queue))


def events():
    with kubemq.PubSubClient(address=ADDRESS, client_id="python4") as client:
        seen, stored, errors = [], [], []
        cancel = kubemq.CancellationToken()
        client.subscribe_to_events(
            kubemq.EventsSubscription(
                channel=f"{NAME}.*", on_receive_event_callback=lambda event: seen.append(event.body), on_error_callback=errors.append
            ),
            cancel,
        )
        time.sleep(1)
        client.publish_event(kubemq.EventMessage(channel=f"{NAME}.a", body=b"event"))
        for number in range(3):
            sent = client.send_event_store(kubemq.EventStoreMessage(channel=f"{NAME}-log", body=b"%d" % number))
            check("store", sent.sent, sent)
        client.subscribe_to_events_store(
            kubemq.EventsStoreSubscription(
                channel=f"{NAME}-log",
                on_receive_event_callback=lambda event: stored.append((event.sequence, event.body)),
                on_error_callback=errors.append,
                events_store_type=kubemq.pubsub.events_store_subscription.EventStoreStartPosition.StartFromFirst,
            ),
            cancel,
        )
        deadline = time.time() + 10
        while (len(seen), len(stored)) != (1, 3) and time.time() < deadline:
            time.sleep(0.05)
        check("event", seen == [b"event"], (seen, errors))
        check("stored events", stored == [(1, b"0"), (2, b"1"), (3, b"2")], (stored, errors))
        cancel.cancel()


def requests():
    with kubemq.CQClient(address=ADDRESS, client_id="python4") as client:
        cancel = kubemq.CancellationToken()

        def answer(query):
            client.send_response_message(
                kubemq.QueryResponse(query_received=query, is_executed=True, body=b"answer", metadata="m", tags={"a": "b"})
                if isinstance(query, kubemq.QueryReceived)
                else kubemq.CommandResponse(command_received=query, is_executed=True)
            )

        client.subscribe_to_commands(
            kubemq.CommandsSubscription(channel=f"{NAME}.c", on_receive_command_callback=answer, on_error_callback=print), cancel
        )
        client.subscribe_to_queries(
            kubemq.QueriesSubscription(channel=f"{NAME}.q", on_receive_query_callback=answer, on_error_callback=print), cancel
        )
        time.sleep(1)
        command = client.send_command(kubemq.CommandMessage(channel=f"{NAME}.c", body=b"do", timeout_in_seconds=5))
        check("command", command.is_executed, command)
        ask = kubemq.QueryMessage(channel=f"{NAME}.q", body=b"?", timeout_in_seconds=5, cache_key="k", cache_ttl_in_seconds=60)
        first, second = client.send_query(ask), client.send_query(ask)
        check("query", (first.body, first.metadata, first.tags.get("a")) == (b"answer", "m", "b"), first)
        check("cached", not first.cache_hit and second.cache_hit, (first, second))
        cancel.cancel()


for pattern in (queues, events, requests):
    pattern()
print("done")
