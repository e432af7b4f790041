"""The oldest Python SDK that still loads: queues with its transactions, one message a stream."""

import sys
import time

from kubemq.queue.message import Message
from kubemq.queue.message_queue import MessageQueue

ADDRESS = sys.argv[1]
NAME = f"sdk2-{time.time_ns()}"


def check(name, condition, about=""):
    print(("ok " if condition else "FAILED ") + name + (f": {about!r}" if not condition else ""), flush=True)
    if not condition:
        sys.exit(1)


def send(queue, body, **policy):
    message = Message(body=body, metadata="m", tags=[("key", "value")])
    for name, value in policy.items():
        getattr(message, name)(value)
    result = queue.send_queue_message(message)
    check("send", not result.error, result.error)


def bodies(response):
    return [message.Body for message in response.messages]


def receive(transaction, visibility, wait):
    """The SDK learns of the end of its last stream from another thread, a moment after the answer."""
    deadline = time.time() + 2
    while True:
        try:
            return transaction.receive(visibility, wait)
        except Exception as error:
            if "already open" not in str(error) or time.time() > deadline:
                raise
            time.sleep(0.01)


queue = MessageQueue(f"{NAME}.orders", "python2", ADDRESS, 32, 1)
other = MessageQueue(f"{NAME}.other", "python2", ADDRESS, 32, 1)
check("ping", queue.ping().Version.startswith("2."))
for body in (b"a", b"b", b"c"):
    send(queue, body)
check("peek", bodies(queue.peek_queue_message(10)) == [b"a", b"b", b"c"])
check("receive", bodies(queue.receive_queue_messages(1)) == [b"a"])

transaction = queue.create_transaction()
held = receive(transaction, 10, 5)
check("transaction", (held.is_error, held.message.Body) == (False, b"b"), held.error)
check("ack", not transaction.ack_message(held.message.Attributes.Sequence).is_error)

held = receive(transaction, 10, 5)
check("second", held.message.Body == b"c", held.error)
check("reject", not transaction.rejected_message(held.message.Attributes.Sequence).is_error)
held = receive(transaction, 2, 5)
check("counted", (held.message.Body, held.message.Attributes.ReceiveCount) == (b"c", 2), held.message)
time.sleep(1)
check("extended", not transaction.extend_visibility(3).is_error)
time.sleep(2)
check("in time", not transaction.ack_message(held.message.Attributes.Sequence).is_error)

send(queue, b"d")
held = receive(transaction, 10, 5)
check("resend", not transaction.resend(f"{NAME}.other").is_error)
check("resent", bodies(other.receive_queue_messages(1)) == [b"d"])

send(queue, b"e")
held = receive(transaction, 10, 5)
modified = held.message
modified.Body = b"modified"
modified.Channel = f"{NAME}.other"
check("modify", not transaction.modify(modified).is_error)
check("modified", bodies(other.receive_queue_messages(1)) == [b"modified"])

send(queue, b"f")
held = receive(transaction, 1, 5)
time.sleep(1.5)
late = transaction.ack_message(held.message.Attributes.Sequence)
check("visibility expired", late.is_error and "129" in late.error, late.error)
check("came back", bodies(queue.receive_queue_messages(1)) == [b"f"])

empty = receive(transaction, 1, 1)
check("nothing came", empty.is_error and "138" in empty.error, empty.error)
send(queue, b"g")
check("ack all", queue.ack_all_queue_messages().affected_messages == 1)
print("done")
