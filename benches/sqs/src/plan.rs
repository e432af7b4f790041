//! What is measured on SQS, and what design asks of it.

use harness::plan::{Broker, Plan, Row, Table, upkeep};

pub fn plan(quick: bool) -> Plan {
    let mut tables = Vec::new();
    for (size, id, bytes, messages) in [("256 bytes", "small", 256, 5_000), ("16 KiB", "large", 16 * 1024, 1_000)] {
        let row = |scenario, label| Row::new(scenario, messages, label).with(format!("size={bytes}"));
        tables.push(
            Table::new(format!("sqs-publish-{id}"), format!("SQS, send, {size}"))
                .note(
                    "Until the last answer; ten messages a request, eight requests at a time. What is in the queue \
                     afterwards is counted. Compared with the loop that writes the same bytes: an id, by which a receiver \
                     knows a repetition, and a time. The emulator takes its time over attributes.",
                )
                .compared_with("raw-publish-ids")
                .rows([
                    row("raw-publish-ids", "aws-sdk-sqs, batches of ten, eight at a time, with an id and a time"),
                    row("raw-publish", "aws-sdk-sqs, the same without attributes"),
                    row("polymq-publish", "polymq, send_all").bar("ratio", ">=", 0.95),
                    row("ruststream-publish", "ruststream-sqs-sns, 80 at a time (a request each)"),
                    row("omniqueue-publish", "omniqueue, batches of ten (weaker: refused entries are not seen)"),
                    row("mq-bridge-publish", "mq-bridge, batches of 80"),
                ]),
        );
        tables.push(
            Table::new(format!("sqs-consume-{id}"), format!("SQS, consume, {size}"))
                .note(
                    "From the first to the last message handled; ten messages a poll, eight polls at a time, deleted after \
                     handling. What is left at the end is checked to be nothing.",
                )
                .compared_with("raw-consume")
                .rows([
                    row("raw-consume", "aws-sdk-sqs, eight loops, deleted in batches of ten"),
                    row("polymq-consume", "polymq handler").bar("ratio", ">=", 0.95),
                    row("ruststream-consume", "ruststream-sqs-sns #[subscriber]"),
                    row("omniqueue-consume", "omniqueue, eight loops of receive_all, a request for each deletion"),
                    row("mq-bridge-consume", "mq-bridge, batches of ten"),
                ]),
        );
    }
    let row = |scenario, label| Row::new(scenario, 400, label);
    tables.push(
        Table::new("sqs-latency", "SQS, one message every five milliseconds, from sender to handler")
            .note("One process sends and consumes.")
            .less_of("p50_us")
            .compared_with("raw-latency")
            .rows([row("raw-latency", "aws-sdk-sqs, one poll at a time"), row("polymq-latency", "polymq handler")]),
    );
    tables.extend(upkeep("sqs", "SQS", quick));
    let options = &["--emulator", "elasticmq", "--volatile"];
    Plan { brokers: vec![Broker::new("sqs", options, "sqs://test:test@127.0.0.1:{port}")], tables }
}
