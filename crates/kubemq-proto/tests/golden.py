"""Prints the messages of `golden.txt`, as an official Python SDK encodes them: python golden.py > golden.txt

Needs `pip install kubemq==3.6.0`; 4.1.5 gives the same, but does not have QueuesInfo. Each line is a name, a message's type and its
bytes in hexadecimal, `-` for none. Maps have one entry: the order of several is not defined.
"""

from kubemq.grpc import kubemq_pb2 as pb

TAGS = {"tenant": "acme"}
BODY = bytes([0, 255, 7])
MESSAGE = dict(MessageID="m-1", ClientID="c", Channel="orders", Metadata="meta", Body=BODY, Tags=TAGS)
POLICY = dict(ExpirationSeconds=60, DelaySeconds=5, MaxReceiveCount=3, MaxReceiveQueue="orders.dlq")
ATTRIBUTES = dict(Timestamp=1700000000000000000, Sequence=9, MD5OfBody="0123456789abcdef0123456789abcdef", ReceiveCount=2,
                  ReRouted=True, ReRoutedFromQueue="old", ExpirationAt=1700000060000000000, DelayedTo=1700000005000000000)
EVENT = dict(EventID="e-1", ClientID="c", Channel="news", Metadata="meta", Body=BODY, Tags=TAGS)
REQUEST = dict(RequestID="r-1", ClientID="c", Channel="ask", Metadata="meta", Body=BODY, Timeout=2500, Tags=TAGS)


def queued(**more):
    return pb.QueueMessage(**MESSAGE, **more)


def main():
    show = []
    add = lambda name, message: show.append((name, type(message).__name__, message.SerializeToString(deterministic=True).hex() or "-"))

    add("ping", pb.Empty())
    add("event", pb.Event(**EVENT))
    add("stored_event", pb.Event(**EVENT, Store=True))
    add("events", pb.Subscribe(SubscribeTypeData=1, ClientID="c", Channel="news.>", Group="g"))
    for kind, value in [(1, 0), (2, 0), (3, 0), (4, 7), (5, 1700000000000000000), (6, 3600)]:
        add(f"events_store_{kind}", pb.Subscribe(SubscribeTypeData=2, ClientID="c", Channel="news", Group="g",
                                                 EventsStoreTypeData=kind, EventsStoreTypeValue=value))
    add("commands", pb.Subscribe(SubscribeTypeData=3, ClientID="c", Channel="ask", Group="g"))
    add("queries", pb.Subscribe(SubscribeTypeData=4, ClientID="c", Channel="ask", Group="g"))
    add("command", pb.Request(**REQUEST, RequestTypeData=1))
    add("query", pb.Request(**REQUEST, RequestTypeData=2, CacheKey="key", CacheTTL=60, ReplyChannel="_INBOX.1", Span=b"span"))
    add("response", pb.Response(ClientID="c", RequestID="r-1", ReplyChannel="_INBOX.1", Metadata="meta", Body=BODY, CacheHit=True,
                                Timestamp=1700000000000000000, Executed=True, Error="none", Span=b"span", Tags=TAGS))
    add("queue_message", queued(Policy=pb.QueueMessagePolicy(**POLICY)))
    add("received_message", queued(Attributes=pb.QueueMessageAttributes(**ATTRIBUTES)))
    add("batch", pb.QueueMessagesBatchRequest(BatchID="b-1", Messages=[queued(), queued()]))
    add("receive", pb.ReceiveQueueMessagesRequest(RequestID="r-1", ClientID="c", Channel="orders", MaxNumberOfMessages=32,
                                                  WaitTimeSeconds=5, IsPeak=True))
    add("ack_all", pb.AckAllQueueMessagesRequest(RequestID="r-1", ClientID="c", Channel="orders", WaitTimeSeconds=1))
    for kind in range(1, 7):
        add(f"transaction_{kind}", pb.StreamQueueMessagesRequest(
            RequestID="r-1", ClientID="c", StreamRequestTypeData=kind, Channel="orders", VisibilitySeconds=30, WaitTimeSeconds=5,
            RefSequence=9, ModifiedMessage=queued()))
    add("upstream", pb.QueuesUpstreamRequest(RequestID="r-1", Messages=[queued()]))
    for kind in range(1, 12):
        add(f"downstream_{kind}", pb.QueuesDownstreamRequest(
            RequestID="r-1", ClientID="c", RequestTypeData=kind, Channel="orders", MaxItems=100, WaitTimeout=1500, AutoAck=True,
            ReQueueChannel="other", SequenceRange=[3, 300, 70000], RefTransactionId="t-1", Metadata=TAGS))
    add("queues_info", pb.QueuesInfoRequest(RequestID="r-1", QueueName="orders"))

    for line in show:
        print(*line)


main()
