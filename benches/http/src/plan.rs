//! What is measured over HTTP, and what design asks of it.

use harness::plan::{Plan, Row, Table};

pub fn plan(quick: bool) -> Plan {
    let mut tables = Vec::new();
    for (size, id, bytes, messages) in [("256 bytes", "small", 256, 40_000), ("16 KiB", "large", 16 * 1024, 20_000)] {
        let row = |scenario, label| Row::new(scenario, messages, label).with(format!("size={bytes}"));
        tables.push(
            Table::new(format!("http-send-{id}"), format!("HTTP, sending to a bare server, {size}"))
                .note(
                    "HTTP/1.1, 128 requests on their way at a time over as many kept connections; the server is axum. \
                     Compared with the loop that gives each message an id, as polymq does: without one a receiver \
                     cannot tell a copy from another message.",
                )
                .compared_with("raw-send-ids")
                .rows([
                    row("raw-send", "reqwest, a task for each request on its way"),
                    row("raw-send-stream", "reqwest, one task for all"),
                    row("raw-send-ids", "reqwest, a UUID with each message"),
                    row("polymq-send", "polymq, send_all").bar("ratio", ">=", 0.95),
                    row("mq-bridge-send", "mq-bridge, batches of 2560"),
                ]),
        );
        tables.push(
            Table::new(format!("http-serve-{id}"), format!("HTTP, handling what a bare client sends, {size}"))
                .note("The same with reqwest, a task for each request on its way; answered after handling.")
                .compared_with("raw-serve")
                .rows([
                    row("raw-serve", "axum"),
                    row("polymq-serve", "polymq, handler").bar("ratio", ">=", 0.95),
                    row("mq-bridge-serve", "mq-bridge, batches of 128"),
                ]),
        );
        tables.push(
            Table::new(format!("http-both-{id}"), format!("HTTP, both ends, {size}"))
                .compared_with("raw-send-ids")
                .rows([
                    row("raw-send-ids", "reqwest and axum"),
                    row("polymq-both", "polymq, send_all and handler"),
                    row("mq-bridge-both", "mq-bridge, both ends"),
                ]),
        );
        let row = |scenario, label| Row::new(scenario, 1_000, label).with(format!("size={bytes}"));
        tables.push(
            Table::new(format!("http-latency-{id}"), format!("HTTP, one message a millisecond, {size}"))
                .note("From sending to the answer, which comes after handling.")
                .less_of("p50_us")
                .compared_with("raw-latency")
                .rows([
                    row("raw-latency", "reqwest and axum"),
                    row("polymq-latency", "polymq, both ends"),
                    row("mq-bridge-latency", "mq-bridge, both ends"),
                ]),
        );
    }
    tables.push(
        Table::new("http-idle", "HTTP, idle consumer")
            .note("Processor time of the whole process while nothing comes.")
            .less_of("cpu_percent")
            .rounds(1, 1)
            .rows([Row::new("polymq-idle", 1, "polymq").with(if quick { "seconds=5" } else { "seconds=20" }).bar(
                "cpu_percent",
                "<=",
                1.0,
            )]),
    );
    Plan { brokers: Vec::new(), tables }
}
