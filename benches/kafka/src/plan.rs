//! What is measured on Kafka, and what design asks of it.

use harness::plan::{Broker, Plan, Row, Table, upkeep};

pub fn plan(quick: bool) -> Plan {
    let mut tables = Vec::new();
    // Consumers read the same messages in each round.
    for (size, id, bytes, sent, read) in
        [("256 bytes", "small", 256, 400_000, 2_000_000), ("16 KiB", "large", 16 * 1024, 20_000, 50_000)]
    {
        let row = |scenario, label| Row::new(scenario, sent, label).with(format!("size={bytes}"));
        tables.push(
            Table::new(format!("kafka-publish-{id}"), format!("Kafka, publish, {size}"))
                .note(
                    "Four partitions, an idempotent producer, acks=all, until the last delivery report; 1024 without \
                     one at a time, and no lingering. What is in the topic afterwards is counted. Compared with the \
                     loop that writes an id, by which a receiver knows a repetition.",
                )
                .compared_with("raw-publish-ids")
                .rows([
                    row("raw-publish-ids", "rdkafka, ThreadedProducer with a window, with an id"),
                    row("raw-publish", "rdkafka, the same without"),
                    row("raw-publish-future", "rdkafka, FutureProducer with a window"),
                    row("polymq-publish", "polymq, send_all").bar("ratio", ">=", 0.95),
                    row("ruststream-publish", "ruststream-rdkafka, 1024 at a time"),
                    row("sea-streamer-publish", "sea-streamer-kafka, 1024 at a time"),
                    row("mq-bridge-publish", "mq-bridge, batches of 1024"),
                ]),
        );
        let row = |scenario, label| Row::new(scenario, read, label).with(format!("size={bytes}"));
        tables.push(
            Table::new(format!("kafka-consume-{id}"), format!("Kafka, consume, {size}"))
                .note(
                    "Four partitions, from the first to the last message handled. Offsets are committed after handling, \
                     ten times a second and at the end. Compared with the loop that reads the headers, where id and \
                     kind of a message are.",
                )
                .compared_with("raw-consume-headers")
                .rows([
                    row("raw-consume-headers", "rdkafka, BaseConsumer polled by a thread, fetch.queue.backoff.ms=2"),
                    row("raw-consume-copies", "rdkafka, the same with a copy of each body"),
                    row("raw-consume", "rdkafka, the first one without headers"),
                    row("raw-consume-defaults", "rdkafka, the same with librdkafka's defaults"),
                    row("raw-consume-stream", "rdkafka, StreamConsumer, offsets stored, fetch.queue.backoff.ms=2"),
                    row("polymq-consume", "polymq handler").bar("ratio", ">=", 0.95),
                    row("ruststream-consume", "ruststream-rdkafka #[subscriber], tracked commits"),
                    row("sea-streamer-consume", "sea-streamer-kafka, offsets stored after handling"),
                    row("mq-bridge-consume", "mq-bridge, batches of at most 1024"),
                ]),
        );
    }
    let row = |scenario, label| Row::new(scenario, 2_000, label);
    tables.push(
        Table::new("kafka-latency", "Kafka, one message a millisecond, from sender to handler")
            .note("One process sends and consumes; no lingering.")
            .less_of("p50_us")
            .compared_with("raw-latency")
            .rows([row("raw-latency", "rdkafka"), row("polymq-latency", "polymq handler")]),
    );
    tables.extend(upkeep("kafka", "Kafka", quick));
    Plan { brokers: vec![Broker::new("kafka", &[], "kafka://127.0.0.1:{port}")], tables }
}
