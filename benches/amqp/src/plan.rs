//! What is measured on RabbitMQ, and what design asks of it.

use harness::plan::{Broker, Plan, Row, Table, upkeep};

pub fn plan(quick: bool) -> Plan {
    let mut tables = Vec::new();
    for (size, id, bytes) in [("256 bytes", "small", 256), ("16 KiB", "large", 16 * 1024)] {
        for (workers, tasks, consumers) in [(1, "one task", "one worker"), (8, "eight tasks", "eight workers")] {
            let row = |scenario, label| {
                Row::new(scenario, if bytes > 1024 { 4_000 } else { 16_000 }, label)
                    .with(format!("size={bytes}"))
                    .with(format!("workers={workers}"))
            };
            tables.push(
                Table::new(format!("amqp-publish-{id}-{workers}"), format!("RabbitMQ, publish, {size}, {tasks}"))
                    .note("Durable queue, persistent messages, until the last confirm; 128 unconfirmed a task.")
                    .compared_with("raw-publish")
                    .rows([
                        row("raw-publish", "lapin, sliding window"),
                        row("raw-publish-ids", "lapin, the same with an id and a time"),
                        row("polymq-publish", "polymq, send_all").bar("ratio", ">=", 0.95),
                        row("ruststream-publish", "ruststream-lapin, confirms, 128 at a time (not mandatory)"),
                        row("omniqueue-publish", "omniqueue (weaker: no confirms, so no window)"),
                    ]),
            );
            tables.push(
                Table::new(format!("amqp-consume-{id}-{workers}"), format!("RabbitMQ, consume, {size}, {consumers}"))
                    .note(
                        "Durable queue, persistent messages, acknowledged after handling, 128 fetched ahead a worker; \
                         from the first to the last message handled. What is left unacknowledged at the end is \
                         checked to be none.",
                    )
                    .compared_with("raw-consume")
                    .rows([
                        row("raw-consume", "lapin, each acknowledged"),
                        row("raw-consume-cumulative", "lapin, acknowledged every 64"),
                        row("raw-consume-unacknowledged", "lapin, never acknowledged (weaker: the broker's limit)"),
                        row("polymq-consume", "polymq handler").bar("ratio", ">=", 2.0),
                        row("ruststream-consume", "ruststream-lapin #[subscriber]"),
                        row("omniqueue-consume", "omniqueue, receive and ack"),
                    ]),
            );
        }
    }
    tables.extend(upkeep("amqp", "RabbitMQ", quick));
    Plan { brokers: vec![Broker::new("rabbitmq", &[], "amqp://127.0.0.1:{port}")], tables }
}
